"""Wanda (Sun et al. 2023) once more, by the paper and in float64, to hold deeparc_hf against. It shares no code with
it.

It is slow and plain: hooks on the whole model, whole forward passes, whole sorts. Blocks, linear maps and padding are
told by name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

BLOCK = re.compile(r"^((?:.*?\.)?(?:layers|layer[1-4]?|blocks|block|h|attentions|ffns)\.\d+)\.")
BESIDE = {"ffns": "attentions"}  # XLM: lists with other parts of the same blocks
# keys and values made from the encoder's output
CROSS = re.compile(
    r"(EncDecAttention\.[kv]|encoder_attn\.[kv]_proj|crossattention\.self\.(key|value)|crossattention\.c_attn)$"
)
# DeBERTa's tables of distances, CLIP's patches of images
NO_TEXT = re.compile(r"pos_(key|query)_proj$|^vision_model\.")
LINEAR = (nn.Linear, nn.Conv2d, nn.Conv1d, Conv1D)

Batch = Mapping[str, Tensor]


def linear_maps(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """The linear maps of each block, by path, blocks in forward order."""
    found: dict[str, dict[str, nn.Module]] = {}
    for path, module in model.named_modules():
        block = BLOCK.match(path)
        if block and isinstance(module, LINEAR):
            *above, name, index = block[1].split(".")
            found.setdefault(".".join((*above, BESIDE.get(name, name), index)), {})[path] = module
    return found


def masks(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    sparsity: float = 0.5,
    pattern: str | None = None,
    method: str = "wanda",
    sequential: bool = True,
    wanted: Callable[[str], bool] = lambda path: True,
) -> dict[str, Tensor]:
    """What is to be zeroed, in the shape of each weight, by path of the map. The model is not changed."""
    model = copy.deepcopy(model).eval()
    result: dict[str, Tensor] = {}
    blocks = list(linear_maps(model).values())
    for maps in blocks if sequential else [{path: module for block in blocks for path, module in block.items()}]:
        maps = {path: module for path, module in maps.items() if wanted(path)}
        norms = input_norms(model, maps, batches) if maps and method == "wanda" else {}
        for path, module in maps.items():
            score = rows(module).abs().double()
            if method == "wanda":
                score = score * norms[path]
            chosen = lowest(score, sparsity, pattern)
            result[path] = chosen.T if isinstance(module, Conv1D) else chosen.reshape(module.weight.shape)
        with torch.no_grad():
            for path, module in maps.items():
                module.weight[result[path]] = 0.0
    return result


def rows(module: nn.Module) -> Tensor:
    """The weight, one output a row."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight.flatten(1)


def lowest(score: Tensor, sparsity: float, pattern: str | None) -> Tensor:
    """Whole stable sorts: of equal scores the earlier ones go."""
    outputs, inputs = score.shape
    keep, size = map(int, pattern.split(":")) if pattern else (inputs - int(inputs * sparsity), inputs)
    grouped = score.numpy().reshape(-1, size)
    order = np.argsort(grouped, axis=1, kind="stable")
    chosen = np.zeros(grouped.shape, dtype=bool)
    np.put_along_axis(chosen, order[:, : size - keep], True, axis=1)
    return torch.from_numpy(chosen.reshape(outputs, inputs))


def input_norms(model: nn.Module, maps: Mapping[str, nn.Module], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Of each input the L2 norm over all unpadded positions, in the shape of `rows`."""
    sums: dict[str, Tensor] = {}
    at_hand: list[Batch] = []

    def hook(path: str) -> Any:
        def take(module: nn.Module, args: Any) -> None:
            squares = patches(module, args[0].detach()) if isinstance(module, (nn.Conv1d, nn.Conv2d)) else None
            if squares is None:
                x, keep = args[0].detach().double(), unpadded(model, path, at_hand[0])
                squares = (x.flatten(0, -2) if keep is None else x[keep]).square().sum(0).expand_as(rows(module))
            sums[path] = sums.get(path, 0) + squares

        return take

    handles = [module.register_forward_pre_hook(hook(path)) for path, module in maps.items()]
    with torch.no_grad():
        for batch in batches:
            at_hand[:] = [batch]
            run(model, batch)
    for handle in handles:
        handle.remove()
    return {path: value.sqrt() for path, value in sums.items()}


def run(model: nn.Module, batch: Batch) -> Any:
    """A whole, plain forward pass."""
    bare = type(model).__module__.startswith("timm.")
    return model(batch["pixel_values"]) if bare else model(**batch)


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """Squares summed over all places of the kernel, by output and (channel of its group, kernel position)."""
    x = x.double()
    padding = [side for size in reversed(module.padding) for side in (size, size)]
    x = nn.functional.pad(x, padding)
    if isinstance(module, nn.Conv1d):
        x, one = x[:, :, None], (1,)
    else:
        one = ()
    unfolded = nn.functional.unfold(x, (*one, *module.kernel_size), (*one, *module.dilation), 0, (*one, *module.stride))
    squares = unfolded.square().sum((0, 2)).reshape(module.groups, -1)
    return torch.cat([row.expand(module.out_channels // module.groups, -1) for row in squares])


def unpadded(model: nn.Module, path: str, batch: Batch) -> Tensor | None:
    """The positions that count among the inputs of the map at that path, as its input's mask; None: all."""
    if "input_ids" not in batch or NO_TEXT.search(path):
        return None
    encoder = batch["attention_mask"].bool() if "attention_mask" in batch else None
    if not model.config.is_encoder_decoder or "decoder." not in path or CROSS.search(path):
        return encoder
    if "decoder_attention_mask" in batch:
        return batch["decoder_attention_mask"].bool()
    return batch["labels"] != -100 if "labels" in batch else None


def sparsified(model: nn.Module, chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that the model has to have afterwards."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for path, mask in chosen.items():
        state[f"{path}.weight"][mask] = 0.0
    return state


def differences(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Keys whose tensors are not the same, bit for bit."""
    assert state.keys() == expected.keys()
    return [key for key in expected if not torch.equal(state[key], expected[key])]
