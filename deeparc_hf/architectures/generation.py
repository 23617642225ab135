"""Generation settings that name blocks: Whisper's alignment_heads, pairs of a decoder layer and a head of it."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import GenerationConfig

from ..core.caller import warn_caller
from ..core.transaction import Transaction
from .base import Stack
from .layout import Layout

__all__ = ["follow_generation"]

_OTHERS = re.compile(r"layer|exit|head")

logger = logging.getLogger(__name__)


def follow_generation(root: nn.Module, stacks: Mapping[str, Stack], layout: Layout, transaction: Transaction) -> None:
    """Have the generation configs of a model name the kept blocks, renumbered. Each becomes the model's own copy."""
    for path, module in root.named_modules():
        config = vars(module).get("generation_config")
        inside = [name for name in stacks if name.startswith(f"{path}." if path else "")]
        pruned = [name for name in inside if name in layout.removed]
        if not isinstance(config, GenerationConfig) or not pruned:
            continue
        own = copy.deepcopy(config)
        decoders = [name for name in inside if stacks[name].side == "decoder"] or inside
        decoder = decoders[0] if len(decoders) == 1 else None
        for key, value in config.to_diff_dict().items():
            if decoder is not None and _pairs(key, value, layout.lengths[decoder]):
                _follow(own, key, value, layout.kept[decoder], decoder)
            elif _OTHERS.search(key) and _whole(value):
                warn_caller(
                    f"generation_config.{key} = {value} may name blocks by their number. No forward pass shows it, so "
                    "it stays as it is. If it does, set it anew for "
                    f"{', '.join(f'the {layout.counts[n]} blocks of {n}' for n in pruned)}, or to None.",
                )
        transaction.set(module, "generation_config", own)


def _follow(
    config: GenerationConfig, key: str, pairs: Sequence[Sequence[int]], kept: Sequence[int], stack: str
) -> None:
    left = [[kept.index(layer), head] for layer, head in pairs if layer in kept]
    if left:
        setattr(config, key, left)
        if len(left) < len(pairs):
            logger.info("generation_config.%s: %d of %d heads are left.", key, len(left), len(pairs))
        return
    delattr(config, key)
    warn_caller(
        f"The blocks of {stack} that generation_config.{key} names are removed, and it goes with them: word timestamps "
        "(return_token_timestamps=True) are no longer possible. Keep one of the blocks "
        f"{sorted({layer for layer, _ in pairs})}, or choose other heads and set generation_config.{key} = [[layer, "
        "head], ...].",
    )


def _pairs(key: str, value: Any, length: int) -> bool:
    if "head" not in key or not isinstance(value, (list, tuple)) or not value:
        return False
    pairs = [pair for pair in value if isinstance(pair, (list, tuple)) and [type(i) for i in pair] == [int, int]]
    return len(pairs) == len(value) and all(0 <= layer < length for layer, _ in pairs)


def _whole(value: Any) -> bool:
    """Whether there are whole numbers in it that may be indices."""
    if isinstance(value, (list, tuple)):
        return any(_whole(item) for item in value)
    return type(value) is int
