"""How much of what a model puts out hangs on each position of a block's output.

Of outputs z with the Fisher information F (of a softmax diag(p) - pp') a small change D of hidden states moves the
outputs by a divergence of about tr(D'J'FJD) / 2. With random signs r, the squared norm of the gradient of r'F^(1/2)z at
a position is tr(J'FJ) of that position in the mean (Hutchinson 1990, doi 10.1080/03610919008812866): one backward pass
behind the block tells which positions count. In a classifier of texts those are few.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import Host
from ..errors import CalibrationError
from ..observe.forward import forward
from ..observe.hooks import hidden_states, hooked, with_hidden_states
from ..observe.outputs import heads_of
from ..similarity.divergence import Head, mean_square

__all__ = ["output_sensitivities"]

_SIGNS = 2**16
_HALF = 2.0**10


def output_sensitivities(
    host: Host, blocks: Mapping[nn.Module, int], inputs: Mapping[str, Any], *, seed: int = 0
) -> dict[nn.Module, Tensor] | None:
    """How much a random mix of the outputs changes with what blocks put out: the norm of its gradient at each position.

    The whole model runs; hooks that others have made see the pass. What runs before the first of the blocks is not
    recorded for the backward pass.

    Args:
        blocks: the blocks, and which dimension of their hidden states holds the features.
        seed: of the random signs.

    Returns:
        By block, the norms, of the shape of the hidden states with one feature. None where the model cannot be run
        backward, or memory does not suffice.
    """
    found: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_states(output)
        if found and hidden.requires_grad:
            found[module] = hidden
            return None
        found[module] = hidden.detach().requires_grad_()
        return with_hidden_states(output, found[module].clone())  # what comes behind may work on it in place

    try:
        with torch.enable_grad(), hooked(block.register_forward_hook(record) for block in blocks):
            heads = heads_of(host, forward(host, inputs, without_cache=True), inputs)
            mixed = torch.stack([_mixed(head, seed) for head in heads]).sum()
            if any(hidden.dtype == torch.float16 for hidden in found.values()):
                mixed = mixed * _HALF  # gradients would vanish
        gradients = torch.autograd.grad(mixed, list(found.values()), allow_unused=True)
    except (RuntimeError, CalibrationError):  # among them torch.OutOfMemoryError
        return None
    by_block = zip(found, gradients, strict=True)
    return {block: g.float().norm(dim=blocks[block], keepdim=True) for block, g in by_block if g is not None}


def _mixed(head: Head, seed: int) -> Tensor:
    """r'F^(1/2)z, summed over the rows. The signs of a row hang on its place in its sample, not on the batch."""
    values = head.values.float()
    known, signs = values.detach(), _signs(seed, values.device)
    across = signs[torch.arange(values.shape[1], device=values.device) % _SIGNS]
    if head.kind == "softmax":
        p = known.softmax(1)
        mix = across * p.sqrt()
        mix = mix - p * mix.sum(dim=1, keepdim=True)
    elif head.kind == "sigmoid":
        p = known.sigmoid()
        mix = across * (p * (1 - p)).sqrt()
    else:
        mix = across / mean_square(head).detach().sqrt().clamp(min=1e-30)[:, None]
    mixed = (mix * values).sum(dim=1)
    if head.samples is None:
        return mixed.sum()
    samples = head.samples.contiguous()
    places = torch.arange(len(samples), device=samples.device) - torch.searchsorted(samples, samples)
    return (signs[-1 - places % _SIGNS] * mixed).sum()


def _signs(seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (_SIGNS,), generator=generator) * 2.0 - 1.0).to(device)
