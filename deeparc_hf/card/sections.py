"""The sentences of a card: what was done, how to do it again, where its limits are, what it was made from."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from typing import Any

from ..config import MPruneConfig
from ..plan import PruningPlan
from ..schedule import FINISHED
from .facts import CardFacts
from .metadata import Given
from .tables import data_text
from .text import code, fenced, json_block, linked, md, plain, shared
from .usage import task_of

__all__ = [
    "alt_text",
    "citations",
    "evaluation_note",
    "iterations_note",
    "limits",
    "made",
    "reproduce",
    "similarity_note",
    "state",
    "summary",
]

_METRICS = {"cka": "debiased CKA", "cka_biased": "biased CKA", "cosine": "cosine similarity", "effect": "the effect of skipping them"}
_EFFECT = (
    "Row i, column j: what is left of the outputs, exp(-change), when block i stays and the blocks from its neighbour to j go; the changes "
    "of a run are summed. Blocks that must stay were not skipped, and change nothing here."
)
_DEVICES = {"cpu": "CPU", "cuda": "GPU", "mps": "GPU"}
_CITED = {
    "mpruner": "MPruner, which clusters blocks by CKA and prunes in iterations: [arXiv 2408.13482](https://arxiv.org/abs/2408.13482)",
    "cka": "CKA: Kornblith et al. 2019, [arXiv 1905.00414](https://arxiv.org/abs/1905.00414); its debiased estimate: Nguyen et al. 2021, "
    "[arXiv 2010.15327](https://arxiv.org/abs/2010.15327)",
    "cosine": "Block influence: ShortGPT, Men et al. 2024, [arXiv 2403.03853](https://arxiv.org/abs/2403.03853)",
    "effect": "Effect of skipping a block: Shortened LLaMA, Kim et al. 2024, [arXiv 2402.02834](https://arxiv.org/abs/2402.02834)",
    "heal": "Related to the repair: ReplaceMe, [arXiv 2505.02819](https://arxiv.org/abs/2505.02819); LLM-Streamline, "
    "[arXiv 2403.19135](https://arxiv.org/abs/2403.19135)",
    "distill": "Distillation: Hinton et al. 2015, [arXiv 1503.02531](https://arxiv.org/abs/1503.02531)",
    "wanda": "Wanda: Sun et al. 2023, [arXiv 2306.11695](https://arxiv.org/abs/2306.11695)",
}


def summary(facts: CardFacts, given: Given) -> str:
    """One sentence of what was done, with blocks and parameters before and after."""
    base = given.base_of(facts)
    what = linked(base) if base else f"A {code(facts.architecture)}" if facts.architecture else "A model"
    done = []
    if facts.removed:
        total = facts.blocks[0]
        metrics = {(entry.get("settings") or {}).get("similarity") for entry in facts.record.iterations}
        metric = metrics.pop() if len(metrics) == 1 else None  # of all prunings, or of none
        found = f" (found by {_METRICS.get(metric, md(metric))})" if isinstance(metric, str) else ""
        done.append(f"{facts.removed} of its {total} blocks (layers) removed{found}")
    if facts.zeros is not None:
        zeros, size, matrices = facts.zeros
        done.append(f"{100 * zeros / max(1, size):.1f} % of the weights of {matrices} matrices set to zero")
    before, now = facts.parameters
    counts = ""
    if before and now and before != now:
        counts = f": {before:,} → {now:,} parameters ({100 * (now - before) / before:+.1f} %)"
    elif now:
        counts = f": {now:,} parameters"
    return f"{what} with {' and '.join(done) or 'nothing removed or zeroed'}{counts}."


def state(facts: CardFacts) -> str:
    """What it needs, and whether the training goes on."""
    needs = f"It loads with plain {facts.library}: nothing of what made it is needed."
    phase = facts.summary.get("phase")
    return needs if phase in (None, FINISHED) else f"{needs} It is from the middle of a training that goes on (state: {md(phase)})."


def iterations_note(facts: CardFacts) -> str:
    """What the columns are, and the hardware and batch of the times."""
    notes = ["Blocks: by stack. Freeze: blocks that were not trained."]
    if facts.from_run:
        epochs = "Each value is that at the end of a training" if facts.continued else "Epochs are counted from each pruning on"
        notes.append(f"{epochs}; the pruned models were trained for longer than the one before pruning.")
        s = facts.summary
        if s.get("max_drop") is not None and s.get("baseline") is not None:
            notes.append(
                f"A pruning was accepted while {md(s['metric'])} got worse by no more than {s['max_drop']:g} from {s['baseline']:.4g}."
            )
        if s.get("zeroed_at") is not None:
            notes.append(f"Weights were zeroed at optimizer step {s['zeroed_at']:,}: figures from there on are of the sparse model.")
        evaluated = _batch(facts, "evaluation_batch")
        notes.append(
            f"Times: {_hardware(facts)}. Evaluation: one evaluation in the middle of the training, as the Trainer measured it{evaluated}. "
            f"Training: of the training steps alone{_batch(facts, 'training_batch')}."
        )
    return " ".join(notes)


def evaluation_note(facts: CardFacts) -> str:
    """How the metrics were measured."""
    began = next((evaluation.before_blocks for evaluation in facts.final if evaluation.before), None)
    notes = ["Measured on these weights." if facts.mark is not None else "Measured at the end."]
    if began is not None:
        total = facts.blocks[0]
        what = "the model before any pruning" if began == total else f"the model that this began with, {began} of {total} blocks"
        notes.append(f"Before: {what}, measured in the same way.")
    if any(evaluation.judged for evaluation in facts.final):
        notes.append("There was no test data: prunings were judged on the same rows, so the figures are optimistic.")
    if facts.hardware:
        notes.append(f"Evaluated {_hardware(facts)}{_batch(facts, 'evaluation_batch')}.")
    if any(name.removeprefix("eval_") in ("accuracy", "test_accuracy") and e.data.get("rows") for e in facts.final for name in e.metrics):
        notes.append("Intervals of accuracies: Wilson's, over the samples.")
    if any(not name.endswith("accuracy") for e in facts.final for name in e.intervals):
        notes.append("Other intervals: of 95 %, from the spread over the samples.")
    if facts.speed:
        s = facts.speed
        notes.append(
            f"One evaluation of the test data takes {s['ratio']:.3f} of the time of the model before ({s['low']:.3f} .. {s['high']:.3f}, "
            f"{s['turns']:g} turns, both models warm in one process); {s['blocks']:.3f} of the blocks are left."
        )
    return " ".join(notes)


def _batch(facts: CardFacts, key: str) -> str:
    size = facts.training.get(key)
    return "" if size is None else f", {md(size)} samples a batch and process"


def _hardware(facts: CardFacts) -> str:
    found = facts.hardware
    if not found:
        return "on hardware that was not noted"
    device = _DEVICES.get(found.get("device", ""), found.get("device", "a device that was not noted"))
    name = f" ({md(found['device_name'])})" if "device_name" in found else ""
    cores, threads = _count(found.get("cpu_count"), "CPU core", "CPU cores"), _count(found.get("torch_threads"), "thread", "threads")
    processes = _count(facts.training.get("processes"), "process", "processes")
    return f"on {md(device)}{name}{cores}{threads}{processes}"


def _count(number: str | None, one: str, many: str) -> str:
    return "" if number is None else f", {md(number)} {one if number == '1' else many}"


def alt_text(plan: PruningPlan) -> str:
    """What the heatmap shows, for those who do not see it."""
    parts = []
    for name, stack in plan.stacks.items():
        values = [value for i, row in enumerate(stack.similarity) for j, value in enumerate(row) if i != j]
        span = f", similarities from {min(values):.2f} to {max(values):.2f}" if values else ""
        gone = f"blocks {', '.join(map(str, stack.removed))} removed" if stack.removed else "none removed"
        parts.append(f"{md(name)}: {len(stack)} blocks{span}, {gone}")
    return f"Heatmap of the similarity of every two blocks. {'; '.join(parts)}."


def similarity_note(plan: PruningPlan) -> str:
    """How the blocks were compared."""
    c = plan.config
    samples = f"{plan.samples:,} calibration samples" if plan.samples else "calibration samples whose number is not known"
    rows = "" if c.similarity == "effect" else f" (rows: {md(c.effective_rows)})"
    metric = _METRICS.get(c.similarity, md(c.similarity))
    note = f"By {metric}{rows} on {samples}, before the last pruning; blocks are numbered as they were then."
    return f"{note} {_EFFECT}" if c.similarity == "effect" else note


def reproduce(facts: CardFacts, given: Given, repo_id: str) -> str:
    """The exact settings, and the ways to make the model, or its structure, again."""
    parts = []
    if given.command:
        parts += ["Made by:", fenced(given.command, "bash")]
    if facts.config is not None:
        config = _known_settings(facts.config)
        parts += ["Settings of the pruning:", json_block(config)]
        if facts.from_run:
            parts += ["In a Trainer:", fenced(_callback(config), "python")]
        elif command := _command(facts, given.base_of(facts)):
            parts += ["Without a Trainer:", fenced(command, "bash")]
    if facts.sparsity is not None:
        parts += ["Settings of the zeroing:", json_block(facts.sparsity.config.to_dict())]
    if facts.training:
        parts.append(f"The training: {shared({key.replace('_', ' '): value for key, value in facts.training.items()})}.")
    base, auto_class = given.base_of(facts), task_of(facts)[1]
    if facts.removed and base and auto_class:
        name = json.dumps(repo_id)
        again = f"from deeparc_hf import PrunedConfig, load_pruned\nfrom transformers import {auto_class}\n\n"
        again += f"record = PrunedConfig.from_pretrained({name})\nmodel = load_pruned({auto_class}, {json.dumps(base)}, record)"
        parts += ["The same blocks of the base model, with the base's weights:", fenced(again, "python")]
    return "\n\n".join(parts) or "How the model was made was not noted."


def _known_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as this package knows them; a record of another kind as it is."""
    try:
        return MPruneConfig.from_dict(config).to_dict()
    except (TypeError, ValueError):
        return dict(config)


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not the defaults."""
    defaults = {spec.name: spec.default for spec in dataclasses.fields(MPruneConfig)}
    return {key: value for key, value in config.items() if value not in (defaults.get(key), None, [], ())}


def _callback(config: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key}={_python(value)}" for key, value in _given(config).items())
    return f"from deeparc_hf import MPruneCallback\n\ncallback = MPruneCallback({settings})"


def _python(value: Any) -> str:
    """A value of JSON types as Python writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_python(key)}: {_python(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_python, value)) + "]"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _command(facts: CardFacts, base: str | None) -> str | None:
    """The command line that removes these blocks; None where a Trainer removed them, or the settings are not this package's."""
    last = facts.record.iterations[-1] if facts.record.iterations else {}
    if not {"similarity", "calibration_samples"} <= set(last.get("settings") or {}) or {"stages", "metrics"} & set(last):
        return None
    try:
        config = _given(MPruneConfig.from_dict(last["settings"]).to_dict())
    except (TypeError, ValueError):
        return None
    for_trainers = {spec.name for spec in dataclasses.fields(MPruneConfig) if spec.metadata.get("trainer")}
    words = ["deeparc", "prune", base or "MODEL", "--data", "TRAINING_DATA"]
    for key, value in config.items():
        option = f"--{key.replace('_', '-')}"
        if key in for_trainers:
            continue
        if isinstance(value, Mapping):
            words += [word for name, count in value.items() for word in (option, f"{name}={count}")]
        elif isinstance(value, (list, tuple)):
            words += [word for entry in value for word in (option, str(entry))]
        else:
            words += [option, str(value)]
    return shlex.join([*map(plain, words), "-o", "pruned"])


