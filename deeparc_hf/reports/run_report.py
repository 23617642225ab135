"""The report of a training with prunings in it: a row for the model before, and for each pruning with its verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..architectures import Subject, describe
from ..core.environment import hardware, package_versions
from ..core.files import finite, write_whole
from ..core.markdown import made_with, table
from ..core.shards import numel
from ..healing.sites import healing_text
from ..pruning.config import MPruneConfig
from .attempts import STAGES, Attempt

__all__ = ["RUN_REPORT", "loss_text", "quality_text", "run_table", "share_text", "structure_of", "write_run_report"]

RUN_REPORT = "pruning_report"
FORMAT_VERSION = 1
_STAGES_TEXT = (
    "The loss that the model puts out, in eval mode, as the callback measured it, with its 95 % interval (normal, from "
    "the spread of the batches); where answers are classes, the share of right ones with its Wilson interval. All "
    "columns of a row are of the same samples, which need not be all that the Trainer evaluates on. After the "
    "retraining: when it was judged, or when the training ended."
)


def structure_of(model: nn.Module, subject: Subject | None = None) -> dict[str, Any]:
    """Number of blocks of each stack, and of parameters of all of a model, which may lie around what is described."""
    lengths = describe(model if subject is None else subject).lengths
    return {"blocks": lengths, "parameters": sum(map(numel, model.parameters()))}


def run_table(attempts: Sequence[Attempt], metric: str | None = None) -> str:
    """The Markdown table of a run: a row for each pruning that was tried, with a metric or the loss."""
    name = (metric or "loss").removeprefix("eval_")
    header = ["model", "k", "threshold", "blocks", "parameters", "freeze", f"{name} after each evaluation (epoch)"]
    header += ["evaluation time (s)", "training time (s)", "verdict"]
    rows = []
    for attempt in attempts:
        values = [(e.epoch, e.figures.get(f"eval_{name}")) for e in attempt.evaluations]
        runtime = attempt.evaluations[-1].times.get("eval_runtime") if attempt.evaluations else None
        rows.append(
            [
                attempt.name,
                "-" if attempt.k is None else str(attempt.k),
                " ".join(f"{value:.4f}" for value in sorted(set(attempt.thresholds.values()))) or "-",
                " + ".join(map(str, attempt.blocks.values())),
                f"{attempt.parameters:,}",
                str(sum(map(len, attempt.frozen.values()))),
                ", ".join(f"{value:.4f} ({epoch:g})" for epoch, value in values if value is not None) or "-",
                "-" if runtime is None else f"{runtime:,.2f}",
                f"{attempt.training_seconds:,.2f}",
                attempt.decision or "-",
            ]
        )
    return table(header, rows, left=(0, len(header) - 1))


def quality_text(quality: Mapping[str, Any]) -> str:
    """A measure of a model (`quality.measure_quality`) in a few characters."""
    share = "" if quality["accuracy"] is None else f" ({100 * quality['accuracy']:.1f} % right)"
    return f"{quality['loss']:.4f}{share}"


def loss_text(quality: Mapping[str, Any] | None) -> str:
    """The loss of a measure, with its interval."""
    if quality is None:
        return "-"
    interval = quality["loss_interval"]
    return f"{quality['loss']:.4f}" + ("" if interval is None else " ({:.4f} .. {:.4f})".format(*interval))


def share_text(quality: Mapping[str, Any] | None) -> str:
    """The share of right answers of a measure, with its interval."""
    if quality is None or quality["accuracy"] is None:
        return "-"
    low, high = (100 * bound for bound in quality["accuracy_interval"])
    return f"{100 * quality['accuracy']:.1f} % ({low:.1f} .. {high:.1f})"


def _stages_table(attempts: Sequence[Attempt]) -> str | None:
    """The Markdown table of what each step of each pruning did to the model; None where nothing was measured."""
    rows = []
    for attempt in attempts:
        if attempt.k is None or not attempt.stages:
            continue
        stages = attempt.stages
        first = next(iter(stages.values()))
        pairs = [(loss_text(stages.get(stage)), share_text(stages.get(stage))) for stage in STAGES]
        cells = [loss if share == "-" else f"{loss}; {share}" for loss, share in pairs]
        rows.append([f"{attempt.name} (k={attempt.k})", *cells, f"{first['samples']:,}", first["data"]])
    header = ["model", *STAGES.values(), "n", "measured on"]
    return table(header, rows, left=(0, len(header) - 1)) if rows else None


def write_run_report(
    folder: Path,
    config: MPruneConfig,
    progress: Mapping[str, Any],
    metric: str | None,
    zeroed_at: int | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write pruning_report.json and pruning_report.md; each is there whole or not at all.

    Args:
        progress: where the training stands (`Progress.for_report`).
        more: settings and data of the training, the figures of its end, and the evaluations after it.
    """
    data = {
        "format_version": FORMAT_VERSION,
        "config": config.to_dict(),
        "metric": metric,
        **progress,
        "attempts": [attempt.to_dict() for attempt in progress["attempts"]],
        "zeroed_at": zeroed_at,
        "versions": package_versions(),
        **(more or {"training": {}, "data": {}, "final": [], "weights": None, "end": None, "hardware": hardware()}),
    }
    write_whole(folder / f"{RUN_REPORT}.json", json.dumps(finite(data), indent=1, allow_nan=False) + "\n")
    write_whole(folder / f"{RUN_REPORT}.md", _markdown(data, progress["attempts"]))


