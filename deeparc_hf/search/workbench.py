"""What a search works with: models with blocks left out and the kept ones healed, and how good they are.

The data is cut in two: on one part repairs are fitted, on the other models are judged. What every block puts out is
kept for both, so that a model which differs from a known one from some block on is computed from there. A repair
depends on what is removed before it alone, and is shared by all models that begin alike.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..architectures import Host, Subject
from ..core.distributed import agree, gather, process_count, process_index
from ..core.transaction import Transaction
from ..errors import CalibrationError
from ..healing.block_ends import Ending
from ..healing.fit import SiteFit
from ..healing.heal import apply_healing, find_endings
from ..healing.sensitivity import output_sensitivities
from ..healing.sites import Healing, Site, sites_of
from ..observe.axes import Axes, find_axes
from ..observe.batches import batch_size, cut, is_cuttable
from ..observe.forward import forward
from ..observe.outputs import heads_of
from ..pruning.surgery import remove_blocks
from .journal import Journal
from .objectives import Answer, AnswerObjective, ModelObjective, Objective, Score
from .playback import Block, Playback

__all__ = ["SENSITIVITY_PASSES", "Node", "Removed", "Workbench", "by_stack"]

Removed = frozenset[Block]
Change = Callable[[Mapping[Block, Healing]], None]  # gives the model these repairs, and no others

logger = logging.getLogger(__name__)

_FIT = 5, 8  # share of the samples that repairs are fitted on
_BACKWARD = 3  # forward passes that one forward and backward pass counts for
SENSITIVITY_PASSES = _BACKWARD * _FIT[0] / _FIT[1]  # over all data, before a search with repairs begins
_ROUGH = 4  # of the judging samples one in so many comes first,
_ROUGH_OUTPUTS = 64  # or as many as have so many outputs: fewer would tell too little of a classifier
MEMORY = 4 * 10**9  # bytes, for what blocks put out
_LEFT = 3  # and one in so many candidates stays for the others


@dataclass(eq=False)
class Node:
    """A model with blocks left out, and the kept ones before them repaired.

    Attributes:
        removed: the blocks that are left out.
        score: how good it is.
    """

    removed: Removed
    score: Score
    _make: Callable[[], tuple[Mapping[Block, Healing], Mapping[Block, Sequence[Tensor]]]]

    @cached_property
    def _made(self) -> tuple[Mapping[Block, Healing], Mapping[Block, Sequence[Tensor]]]:
        return self._make()

    @property
    def repairs(self) -> Mapping[Block, Healing]:
        """By the kept block that changes, how."""
        return self._made[0]

    @property
    def states(self) -> Mapping[Block, Sequence[Tensor]]:
        """By kept block, what it puts out, a tensor a batch. Of a model whose score was known from a journal they are
        computed when they are first asked for, outside of other work of the bench.
        """
        return self._made[1]


class Workbench:
    """One model and its data. Between calls the model is as it was; it must be evaluating all the time.

    Args:
        subject: the model.
        batches: what it is looked at on, as it takes them, with labels.
        objective: how it is judged.
        heals: whether the kept block before each removal is repaired.
        measure: measures a model for a `ModelObjective`: less is better.
        shared: whether all processes have the same model and batches, and try the candidates together.
        journal: scores that are known from an earlier search.
        tell: called with the number of forward passes over all data that each step took.

    Attributes:
        root: the whole model.
        samples: number of samples.
        passes: forward passes over all the data so far.
    """

    def __init__(
        self,
        subject: Subject,
        batches: Sequence[Mapping[str, Any]],
        objective: Objective,
        *,
        heals: bool = True,
        measure: Callable[[nn.Module], float] | None = None,
        shared: bool = False,
        journal: Journal | None = None,
        tell: Callable[[float], None] = lambda passes: None,
    ) -> None:
        self.subject, self.host, self.stacks = subject, subject.host, dict(subject.stacks)
        self._objective, self._heals, self._tell = objective, heals, tell
        self._measure = measure if isinstance(objective, ModelObjective) else None
        self._journal = journal or Journal(None, {})
        self._share = (process_index(), process_count()) if shared else (0, 1)
        first = cut(batches[0], 2)
        self._playback = Playback.of(self.host, self.stacks, first)
        batches = self._that_fit(batches)
        self._fitting, self._judging = _parts(batches) if heals else ([], [dict(batch) for batch in batches])
        if not self._judging or (heals and not self._fitting):
            raise CalibrationError(
                "A search needs several samples: some to fit repairs on, others to judge by. Give some hundreds."
            )
        if self._measure is not None:
            self._judging = self._judging[:1]  # `measure` has data of its own
        self.samples = sum(map(batch_size, [*self._fitting, *self._judging]))
        self._order = self._playback.order
        self._position = {block: number for number, block in enumerate(self._order)}
        self._fits: OrderedDict[tuple[Removed, Site], Healing] = OrderedDict()
        self._told = 0.0
        modules = list(self._playback.modules.values())
        self._endings = find_endings(self.host, modules, first) if heals else {}
        self._axes = find_axes(self.host, list(self.stacks.values()), first) if heals else {}
        self._wanted: list[Any] = []
        self._outputs_each = _outputs_each(self.host, first)
        self.root = self._whole()
        self._sensitivities = self._differentiated()

    @property
    def passes(self) -> float:
        return self._playback.done[0] / (len(self._order) * self.samples)

    @property
    def order(self) -> list[Block]:
        """All blocks, in the order in which they run."""
        return self._order

    @property
    def modules(self) -> Mapping[Block, nn.Module]:
        return self._playback.modules

    @property
    def example(self) -> dict[str, Any]:
        """A small batch."""
        return cut(self._judging[0], 2)

    def make(self, node: Node) -> nn.Module:
        """A model as a copy, with the blocks really removed and the kept ones repaired."""
        with self._repaired() as change:
            change(node.repairs)
            return self._smaller(node.removed)

    def _smaller(self, removed: Removed) -> nn.Module:
        """A copy of the model as it is now, without blocks; the model itself where none are named."""
        if not removed:
            return self.subject.root
        smaller = copy.deepcopy(self.subject.root)
        remove_blocks(smaller, by_stack(removed), example=self.example)
        return smaller

    def follow(self, removed: Removed, base: Node) -> Node:
        """The model with these blocks left out, from a known one: repairs are fitted one after another, each on what
        the model gives with those before it.
        """
        if removed == base.removed:
            return base
        known = self._journal.get("follow", removed)
        if known is not None:
            return Node(removed, known["score"], lambda: self._followed(removed, base)[1:])
        score, *made = self._followed(removed, base)
        if self._share[1] > 1:  # rounding may differ from one process to another, and decisions must not
            score = agree(lambda: score)
        self._journal.put("follow", removed, {"score": score})
        return Node(removed, score, lambda: (made[0], made[1]))

    def _followed(self, removed: Removed, base: Node) -> tuple[Score, dict[Block, Healing], dict[Block, list[Tensor]]]:
        sites, earlier = self._sites(removed), self._sites(base.removed)
        differ = [b for b in self._order if (b in removed) != (b in base.removed) or sites.get(b) != earlier.get(b)]
        here = self._position[differ[0]]
        # of a base that is known from a journal alone they are computed now, before the model is repaired
        states = {block: list(kept) for block, kept in base.states.items() if self._position[block] < here}
        repairs = {block: healing for block, healing in base.repairs.items() if self._position[block] < here}
        with self._repaired() as change:
            change(repairs)
            for block in [block for block in self._order[here:] if block in sites]:
                self._fill(states, removed, here, self._position[block])
                repairs[block] = self._fit(sites[block], removed, states, change, dict(repairs))
                change(repairs)
                here = self._position[block]
            parts = self._fill(states, removed, here, None)
        self._account()
        return Score.of(parts), repairs, states

    def screen(self, base: Node, blocks: Collection[Block]) -> dict[Block, Score]:
        """How good a known model is without one more block, for each of several; those that look bad on the first
        samples are judged by these alone. Repairs behind the block stay those of the known model.
        """
        known = self._journal.get("screen", base.removed, blocks)
        if known is not None:
            return {block: known[_label(block)] for block in blocks}
        base.states  # noqa: B018  computed now, if that is still to be done: below the model is repaired
        rough = self._rough()
        first, rest = range(rough), range(rough, len(self._judging))
        with self._repaired() as change:
            parts = self._tried(base, list(blocks), first, change)
            order = sorted(parts, key=lambda block: Score.of(parts[block]).value)
            more = self._tried(base, order[: max(_LEFT, -(-len(order) // _LEFT))], rest, change) if rest else {}
        self._account()
        scores = {block: Score.of([*found, *more.get(block, ())]) for block, found in parts.items()}
        self._journal.put("screen", base.removed, {_label(block): score for block, score in scores.items()}, blocks)
        return scores

    def _rough(self) -> int:
        """How many of the judging batches come first."""
        outputs = 0.0
        for number, batch in enumerate(self._judging, 1):
            outputs += batch_size(batch) * self._outputs_each
            if outputs >= _ROUGH_OUTPUTS and number >= len(self._judging) // _ROUGH:
                return number
        return len(self._judging)

    def complete(self, scores: Mapping[Block, Score]) -> dict[Block, Score]:
        """Those that were judged on all samples, the best first."""
        most = max((score.samples for score in scores.values()), default=0)
        full = {block: score for block, score in scores.items() if score.samples == most}
        return dict(sorted(full.items(), key=lambda entry: entry[1].value))

    def _that_fit(self, batches: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The first batches, as many as memory is meant for: what all blocks put out is kept for them."""
        taken: list[Mapping[str, Any]] = []
        size, each = 0.0, 0.0
        for batch in batches:
            if not taken or _shapes(batch) != _shapes(taken[-1]):
                each = 2 * self._bytes_of(cut(batch, 1))  # of the whole model, and of the one at hand
            size += each * batch_size(batch)
            if taken and size > MEMORY:
                logger.info(
                    "The search looks at %d of %d samples, for more would take %.0f GB of memory.",
                    sum(map(batch_size, taken)),
                    sum(map(batch_size, batches)),
                    MEMORY / 1e9,
                )
                break
            taken.append(batch)
        self._playback.done[0] = 0
        return taken

    def _bytes_of(self, batch: Mapping[str, Any]) -> float:
        """What all blocks put out for a sample."""
        seen: list[int] = []

        def note(block: Block, hidden: Tensor) -> None:
            seen.append(hidden.numel() * hidden.element_size())

        self._playback.run(batch, see=note)
        return sum(seen) / max(batch_size(batch), 1)

    # ---- one step ----

    def _whole(self) -> Node:
        states: dict[Block, list[Tensor]] = {}
        parts = self._fill(states, frozenset(), 0, None)
        self._account()
        return Node(frozenset(), Score.of(parts), lambda: ({}, states))

    def _differentiated(self) -> list[Mapping[nn.Module, Tensor]]:
        """For each batch that repairs are fitted on, how sensitive the whole model's outputs are to what blocks put
        out; nothing where it cannot be told.
        """
        found: list[Mapping[nn.Module, Tensor]] = []
        axes = {name: axes.features for name, axes in self._axes.items() if isinstance(axes, Axes)}
        blocks = {
            module: axes[block[0]]
            for block, module in self.modules.items()
            if block[0] in axes and isinstance(self._endings.get(module), Ending)
        }
        for inputs in self._fitting if blocks else ():
            if found and not found[0]:  # where the first batch's are not found, no other's count
                found.append({})
                continue
            found.append(output_sensitivities(self.host, blocks, inputs) or {})
            self._playback.done[0] += _BACKWARD * len(self._order) * batch_size(inputs)
        self._account()
        if self._share[1] > 1:  # what one process could not find out, none goes by: repairs are the same in all
            known = gather(lambda: [bool(each) for each in found])
            found = [each if all(flags) else {} for each, *flags in zip(found, *known, strict=True)]
        return found or [{}] * len(self._fitting)

    def _sites(self, removed: Removed) -> dict[Block, Site]:
        """The removal sites by their kept blocks; none where nothing is repaired."""
        return {(site.stack, site.kept): site for site in sites_of(by_stack(removed))} if self._heals else {}

    def _fit(
        self,
        site: Site,
        removed: Removed,
        states: Mapping[Block, Sequence[Tensor]],
        change: Change,
        repairs: Mapping[Block, Healing],
    ) -> Healing:
        """The repair at a site, with those before it; `states` reach up to it."""
        kept, last = (site.stack, site.kept), (site.stack, site.removed[-1])
        before = frozenset(block for block in removed if self._position[block] < self._position[kept])
        key = before, site
        if key not in self._fits:
            stack = self.stacks[site.stack]
            watch = SiteFit(self.host, stack, site)
            watch.settle([self._endings[stack.blocks[index]] for _, index in (kept, last)])
            watch.orient(self._axes.get(site.stack))
            seen = 0
            for number, inputs in enumerate(self._fitting):
                if watch.reason is not None:
                    break
                if not self._playback.can_begin_anywhere:  # the pass goes through the blocks that are repaired
                    change({})
                self._run_one(number, last, frozenset(), self.root.states, partial(watch.hooks, "last"))
                change(repairs)
                self._run_one(number, kept, removed, states, partial(watch.hooks, "kept"))
                watch.take(inputs, seen, self._sensitivities[number].get(self.modules[last]))
                seen += batch_size(inputs)
            self._fits[key] = watch.finish([watch.part()])
            while len(self._fits) > 3 * len(self._order):
                self._fits.popitem(last=False)
        self._fits.move_to_end(key)
        return self._fits[key]

    def _tried(
        self,
        base: Node,
        blocks: Sequence[Block],
        numbers: range,
        change: Change,
    ) -> dict[Block, list[tuple[Tensor, Tensor]]]:
        """Losses and weights of candidates on some batches: each process tries its share."""
        mine, of = self._share

        def work() -> dict[Block, list[tuple[Tensor, Tensor]]]:
            found = {}
            for block in blocks[mine::of]:
                change(base.repairs)
                trial = self._trial(base, block, change)
                change(trial.repairs)
                found[block] = [self._judge(n, trial.removed, base.states, trial.begin) for n in numbers]
            return found

        together = gather(work) if of > 1 else [work()]
        return {block: next(part[block] for part in together if block in part) for block in blocks}

    def _trial(self, base: Node, block: Block, change: Change) -> _Trial:
        removed = base.removed | {block}
        sites, earlier = self._sites(removed), self._sites(base.removed)
        repairs = {kept: healing for kept, healing in base.repairs.items() if kept != block}
        begin = self._position[block]
        for kept, site in sites.items():
            if site != earlier.get(kept):
                repairs.pop(kept, None)
                repairs[kept] = self._fit(site, removed, base.states, change, dict(repairs))
                begin = self._position[kept]
        return _Trial(removed, repairs, begin)

    # ---- passes ----

    def _run_one(
        self,
        number: int,
        block: Block,
        removed: Removed,
        states: Mapping[Block, Sequence[Tensor]],
        hooks: Callable[[], Any],
    ) -> None:
        """Compute one block for a batch."""
        begin = self._position[block]
        known = {each: states[each][number] for each in self._playback.last_known(removed, begin)}
        inputs = self._batch(number)
        self._playback.run(inputs, removed, known=known, begin=begin, end=block, hooks=hooks)

    def _fill(
        self, states: dict[Block, list[Tensor]], removed: Removed, begin: int, stop: int | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Compute the kept blocks from one on, up to that at `stop`, which is left out, for all batches. Without a stop
        the model is judged.
        """
        kept = [block for block in self._order[begin:stop] if block not in removed]
        for block in kept:
            states[block] = []

        def see(block: Block, hidden: Tensor) -> None:
            if block in states and len(states[block]) == number:
                states[block].append(hidden)

        parts = []
        for number in range(len(self._fitting) + len(self._judging)):
            judged = number - len(self._fitting)
            if stop is None and judged >= 0:
                parts.append(self._judge(judged, removed, states, begin, see))
            elif kept:
                known = {block: states[block][number] for block in self._playback.last_known(removed, begin)}
                self._playback.run(self._batch(number), removed, known=known, begin=begin, end=kept[-1], see=see)
        return parts

    def _judge(
        self,
        judged: int,
        removed: Removed,
        states: Mapping[Block, Sequence[Tensor]],
        begin: int,
        see: Callable[[Block, Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses and weights of a batch, computed from a block on."""
        if self._measure is not None:
            value = self._measure(self._smaller(removed))
            return torch.tensor([[value]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        inputs, objective = self._judging[judged], cast(AnswerObjective, self._objective)
        number = judged + len(self._fitting)
        known = {block: states[block][number] for block in self._playback.last_known(removed, begin)}
        hidden = {block[0]: value for block, value in known.items()}

        def note(block: Block, value: Tensor) -> None:
            hidden[block[0]] = value
            if see is not None:
                see(block, value)

        watches = note if objective.needs_hidden or see is not None else None
        labels = objective.needs_labels
        output = self._playback.run(inputs, removed, known=known, begin=begin, see=watches, labels=labels)
        sides = {name: stack.side for name, stack in self.stacks.items()}
        answer = Answer(self.host, inputs, output, hidden, sides)
        if len(self._wanted) <= judged:
            self._wanted.append(objective.wanted(answer))
        return objective.losses(answer, self._wanted[judged])

    def _batch(self, number: int) -> Mapping[str, Any]:
        fits = len(self._fitting)
        return self._fitting[number] if number < fits else self._judging[number - fits]

    @contextmanager
    def _repaired(self) -> Iterator[Change]:
        """Within, call what it gives with the repairs that the model is to have; afterwards it has none."""
        applied: dict[Block, tuple[Healing, Transaction]] = {}

        def change(wanted: Mapping[Block, Healing]) -> None:
            for block in [b for b, (healing, _) in applied.items() if wanted.get(b) is not healing]:
                applied[block][1].roll_back()
                del applied[block]
            for block, healing in wanted.items():
                if block not in applied:
                    transaction = Transaction()
                    applied[block] = healing, transaction
                    apply_healing(healing, self.modules[block], transaction)

        try:
            yield change
        finally:
            _take_back(applied)

    def _account(self) -> None:
        passes = self.passes
        self._tell(passes - self._told)
        self._told = passes


@dataclass(frozen=True, eq=False)
class _Trial:
    """A candidate: what is left out, the repairs then, and from which block on it differs from the known model."""

    removed: Removed
    repairs: Mapping[Block, Healing]
    begin: int


def _take_back(applied: dict[Block, tuple[Healing, Transaction]]) -> None:
    """Take all repairs back, whatever happens: after Ctrl-C in the middle it is gone on with."""
    interrupted: KeyboardInterrupt | None = None
    while applied:
        block = next(iter(applied))
        try:
            applied[block][1].roll_back()
            del applied[block]
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


def _shapes(batch: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a sample's tensors, by name."""
    return {name: tuple(value.shape[1:]) for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}


def _outputs_each(host: Host, inputs: Mapping[str, Any]) -> float:
    """How many outputs a sample has: one of a classifier, one for each token of a language model."""
    try:
        head, *_ = heads_of(host, forward(host, inputs, without_cache=True), inputs)
    except CalibrationError:  # a loss alone
        return 1.0
    return len(head.values) / batch_size(inputs)


def _label(block: Block) -> str:
    return f"{block[0]}.{block[1]}"


def by_stack(removed: Collection[Block]) -> dict[str, list[int]]:
    """Blocks by the stack they are of, in order."""
    found: dict[str, list[int]] = {}
    for name, index in sorted(removed):
        found.setdefault(name, []).append(index)
    return found


def _parts(batches: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The data to fit on, and that to judge by: of each batch a share, of those that cannot be cut some whole ones."""
    fitting, judging = [], []
    share, of = _FIT
    for number, batch in enumerate(batches):
        size = batch_size(batch)
        first = round(size * share / of)
        if is_cuttable(batch) and 0 < first < size:
            fitting.append(cut(batch, range(first)))
            judging.append(cut(batch, range(first, size)))
        else:
            (fitting if number * share % of < share else judging).append(dict(batch))
    return fitting, judging
