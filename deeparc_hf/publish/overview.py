"""The first screen of a card: this model against the original, in figures, and what was not measured or done."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint.weights_mark import SIZES
from ..core.markdown import md, table
from ..reports.attempts import Evaluation, bare
from ..reports.phases import FINISHED
from .facts import CardFacts
from .metadata import Given
from .tables import against_original, data_text, with_interval
from .vocabulary import ERRORS

__all__ = ["ENDING", "Headline", "headline", "overview", "state", "trained"]

ENDING = "ending"  # phase of a run that is pushed at its last step, before its callbacks hear that it is over
_NOT = "not measured"


@dataclass(frozen=True)
class Headline:
    """The figure that stands for the quality of a model.

    Attributes:
        evaluation, key: where it is, and the name of the metric.
        before: that of the original on the same data, with its interval; None where it was not measured.
    """

    evaluation: Evaluation
    key: str
    before: tuple[float, tuple[float, float] | None] | None = None


def headline(facts: CardFacts) -> Headline | None:
    """The main metric on test data, else on data that prunings were not judged on, else on what there is."""
    asked = bare(facts.summary.get("metric") or "")
    found = [(evaluation, key) for evaluation in facts.final for key in evaluation.metrics]
    if not found:
        return None
    evaluation, key = min(found, key=lambda pair: (_kind(bare(pair[1]), asked), _split(*pair)))
    before = evaluation.before.get(key)
    if before is not None and against_original(facts):
        return Headline(evaluation, key, (before, evaluation.interval_before(key)))
    return Headline(evaluation, key, _before_in_run(facts, evaluation, key))


def _kind(name: str, asked: str) -> int:
    ranks = [asked and name == asked, name == "accuracy", name.endswith("accuracy"), not name.endswith("loss")]
    return next((rank for rank, fits in enumerate(ranks) if fits), len(ranks))


def _split(evaluation: Evaluation, key: str) -> int:
    split = evaluation.split_of(key) or ""
    return 2 if split.startswith("validation") else 0 if split.startswith("test") else 1


def _before_in_run(
    facts: CardFacts, evaluation: Evaluation, key: str
) -> tuple[float, tuple[float, float] | None] | None:
    """The same figure of the original, where the training measured it before its first pruning, on the same data."""
    first = facts.attempts[0] if facts.attempts else None
    if first is None or first.k is not None or (facts.removed and sum(first.blocks.values()) != facts.blocks[0]):
        return None
    same = [e for _, e in first.evaluations if e.data == evaluation.data and key in e.metrics and not e.sparse]
    return (same[-1].metrics[key], same[-1].interval_of(key)) if same and (facts.removed or facts.zeros) else None


def overview(facts: CardFacts, given: Given) -> str:
    """The table of the original against this model."""
    shown = headline(facts)
    rows = []
    if shown is None:
        rows.append(["quality", _NOT, _NOT])
    else:
        evaluation, key = shown.evaluation, shown.key
        n = evaluation.data.get("rows")
        better = "lower is better; " if bare(key).rpartition("_")[2] in ERRORS else ""
        what = f"{md(bare(key))} ({better}{data_text(facts, given, evaluation, key)}{f'; n = {n:,}' if n else ''})"
        original = _NOT if shown.before is None else with_interval(*shown.before)
        rows.append([what, original, with_interval(evaluation.metrics[key], evaluation.interval_of(key))])
    s = facts.speed
    known = s and against_original(facts)
    times = ["1", f"{s['ratio']:.3f} ({s['low']:.3f} .. {s['high']:.3f})"] if known else [_NOT, _NOT]
    rows.append(["time of one evaluation (measured in turns)", *times])
    before, now = facts.parameters
    before = before or (now if not facts.removed else None)
    change = f" ({100 * (now - before) / before:+.1f} %)" if before and now and before != now else ""
    rows.append(["parameters", _count(before), _count(now) + change])
    bytes_each = SIZES.get(facts.dtype or "")
    sizes = [
        "not known" if count is None or bytes_each is None else f"{count * bytes_each / 1e6:,.1f}"
        for count in (before, now)
    ]
    rows.append([f"size of the weights (MB{f', {facts.dtype}' if bytes_each else ''})", *sizes])
    if facts.removed:
        rows.append(["blocks", *map(str, facts.blocks)])
    return table(["", "original", "this model"], rows)


def _count(number: int | None) -> str:
    return "not known" if number is None else f"{number:,}"


def trained(facts: CardFacts) -> str | None:
    """Whether the model was trained after its last pruning, as far as that is known; None where nothing was removed."""
    if not facts.removed or not facts.record.iterations:
        return None
    last = facts.record.iterations[-1]
    left = last.get("left")
    if left is not None and left == facts.mark:
        healed = any(site.get("healed") for site in last.get("healing") or ())
        return f"**Not trained after the removal**: the weights are as {'the repair' if healed else 'it'} left them."
    standing = [attempt for attempt in facts.attempts if attempt.k is not None and attempt.decision != "rolled back"]
    seconds = standing[-1].training_seconds if standing and facts.from_run else None
    if seconds or "retrained" in (last.get("stages") or {}) or last.get("metrics"):
        return "Trained after the removal."
    if left is not None and facts.mark is not None:
        what = "zeroed, trained or converted" if facts.zeros is not None else "trained or converted"
        return f"The weights were changed after the removal ({what}); how was not noted."
    return "Whether it was trained after the removal was not noted."


def state(facts: CardFacts, given: Given) -> str:
    """What was not measured or done, what it needs, and whether its training was over."""
    shown = headline(facts)
    parts = [trained(facts)]
    if shown is None:
        parts.append("No evaluation of these weights was noted.")
    elif shown.before is None and (facts.removed or facts.zeros is not None):
        parts.append("No original was measured beside it.")
    judged = shown is not None and (shown.evaluation.judged or facts.summary.get("max_drop") is not None)
    if shown is not None and judged and _split(shown.evaluation, shown.key) == 2:
        parts.append("Prunings were judged on the same data, so its figure is optimistic.")
    phase = facts.summary.get("phase")
    if phase == ENDING:
        last = facts.attempts[-1] if facts.attempts else None
        pending = (
            last is not None
            and last.k is not None
            and last.decision is None
            and facts.summary.get("max_drop") is not None
        )
        parts += (
            ["It was saved at the last step of its training, before its last pruning was judged."] if pending else []
        )
    elif phase not in (None, FINISHED):
        parts.append(f"It was saved in the middle of its training (state: {md(phase)}).")
    parts.append(f"It loads with plain {facts.library}: nothing of what made it is needed.")
    return " ".join(part for part in parts if part)
