"""The sentences of a card: what was done, how to do it again, where its limits are, what it was made from."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from typing import Any

from ..core.markdown import code, fenced, folded, json_block, linked, md, plain, shared
from ..core.settings import Settings
from ..pruning.config import MPruneConfig
from ..pruning.plan import PruningPlan
from ..reports.attempts import bare
from ..sparsity.config import WandaConfig
from .facts import CardFacts
from .metadata import Given
from .tables import against_original, steps_data
from .usage import task_of

__all__ = [
    "citations",
    "compared",
    "evaluation_note",
    "iterations_note",
    "limits",
    "made",
    "reproduce",
    "similarity_note",
    "steps_note",
    "summary",
    "times_note",
]

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
_ALL = "All settings"
_DEVICES = {"cpu": "CPU", "cuda": "GPU", "mps": "GPU"}
_CITED = {
    "mpruner": "MPruner, which clusters blocks by CKA and prunes in iterations: [arXiv "
    "2408.13482](https://arxiv.org/abs/2408.13482)",
    "cka": "CKA: Kornblith et al. 2019, [arXiv 1905.00414](https://arxiv.org/abs/1905.00414); its debiased estimate: "
    "Nguyen et al. 2021, [arXiv 2010.15327](https://arxiv.org/abs/2010.15327)",
    "cosine": "Block influence: ShortGPT, Men et al. 2024, [arXiv 2403.03853](https://arxiv.org/abs/2403.03853)",
    "effect": "Effect of skipping a block: Shortened LLaMA, Kim et al. 2024, [arXiv "
    "2402.02834](https://arxiv.org/abs/2402.02834)",
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
        metric = metrics.pop() if len(metrics) == 1 else ""  # of all prunings, or of none
        how = (
            "chosen by hand"
            if metric is None
            else _METRICS.get(metric, md(metric))
            if isinstance(metric, str) and metric
            else ""
        )
        found = f" ({'' if metric is None else 'found by '}{how})" if how else ""
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


def steps_note(facts: CardFacts) -> str:
    """What the steps were measured on, and how."""
    return (
        f"Measured by the callback in eval mode on {steps_data(facts)}; within a row all columns are of the same "
        f"samples, which need not be all that the Trainer evaluates on. 95 % intervals: Wilson's for shares, normal "
        f"for the loss, from the spread of the batches."
    )


def iterations_note(facts: CardFacts) -> str:
    """What the columns are, and the hardware and batch of the times."""
    notes = ["Blocks: by stack." if len(facts.record.stacks) > 1 else ""]
    if facts.from_run:
        inside = {e.split_of(key) for a in facts.attempts for _, e in a.evaluations for key in e.metrics} - {None}
        where = f" on {md(' and '.join(sorted(map(str, inside))))} data" if inside else ""
        notes.append(
            f"The last figure of each training{where}; the pruned models were trained for longer than the one before "
            f"pruning."
        )
        s = facts.summary
        if s.get("max_drop") is not None and s.get("baseline") is not None:
            notes.append(
                f"A pruning was accepted while {md(s['metric'])} got worse by no more than {s['max_drop']:g} from "
                f"{s['baseline']:.4g}."
            )
        if s.get("zeroed_at") is not None:
            notes.append(
                f"Weights were zeroed at optimizer step {s['zeroed_at']:,}: figures from there on are of the sparse "
                f"model."
            )
    return " ".join(note for note in notes if note)


def times_note(facts: CardFacts) -> str:
    """Hardware and batch of the times in the tables of iterations."""
    frozen = "Frozen blocks were not trained."
    if not facts.from_run:
        return frozen
    return (
        f"{frozen} Times: {_hardware(facts)}. Evaluation: one evaluation in the middle of the training, as the Trainer "
        f"measured it{_batch(facts, 'evaluation_batch')}. Training: of the training steps "
        f"alone{_batch(facts, 'training_batch')}."
    )


def evaluation_note(facts: CardFacts) -> str:
    """How the metrics were measured."""
    began = next((evaluation.before_blocks for evaluation in facts.final if evaluation.before), None)
    notes = ["Measured on these weights." if facts.mark is not None else "Measured at the end."]
    if began is not None:
        total = facts.blocks[0]
        what = (
            "Original: the model before any pruning"
            if against_original(facts)
            else f"Before: the model that this began with, {began} of {total} blocks"
        )
        notes.append(f"{what}, measured in the same way.")
    if any(evaluation.judged for evaluation in facts.final):
        notes.append("There was no test data: prunings were judged on the same rows, so the figures are optimistic.")
    if facts.hardware:
        notes.append(f"Evaluated {_hardware(facts)}{_batch(facts, 'evaluation_batch')}.")
    if any(bare(name) == "accuracy" and e.data.get("rows") for e in facts.final for name in e.metrics):
        notes.append("Intervals of accuracies: Wilson's, over the samples.")
    if any(not name.endswith("accuracy") for e in facts.final for name in e.intervals):
        notes.append("Other intervals: of 95 %, from the spread over the samples.")
    if facts.speed:
        s, reference = facts.speed, "original" if against_original(facts) else "model before"
        notes.append(
            f"One evaluation of the test data takes {s['ratio']:.3f} of the time of the {reference} ({s['low']:.3f} .. "
            f"{s['high']:.3f}, {s['turns']:g} turns, both models warm in one process); {s['blocks']:.3f} of the blocks "
            f"are left."
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
    cores, threads = (
        _count(found.get("cpu_count"), "CPU core", "CPU cores"),
        _count(found.get("torch_threads"), "thread", "threads"),
    )
    processes = _count(facts.training.get("processes"), "process", "processes")
    return f"on {md(device)}{name}{cores}{threads}{processes}"


def _count(number: str | None, one: str, many: str) -> str:
    return "" if number is None else f", {md(number)} {one if number == '1' else many}"


def similarity_note(plan: PruningPlan) -> str:
    """How the blocks were compared."""
    c = plan.config
    samples = (
        f"{plan.samples:,} calibration samples" if plan.samples else "calibration samples whose number is not known"
    )
    rows = "" if c.similarity == "effect" else f" (rows: {md(c.effective_rows)})"
    metric = _METRICS.get(c.similarity, md(c.similarity))
    note = f"By {metric}{rows} on {samples}, before the last pruning, of the blocks that were left then."
    return f"{note} {_EFFECT}" if c.similarity == "effect" else note


def reproduce(facts: CardFacts, given: Given, repo_id: str) -> str:
    """The settings, and the ways to make the model, or its structure, again."""
    parts = []
    if given.command:
        parts += ["Made by:", fenced(given.command, "bash")]
    if facts.removed and not compared(facts):
        chosen = {name: list(blocks) for name, blocks in facts.record.removed.items() if blocks}
        code_ = f"from deeparc_hf import remove_blocks\n\nremove_blocks(model, {_python(chosen)})"
        parts += [
            "The blocks were chosen by hand, not found by comparing them. On the original model:",
            fenced(code_, "python"),
        ]
    elif facts.config is not None:
        parts += _settings(facts, given)
    if facts.sparsity is not None:
        zeroing = _of_use(WandaConfig, facts.sparsity.config.to_dict(), facts.zeroed_in_training)
        parts += [
            "Settings of the zeroing:",
            json_block(_given(WandaConfig, zeroing) or {}),
            folded(_ALL, json_block(zeroing)),
        ]
    if facts.training:
        parts.append(
            f"The training: {shared({key.replace('_', ' '): value for key, value in facts.training.items()})}."
        )
    base, auto_class = given.base_of(facts), task_of(facts)[1]
    if facts.removed and base and auto_class:
        name = json.dumps(repo_id)
        again = f"from deeparc_hf import PrunedConfig, load_pruned\nfrom transformers import {auto_class}\n\n"
        again += (
            f"record = PrunedConfig.from_pretrained({name})\nmodel = load_pruned({auto_class}, "
            f"{json.dumps(base)}, record)"
        )
        parts += ["The same blocks of the base model, with the base's weights:", fenced(again, "python")]
    return "\n\n".join(parts) or "How the model was made was not noted."


def compared(facts: CardFacts) -> bool:
    """Whether the last pruning was found by comparing blocks, and not chosen by hand."""
    return bool((facts.config or {}).get("similarity"))


def _settings(facts: CardFacts, given: Given) -> list[str]:
    """The settings of the last pruning, and the lines that give them; what only a training uses is left out where there
    was none.
    """
    in_training = facts.from_run or bool(
        {"stages", "metrics"} & set(facts.record.iterations[-1] if facts.record.iterations else ())
    )
    config = _known_settings(facts.config or {}, in_training)
    shown = _given(MPruneConfig, config)
    parts = (
        ["Settings of the pruning that are not the defaults:", json_block(shown)]
        if shown
        else ["All settings are the defaults."]
    )
    parts.append(folded(_ALL, json_block(config)))
    if facts.from_run:
        return [*parts, "In a Trainer:", fenced(_callback(config), "python")]
    several = len(facts.record.iterations) > 1
    command = None if in_training else _command(facts, None if several else given.base_of(facts))
    title = "The last pruning, of the model that the one before it left:" if several else "Without a Trainer:"
    return [*parts, title, fenced(command, "bash")] if command else parts


def _known_settings(config: Mapping[str, Any], in_training: bool) -> dict[str, Any]:
    """The settings that this package knows; those of a record of another kind as far as their names are known."""
    try:
        found = MPruneConfig.from_dict(config).to_dict()
    except (TypeError, ValueError):
        names = [spec.name for spec in dataclasses.fields(MPruneConfig)]
        found = {name: config[name] for name in names if name in config}
    return _of_use(MPruneConfig, found, in_training)


def _of_use(settings: type[Settings], config: Mapping[str, Any], in_training: bool) -> dict[str, Any]:
    for_trainers = {spec.name for spec in dataclasses.fields(settings) if spec.metadata.get("trainer")}
    return {key: value for key, value in config.items() if in_training or key not in for_trainers}


def _given(settings: type[Settings], config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not the defaults."""
    defaults = {spec.name: spec.default for spec in dataclasses.fields(settings)}
    return {key: value for key, value in config.items() if value not in (defaults.get(key), None, [], ())}


