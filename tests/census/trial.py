"""What becomes of one type: each of its stacks loses blocks, and what is left is held against two others.

One is the original with these blocks' forwards replaced by identities (no code of the package). The other is a load of
the saved model in a process without the package.
"""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deeparc_hf import MPruneConfig, PruningPlan, apply_plan, find_stacks, remove_blocks, save_pruned
from deeparc_hf.architectures import Layout, Stack, describe
from deeparc_hf.architectures.base import Heads
from deeparc_hf.errors import DeepArcError
from deeparc_hf.pruned_type.config import PrunedSettings
from deeparc_hf.pruned_type.models import auto_class_for
from deeparc_hf.pruning.plan import ComparedStack, make_plan
from deeparc_hf.pruning.rebuild import skeletons

from ..stock import StockError, StockProcess, aligned, flattened, generated
from . import tiny
from .inputs import NoInputsError, inputs_for, run
from .uses import uses

__all__ = ["Loaders", "Row", "removals", "try_model", "try_type"]

# "stock", "package": computes what it should, here and in a process of its own, without the package or with it.
# "refused": with a reason. The rest is a fault.
GOOD, BAD = ("stock", "package"), ("wrong", "crash", "unproven", "reload")
# outputs that have one entry per block, so that they differ in number
_PER_BLOCK = re.compile(
    r"(^|\.)(\w*hidden_states|\w*attentions|mems|state|past_key_values|router_\w*|intermediate_(logits|reference_points|predicted_corners)|loss)(\.|$)"
)


@dataclass
class Row:
    """What was found of one type.

    Attributes:
        kind: the model type.
        model: the class that was built, or "" if none could be.
        state: "tried", or why nothing was: "not built", "no inputs", "stock differs", "refused", "crash".
        reason: of that state.
        stacks: by name, the number of blocks, how many are pinned, by removal what became of it and why, and what can
            be done with the first that is good.
    """

    kind: str
    model: str = ""
    state: str = "tried"
    reason: str = ""
    stacks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in ("", {})}

    def results(self) -> list[str]:
        return [result for stack in self.stacks.values() for result, _ in stack["removals"].values()]

    def uses(self) -> list[str]:
        return [result for stack in self.stacks.values() for result, _ in stack.get("uses", {}).values()]

    @property
    def verdict(self) -> str:
        """ "whole", "in part", "refused", or the fault."""
        results = self.results()
        for fault in BAD:
            if fault in results or fault in self.uses() or self.state == fault:
                return fault
        if self.state != "tried":
            return self.state
        if not results:
            return "nothing to remove"
        good = sum(result in GOOD for result in results)
        return "whole" if good == len(results) else "in part" if good else "refused"

    @property
    def by_stock(self) -> str:
        """What stock libraries can load of it: "whole", "in part" or "nothing"."""
        good = sum(result == "stock" for result in self.results())
        return "nothing" if not good else "whole" if good == len(self.results()) else "in part"


