"""What a card tells of other tools: those that pruned models of its type were run with, and what runs wrongly there."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ..core.markdown import code, fenced, folded, md, table
from .content import CardContent
from .usage import task_of
from .ways_out import FAULTS, WAYS_OUT, Fault, in_turn

__all__ = ["elsewhere", "faults_of", "within"]


def within(content: CardContent) -> dict[str, float]:
    """The tools that were tried for a model's type, with the largest difference that is allowed there."""
    known: Mapping[str, Mapping[str, float]] = {
        name: way.packaged if content.needs_package else way.within for name, way in WAYS_OUT.items()
    }
    kind = content.model_type or ""
    return {name: types[kind] for name, types in known.items() if kind in types}


def faults_of(content: CardContent) -> list[Fault]:
    """What runs wrongly of a model's type; what a period leads to only where the layers do not come in turn."""
    stacks = content.record.stacks.values()
    return [
        fault
        for fault in FAULTS
        if (fault.way in within(content) and fault.model_type == content.model_type)
        and (fault.period is None or not all(in_turn(sorted(stack.kept), fault.period) for stack in stacks))
    ]


def elsewhere(content: CardContent, repo_id: str) -> str:
    """The section; empty for a model of a type that was not tried."""
    known = within(content)
    if not known:
        return ""
    rows = []
    for name, bound in known.items():
        way = WAYS_OUT[name]
        versions = ", ".join(f"{package} {version}" for package, version in way.versions.items())
        rows.append([name, versions, way.compared, difference_text(bound)])
    first = "After `import deeparc_hf`, tiny" if content.needs_package else "Tiny"
    parts = [
        f"{first} pruned models of this type ({code(content.model_type or '')}, random weights) put out there what "
        "they do in transformers. This model itself was not tried.",
        table(["tool", "tried", "compared", "largest difference"], rows, left=(0, 1, 2, 3)),
    ]
    parts += [f"- **{md(fault.way)}** goes wrong without an error. {told(fault)}" for fault in faults_of(content)]
    lines = "\n\n".join(f"{md(name)}:\n\n{_typed(name, content, repo_id)}" for name in known)
    inputs = (
        "`model` is this model, loaded; `inputs` is a dict of what it is called with. Of a language model one pass is "
        "exported, after `model.config.use_cache = False`."
    )
    return "\n\n".join([*parts, folded("What to type", f"{inputs}\n\n{lines}")])


def difference_text(bound: float) -> str:
    """A bound for people."""
    return "none" if bound == 0 else f"{bound:g} of the largest value"


def told(fault: Fault) -> str:
    """What a tool goes by, and what to do."""
    return f"{fault.reason} {fault.remedy}"


def _typed(name: str, content: CardContent, repo_id: str) -> str:
    way = WAYS_OUT[name]
    lines = way.lines.replace('"{model}"', json.dumps(repo_id)).replace("{auto_class}", task_of(content)[1])
    return fenced(lines, "bash" if way.shell else "python")
