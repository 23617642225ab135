"""How much of what a model puts out hangs on each position of a block's output.

Of outputs z with the Fisher information F (of a softmax diag(p) - pp') a small change D of hidden states moves the
outputs by a divergence of about tr(D'J'FJD) / 2. With random signs r, the squared norm of the gradient of r'F^(1/2)z at
a position is tr(J'FJ) of that position in the mean (Hutchinson 1990, doi 10.1080/03610919008812866): one backward pass
behind the block tells which positions count. In a classifier of texts those are few.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import Host
from ..core.offload import fetching_in_backward
from ..observe.forward import forward
from ..observe.hooks import hidden_states, hooked, with_hidden_states
from ..observe.outputs import heads_of
from ..similarity.divergence import Head, mean_square

__all__ = ["output_sensitivities"]

logger = logging.getLogger(__name__)

_SIGNS = 2**16
_HALF = (2.0**10, 1.0, 2.0**-10)  # in float16 gradients vanish or overflow: tried one after another


def output_sensitivities(
    host: Host, blocks: Mapping[nn.Module, int], inputs: Mapping[str, Any], *, seed: int = 0
) -> dict[nn.Module, Tensor] | None:
    """How much a random mix of the outputs changes with what blocks put out: the norm of its gradient at each position.

    The whole model runs; hooks that others have made see the pass, and backward hooks the way back. What runs before
    the first of the blocks is not recorded for that.

    Args:
        blocks: the blocks, and which dimension of their hidden states holds the features.
        seed: of the random signs.

    Returns:
        By block, the norms, of the shape of the hidden states with one feature. None where the model cannot be run
        backward, or memory does not suffice.
    """
    try:
        return _differentiated(host, blocks, inputs, seed)
    except Exception as error:  # whatever a model's own backward raises: what is wrong with the pass itself shows again
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.info("The outputs of %s cannot be differentiated, so all positions count alike: %s", host.label, told)
        return None


def _differentiated(
    host: Host, blocks: Mapping[nn.Module, int], inputs: Mapping[str, Any], seed: int
) -> dict[nn.Module, Tensor]:
    found: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_states(output)
        if found and hidden.requires_grad:
            found[module] = hidden
            return None
        torch.set_grad_enabled(True)  # from here on; the context below puts it back
        found[module] = hidden.detach().requires_grad_()
        return with_hidden_states(output, found[module].clone())  # what comes behind may work on it in place

    handles = (block.register_forward_hook(record) for block in blocks)
    with torch.inference_mode(False), torch.no_grad(), hooked(handles), fetching_in_backward(host.root):
        heads = heads_of(host, forward(host, inputs, without_cache=True), inputs)
        alone = len(heads) == 1
        mixed = torch.stack([_mixed(head, seed + number, alone) for number, head in enumerate(heads)]).sum()
        factors = _HALF if any(hidden.dtype == torch.float16 for hidden in found.values()) else (1.0,)
        for factor in factors:
            again = factor != factors[-1]
            by_block = torch.autograd.grad(mixed * factor, list(found.values()), retain_graph=again, allow_unused=True)
            if all(gradient is None or bool(gradient.isfinite().all()) for gradient in by_block):
                break
    return {
        block: gradient.float().norm(dim=blocks[block], keepdim=True) / factor
        for block, gradient in zip(found, by_block, strict=True)
        if gradient is not None
    }


def _mixed(head: Head, seed: int, alone: bool) -> Tensor:
    """r'F^(1/2)z, summed over the rows. The signs of a row hang on its place in its sample, not on the batch."""
    values = head.values.float()
    known, width = values.detach(), values.shape[1]
    signs = _signs(seed, max(_SIGNS, width), values.device)
    across = signs[:width]
    if head.kind == "softmax":
        p = known.softmax(1)
        mix = across * p.sqrt()
        mix = mix - p * mix.sum(dim=1, keepdim=True)
    elif head.kind == "sigmoid":
        p = known.sigmoid()
        mix = across * (p * (1 - p)).sqrt()
    else:  # beside others a head of numbers needs a unit, as the objective has one
        unit = torch.ones(()) if alone or not len(known) else mean_square(head).detach().mean().sqrt().clamp(min=1e-30)
        mix = (across / unit.to(across)).expand_as(known)
    mixed = (mix * values).sum(dim=1)
    if head.samples is None:
        return mixed.sum()
    samples = head.samples.contiguous()
    places = torch.arange(len(samples), device=samples.device) - torch.searchsorted(samples, samples)
    return (signs[-1 - places % _SIGNS] * mixed).sum()


def _signs(seed: int, count: int, device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return (torch.randint(0, 2, (count,), generator=generator, device="cpu") * 2.0 - 1.0).to(device)