def limits(facts: CardFacts, given: Given) -> str:
    """What the figures do not say."""
    found = []
    if facts.final or any(a.evaluations for a in facts.attempts):
        found.append("One run with one seed: intervals are over the evaluation samples, not over seeds.")
    if facts.summary.get("max_drop") is not None:
        found.append("The evaluation data decided which prunings stayed, so the figures on it are optimistic.")
    if not facts.final:
        found.append("No evaluation that was noted is of the model as it is: evaluate it on your data before you use it.")
    if facts.removed:
        found.append(
            "Fewer blocks save time and memory in proportion to their share of the model; embeddings and heads are as large as before."
        )
    if facts.zeros is not None:
        found.append("Zeroed weights save neither memory nor time by themselves.")
    base = given.base_of(facts)
    if base:
        found.append(f"What {linked(base)} is not meant for, this model is not meant for either; its biases are still here.")
    found.append("What is not in this card was not measured.")
    return "\n".join(f"- {line}" for line in found)


def made(facts: CardFacts, given: Given) -> str:
    """Base model, data and their licences, hardware and versions."""
    lines = []
    base = given.base_of(facts)
    if base:
        revision = facts.record.base_revision
        commit = f", commit {code(plain(revision, 40))}" if revision else ""
        lines.append(f"Base model: {linked(base)}{commit}{_licence(given, base)}")
    for use, data in facts.data.items():
        if data:
            rows = f", {data['rows']:,} rows" if "rows" in data else ""
            commit = f", commit {code(data['revision'])}" if "revision" in data else ""
            name = data_text(data) if "id" in data else "not named"
            lines.append(f"{use.capitalize()} data: {name}{rows}{commit}{_licence(given, 'datasets/' + str(data.get('id')))}")
    named = {data.get("id") for data in facts.data.values()}
    lines += [
        f"Data: {linked(name, 'datasets/')}{_licence(given, f'datasets/{name}')}" for name in given.datasets_of(facts) if name not in named
    ]
    if facts.hardware:
        lines.append(f"Ran {_hardware(facts)}")
    if facts.versions:
        lines.append(f"Versions: {shared(dict(sorted(facts.versions.items())))}")
    lines.append("Pruning and card: deeparc_hf")
    return "\n".join(f"- {line}" for line in lines)


def _licence(given: Given, name: str) -> str:
    licence = given.licences.get(name)
    return "" if licence is None else f" (licence by its card: {md(licence)})"


def citations(facts: CardFacts) -> str:
    """The papers behind what was done."""
    config = facts.config or {}
    keys = []
    if facts.removed:
        keys.append("mpruner")
        metric = str(config.get("similarity", ""))
        keys.append("cka" if metric.startswith("cka") else metric)
        keys += [key for key in ("heal", "distill") if config.get(key)]
    if facts.sparsity is not None:
        keys.append(facts.sparsity.config.method)
    lines = [f"- {_CITED[key]}" for key in keys if key in _CITED]
    return "\n".join(lines) or "None: nothing was removed or zeroed."
