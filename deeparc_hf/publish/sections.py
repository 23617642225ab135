"""The sentences of a card, which its template asks for: what was done, how it was measured, where its limits are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.markdown import code, linked, md, plain, shared, table
from ..pruning.plan import PruningPlan
from ..reports.attempts import bare
from .content import CardContent
from .tables import epochs_table, settings_table, steps_data

_METRICS = {
    "cka": "debiased CKA",
    "cka_biased": "biased CKA",
    "cosine": "cosine similarity",
    "effect": "the effect of skipping them",
}
_EFFECT = (
    "Row i, column j: what is left of the outputs, exp(-change), when block i stays and the blocks from its neighbour "
    "to j go; the changes of a run are summed. Blocks that must stay were not skipped, and change nothing here."
)
_DEVICES = {"cpu": "CPU", "cuda": "GPU", "mps": "GPU"}
_CITED = {
    "mpruner": "MPruner, which clusters blocks by CKA and prunes in iterations: [arXiv "
    "2408.13482](https://arxiv.org/abs/2408.13482)",
    "cka": "CKA: Kornblith et al. 2019, [arXiv 1905.00414](https://arxiv.org/abs/1905.00414); its debiased estimate: "
    "Nguyen et al. 2021, [arXiv 2010.15327](https://arxiv.org/abs/2010.15327)",
    "cosine": "Block influence: ShortGPT, Men et al. 2024, [arXiv 2403.03853](https://arxiv.org/abs/2403.03853)",
    "effect": "Effect of skipping a block: Shortened LLaMA, Kim et al. 2024, [arXiv "
    "2402.02834](https://arxiv.org/abs/2402.02834)",
    "sleb": "Removal of one block after another by what the model puts out: SLEB, Song et al. 2024, [arXiv "
    "2402.09025](https://arxiv.org/abs/2402.09025)",
    "evopress": "Search by the divergence of the outputs: EvoPress, Sieberling et al. 2025, [arXiv "
    "2410.14649](https://arxiv.org/abs/2410.14649)",
    "heal": "Related to the repair: ReplaceMe, [arXiv 2505.02819](https://arxiv.org/abs/2505.02819); LLM-Streamline, "
    "[arXiv 2403.19135](https://arxiv.org/abs/2403.19135)",
    "distill": "Distillation: Hinton et al. 2015, [arXiv 1503.02531](https://arxiv.org/abs/1503.02531)",
    "wanda": "Wanda: Sun et al. 2023, [arXiv 2306.11695](https://arxiv.org/abs/2306.11695)",
}


def summary(content: CardContent) -> str:
    """One sentence of what was done, with blocks and parameters before and after."""
    unnamed = f"A {code(content.architecture)}" if content.architecture else "A model"
    done = []
    if content.removed:
        done.append(f"{content.removed} of its {content.blocks[0]} blocks (layers) removed{_how_chosen(content)}")
    if content.record.zeros is not None:
        zeros, size, matrices = content.record.zeros
        done.append(f"{100 * zeros / max(1, size):.1f} % of the weights of {matrices} matrices set to zero")
    before, now = content.parameters
    counts = ""
    if before and now and before != now:
        counts = f": {before:,} → {now:,} parameters ({100 * (now - before) / before:+.1f} %)"
    elif now:
        counts = f": {now:,} parameters"
    return f"{linked(content.base) or unnamed} with {' and '.join(done) or 'nothing removed or zeroed'}{counts}."


def _how_chosen(content: CardContent) -> str:
    settings = [noted.get("settings") or {} for noted in content.record.iterations]
    searches = {noted.get("search") for noted in settings}
    if searches and None not in searches:
        names = " and ".join(sorted(md(str(name)) for name in searches))
        return f" (found by {names} search, each candidate judged by what it puts out)"
    if len(searches) > 1:
        return ""
    metrics = [noted.get("similarity") for noted in settings]
    metric = metrics[0] if metrics else ""
    if any(other != metric for other in metrics):  # it is told of all prunings, or of none
        return ""
    if metric is None:
        return " (chosen by hand)"
    return f" (found by {_METRICS.get(metric, md(metric))})" if isinstance(metric, str) and metric else ""


def steps_note(content: CardContent) -> str:
    """What the steps were measured on, and how."""
    return (
        f"Measured by the callback in eval mode on {steps_data(content)}; within a row all columns are of the same "
        "samples, which need not be all that the Trainer evaluates on. 95 % intervals: Wilson's for shares, normal "
        "for the loss, from the spread of the batches."
    )


def iterations_note(content: CardContent) -> str:
    """What the columns are, and the hardware and batch of the times."""
    notes = ["Blocks: by stack." if len(content.record.stacks) > 1 else ""]
    if not content.from_run:
        return notes[0]
    inside = {e.split_of(key) for a in content.attempts for e in a.evaluations for key in e.metrics} - {None}
    where = f" on {md(' and '.join(sorted(map(str, inside))))} data" if inside else ""
    notes.append(
        f"The last figure of each training{where}; the pruned models were trained for longer than the one before "
        "pruning."
    )
    run = content.run
    if run.get("max_drop") is not None and run.get("baseline") is not None:
        notes.append(
            f"A pruning was accepted while {md(run['metric'])} got worse by no more than {run['max_drop']:g} from "
            f"{run['baseline']:.4g}."
        )
    if run.get("zeroed_at") is not None:
        notes.append(
            f"Weights were zeroed at optimizer step {run['zeroed_at']:,}: figures from there on are of the sparse "
            "model."
        )
    return " ".join(note for note in notes if note)


def iterations_more(content: CardContent) -> str:
    """The tables of iterations that are folded, if there are any, with hardware and batch of the times in them."""
    parts = [part for part in (epochs_table(content), settings_table(content)) if part]
    note = "Frozen blocks were not trained."
    if content.from_run:
        note += (
            f" Times: {_hardware(content)}. Evaluation: one evaluation in the middle of the training, as the "
            f"Trainer measured it{_batch(content, 'evaluation_batch')}. Training: of the training steps "
            f"alone{_batch(content, 'training_batch')}."
        )
    return "\n\n".join([*parts, note]) if parts else ""


def evaluation_note(content: CardContent) -> str:
    """How the metrics were measured."""
    began = next((evaluation.before_blocks for evaluation in content.final if evaluation.before), None)
    notes = ["Measured on these weights." if content.mark is not None else "Measured at the end."]
    if began is not None:
        total = content.blocks[0]
        what = (
            "Original: the model before any pruning"
            if content.against_original
            else f"Before: the model that this began with, {began} of {total} blocks"
        )
        notes.append(f"{what}, measured in the same way.")
    if any(evaluation.judged for evaluation in content.final):
        notes.append("There was no test data: prunings were judged on the same rows, so the figures are optimistic.")
    if content.hardware:
        notes.append(f"Evaluated {_hardware(content)}{_batch(content, 'evaluation_batch')}.")
    if any(bare(name) == "accuracy" and e.data.get("rows") for e in content.final for name in e.metrics):
        notes.append("Intervals of accuracies: Wilson's, over the samples.")
    if any(not name.endswith("accuracy") for e in content.final for name in e.intervals):
        notes.append("Other intervals: of 95 %, from the spread over the samples.")
    if content.speed:
        s, reference = content.speed, "original" if content.against_original else "model before"
        notes.append(
            f"One evaluation of the test data takes {s['ratio']:.3f} of the time of the {reference} ({s['low']:.3f} .. "
            f"{s['high']:.3f}, {s['turns']:g} turns, both models warm in one process); {s['blocks']:.3f} of the blocks "
            "are left."
        )
    return " ".join(notes)


def _batch(content: CardContent, key: str) -> str:
    size = content.training.get(key)
    return "" if size is None else f", {md(size)} samples a batch and process"


def _hardware(content: CardContent) -> str:
    hardware = content.hardware
    if not hardware:
        return "on hardware that was not noted"
    device = hardware.get("device", "a device that was not noted")
    name = f" ({md(hardware['device_name'])})" if "device_name" in hardware else ""
    counts = (
        (hardware.get("cpu_count"), "CPU core", "CPU cores"),
        (hardware.get("torch_threads"), "thread", "threads"),
        (content.training.get("processes"), "process", "processes"),
    )
    known = [f", {md(number)} {one if number == '1' else many}" for number, one, many in counts if number is not None]
    return f"on {md(_DEVICES.get(device, device))}{name}{''.join(known)}"


def answers(content: CardContent) -> str:
    """What this model says to some prompts, beside what the one before said."""
    before = "original" if content.against_original else "before"
    keys = ("prompt", "before", "generated")
    rows = [[md(each[key], 600) or "(nothing)" for key in keys] for each in content.answers]
    note = "The likeliest token each time; long texts are cut."
    return f"{table(['prompt', before, 'this model'], rows, left=(0, 1, 2))}\n\n{note}"


def similarity_note(plan: PruningPlan) -> str:
    """How the blocks were compared, and chosen where that was otherwise."""
    c = plan.config
    chosen = (
        "" if plan.choice is None else f" The blocks that went were not chosen by it, but by {md(str(plan.choice))}."
    )
    rows = "" if c.similarity == "effect" else f" (rows: {md(c.effective_rows)})"
    metric = _METRICS.get(c.similarity, md(c.similarity))
    note = f"By {metric}{rows} on {plan.samples_text}, before the last pruning, of the blocks that were left then."
    note += chosen
    return f"{note} {_EFFECT}" if c.similarity == "effect" else note


def limits(content: CardContent) -> str:
    """What the figures do not say."""
    base = linked(content.base)
    sentences = (
        (
            content.final or any(attempt.evaluations for attempt in content.attempts),
            "One run with one seed: intervals are over the evaluation samples, not over seeds.",
        ),
        (
            content.run.get("max_drop") is not None,
            "The evaluation data decided which prunings stayed, so the figures on it are optimistic.",
        ),
        (
            not content.final,
            "No evaluation that was noted is of the model as it is: evaluate it on your data before you use it.",
        ),
        (
            content.removed,
            "Fewer blocks save time and memory in proportion to their share of the model; embeddings and heads are as "
            "large as before.",
        ),
        (content.record.zeros is not None, "Zeroed weights save neither memory nor time by themselves."),
        (base, f"What {base} is not meant for, this model is not meant for either; its biases are still here."),
        (True, "What is not in this card was not measured."),
    )
    return "\n".join(f"- {sentence}" for holds, sentence in sentences if holds)


def made(content: CardContent) -> str:
    """Base model, data and their licences, hardware and versions."""
    lines = []
    if content.base:
        revision = content.record.base_revision
        commit = f", commit {code(plain(revision, 40))}" if revision else ""
        lines.append(f"Base model: {linked(content.base)}{commit}{_licence(content, content.base)}")
    lines += [f"{use.capitalize()} data: {_made_from(content, data)}" for use, data in content.data.items() if data]
    named = {content.id_of(data) for data in content.data.values() if data}
    for name in content.datasets:
        if name not in named:
            lines.append(f"Data: {linked(name, 'datasets/')}{_licence(content, f'datasets/{name}')}")
    if content.hardware:
        lines.append(f"Ran {_hardware(content)}")
    if content.versions:
        lines.append(f"Versions: {shared(dict(sorted(content.versions.items())))}")
    lines.append("Pruning and card: deeparc_hf")
    return "\n".join(f"- {line}" for line in lines)


def _made_from(content: CardContent, data: Mapping[str, Any]) -> str:
    words = content.words_of(data)
    given = " (as told by who published this)" if words and "id" not in data else ""
    rows = f", {data['rows']:,} rows" if "rows" in data else ""
    commit = f", commit {code(data['revision'])}" if "revision" in data else ""
    parts = [*(words or ["not named"]), *([md(data["split"])] if "split" in data else [])]
    return f"{', '.join(parts)}{given}{rows}{commit}{_licence(content, f'datasets/{content.id_of(data)}')}"


def _licence(content: CardContent, name: str) -> str:
    licence = content.licences.get(name)
    return "" if licence is None else f" (licence by its card: {md(licence)})"


def citations(content: CardContent) -> str:
    """The papers behind what was done."""
    config = content.config or {}
    keys = []
    if content.removed and content.compared:
        metric = str(config.get("similarity", ""))
        by_similarity = ["mpruner", "cka" if metric.startswith("cka") else metric]
        keys += by_similarity if config.get("search") is None else ["sleb", "evopress"]
        keys += [key for key in ("heal", "distill") if config.get(key)]
    if content.sparsity is not None:
        keys.append(content.sparsity.config.method)
    lines = [f"- {_CITED[key]}" for key in keys if key in _CITED]
    return "\n".join(lines) or "None: no published method was used."
