"""What a search works with: models with blocks left out and the kept ones healed, and how good they are.

The data is in folds. Each sample runs through a model whose repairs were fitted on the other folds, and is judged so:
all samples judge, and none by a repair that has seen it (cross-fitting: Chernozhukov et al. 2018, doi
10.1111/ectj.12097). The repairs of the model that is made in the end are fitted on all. What every block puts out is
kept for all samples, so that a model which differs from a known one from some block on is computed from there. A repair
depends on what is removed before it alone, and is shared by all models that begin alike.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..architectures import Host, Subject
from ..core.copies import independent_copy
from ..core.distributed import gather, process_count, process_index
from ..core.offload import holding
from ..core.shards import moves_together
from ..core.transaction import Transaction
from ..errors import CalibrationError
from ..healing.block_ends import Ending
from ..healing.fit import CrossFit, SiteFit
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

__all__ = ["FOLDS", "SENSITIVITY_PASSES", "Node", "Removed", "Workbench", "by_stack"]

Removed = frozenset[Block]
States = Mapping[Block, Sequence[Tensor]]
Change = Callable[[Mapping[Block, Healing]], None]  # gives the model these repairs, and no others

logger = logging.getLogger(__name__)

SENSITIVITY_PASSES = 2.0  # of a forward and backward pass without gradients of weights (measured: 2.0 to 2.1)
FOLDS = 4  # a repair is fitted on three quarters of the samples: on fewer, models with many of them would look worse
_ROUGH = 8  # of the samples one in so many comes first,
_ROUGH_OUTPUTS = 64  # or as many as have so many outputs: fewer would tell too little of a classifier;
_LEFT = 3  # so many candidates at least stay, else the better half, for each doubling of the samples
MEMORY = 4 * 10**9  # bytes, for what blocks put out,
_MEMORY_OF_FITS = 10**9  # and for repairs that may be wanted again


@dataclass(eq=False)
class Node:
    """A model with blocks left out, and the kept ones before them repaired.

    Attributes:
        removed: the blocks that are left out.
        score: how good it is.
    """

    removed: Removed
    score: Score
    _make: Callable[[], tuple[Mapping[Block, CrossFit], States]]

    @cached_property
    def _made(self) -> tuple[Mapping[Block, CrossFit], States]:
        return self._make()

    @property
    def repairs(self) -> Mapping[Block, CrossFit]:
        """By the kept block that changes, how."""
        return self._made[0]

    @property
    def states(self) -> States:
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
        seconds: that a forward pass over them took.
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
        # where each process holds a part of the weights, all try each candidate
        apart = shared and not moves_together(self.host.root)
        self._share = (process_index(), process_count()) if apart else (0, 1)
        first = cut(batches[0], 2)
        self._playback = Playback.of(self.host, self.stacks, first)
        self._outputs_each = _outputs_each(self.host, first)
        self._batches, self._folds = _in_folds(self._that_fit(batches)) if heals else (self._that_fit(batches), [])
        if not self._batches or (heals and len(set(self._folds)) < FOLDS):
            raise CalibrationError(
                f"A search needs more samples: repairs are fitted on some and judged by others, in {FOLDS} turns. Give "
                "some hundreds."
            )
        # `measure` has data of its own
        self._judging = range(len(self._batches) if self._measure is None else 1)
        self.samples = sum(map(batch_size, self._batches))
        self._order = self._playback.order
        self._position = {block: number for number, block in enumerate(self._order)}
        self._fits: OrderedDict[tuple[Removed, Site], CrossFit] = OrderedDict()
        self._told = 0.0
        modules = list(self._playback.modules.values())
        self._endings = find_endings(self.host, modules, first) if heals else {}
        self._axes = find_axes(self.host, list(self.stacks.values()), first) if heals else {}
        self._wanted: dict[int, Any] = {}
        start = time.perf_counter()
        self.root = self._whole()
        self.seconds = time.perf_counter() - start
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
        return cut(self._batches[0], 2)

    def make(self, node: Node) -> nn.Module:
        """A model as a copy, with the blocks really removed and the kept ones repaired."""
        with self._repaired() as change:
            change({block: fit.whole for block, fit in node.repairs.items()})
            return self._smaller(node.removed)

    def _smaller(self, removed: Removed) -> nn.Module:
        """A copy of the model as it is now, without blocks; the model itself where none are named."""
        if not removed:
            return self.subject.root
        smaller = independent_copy(self.subject.root)
        remove_blocks(smaller, by_stack(removed), example=self.example)
        return smaller

    def follow(self, removed: Removed, base: Node) -> Node:
        """The model with these blocks left out, from a known one: repairs are fitted one after another, each on what
        the model gives with those before it.
        """
        if removed == base.removed:
            return base
        known = self._journal.get("follow", removed, ["score"])
        if known is not None:
            return Node(removed, known["score"], lambda: self._followed(removed, base)[1:])
        made: list[Any] = []

        def work() -> Score:
            score, *rest = self._followed(removed, base)
            made.extend(rest)
            return score

        # the first process's: rounding may differ from one process to another, and decisions must not
        score = gather(work)[0] if self._share[1] > 1 else work()
        self._journal.put("follow", removed, {"score": score})
        return Node(removed, score, lambda: (made[0], made[1]))

    def _followed(self, removed: Removed, base: Node) -> tuple[Score, dict[Block, CrossFit], dict[Block, list[Tensor]]]:
        sites, earlier = self._sites(removed), self._sites(base.removed)
        differ = [b for b in self._order if (b in removed) != (b in base.removed) or sites.get(b) != earlier.get(b)]
        here = self._position[differ[0]]
        # of a base that is known from a journal alone they are computed now, before the model is repaired
        states = {block: list(kept) for block, kept in base.states.items() if self._position[block] < here}
        repairs = {block: healing for block, healing in base.repairs.items() if self._position[block] < here}
        with self._repaired() as change:
            for block in [block for block in self._order[here:] if block in sites]:
                self._fill(states, removed, here, self._position[block], repairs, change)
                repairs[block] = self._fit(sites[block], removed, states, change, dict(repairs))
                here = self._position[block]
            parts = self._fill(states, removed, here, None, repairs, change)
        self._account()
        return Score.of(parts), repairs, states

    def screen(self, base: Node, blocks: Collection[Block]) -> dict[Block, Score]:
        """How good a known model is without one more block, for each of several; those that look bad on the first
        samples are judged by these alone (successive halving: Jamieson and Talwalkar 2016, arXiv 1502.07943). Repairs
        behind the block stay those of the known model.
        """
        known = self._journal.get("screen", base.removed, list(map(_label, blocks)), blocks)
        if known is not None:
            return {block: known[_label(block)] for block in blocks}
        base.states  # noqa: B018  computed now, if that is still to be done: below the model is repaired
        parts: dict[Block, list[tuple[Tensor, Tensor]]] = {block: [] for block in blocks}
        left, start = list(blocks), 0
        mine = set(left[self._share[0] :: self._share[1]])  # the same in all rounds: fits are kept
        with self._repaired() as change:
            for end in self._rounds():
                tried = self._tried(base, left, mine, self._judging[start:end], change)
                for block, found in tried.items():
                    parts[block] += found
                left.sort(key=lambda block: Score.of(parts[block]).value)
                left, start = left[: max(_LEFT, len(left) // 2)], end
        self._account()
        scores = {block: Score.of(found) for block, found in parts.items()}
        self._journal.put("screen", base.removed, {_label(block): score for block, score in scores.items()}, blocks)
        return scores

    def _rounds(self) -> list[int]:
        """How many of the batches candidates are judged by, round after round: successive halving."""
        rounds, count = [], len(self._judging)
        end = self._rough()
        while end < count:
            rounds.append(end)
            end *= 2
        return [*rounds, count]

    def _rough(self) -> int:
        """How many of the batches come first."""
        outputs = 0.0
        for number in self._judging:
            outputs += batch_size(self._batches[number]) * self._outputs_each
            if outputs >= _ROUGH_OUTPUTS and number + 1 >= len(self._judging) // _ROUGH:
                return number + 1
        return len(self._judging)

    def complete(self, scores: Mapping[Block, Score]) -> dict[Block, Score]:
        """Those that were judged on all samples, the best first."""
        most = max((score.samples for score in scores.values()), default=0)
        full = {block: score for block, score in scores.items() if score.samples == most}
        return dict(sorted(full.items(), key=lambda entry: entry[1].value))

    def _that_fit(self, batches: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The first batches, as many as memory is meant for: what all blocks and the model put out is kept for them."""
        taken: list[Mapping[str, Any]] = []
        size, each = 0.0, 0.0
        for batch in batches:
            if not taken or _shapes(batch) != _shapes(taken[-1]):
                each = self._bytes_of(cut(batch, 1))
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
        """What is kept of a sample: what all blocks put out in the whole model, and in the one at hand; and what the
        whole one puts out.
        """
        seen: list[int] = []

        def note(block: Block, hidden: Tensor) -> None:
            seen.append(hidden.numel() * hidden.element_size())

        output = self._playback.run(batch, see=note)
        kept = 2 * sum(seen)
        if isinstance(self._objective, AnswerObjective) and self._objective.keeps_outputs:
            heads = heads_of(self.host, output, batch)
            kept += sum(head.values.numel() * head.values.element_size() for head in heads)
        return kept / max(batch_size(batch), 1)

    # ---- one step ----

    def _whole(self) -> Node:
        states: dict[Block, list[Tensor]] = {}
        parts = self._fill(states, frozenset(), 0, None, {}, lambda wanted: None)
        self._account()
        return Node(frozenset(), Score.of(parts), lambda: ({}, states))

    def _differentiated(self) -> list[Mapping[nn.Module, Tensor]]:
        """For each batch, how sensitive the whole model's outputs are to what blocks put out; nothing where that cannot
        be told.
        """
        found: list[Mapping[nn.Module, Tensor]] = []
        axes = {name: axes.features for name, axes in self._axes.items() if isinstance(axes, Axes)}
        blocks = {
            module: axes[block[0]]
            for block, module in self.modules.items()
            if block[0] in axes and isinstance(self._endings.get(module), Ending)
        }
        for inputs in self._batches if blocks else ():
            if found and not found[0]:  # where the first batch's are not found, no other's count
                found.append({})
                continue
            found.append(output_sensitivities(self.host, blocks, inputs) or {})
            self._playback.done[0] += round(SENSITIVITY_PASSES * len(self._order) * batch_size(inputs))
        self._account()
        if self._share[1] > 1:  # what one process could not find out, none goes by: repairs are the same in all
            known = gather(lambda: [bool(each) for each in found])
            found = [each if all(flags) else {} for each, *flags in zip(found, *known, strict=True)]
        return found or [{}] * len(self._batches)

    def _sites(self, removed: Removed) -> dict[Block, Site]:
        """The removal sites by their kept blocks; none where nothing is repaired."""
        return {(site.stack, site.kept): site for site in sites_of(by_stack(removed))} if self._heals else {}

    def _fit(
        self,
        site: Site,
        removed: Removed,
        states: States,
        change: Change,
        repairs: Mapping[Block, CrossFit],
    ) -> CrossFit:
        """The repair at a site, with those before it; `states` reach up to it."""
        kept = site.stack, site.kept
        before = frozenset(block for block in removed if self._position[block] < self._position[kept])
        key = before, site
        if key not in self._fits:
            stack = self.stacks[site.stack]
            watch = SiteFit(self.host, stack, site, folds=FOLDS)
            change({})  # what is missing is missing in blocks without repairs
            with holding(watch.kept, watch.last):
                self._fits[key] = self._look(watch, removed, states, change, repairs)
            while len(self._fits) > 1 and sum(map(_bytes_of_fit, self._fits.values())) > _MEMORY_OF_FITS:
                self._fits.popitem(last=False)
        self._fits.move_to_end(key)
        return self._fits[key]

    def _look(
        self, watch: SiteFit, removed: Removed, states: States, change: Change, repairs: Mapping[Block, CrossFit]
    ) -> CrossFit:
        """What all batches show of a site."""
        site = watch.site
        kept, last = (site.stack, site.kept), (site.stack, site.removed[-1])
        watch.settle([self._endings[self.modules[block]] for block in (kept, last)])
        watch.orient(self._axes.get(site.stack))
        seen = 0
        for number, inputs in enumerate(self._batches):
            if watch.reason is not None:
                break
            if watch.needs_last_block:
                if not self._playback.can_begin_anywhere:  # the pass goes through the blocks that are repaired
                    change({})
                self._run_one(number, last, frozenset(), self.root.states, partial(watch.hooks, "last"))
            else:
                watch.show_last_output(self.root.states[last][number])
            if not self._playback.can_begin_anywhere:
                change(self._applied(repairs, number))
            self._run_one(number, kept, removed, states, partial(watch.hooks, "kept"))
            sensitive = self._sensitivities[number].get(self.modules[last])
            watch.take(inputs, seen, sensitive, fold=self._folds[number])
            seen += batch_size(inputs)
        return watch.cross([watch.part()])

    def _applied(self, repairs: Mapping[Block, CrossFit], number: int) -> dict[Block, Healing]:
        """What repairs do to the model that a batch runs through."""
        if self._measure is not None:  # what is judged is no answer to a batch
            return {block: fit.whole for block, fit in repairs.items()}
        return {block: fit.folds[self._folds[number]] for block, fit in repairs.items()}

    def _in_turns(self, numbers: Sequence[int], repairs: Mapping[Block, CrossFit], change: Change) -> Iterator[int]:
        """Some batches, one fold after the other; the model is repaired for each."""
        for number in sorted(numbers, key=lambda each: self._folds[each] if self._folds else 0):
            change(self._applied(repairs, number))
            yield number

    def _tried(
        self,
        base: Node,
        blocks: Sequence[Block],
        mine: Collection[Block],
        numbers: Sequence[int],
        change: Change,
    ) -> dict[Block, list[tuple[Tensor, Tensor]]]:
        """Losses and weights of candidates on some batches; each process tries those that are its own."""

        def work() -> dict[Block, list[tuple[Tensor, Tensor]]]:
            found = {}
            for block in (block for block in blocks if block in mine):
                trial = self._trial(base, block, change)
                judged = {
                    number: self._judge(number, trial.removed, base.states, trial.begin, change)
                    for number in self._in_turns(numbers, trial.repairs, change)
                }
                found[block] = [judged[number] for number in numbers]
            return found

        together = gather(work) if self._share[1] > 1 else [work()]
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
        states: States,
        hooks: Callable[[], Any],
    ) -> None:
        """Compute one block for a batch."""
        begin = self._position[block]
        known = {each: states[each][number] for each in self._playback.last_known(removed, begin)}
        self._playback.run(self._batches[number], removed, known=known, begin=begin, end=block, hooks=hooks)

    def _fill(
        self,
        states: dict[Block, list[Tensor]],
        removed: Removed,
        begin: int,
        stop: int | None,
        repairs: Mapping[Block, CrossFit],
        change: Change,
    ) -> list[tuple[Tensor, Tensor]]:
        """Compute the kept blocks from one on, up to that at `stop`, which is left out, for all batches. Without a stop
        the model is judged.
        """
        kept = [block for block in self._order[begin:stop] if block not in removed]
        made: dict[Block, dict[int, Tensor]] = {block: {} for block in kept}

        def see(block: Block, hidden: Tensor) -> None:
            if block in made:
                made[block].setdefault(number, hidden)

        parts = {}
        for number in self._in_turns(range(len(self._batches)), repairs, change):
            judges = stop is None and number in self._judging
            if judges:
                parts[number] = self._judge(number, removed, states, begin, change, see)
            if kept and not (judges and self._measure is None):  # to measure a model is no pass over the batch
                change(self._applied(repairs, number))
                known = {block: states[block][number] for block in self._playback.last_known(removed, begin)}
                self._playback.run(self._batches[number], removed, known=known, begin=begin, end=kept[-1], see=see)
        states.update({block: [found[number] for number in sorted(found)] for block, found in made.items()})
        return [parts[number] for number in sorted(parts)]

    def _judge(
        self,
        number: int,
        removed: Removed,
        states: States,
        begin: int,
        change: Change,
        see: Callable[[Block, Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses and weights of a batch, computed from a block on; a model that was measured is left without repairs:
        what measures it may look at the whole one too.
        """
        if self._measure is not None:
            smaller = self._smaller(removed)
            change({})
            value = self._measure(smaller)
            return torch.tensor([[value]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        inputs, objective = self._batches[number], cast(AnswerObjective, self._objective)
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
        if number not in self._wanted:
            self._wanted[number] = objective.wanted(answer)
        return objective.losses(answer, self._wanted[number])

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
                    held = ExitStack()
                    transaction.on_failure(held.close)  # last, when the weights are as before
                    held.enter_context(holding(self.modules[block]))
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
    repairs: Mapping[Block, CrossFit]
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


def _bytes_of_fit(fit: CrossFit) -> int:
    changes = [each.change for each in {id(each): each for each in (*fit.folds, fit.whole)}.values()]
    return sum(change.numel() * change.element_size() for change in changes if change is not None)


def _label(block: Block) -> str:
    return f"{block[0]}.{block[1]}"


def by_stack(removed: Collection[Block]) -> dict[str, list[int]]:
    """Blocks by the stack they are of, in order."""
    found: dict[str, list[int]] = {}
    for name, index in sorted(removed):
        found.setdefault(name, []).append(index)
    return found


def _in_folds(batches: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[int]]:
    """Batches, and the fold that each is in: in turn. Where they are few, each is cut into a part for every fold, if it
    can be.
    """
    found: list[Mapping[str, Any]] = []
    for batch in batches:
        each, left = divmod(batch_size(batch), FOLDS)
        if len(batches) < 2 * FOLDS and each and is_cuttable(batch):
            ends = [each * number + min(number, left) for number in range(FOLDS + 1)]
            found += [cut(batch, range(*pair)) for pair in pairwise(ends)]
        else:
            found.append(batch)
    return found, [number % FOLDS for number in range(len(found))]
