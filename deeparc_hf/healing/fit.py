"""What is seen of one removal site while the model runs, and the change of the kept block's map that follows."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import Host, Stack
from ..core.block_paths import block_path
from ..core.compat import BatchNorm, parameters_of
from ..errors import CalibrationError
from ..observe.axes import Axes
from ..observe.batches import batch_size
from ..observe.hooks import hidden_states
from .block_ends import Ending, at_home, rows
from .ridge import RidgeSums, fitted, solve, solve_crosswise
from .sites import Healing, Site

__all__ = ["CrossFit", "SiteFit", "SitePart", "in_one_unit"]

_EACH = 5  # each fifth sample is held out
_ZEROS = 0.02  # share of zeros from which on a map is taken for a sparse one, whatever the record says
_RESERVOIR = 8192  # most positions on which the block's output is compared
_MOST = 100.0  # positions of median size that a larger one counts for at most
_EVEN = 0.5  # of its sample's mean, what each position counts for at least
_NO_GAIN = "held-out positions do not come closer to the removed block's output"
_LEAST = 1e-20  # so that where no output hangs on anything, all positions count alike


@dataclass(frozen=True)
class SitePart:
    """What one process has seen of a site; see the attributes of `SiteFit`."""

    reason: str | None
    sums: Mapping[int, RidgeSums | None]
    held: Mapping[int, list[tuple[Tensor, ...]]]
    endings: list[Ending]
    plain: RidgeSums | None
    unit: float | None


@dataclass(frozen=True, eq=False)
class CrossFit:
    """The outcomes at one site where the samples are in folds.

    Attributes:
        folds: for the samples of each fold, fitted on those of the others.
        whole: fitted on all.
    """

    folds: tuple[Healing, ...]
    whole: Healing


class SiteFit:
    """One site while the model runs.

    Args:
        folds: how many the samples are in, for `cross`; None: each fifth is held out, for `finish`.
    """

    def __init__(self, host: Host, stack: Stack, site: Site, folds: int | None = None) -> None:
        self.host = host
        self.stack = stack
        self.site = site
        self.kept, self.last = stack.blocks[site.kept], stack.blocks[site.removed[-1]]
        self.reason: str | None = None
        self.axes: Axes | None = None
        self.endings: list[Ending] = []
        # by fold; without folds 1 are those that are held out
        self.sums: dict[int, RidgeSums | None] = dict.fromkeys(range(folds or 2))
        self.held: dict[int, list[tuple[Tensor, ...]]] = {part: [] for part in self.sums if part or folds}
        self.plain: RidgeSums | None = None  # of all positions alike, where a BatchNorm needs them
        self.strides = dict.fromkeys(self.held, 1)  # of the positions that are kept
        self.seen: dict[str, Tensor] = {}
        self.unit: float | None = None  # the mean sensitivity of the first batch; 0: all positions count alike

    @property
    def module(self) -> nn.Module:
        return self.kept.get_submodule(self.endings[0].map)

    @property
    def has_intercept(self) -> bool:
        paths = (self.endings[0].map, self.endings[0].batch_norm)
        return any(path and getattr(self.kept.get_submodule(path), "bias", None) is not None for path in paths)

    @property
    def needs_last_block(self) -> bool:
        """Whether more is to be seen of the last removed block than what it puts out: the sum before its final norm."""
        return self.endings[1].final is not None

    def show_last_output(self, output: Tensor) -> None:
        """Take note of what the last removed block puts out for a batch, where it is known."""
        self.seen["last output"] = at_home(output)

    def settle(self, endings: Sequence[Ending | str]) -> None:
        """Take note of how the kept and the last removed block end, or why the site is left alone."""
        if self.reason is not None:
            return
        kinds = []
        for index, ending in zip((self.site.kept, self.site.removed[-1]), endings, strict=True):
            if isinstance(ending, str):
                self.reason = f"block {index}: {ending}"
                return
            kinds.append(None if ending.final is None else type(self.stack.blocks[index].get_submodule(ending.final)))
        if kinds[0] is not kinds[1]:
            self.reason = "the kept block and the last removed one end in different ways"
            return
        self.endings = list(endings)
        self.reason = self._obstacle(self.endings[0])

    def orient(self, axes: Axes | str | None) -> None:
        """Take note of what the dimensions of the blocks' outputs mean."""
        if isinstance(axes, str):
            self.reason = axes
        elif axes is not None and axes.samples is None:
            self.reason = "which positions belong to a sample cannot be told, so none can be held out"
        else:
            self.axes = axes

    def _obstacle(self, ending: Ending) -> str | None:
        """Why a map cannot be changed although its block ends as it should."""
        weight = parameters_of(self.module).get("weight")
        if weight is None or not weight.is_floating_point():
            return f"the weight of {ending.map} is not stored as plain numbers"
        if sum(any(p is weight for p in parameters_of(module).values()) for module in self.host.root.modules()) > 1:
            return f"the weight of {ending.map} is tied to another map, which would change too"
        sparsity = (self.host.record() or {}).get("sparsity") or {}
        prefix = f"{self.host.base_prefix}."
        name = block_path(self.stack.name, self.site.kept, ending.map).removeprefix(prefix)
        is_listed = any(name == listed.removeprefix(prefix) for listed in sparsity.get("matrices", {}))
        if is_listed or int((weight == 0).sum()) > _ZEROS * weight.numel():
            return f"{ending.map} holds zeros that a change would fill; heal before weights are zeroed"
        if ending.final is not None and isinstance(self.kept.get_submodule(ending.final), BatchNorm):
            return f"its output comes from {ending.final}, whose statistics are those of its own inputs"
        return None

    def hooks(self, which: str) -> Iterator[Any]:
        """Make hooks that note what the "kept" or the "last" removed block is about."""

        def noting_input(module: nn.Module, name: str) -> Any:
            def note(module: nn.Module, args: Any, kwargs: Any) -> None:
                # a copy: what comes behind may work on it in place
                given = args[0] if args else next(iter(kwargs.values()))
                self.seen[name] = at_home(given.detach()).to(torch.float64, copy=True)

            return module.register_forward_pre_hook(note, with_kwargs=True)

        def note_output(module: nn.Module, args: Any, result: Any) -> None:
            self.seen[f"{which} output"] = at_home(hidden_states(result).detach()).clone()

        block, ending = (self.kept, self.endings[0]) if which == "kept" else (self.last, self.endings[1])
        if which == "kept":
            yield noting_input(self.module, "x")
        if ending.final is not None:
            yield noting_input(block.get_submodule(ending.final), f"{which} sum")
        yield block.register_forward_hook(note_output)

    def take(
        self,
        inputs: Mapping[str, Any],
        first: int,
        sensitivities: Tensor | None = None,
        fold: int | None = None,
    ) -> None:
        """Add what a batch showed to the sums.

        Args:
            first: the number of samples that came before it.
            sensitivities: of the outputs to what the last removed block puts out (`output_sensitivities`), by which
                positions count. None: all count alike.
            fold: which the samples are in; None: each fifth is held out.
        """
        module, scale = self.module, self.endings[0].scale
        assert self.axes is not None and self.axes.samples is not None
        shape = self.seen["kept output"].shape
        mask, unknown = self.axes.mask_of(inputs, shape)
        if unknown:
            self.reason = "its positions are not those of the attention mask, so padding cannot be left out"
            return
        count, size = shape[self.axes.samples], batch_size(inputs)
        numbers = first + torch.arange(count, device=self.seen["x"].device) // max(count // size, 1)
        positions = math.prod(shape) // (shape[self.axes.features] * count)  # of a sample
        part_of = (numbers % _EACH == _EACH - 1).long() if fold is None else torch.full_like(numbers, fold)
        chosen = self.axes.as_put_out(part_of[:, None].expand(count, positions), shape).flatten()
        layout = [size for dimension, size in enumerate(shape) if dimension != self.axes.features]
        x = self.seen["x"]
        own = list((x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x).shape[:-1])
        if own not in (layout, [math.prod(layout)]):
            self.reason = "its last map works on positions in another order than the block puts them out"
            return
        x = rows(x, module)
        outputs = [rows(self.seen[f"{which} output"], module) for which in ("kept", "last")]
        sums = [rows(self.seen.get(f"{which} sum", self.seen[f"{which} output"]), module) for which in ("kept", "last")]
        self.seen = {}
        if sums[0].shape != sums[1].shape:  # SegGPT makes one of two halves of a batch between its blocks
            self.reason = "the last removed block puts out another number of positions than it does"
            return
        valid = torch.ones_like(chosen, dtype=torch.bool) if mask is None else mask.flatten().to(x.device)
        inverse = torch.where(scale.abs() > 1e-6 * scale.abs().max(), 1 / scale, 0.0)
        missing = (sums[1].double() - sums[0].double()) * inverse
        weights = _weights(missing, valid)
        each = torch.arange(count, device=valid.device)[:, None].expand(count, positions)
        more = self._counted(sensitivities, self.axes.as_put_out(each, shape).flatten(), valid)
        if more is not None:
            weights = more if weights is None else weights * more
        for part in self.sums:
            pick = valid & (chosen == part)
            if not bool(pick.any()):
                continue
            chosen_x = x if bool(pick.all()) else x[pick]
            inputs = nn.functional.pad(chosen_x, (0, 1), value=1.0) if self.has_intercept else chosen_x
            wanted, weight = missing[pick], torch.ones_like(inputs[:, :1]) if weights is None else weights[pick, None]
            root = weight.sqrt()
            found = RidgeSums.of(inputs, wanted) if weights is None else RidgeSums.of(inputs * root, wanted * root)
            self.sums[part] = _total([self.sums[part], found])
            if self.endings[0].batch_norm is not None:  # its statistics are of all positions alike
                plain = found if weights is None else RidgeSums.of(inputs, wanted)
                self.plain = _total([self.plain, plain])
            if part in self.held:
                self._keep(part, inputs, sums[0][pick], outputs[0][pick], outputs[1][pick], weight)

    def _counted(self, sensitivities: Tensor | None, samples: Tensor, valid: Tensor) -> Tensor | None:
        """How much positions count, shape (N,): by their sensitivities, and half of the mean of their sample's. The
        unit is left as it is, so that samples whose outputs are decided count for little, in whatever batch.
        """
        if sensitivities is None or self.unit == 0.0:
            # what is not known counts like the mean; where nothing is known at first, all positions count alike
            self.unit = 0.0 if self.unit is None else self.unit
            return None if self.unit == 0.0 else torch.full_like(samples, (1 + _EVEN) * self.unit, dtype=torch.float64)
        size = rows(at_home(sensitivities), self.module)[:, 0].double()
        size = torch.where(valid, size.nan_to_num(0.0, 0.0, 0.0), 0.0)
        sums = torch.zeros(2, int(samples.max()) + 1, dtype=torch.float64, device=size.device)
        sums.index_add_(1, samples, torch.stack([size, valid.double()]))
        mean = float(sums[0].sum() / sums[1].sum().clamp(min=1.0))
        self.unit = mean if self.unit is None and mean > 0 else self.unit
        return size + _EVEN * (sums[0] / sums[1].clamp(min=1.0))[samples] + _LEAST

    def part(self) -> SitePart:
        """What this process has seen, for `finish` and `cross`."""
        return SitePart(self.reason, self.sums, self.held, self.endings, self.plain, self.unit)

    def _keep(self, part: int, *held: Tensor) -> None:
        """Keep positions to compare the block's output on: each so many of every batch, fewer as more come."""
        self.held[part].append(tuple(rows[:: self.strides[part]].float().cpu().contiguous() for rows in held))
        while sum(len(entry[0]) for entry in self.held[part]) > _RESERVOIR // len(self.held):
            self.held[part] = [tuple(rows[::2].clone() for rows in entry) for entry in self.held[part]]
            self.strides[part] *= 2

    def finish(self, parts: Sequence[SitePart]) -> Healing:
        """Solve, and compare the block's output with and without the change on what was held out; then, with the
        strength that was best there, solve for all positions.
        """
        seen = self._together(parts, "Healing needs at least 5 calibration samples: each fifth is held out.")
        if isinstance(seen, str):
            return Healing(self.site, seen)
        fit, held_out = seen.sums[0], seen.sums[1]
        solution = solve(fit, held_out, self.has_intercept)
        found = Healing(self.site, positions=fit.count, strength=solution.strength, ending=self.endings[0])
        found.held_out = _share([self._distances(solution.change, seen.held[1])])
        if solution.change is None or solution.strength is None or found.held_out >= 1.0:
            found.reason = _NO_GAIN
            return found
        together = fit + held_out
        change = fitted(together, self.has_intercept, solution.strength)
        assert change is not None  # the sum is as definite as its parts
        found.positions = together.count
        return self._changed(found, change, seen)

    def cross(self, parts: Sequence[SitePart]) -> CrossFit:
        """Solve for each fold on the samples of the others, and compare the block's output with and without that."""
        seen = self._together(parts, f"No position of the samples in one of {len(self.sums)} folds counts.")
        if isinstance(seen, str):
            return self._alone(Healing(self.site, seen))
        sums = [seen.sums[fold] for fold in self.sums]
        solution = solve_crosswise(sums, self.has_intercept)
        changes = solution.changes or (None,) * len(sums)
        share = _share([self._distances(changes[fold], seen.held[fold]) for fold in self.sums])
        positions = sum(each.count for each in sums)
        known = partial(Healing, self.site, held_out=share, strength=solution.strength, positions=positions)
        if solution.changes is None or solution.whole is None or share >= 1.0:
            return self._alone(known(reason=_NO_GAIN))
        *folds, whole = (
            self._changed(known(ending=self.endings[0]), change, seen) for change in (*solution.changes, solution.whole)
        )
        return CrossFit(tuple(folds), whole)

    def _alone(self, outcome: Healing) -> CrossFit:
        return CrossFit((outcome,) * len(self.sums), outcome)

    def _together(self, parts: Sequence[SitePart], lacking: str) -> _Seen | str:
        """What all processes have seen, or why the site is left alone."""
        parts = in_one_unit(parts)
        reason = next((part.reason for part in parts if part.reason is not None), None)
        if reason is not None:
            return reason
        # of the first process that saw a batch, for all
        self.endings = next(filter(None, (part.endings for part in parts)), [])
        totals = {which: _total([part.sums[which] for part in parts]) for which in self.sums}
        sums = {which: total for which, total in totals.items() if total is not None}
        if len(sums) < len(totals) or not self.endings:
            raise CalibrationError(f"{lacking} Give some hundreds of samples.")
        kept = {which: list(chain.from_iterable(part.held[which] for part in parts)) for which in self.held}
        return _Seen(sums, kept, _total([part.plain for part in parts]))

    def _changed(self, found: Healing, change: Tensor, seen: _Seen) -> Healing:
        """The healing with a change that was fitted."""
        width = len(change) - self.has_intercept
        found.change = change[:width].T.contiguous()
        found.intercept = change[width].clone() if self.has_intercept else None
        final = self.endings[1].final
        if final is not None:
            found.final = {name: p.detach().clone() for name, p in self.last.get_submodule(final).named_parameters()}
        if self.endings[0].batch_norm is not None:
            found.statistics = self._statistics(seen.plain, found.change)
        found.change = found.change.to(self.module.weight.dtype)  # in which it is added
        return found

    def _distances(self, change: Tensor | None, held: Sequence[tuple[Tensor, ...]]) -> tuple[float, float]:
        """Squared distance from the removed block's output on kept positions, without a change and with it."""
        before = after = 0.0
        if change is None:
            return before, after
        ending, change = self.endings[1], change.cpu()
        final = None if ending.final is None else self.last.get_submodule(ending.final)
        with torch.no_grad():
            for inputs, kept_sum, kept_output, target, weight in held:
                changed = kept_sum.double() + (inputs.double() @ change) * self.endings[0].scale.cpu()
                if final is not None:
                    device = next(self.last.parameters())
                    changed = final(changed.float().to(device)).cpu().double()
                before += float((weight * (kept_output.double() - target.double()).square()).sum())
                after += float((weight * (changed - target.double()).square()).sum())
        return before, after

    def _statistics(self, sums: RidgeSums, change: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the changed map's output, for the BatchNorm behind it."""
        width = change.shape[1]
        weight = self.module.weight.detach().double().flatten(1).to(change.device) + change
        total = sums.inputs[-1, -1]  # of the constant 1
        mean = sums.inputs[-1, :width] / total
        covariance = sums.inputs[:width, :width] / total - torch.outer(mean, mean)
        return weight @ mean, ((weight @ covariance) * weight).sum(dim=1)


@dataclass(frozen=True)
class _Seen:
    """What all processes have seen of a site."""

    sums: Mapping[int, RidgeSums]
    held: Mapping[int, list[tuple[Tensor, ...]]]
    plain: RidgeSums | None


def _share(distances: Sequence[tuple[float, float]]) -> float:
    """What is left of the squared distance."""
    before, after = (sum(values) for values in zip(*distances, strict=True))
    return after / before if before > 0 else 1.0


def _weights(missing: Tensor, valid: Tensor) -> Tensor | None:
    """How much each position counts, shape (N,), of what is missing at it, (N, D); None: all alike.

    In some models a few positions are larger by orders of magnitude (the first token of a causal model, on which
    attention rests: Sun et al. 2024, arXiv 2402.17762). Their squares would leave the others no say: they count less.
    """
    if not bool(valid.any()):
        return None
    size = missing.square().sum(dim=1)
    most = _MOST * size[valid].median()
    return (most / size).clamp(max=1.0) if 0 < most < size[valid].max() else None


def in_one_unit(parts: Sequence[SitePart]) -> list[SitePart]:
    """Where only some processes know how much positions count, those of the others count like their mean."""
    units = [part.unit for part in parts if part.unit]
    if not units:
        return list(parts)
    factor = (1 + _EVEN) * sum(units) / len(units)
    return [part if part.unit != 0.0 else _weighed(part, factor) for part in parts]


def _weighed(part: SitePart, factor: float) -> SitePart:
    sums = {held: None if known is None else known * factor for held, known in part.sums.items()}
    kept = {which: [(*rows, weight * factor) for *rows, weight in held] for which, held in part.held.items()}
    return dataclasses.replace(part, sums=sums, held=kept)


def _total(parts: Sequence[RidgeSums | None]) -> RidgeSums | None:
    found = [part for part in parts if part is not None]
    return reduce(operator.add, found) if found else None