def _callback(config: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key}={_python(value)}" for key, value in _given(MPruneConfig, config).items())
    return f"from deeparc_hf import MPruneCallback\n\ncallback = MPruneCallback({settings})"


def _python(value: Any) -> str:
    """A value of JSON types as Python writes it; texts are shortened."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_python(key)}: {_python(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_python, value)) + "]"
    return json.dumps(plain(value)) if isinstance(value, str) else repr(value)


def _command(facts: CardFacts, base: str | None) -> str | None:
    """The command line that removes these blocks; None where the settings are not this package's."""
    last = facts.record.iterations[-1] if facts.record.iterations else {}
    if not {"similarity", "calibration_samples"} <= set(last.get("settings") or {}):
        return None
    try:
        config = _given(
            MPruneConfig, _of_use(MPruneConfig, MPruneConfig.from_dict(last["settings"]).to_dict(), in_training=False)
        )
    except (TypeError, ValueError):
        return None
    words = ["deeparc", "prune", base or "MODEL", "--data", "TRAINING_DATA"]
    for key, value in config.items():
        option = f"--{key.replace('_', '-')}"
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
        found.append(
            "No evaluation that was noted is of the model as it is: evaluate it on your data before you use it."
        )
    if facts.removed:
        found.append(
            "Fewer blocks save time and memory in proportion to their share of the model; embeddings and heads are as "
            "large as before."
        )
    if facts.zeros is not None:
        found.append("Zeroed weights save neither memory nor time by themselves.")
    base = given.base_of(facts)
    if base:
        found.append(
            f"What {linked(base)} is not meant for, this model is not meant for either; its biases are still here."
        )
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
            known = given.name_of(facts, data)
            parts = [*(given.words_of(facts, data) or ["not named"]), *([md(data["split"])] if "split" in data else [])]
            told = "" if parts[0] == "not named" or "id" in data else " (as told by who published this)"
            lines.append(
                f"{use.capitalize()} data: {', '.join(parts)}{told}{rows}{commit}{_licence(given, f'datasets/{known}')}"
            )
    named = {given.name_of(facts, data) for data in facts.data.values() if data}
    lines += [
        f"Data: {linked(name, 'datasets/')}{_licence(given, f'datasets/{name}')}"
        for name in given.datasets_of(facts)
        if name not in named
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
    if facts.removed and compared(facts):
        keys.append("mpruner")
        metric = str(config.get("similarity", ""))
        keys.append("cka" if metric.startswith("cka") else metric)
        keys += [key for key in ("heal", "distill") if config.get(key)]
    if facts.sparsity is not None:
        keys.append(facts.sparsity.config.method)
    lines = [f"- {_CITED[key]}" for key in keys if key in _CITED]
    return "\n".join(lines) or "None: no published method was used."