def removals(stack: Stack) -> dict[str, list[int]]:
    """Which blocks are taken out: a middle one, the last, every second, and a few that are counted as one; never a
    pinned one.
    """
    free = [i for i in range(len(stack)) if i not in stack.pinned]
    if len(stack) < 2 or not free:
        return {}
    later = [i for i in free if i] or free
    found = {"middle": [later[(len(later) - 1) // 2]], "last": [free[-1]]}
    second = [i for i in range(1, len(stack), 2) if i in free]
    if len(second) > 1:
        found["every second"] = second
    together = list(range(stack.count.each)) if stack.count is not None else []
    if len(together) > 1 and set(together) <= set(free):
        found["counted as one"] = together
    seen: list[list[int]] = []
    for name, blocks in list(found.items()):
        if blocks in seen or len(blocks) == len(stack):
            del found[name]
        seen.append(blocks)
    return found


@dataclass
class Loaders:
    """Processes that load what was saved: one without the package, one with it."""

    stock: StockProcess
    package: StockProcess

    @classmethod
    def started(cls) -> Loaders:
        """Start both; they end with this process."""
        return cls(StockProcess().__enter__(), StockProcess(package=True).__enter__())


def try_type(kind: str, loaders: Loaders, only: Sequence[str] | None = None) -> Row:
    """Try all removals on one type, and what is done with its pruned models; or only some (of `removals`)."""
    row = Row(kind)
    try:
        model = tiny.build(kind)
    except tiny.NotBuiltError as error:
        row.state, row.reason = "not built", _short(error)
        return row
    return try_model(row, model, lambda reach: inputs_for(model, reach), loaders, only)


def try_model(
    row: Row,
    model: nn.Module,
    inputs_reaching: Callable[[Callable[[Mapping[str, Any]], list[str]]], dict[str, Any]],
    loaders: Loaders,
    only: Sequence[str] | None = None,
    some: Callable[[Mapping[str, Stack]], Sequence[str]] = list,
    *,
    further: bool = True,
) -> Row:
    """Try removals on a model, on inputs that reach its stacks where there are such.

    Args:
        only: some of the removals, quickly: what the whole model does is looked at only where one of them fails.
        some: which of the stacks are tried.
        further: whether pruned models are trained, healed and sparsified (`uses`).
    """
    row.model = type(model).__name__
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stacks = find_stacks(copy.deepcopy(model))
    except DeepArcError as error:
        row.state, row.reason = "refused", _short(error)
        return row
    except Exception as error:
        row.state, row.reason = "crash", f"{type(error).__name__}: {_short(error)}"
        return row
    try:
        inputs = inputs_reaching(lambda given: _idle(model, stacks, given))
        if only is None:
            row.state, row.reason = _without_removal(model, stacks, inputs, loaders)
    except NoInputsError as error:
        row.state, row.reason = "no inputs", _short(error)
    if row.state != "tried":
        return row
    for name, stack in stacks.items():
        asked = {what: blocks for what, blocks in removals(stack).items() if only is None or what in only}
        asked = asked if name in some(stacks) else {}
        row.stacks[name] = entry = {"blocks": len(stack), "pinned": len(stack.pinned), "removals": {}}
        for what, blocks in asked.items():
            pruned, result = _try(model, stack, blocks, inputs, loaders)
            entry["removals"][what] = result
            if further and only is None and result[0] in GOOD and "uses" not in entry:
                entry["uses"] = uses(pruned, model, inputs, lambda changed: _reload_problem(changed, inputs, loaders))
    if only is not None and row.verdict in BAD:
        row.state, row.reason = _stock_state(model, inputs, loaders)
        row.stacks = row.stacks if row.state == "tried" else {}
    return row


def _without_removal(
    model: nn.Module, stacks: Mapping[str, Stack], inputs: Mapping[str, Any], loaders: Loaders
) -> tuple[str, str]:
    """Whether a plan that removes nothing leaves the model what it is, here and after a load, and whether settings into
    which the blocks of all its stacks are counted build it.
    """
    same = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apply_plan(same, keeping_all(stacks))
        subject = describe(same)
        try:
            builds = skeletons(subject, Layout.whole(subject.lengths))
        except DeepArcError as error:
            return "wrong", f"with all blocks: {_short(error)}"
        if builds.updates or builds.by_package:
            return "wrong", "settings that count all blocks build another model"
    state = _stock_state(same, inputs, loaders)
    if state[0] == "tried":
        one, other = flattened(run(aligned(model), inputs)), flattened(run(aligned(same), inputs))
        if one.keys() != other.keys() or any(not torch.equal(one[key], other[key]) for key in one):
            return "wrong", "a plan that removes nothing changes what the model computes"
    return state


def keeping_all(stacks: Mapping[str, Stack]) -> PruningPlan:
    """A plan that removes nothing."""
    alone = {
        name: tuple(tuple(float(i == j) for j in range(len(s))) for i in range(len(s))) for name, s in stacks.items()
    }
    compared = {name: ComparedStack(rows, pinned=dict(stacks[name].pinned)) for name, rows in alone.items()}
    return make_plan(compared, MPruneConfig())


def _stock_state(model: nn.Module, inputs: Mapping[str, Any], loaders: Loaders) -> tuple[str, str]:
    """Whether the model without any removal is the same after a load."""
    first, again = flattened(run(aligned(model), inputs)), flattened(run(aligned(model), inputs))
    if not all(torch.equal(first[key], again[key]) for key in first):
        return "stock differs", "two passes of the unpruned model differ"
    if not first or not all(value.isfinite().any() for value in first.values()):
        return "stock differs", "the unpruned model puts out no finite number"
    problem = _reload_problem(model, inputs, loaders)
    return ("stock differs", problem) if problem else ("tried", "")


def _try(
    model: nn.Module, stack: Stack, blocks: Sequence[int], inputs: Mapping[str, Any], loaders: Loaders
) -> tuple[nn.Module, tuple[str, str]]:
    """The pruned model, and what became of it."""
    pruned = copy.deepcopy(model)
    return pruned, _outcome(pruned, model, stack, blocks, inputs, loaders)


def _outcome(
    pruned: nn.Module,
    model: nn.Module,
    stack: Stack,
    blocks: Sequence[int],
    inputs: Mapping[str, Any],
    loaders: Loaders,
) -> tuple[str, str]:
    name, length, heads = stack.name, len(stack), stack.heads
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            remove_blocks(pruned, {name: blocks}, example=dict(inputs))
    except DeepArcError as error:
        return "refused", _short(error)
    except Exception as error:
        return "crash", f"{type(error).__name__}: {_short(error)}"
    with bypassed(copy.deepcopy(model), name, blocks, heads) as (skipping, ran):
        expected = flattened(run(skipping, inputs))
    if not ran:
        return "unproven", "the inputs do not reach the blocks"
    try:
        found = flattened(run(pruned, inputs))
    except Exception as error:
        return "wrong", f"cannot run: {type(error).__name__}: {_short(error)}"
    problem = _different(expected, found)
    if problem:
        return "wrong", problem
    left = find_stacks(pruned).get(name)
    if left is None or len(left) != length - len(blocks):
        return "wrong", f"what is left of {name} is no stack any more"
    problem = _reload_problem(pruned, inputs, loaders)
    return ("reload", problem) if problem else ("package" if by_package(pruned) else "stock", "")


def _reload_problem(model: nn.Module, inputs: Mapping[str, Any], loaders: Loaders) -> str:
    """How a model differs from what another process loads of it, if it does, or why that process cannot."""
    try:
        return _reloaded(model, inputs, loaders)
    except StockError as error:
        return _short(str(error).strip().splitlines()[-1])


@contextmanager
def bypassed(
    model: nn.Module, name: str, blocks: Sequence[int], lists_of_heads: Sequence[Heads] = ()
) -> Iterator[tuple[nn.Module, set[int]]]:
    """Within, blocks hand on what they are given: each tensor that they put out is replaced by the one of its form that
    they were given. Of their heads those that add something add nothing, and the others are those of the block before.
    """
    ran: set[int] = set()
    for told in lists_of_heads:
        heads = cast(nn.ModuleList, model.get_submodule(told.path))
        for index in blocks:
            heads[index] = Zeros(heads[index]) if told.adds else heads[max(index - 1, 0)]
    for index in blocks:
        first, last = _ends(model, name, index)
        ran_into: dict[str, Any] = {}

        def entered(*args: Any, _noted: dict[str, Any] = ran_into, _index: int = index, **kwargs: Any) -> None:
            ran.add(_index)
            _noted["given"] = [value.clone() for value in _tensors((args, kwargs))]
            _noted["named"] = {key: value.clone() for key, value in kwargs.items() if isinstance(value, Tensor)}

        def forward(
            *args: Any,
            _noted: dict[str, Any] = ran_into,
            _entered: Any = entered if first is last else None,
            _original: Any = last.forward,
            **kwargs: Any,
        ) -> Any:
            if _entered is not None:
                _entered(*args, **kwargs)
            return _replaced(_original(*args, **kwargs), _noted["given"], _noted["named"])

        if first is not last:
            first.register_forward_pre_hook(
                lambda _, args, kwargs, note=entered: note(*args, **kwargs), with_kwargs=True
            )
        last.forward = forward  # type: ignore[method-assign]
    yield model, ran


class Zeros(nn.Module):
    """Puts out zeros in the form of what a head does."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden) * 0.0


def _ends(model: nn.Module, stack: str, index: int) -> tuple[nn.Module, nn.Module]:
    """The first and the last module of a block: itself, or those of its parts in lists side by side ("a.{b,c}")."""
    parent, braced, names = stack.partition("{")
    lists = [parent + name for name in names.removesuffix("}").split(",")] if braced else [stack]
    return model.get_submodule(f"{lists[0]}.{index}"), model.get_submodule(f"{lists[-1]}.{index}")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _replaced(output: Any, given: list[Tensor], named: Mapping[str, Tensor]) -> Any:
    """An output with the tensors that were given, each once, in place of those of their form; where it has names, of
    the same name (Reformer puts out its two streams in the other order).
    """
    if isinstance(output, Tensor):
        for place, value in enumerate(given):
            if value.shape == output.shape and value.dtype == output.dtype:
                return given.pop(place)
        return output
    if isinstance(output, Mapping):
        return type(output)(**{key: _replaced(value, given, named) for key, value in output.items()})
    names = getattr(type(output), "_fields", None)
    if isinstance(output, tuple) and names is not None:
        pairs = zip(names, output, strict=True)
        return type(output)(*(named[key] if key in named else _replaced(value, given, {}) for key, value in pairs))
    if isinstance(output, (tuple, list)):
        return type(output)(_replaced(value, given, named) for value in output)
    return output


def _different(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """How a pruned model differs from the original with identities; empty if it does not."""
    compared = 0
    for key, value in expected.items():
        before, _, number = key.rpartition(".")
        shorter = number.isdigit() and any(other.rpartition(".")[0] == before for other in found) and key not in found
        if _PER_BLOCK.search(key) or shorter:  # a list with something of each block
            continue
        if key not in found or found[key].shape != value.shape:
            return f"{key} is missing or has another shape"
        compared += 1
        one, other = value.double(), found[key].double()
        same = (one == other) | (one.isnan() & other.isnan())
        far = (one - other)[~same].abs()
        scale = one[one.isfinite() & (one.abs() < 1e30)].abs().max().item() + 1e-6 if one.isfinite().any() else 1.0
        if far.numel() and not far.max().item() <= 1e-4 * scale:
            return f"{key} differs by {far.max().item():.2g}, of {scale:.2g}"
    return "" if compared else "there is nothing to compare"


def by_package(model: nn.Module) -> bool:
    """Whether a pruned model can only be loaded with the package."""
    return isinstance(getattr(model, "config", None), PrunedSettings)


def _loader(model: nn.Module) -> str:
    """What is asked to load it: its own class, an Auto class where it needs the package, or timm."""
    if not isinstance(model, PreTrainedModel):
        return "timm"
    if not by_package(model):
        return type(model).__name__
    found: str = auto_class_for(type(model), model.config).__name__
    return found


def _reloaded(model: nn.Module, inputs: Mapping[str, Any], loaders: Loaders) -> str:
    """How a model differs from what another process loads of it; empty if it does not."""
    own = aligned(model)
    text = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
    bare = not isinstance(own, PreTrainedModel)
    generates = not bare and own.can_generate() and "input_ids" in text and own.main_input_name == "input_ids"
    expected = flattened(run(own, inputs))
    if generates:
        try:
            expected |= generated(own, text)
        except Exception:
            generates = False
    with tempfile.TemporaryDirectory() as folder:
        save_pruned(model, folder)
        for file in Path(folder).rglob("*"):
            if file.suffix in (".bin", ".pt", ".pkl"):
                return f"{file.name} was saved"
        process = loaders.package if by_package(model) else loaders.stock
        loaded = process.load(folder, _loader(model), text, generate=generates, everything=True)
    if not loaded.clean:
        odd = [*loaded.missing, *loaded.unexpected, *loaded.mismatched]
        return f"{len(odd)} keys do not fit: {odd[0]}"
    if loaded.outputs.keys() != expected.keys():
        return "the loaded model puts out other things"
    for key, value in expected.items():
        if not torch.equal(loaded.outputs[key].nan_to_num(), value.nan_to_num()):
            return f"{key} differs after a load"
    return ""


def _idle(model: nn.Module, stacks: Mapping[str, Stack], inputs: Mapping[str, Any]) -> list[str]:
    """The stacks no block of which runs on these inputs."""
    ran: set[str] = set()
    watched = copy.deepcopy(model)
    for name, stack in stacks.items():
        for index in range(len(stack)):
            block, _ = _ends(watched, name, index)

            # no hook: some models call the forward itself
            def forward(*args: Any, _name: str = name, _original: Any = block.forward, **kwargs: Any) -> Any:
                ran.add(_name)
                return _original(*args, **kwargs)

            block.forward = forward  # type: ignore[method-assign]
    run(watched, inputs)
    return [name for name in stacks if name not in ran]


def _short(error: object) -> str:
    return " ".join(str(error).split())[:300]
