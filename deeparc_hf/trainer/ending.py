"""What a training with prunings in it lost and won, when it has ended."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..pruning.config import MPruneConfig
from ..reports.run_report import structure_of
from .evaluations import compared_metrics, last_evaluation, value_text
from .machine import Progress
from .session import Session

__all__ = ["NEXT", "advice", "end_lines", "outcome_of"]

NEXT = (
    'Next: trainer.evaluate(test_data, metric_key_prefix="test") on data that chose nothing, then '
    'deeparc_hf.push_to_hub(trainer, "you/name"), which brings the card along (trainer.push_to_hub() would put the '
    "stock draft in its place)."
)

_BOTH = (
    "deeparc_hf.save_pruned(trainer.model, folder) saves the pruned model beneath them too, and "
    "trainer.model.merge_and_unload() makes one model of both"
)


def outcome_of(progress: Progress, session: Session, config: MPruneConfig, metric: str) -> dict[str, Any]:
    """The figures of a run's end, in plain JSON types: each before the first pruning and after the last one that was
    accepted.
    """
    args, state = session.args, session.state
    attempts = progress.attempts
    accepted = [attempt for attempt in attempts if attempt.decision == "accepted"]
    first, last = attempts[0], accepted[-1] if accepted else attempts[0]  # what is taken back leaves the first model
    best = state.best_global_step if args.load_best_model_at_end else None
    evaluations = {"before": last_evaluation(first.evaluations), "after": last_evaluation(last.evaluations, best)}
    named = metric if config.gated or config.metric else args.metric_for_best_model
    metrics = compared_metrics(evaluations["before"], evaluations["after"], named)
    structure = structure_of(session.model, session.subject)
    stages = [attempt.stages for attempt in accepted] or [{}]
    was, now = stages[0].get("before"), stages[-1].get("retrained")
    loss = None  # that the callback measured itself, where the Trainer has not evaluated
    if not metrics and was is not None and now is not None and was["data"] == now["data"]:
        loss = {"before": was["loss"], "after": now["loss"], "samples": now["samples"], "data": now["data"]}
    checkpoint = f"checkpoint-{best or state.global_step}"  # that holds the model as it is now
    gone = attempts[-1].is_taken_back or state.is_hyper_param_search  # the last one is of before it was taken back
    return {
        "blocks": {"before": sum(first.blocks.values()), "after": sum(structure["blocks"].values())},
        "parameters": {"before": first.parameters, "after": structure["parameters"]},
        "metrics": metrics,
        "loss": loss,
        "evaluation_seconds": {p: None if e is None else e.times.get("eval_runtime") for p, e in evaluations.items()},
        "training_seconds": {
            "before": first.training_seconds,
            "after": sum(attempt.training_seconds for attempt in attempts[1:]),
        },
        "accepted": len(accepted),
        "judged": config.gated,
        "checkpoint": checkpoint if not gone and (session.folder / checkpoint).is_dir() else None,
    }


def end_lines(outcome: Mapping[str, Any]) -> list[str]:
    """The figures for people, a line each."""
    if not outcome["accepted"]:
        return ["no pruning was accepted: the model is the one from before the first of them"]
    lines = []
    blocks, parameters = outcome["blocks"], outcome["parameters"]
    if blocks["after"] < blocks["before"]:
        share, less = (1 - found["after"] / found["before"] for found in (blocks, parameters))
        lines.append(f"{share:.1%} of the blocks and {less:.1%} of the parameters are gone")
    for name, found in outcome["metrics"].items():
        lines.append(
            f"{name}: {value_text(found['before'])} before the first pruning, {value_text(found['after'])} now"
        )
    if outcome["loss"] is not None:
        loss, of = outcome["loss"], f"{outcome['loss']['samples']} samples, {outcome['loss']['data']}"
        lines.append(f"loss: {loss['before']:.4g} before the first pruning, {loss['after']:.4g} now ({of})")
    elif not outcome["metrics"]:
        lines.append("what it cost was not measured: the Trainer made no evaluation")
    seconds = outcome["evaluation_seconds"]
    if None not in seconds.values():
        lines.append(f"an evaluation: {seconds['before']:.3g} s before, {seconds['after']:.3g} s now (timed once each)")
    before, after = outcome["training_seconds"].values()
    lines.append(f"training: {before:,.1f} s before the first pruning, {after:,.1f} s since")
    return lines


def advice(
    outcome: Mapping[str, Any], folder: Path, saved_in: Path | None = None, *, adapted: bool = False
) -> list[str]:
    """What there is to do next; saved_in: the folder that the model already lies in, with its card; adapted: the model
    has adapters, and checkpoints hold these alone.
    """
    place = "is in memory (trainer.model) and in no checkpoint: trainer.save_model(folder) saves it"
    if outcome["checkpoint"] is not None:
        place = f"is in memory (trainer.model) and in {folder / outcome['checkpoint']}"
    if saved_in is not None:
        place = f"is in {saved_in}"
    elif adapted:
        place = "is in memory (trainer.model), and checkpoints hold its adapters alone: " + _BOTH
    lines = [f"The model {place}."]
    if not outcome["judged"]:
        lines.append(
            "Nothing judged the pruning: with max_drop=0.01, say, it would have been taken back if it had cost more "
            "than that."
        )
    if adapted:
        return lines
    return [*lines, NEXT if saved_in is None else f"Next: deeparc push {shlex.quote(str(saved_in))} you/name"]
