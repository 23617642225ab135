"""Verification by a forward pass: a pruned model must compute what the original computes with those blocks skipped.

The original is run first with hooks that replace each removed block's output by its input. Where the two differ, something
in the model depends on a block's place (GPT-2's scale_attn_by_inverse_layer_idx, a convolution after the first layer), and
the removal is refused.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from .architectures import Host, Stack
from .batches import cut, forward_kwargs, without_labels
from .errors import DeepArcWarning, SurgeryError
from .observe import evaluating, hidden_states, with_hidden_states

__all__ = ["Expectation", "expect"]

# "hidden_states" and "attentions" of any part, XLNet's mems, RWKV's state, caches; not "last_hidden_state"
_PER_BLOCK = re.compile(r"hidden_states$|attentions$|^mems$|^state$|past_|cache")

logger = logging.getLogger(__name__)


class Expectation:
    """Outputs of the original with blocks skipped, to hold the pruned model against."""

    def __init__(self, host: Host, inputs: dict[str, Any], outputs: list[Tensor]) -> None:
        self.host = host
        self.inputs = inputs
        self.outputs = outputs
        self.generated = _generation_error(host, inputs) is None

    def check(self) -> None:
        """Run the pruned model on the same inputs.

        Raises:
            SurgeryError: if it cannot run or computes something else.
        """
        try:
            with evaluating(self.host.root):
                outputs = _tensors(self.host.root(**self.inputs))
        except Exception as error:
            raise SurgeryError(f"The pruned model cannot run: {type(error).__name__}: {error}. The model is as it was before.") from error
        error = _generation_error(self.host, self.inputs) if self.generated else None
        if error is not None:
            warnings.warn(
                f"{type(self.host.root).__name__} can no longer generate with a cache ({type(error).__name__}: {error}), in stock "
                "transformers too: T5 and its like need at least as many encoder blocks as decoder blocks for that. Keep more encoder "
                "blocks, remove decoder blocks too, or generate with use_cache=False.",
                DeepArcWarning,
                stacklevel=5,
            )
        if [o.shape for o in outputs] != [o.shape for o in self.outputs]:
            raise SurgeryError("The pruned model puts out other shapes than the original. The model is as it was before.")
        for found, expected in zip(outputs, self.outputs, strict=True):
            scale = expected.float().abs().max().item() + 1e-6
            difference = (found.float() - expected.float()).abs().max().item()
            # both runs do the same operations; the bounds leave room for kernels that choose their order by memory layout
            bound = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 1e-2
            if not difference <= bound * scale:
                raise SurgeryError(
                    "The pruned model does not compute what the original computes with these blocks skipped (largest difference "
                    f"{difference:.3g}, outputs up to {scale:.3g}): something in {type(self.host.root).__name__} depends on a block's "
                    "place. It cannot be pruned so; the model is as it was before."
                )


def expect(host: Host, stacks: Mapping[str, Stack], removed: Mapping[str, Sequence[int]], batch: Any = None) -> Expectation | None:
    """Run the original with blocks skipped, on a sample of `batch` or on small made-up inputs.

    Returns:
        None where there is nothing to run on: a model on the meta device, or one whose inputs cannot be made up.
    """
    if batch is None and host.merges_inputs:
        raise SurgeryError(
            f"{type(host.root).__name__} merges images into its text, and which of its blocks do so may be told by their place; that shows "
            "only on a batch with images. Give one: example=batch. Nothing was changed."
        )
    if any(p.device.type == "meta" for p in host.root.parameters()):
        return None
    inputs = host.example_inputs() if batch is None else without_labels(host, cut(forward_kwargs(host, batch), 2))
    if inputs is None:
        warnings.warn(
            f"The removal is not verified by a forward pass: no inputs can be made up for {type(host.root).__name__}. Give a batch: "
            "example=batch.",
            DeepArcWarning,
            stacklevel=4,
        )
        return None
    blocks = {f"{name}.{index}": stacks[name].blocks[index] for name, indices in removed.items() for index in indices}
    ran: set[nn.Module] = set()

    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        ran.add(module)
        return _skip(module, args, kwargs, output)

    handles = [block.register_forward_hook(skip, with_kwargs=True) for block in blocks.values()]
    try:
        with evaluating(host.root):
            outputs = _tensors(host.root(**inputs))
    except Exception as error:
        if batch is not None:
            raise SurgeryError(
                f"{type(host.root).__name__} cannot run on the batch: {type(error).__name__}: {error}. Nothing was changed."
            ) from error
        logger.info("The removal is not verified by a forward pass: %s: %s", type(error).__name__, error)
        return None
    finally:
        for handle in handles:
            handle.remove()
    idle = [path for path, block in blocks.items() if block not in ran]
    if idle:
        raise SurgeryError(
            f"The removal cannot be verified: the inputs ({', '.join(inputs)}) do not reach {idle[0]}. Give a batch that does: "
            "example=batch. Nothing was changed."
        )
    return Expectation(host, inputs, outputs)


def _generation_error(host: Host, inputs: Mapping[str, Any]) -> Exception | None:
    """What goes wrong when two tokens are generated with a cache; None if nothing does, or the model does not generate."""
    root = host.root
    if host.library != "transformers" or not root.can_generate():
        return None
    given = {key: inputs[key][:1] for key in (root.main_input_name, "attention_mask") if key in inputs}
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # advice on generation settings is beside the point here
    try:
        with evaluating(root), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            root.generate(**given, max_new_tokens=2, min_new_tokens=2, do_sample=False, num_beams=1, use_cache=True)
    except Exception as error:
        return error
    finally:
        hf_logging.set_verbosity(level)
    return None


def _skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook: the block's output becomes its input."""
    before = args[0] if args else kwargs["hidden_states"]
    if hidden_states(output).shape != before.shape:
        raise ValueError(f"{type(module).__name__} changes the shape of its input")
    return with_hidden_states(output, before)


def _tensors(output: Any) -> list[Tensor]:
    """The floating tensors of a model's output, in order; caches are passed over."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        # one entry a block, by nature another number of them afterwards
        output = [value for key, value in output.items() if not _PER_BLOCK.search(key)]
    if isinstance(output, (tuple, list)) or (isinstance(output, Iterable) and not hasattr(output, "get_seq_length")):
        return [tensor for item in output for tensor in _tensors(item)]
    return []
