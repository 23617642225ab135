"""Verification by a forward pass: a pruned model must compute what the original computes with those blocks skipped.

Where the two differ, something in the model depends on a block's place (GPT-2's scale_attn_by_inverse_layer_idx, a
convolution after the first layer).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as hf_logging

from ..architectures import Host, Subject
from ..architectures.hosts import quiet
from ..core.caller import warn_caller
from ..errors import CalibrationError, SurgeryError
from ..observe.batches import cut, forward_kwargs
from ..observe.forward import evaluating, forward, require_weights
from ..observe.hooks import hooked, skipped

__all__ = ["Expectation", "expect", "generation_error"]

# "hidden_states" and "attentions" of any part, XLNet's mems, RWKV's state, caches, the routers of experts, what a
# detector says after each layer, losses (a detector's are of each layer); not "last_hidden_state"
_PER_BLOCK = re.compile(
    r"hidden_states$|attentions$|^mems$|^state$|past_|cache|^router_(logits|probs)$|^auxiliary_outputs$|^loss|loss$|"
    r"^intermediate_(logits|reference_points|predicted_corners)$"
)
_WAYS = (
    "Give a batch that shows it: example=batch. Or say verify=False, and answer for it yourself. Nothing was changed."
)


Gone = set[tuple[int, int]]  # of each stack that loses blocks: how many there are, and how many go


@dataclass(eq=False)
class Expectation:
    """What the original puts out with blocks skipped, to hold the pruned model against."""

    host: Host
    inputs: dict[str, Any]
    output: Any
    gone: Gone
    by_package: bool = False

    def __post_init__(self) -> None:
        self.generated = generation_error(self.host, self.inputs) is None
        self.caches_well = self.by_package and self.generated and _same_with_cache(self.host, self.inputs)

    def check(self) -> None:
        """Run the pruned model on the same inputs.

        Raises:
            SurgeryError: if it cannot run or computes something else.
        """
        try:
            with evaluating(self.host.root):
                output = forward(self.host, self.inputs)
        except CalibrationError as error:
            cause = error.__cause__
            raise SurgeryError(
                f"The pruned model cannot run: {type(cause).__name__}: {cause}. The model is as it was before."
            ) from error
        failure = generation_error(self.host, self.inputs) if self.generated else None
        if failure is not None:
            warn_caller(
                f"{type(self.host.root).__name__} can no longer generate with a cache ({type(failure).__name__}: "
                f"{failure}), in stock transformers too: T5 and its like need at least as many encoder blocks as "
                "decoder blocks for that. Keep more encoder blocks, remove decoder blocks too, or generate with "
                "use_cache=False."
            )
        if self.caches_well and failure is None and not _same_with_cache(self.host, self.inputs):
            raise SurgeryError(
                f"{type(self.host.root).__name__} without these blocks would generate something else with its cache "
                "than without: it counts what is cached by one of them. Remove other blocks. The model is as it was "
                "before."
            )
        compared = 0
        for expected, found in _pairs(self.output, output, self.gone):
            compared += 1
            self.compare(expected, found)
        if not compared:
            raise SurgeryError(
                f"The removal cannot be verified: {type(self.host.root).__name__} puts out no tensor to compare. "
                f"{_WAYS} The model is as it was before."
            )

    def compare(self, expected: Tensor, found: Tensor) -> None:
        """Hold one tensor of the pruned model against the original's, of the same shape.

        Raises:
            SurgeryError: if they differ by more than rounding.
        """
        expected, found, dtype = expected.float(), found.float(), expected.dtype
        # minus infinity, or nearly, stands where nothing is to be chosen: it must stand there in both, and says nothing
        # of the scale
        huge = ~(expected.abs() < 0.1 * torch.finfo(dtype).max)
        same = torch.equal(huge, ~(found.abs() < 0.1 * torch.finfo(dtype).max))
        far = (found - expected).abs()[~huge]
        scale = expected[~huge].abs().max().item() + 1e-6 if far.numel() else 1.0
        difference = far.max().item() if far.numel() else 0.0
        # both runs do the same operations; the bounds leave room for kernels that choose their order by memory layout
        bound = 1e-5 if dtype in (torch.float32, torch.float64) else 1e-2
        if not same or not difference <= bound * scale:
            raise SurgeryError(
                "The pruned model does not compute what the original computes with these blocks skipped (largest "
                f"difference {difference:.3g}, outputs up to {scale:.3g}): something in "
                f"{type(self.host.root).__name__} depends on a block's place. It cannot be pruned so; the model is as "
                "it was before."
            )


def expect(
    subject: Subject, removed: Mapping[str, Sequence[int]], batch: Any = None, *, by_package: bool = False
) -> Expectation:
    """Run the original with blocks skipped, on a sample of `batch` or on small made-up inputs.

    Args:
        by_package: blocks are dropped from a whole model, so that those which stay keep the number of their cache.

    Raises:
        SurgeryError: if it cannot be run, a block is no residual block, or the inputs do not reach a block that goes,
            or a part of the model that sees or hears.
    """
    host, stacks = subject.host, subject.stacks
    if batch is None and host.merges_inputs:
        raise SurgeryError(
            f"{type(host.root).__name__} merges images into its text, and which of its blocks do so may be told by "
            "their place; that shows only on a batch with images. Give one: example=batch. Nothing was changed."
        )
    otherwise = " Or say verify=False: then its settings alone are checked."
    require_weights(host, SurgeryError, otherwise, offloaded=True)
    inputs = host.example_inputs() if batch is None else cut(forward_kwargs(host, batch), 2)
    if inputs is None:
        raise SurgeryError(
            f"The removal cannot be verified: no inputs can be made up for {type(host.root).__name__}. {_WAYS}"
        )
    ran: set[str] = set()
    skips: dict[str, Callable[[], bool]] = {}
    with ExitStack() as hooks:
        handles = (
            block.register_forward_pre_hook(lambda *_, path=f"{name}.{index}": ran.add(path))
            for name, stack in stacks.items()
            for index, block in enumerate(stack.blocks)
        )
        hooks.enter_context(hooked(handles))
        for name, indices in removed.items():
            for index in indices:
                # SqueezeBERT calls its blocks' forward, which runs no hooks
                skips[f"{name}.{index}"] = hooks.enter_context(skipped(stacks[name], index, must_run=False))
        try:
            with evaluating(host.root):
                output = forward(host, inputs)
        except CalibrationError as error:
            where = "the batch" if batch is not None else "inputs that were made up for it"
            problem = error if error.__cause__ is None else f"{type(error.__cause__).__name__}: {error.__cause__}."
            raise SurgeryError(
                f"The removal cannot be verified: {type(host.root).__name__} cannot run on {where} with these blocks "
                f"skipped. {problem} " + ("Nothing was changed." if batch is not None else _WAYS)
            ) from error
    ran |= {path for path, skipped_one in skips.items() if skipped_one()}
    _require_reached(subject, removed, inputs, ran)
    gone = {(len(stacks[name]), len(indices)) for name, indices in removed.items()}
    return Expectation(host, inputs, output, gone, by_package)


def _require_reached(
    subject: Subject, removed: Mapping[str, Sequence[int]], inputs: Mapping[str, Any], ran: set[str]
) -> None:
    """Refuse inputs that do not show what a removal does: what sees or hears may feed any block, by its place."""
    gone = [f"{name}.{index}" for name, indices in removed.items() for index in indices]
    idle = [path for path in gone if path not in ran]
    idle += [name for name, stack in subject.stacks.items() if f"{name}.0" not in ran and subject.host.senses(name)]
    if idle:
        raise SurgeryError(
            f"The removal cannot be verified: the inputs ({', '.join(inputs)}) do not reach {idle[0]}. Give a batch "
            "that does: example=batch. Or say verify=False, and answer for it yourself. Nothing was changed."
        )


def generation_error(host: Host, inputs: Mapping[str, Any]) -> Exception | None:
    """What goes wrong when two tokens are generated with a cache; None if nothing does, or none are generated."""
    if not host.generates:
        return None
    try:
        _generated(host, inputs, 2, use_cache=True)
    except Exception as error:
        return error
    return None


def _generated(host: Host, inputs: Mapping[str, Any], length: int, *, use_cache: bool) -> Any:
    given = {key: inputs[key][:1] for key in (host.main_input, "attention_mask") if key in inputs}
    # advice on generation settings is beside the point here
    with evaluating(host.root), quiet(hf_logging.ERROR), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return host.root.generate(
            **given,
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            num_beams=1,
            use_cache=use_cache,
        )


def _same_with_cache(host: Host, inputs: Mapping[str, Any]) -> bool:
    """Whether a model continues a text in the same way with its cache and without."""
    try:
        with_cache, without = (_generated(host, inputs, 6, use_cache=cached) for cached in (True, False))
    except Exception:
        return False
    return isinstance(with_cache, Tensor) and torch.equal(with_cache, without)


def _pairs(expected: Any, found: Any, gone: Gone) -> Iterator[tuple[Tensor, Tensor]]:
    """The floating tensors of two outputs, side by side; caches, and what has one entry a block, are passed over.

    Raises:
        SurgeryError: if they are not of the same form.
    """
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            raise SurgeryError(
                "The pruned model puts out other shapes than the original. The model is as it was before."
            )
        if expected.is_floating_point():
            yield expected, found
    elif isinstance(expected, Mapping):
        for key, value in expected.items():
            if not _PER_BLOCK.search(key):
                # a list of another name with one entry a block is one of outputs, side by side (an FPN's)
                yield from _pairs(value, found.get(key), set())
    elif isinstance(expected, (tuple, list)):
        same = isinstance(found, (tuple, list)) and len(expected) == len(found)
        # one entry a block, and perhaps one for what runs before the first
        shorter = isinstance(found, (tuple, list)) and any(
            len(expected) - length in (0, 1) and len(expected) - len(found) == number for length, number in gone
        )
        if not same and not shorter:
            raise SurgeryError(
                "The pruned model puts out something else than the original. The model is as it was before."
            )
        for one, other in zip(expected, found, strict=True) if same else ():
            yield from _pairs(one, other, gone)