def _markdown(data: Mapping[str, Any], attempts: Sequence[Attempt]) -> str:
    tried = attempts[1:]
    why = f" ({data['reason']})" if data["reason"] else ""
    summary = (
        f"{data['accepted']} of {data['config']['iterations']} prunings accepted, {len(tried)} "
        f"attempt{'' if len(tried) == 1 else 's'}. State of the run: {data['phase']}{why}."
    )
    parts = ["# Pruning report of a training", summary, run_table(attempts, data["metric"])]
    if data["config"]["max_drop"] is not None:
        baseline = "not known yet" if data["baseline"] is None else f"{data['baseline']:.6g}"
        parts.append(
            f"Gate: {data['metric']} against a baseline of {baseline}, max_drop {data['config']['max_drop']:g}."
        )
    parts.append(
        "Blocks: by stack. Freeze: blocks that were not trained. Evaluation time: of the last evaluation, as the "
        "Trainer measured it, in the middle of the training (a first one may be cold). Training time: of the training "
        "steps alone, in this row's structure. The pruned models have been trained for longer than the one before "
        "pruning. Blocks below are numbered as the original model counts them."
    )
    stages = _stages_table(attempts)
    if stages is not None:
        parts += ["## What each step did", stages, _STAGES_TEXT]
    if tried and data["config"].get("distill"):
        taught = ", ".join(f"{key} {value}" for key, value in data["config"]["distill"].items() if value is not None)
        parts.append(f"The unpruned model taught during the retraining ({taught}).")
    for attempt in tried:
        removed = "; ".join(f"{name}: {', '.join(map(str, blocks))}" for name, blocks in attempt.removed.items())
        verdict = f"{attempt.decision or 'no verdict yet'}{f': {attempt.reason}' if attempt.reason else ''}"
        said = [f"- {attempt.name} (k={attempt.k}, step {attempt.step}) removed {removed}: {verdict}."]
        said += [f"  - Its blocks were compared by {attempt.compared}."] if attempt.compared else []
        # these are numbered as the model was right before the pruning
        said += [f"  - Healing, blocks numbered as before this pruning: {healing_text(s)}" for s in attempt.healing]
        parts.append("\n".join(said))
    if data["zeroed_at"] is not None:
        parts.append(
            f"Weights were zeroed at step {data['zeroed_at']}: figures from there on are of a sparse model "
            "(sparsity_report.md)."
        )
    for entry in data["final"]:
        shown = ", ".join(f"{key} {value:.6g}" for key, value in entry["metrics"].items())
        parts.append(f"After the training: {shown}.")
    training = {key.replace("_", " "): value for key, value in data["training"].items()}
    parts.append(made_with(training, data["hardware"], data["versions"]))
    return "\n\n".join(parts) + "\n"
