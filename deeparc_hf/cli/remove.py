"""`deeparc remove`: rewrite a checkpoint without some of its blocks, from file to file."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from ..checkpoint.loading import save_pruned
from ..checkpoint.record import PrunedConfig, check_record
from ..core.files import whole_folder
from ..errors import ConfigError
from ..pruning.on_disk import DiskSurgery, in_bytes
from ..pruning.plan import PruningPlan
from ..pruning.surgery import apply_plan, remove_blocks
from .common import say
from .data import processor_of
from .sources import find_source, load_model, loading, skeleton

__all__ = ["Written", "given_blocks", "parameters_text", "run", "written_smaller"]

_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")
_MOST = 4096  # blocks of a stack
Written = Callable[[Path], PrunedConfig]


def run(args: argparse.Namespace) -> int:
    """Carry the command out; the exit code."""
    blocks = given_blocks(args.blocks)
    out = Path(args.out).expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{args.out} exists and is not an empty folder. Give another folder with -o.")
    in_bytes(args.max_shard_size)
    write = written_smaller(args, blocks, freeze=args.freeze)
    with whole_folder(out) as folder:
        record = write(folder)
        files = sorted(path.name for path in folder.iterdir())
    counts = record.iterations[-1]["parameters"]
    if args.json:
        result = {"model": args.model, "out": args.out, "files": files, "parameters": counts}
        print(json.dumps({**result, "record": record.to_dict()}, indent=1))
        return 0
    print(parameters_text(counts))
    print(f"written to {args.out}: {', '.join(files)}")
    return 0


def parameters_text(counts: dict[str, int]) -> str:
    """How many parameters there were and are."""
    before, after = counts["before"], counts["after"]
    return f"parameters: {before:,} -> {after:,} ({100 * (after - before) / before:+.1f} %)"


def given_blocks(given: Sequence[str]) -> dict[str, list[int]]:
    """Blocks by stack, as STACK=3,7,20-27 names them."""
    blocks: dict[str, list[int]] = {}
    for entry in given:
        name, sign, listed = entry.rpartition("=")
        found = [_RANGE.fullmatch(part.strip()) for part in listed.split(",")]
        if not sign or not name or not all(found):
            raise ConfigError(
                f"--blocks takes STACK=NUMBERS, as in bert.encoder.layer=3,7,20-27, found {entry!r}. deeparc inspect "
                "MODEL shows the stacks."
            )
        for match in filter(None, found):
            first, last = int(match[1]), int(match[2] or match[1])
            if not first <= last < _MOST:
                raise ConfigError(f"--blocks: {match[0]} is no range of blocks, smaller number first.")
            blocks.setdefault(name, []).extend(range(first, last + 1))
    return blocks


def written_smaller(
    args: argparse.Namespace, what: PruningPlan | dict[str, list[int]], *, freeze: str = "none"
) -> Written:
    """Settle a removal that needs no data; what it gives writes the checkpoint, with its tokenizer or processor, into a
    folder. A model of timm is loaded for it, all others stay on the disk.
    """
    source = find_source(args.model)
    frame = skeleton(source, args.auto_class)
    check_record(frame)
    processor = processor_of(source, frame)
    if source.library == "timm":
        if args.max_shard_size is not None:
            raise ConfigError("A model of timm is saved in one file. Leave --max-shard-size out.")
        return lambda folder: _in_memory(load_model(source, args.auto_class), what, freeze, args.verify, folder)
    with loading(source.given):
        surgery = DiskSurgery.of(source.reference, what, freeze=freeze, auto_class=type(frame), **source.loading)

    def write(folder: Path) -> PrunedConfig:
        if args.verify:
            say("info: verifying reads the blocks from the disk, twice; --no-verify leaves it out.")
        with loading(source.given):
            record = surgery.write(folder, verify=args.verify, max_shard_size=args.max_shard_size)
        if processor is not None:
            processor.save_pretrained(folder)
        return record

    return write


def _in_memory(
    model: nn.Module, what: PruningPlan | dict[str, list[int]], freeze: str, verify: bool, folder: Path
) -> PrunedConfig:
    if isinstance(what, PruningPlan):
        record = apply_plan(model, what, verify=verify)
    else:
        record = remove_blocks(model, what, freeze, verify=verify)
    save_pruned(model, folder)
    return record
