"""Weight sparsity on a live model: measure the inputs of its linear maps, zero the weights that matter least, note it
in the record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import Host, Stack, Subject, describe
from ..architectures.hosts import is_adapted
from ..checkpoint.record import PrunedConfig, current_record
from ..core.environment import package_versions
from ..core.progress_bars import bar
from ..core.transaction import Transaction
from ..errors import CalibrationError, ConfigError, RecordError, UnsupportedModelError
from ..observe.axes import Axes
from ..observe.batches import batch_size
from ..observe.calibration import Calibration
from ..observe.forward import evaluating, forward, require_weights
from ..observe.rows import with_axes
from .config import WandaConfig
from .input_norms import InputNorms, finished_norms, warn_unmasked
from .masks import choose_lowest, choose_pattern, zero_chosen
from .matrices import Matrix, find_matrices, matrices_named
from .methods import SparsityMethod, methods
from .report import MatrixSparsity, SparsityReport
from .sequential import block_by_block

__all__ = ["matrices_for", "recorded_mask", "recorded_matrices", "sparsify", "sparsify_model"]


_MEASURING = "Measuring inputs"


def sparsify_model(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    config: WandaConfig | None = None,
    *,
    progress: bool = True,
    **settings: Any,
) -> SparsityReport:
    """Zero the weights that matter least in the linear maps of every block, in place, all or nothing.

    Wanda (Sun et al. 2023, arXiv 2306.11695): the score of a weight is its size times the L2 norm of the input that it
    meets, over all unpadded calibration positions; in each output row the int(inputs * sparsity) lowest scores go, or
    all but N of each M consecutive ones. Linear, GPT-2's Conv1D and convolutions (an input is a channel at a kernel
    position) of the blocks that `find_stacks` finds are sparsified; embeddings, heads, norms and stems are left alone.
    The zeros are zeros in a dense tensor: they save neither space nor time.

    Args:
        model: a model that `find_stacks` knows.
        dataloader: batches, as for `analyze`; None for methods that need no data ("magnitude"). Up to
            `config.calibration_samples` samples are used. Use training data, never the data you evaluate on.
        config: the settings; or give them by keyword: `sparsify_model(model, dataloader, sparsity=0.3)`.
        progress: show a progress bar on a terminal.

    Returns:
        What was asked for and what was measured, for each matrix. The model carries it in its record.

    Raises:
        CalibrationError: if there is no data, or the inputs of a map are not finite or never seen.
        ConfigError: if a target matches nothing, or a pattern does not fit a map.
        UnsupportedModelError: if a map's weights cannot be zeroed one by one (fused experts, quantized, tied, sharded).
    """
    config = WandaConfig.from_settings(config, settings)
    if isinstance(model, nn.Module) and is_adapted(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} carries PEFT adapters, and the zeros would be filled when they are merged. Merge "
            "them first: model.merge_and_unload(). Or sparsify the model before the adapters are added, and merge "
            "with merge_keeping_zeros."
        )
    calibration = None if dataloader is None else Calibration(dataloader, config.calibration_samples)
    return sparsify(model, calibration, config, progress=progress)[0]


def sparsify(
    model: nn.Module | Subject,
    calibration: Calibration | None,
    config: WandaConfig,
    *,
    progress: bool = True,
) -> tuple[SparsityReport, dict[str, Tensor]]:
    """`sparsify_model` for one of several processes, whose zeros are the same in all.

    Args:
        calibration: the data; None for a method that needs none.

    Returns:
        The report, and the masks by matrix: True where the weight is to be zero, by this or by an earlier
        sparsification.
    """
    subject = describe(model)
    host = subject.host
    record = current_record(subject)  # a record that does not fit is refused before any work is done
    matrices = matrices_for(subject, config)
    require_weights(host, UnsupportedModelError)
    earlier = (record.sparsity or {}).get("matrices", {})
    work = _Work(host, config, calibration, progress, earlier)
    with Transaction() as transaction:
        work.transaction = transaction
        samples = 0
        with evaluating(host.root):
            if not work.method.needs_inputs:
                work.choose(matrices, None)
            else:
                samples = work.with_inputs(subject.stacks, matrices)
        measured = {m.name: MatrixSparsity.measured(m, work.asked[m.name]) for m in matrices}
        entry = {name: {"zeros": int(mask.sum()), "size": mask.numel()} for name, mask in work.masks.items()}
        sparsity = {"settings": config.to_dict(), "samples": samples, "matrices": {**earlier, **entry}}
        host.own_configs(transaction)
        host.set_record(
            dataclasses.replace(record, sparsity=sparsity, versions=record.versions or package_versions()).to_dict()
        )
    return SparsityReport(config, measured, samples), work.masks


def matrices_for(subject: Subject, config: WandaConfig) -> list[Matrix]:
    """The matrices that the settings mean.

    Raises:
        ConfigError, UnsupportedModelError: as `find_matrices`, and if a pattern does not fit one of them.
    """
    matrices = find_matrices(subject, config.targets)
    for matrix in matrices if config.group is not None else ():
        inputs, size = matrix.rows().shape[1], (config.group or (1, 1))[1]
        if inputs % size:
            raise ConfigError(
                f"The pattern {config.pattern} needs a number of inputs divisible by {size}, but {matrix.name} has "
                f"{inputs}. Leave it out: targets=[...], patterns of the module paths that are meant. Nothing was "
                "changed."
            )
    return matrices


def recorded_matrices(model: nn.Module | Subject, record: PrunedConfig) -> dict[str, tuple[Matrix, int]]:
    """The matrices that a record lists as sparse, with their number of zeros.

    Raises:
        RecordError: if the model lacks one, or has fewer zeros in it than the record says.
    """
    entries = (record.sparsity or {}).get("matrices", {})
    own = matrices_named(describe(model), entries)
    found = {}
    for name, entry in entries.items():
        if name not in own or own[name].weight.numel() != entry["size"]:
            what = "lacks it" if name not in own else f"has {own[name].weight.numel():,} there"
            raise RecordError(
                f"The record lists {name!r} with {entry['size']:,} weights as sparse, but the model {what}."
            )
        zeros = int((own[name].weight.detach() == 0).sum())
        if zeros < entry["zeros"]:
            raise RecordError(
                f"By the record {entry['zeros']:,} of the {entry['size']:,} weights of {name} are zero, but in the "
                f"model {zeros:,} are: it was trained without WandaCallback, or the record belongs to other weights. "
                "Sparsify it again with sparsify_model."
            )
        found[name] = (own[name], zeros)
    return found


def recorded_mask(matrix: Matrix, count: int) -> Tensor:
    """Which of a matrix's zeros a record means that counts `count` of them.

    All of them, as a rule. Where there are more, as in a matrix that was zero from the start, the record means as many
    in each row, and the earlier ones, as they are chosen.
    """
    zeros = matrix.rows() == 0
    each, rest = divmod(count, len(zeros))
    chosen = zeros & (zeros.cumsum(dim=1) <= each)
    return matrix.shaped(chosen if rest == 0 and int(chosen.sum()) == count else zeros)


class _Work:
    """One sparsification: measures, chooses, zeroes; `transaction` brings the weights back if it fails."""

    def __init__(
        self,
        host: Host,
        config: WandaConfig,
        calibration: Calibration | None,
        progress: bool,
        earlier: Mapping[str, Any],
    ) -> None:
        self.method: SparsityMethod = methods.get(config.method)()
        self.masks: dict[str, Tensor] = {}
        self.asked: dict[str, int] = {}
        self.transaction = Transaction()
        self._host = host
        self._config = config
        self._earlier = earlier
        self._calibration = calibration
        self._progress = progress
        self._unmasked: set[str] = set()
        self._axes: Mapping[str, Axes | str] = {}

    def with_inputs(self, stacks: Mapping[str, Stack], matrices: Sequence[Matrix]) -> int:
        """Choose by the inputs that the calibration data brings; returns the number of samples over all processes."""
        if self._calibration is None:
            raise CalibrationError(
                f"The method {self._config.method!r} needs calibration data. Give a dataloader, or method='magnitude'."
            )
        samples = (
            self._block_by_block(stacks, matrices, self._calibration)
            if self._config.sequential
            else self._at_once(matrices, self._calibration)
        )
        warn_unmasked(self._unmasked)
        return samples

    def choose(self, matrices: Sequence[Matrix], norms: Mapping[str, Tensor] | None) -> None:
        """Choose the weights of some matrices by their scores, and zero them."""
        group = self._config.group
        for matrix in matrices:
            weight = matrix.weight.detach()
            if not bool(torch.isfinite(weight).all()):
                raise CalibrationError(
                    f"The weights of {matrix.name} hold NaN or infinity, so they cannot be compared. Check the model."
                )
            norm = None if norms is None else norms[matrix.name].to(weight.device)
            score = self.method.score(matrix.rows(weight), norm)
            chosen = choose_lowest(score, self._config.sparsity) if group is None else choose_pattern(score, *group)
            mask = matrix.shaped(chosen)
            known = recorded_mask(matrix, self._earlier[matrix.name]["zeros"]) if matrix.name in self._earlier else None
            self.transaction.on_failure(partial(_bring_back, weight, mask, weight[mask]))
            zero_chosen(weight, mask)
            self.masks[matrix.name], self.asked[matrix.name] = (
                mask | known if known is not None else mask,
                int(mask.sum()),
            )

    def _at_once(self, matrices: Sequence[Matrix], calibration: Calibration) -> int:
        def look() -> tuple[int, dict[str, Tensor]]:
            seen = 0
            stacks = {matrix.stack.name: matrix.stack for matrix in matrices}
            batches, axes = with_axes(self._host, stacks.values(), calibration.inputs(self._host))
            norms = InputNorms(matrices, axes)
            with norms.observing(), calibration.bar(_MEASURING, self._progress) as advance:
                for inputs in batches:
                    norms.batch(inputs)
                    forward(self._host, inputs)
                    seen += batch_size(inputs)
                    advance(batch_size(inputs))
            self._unmasked |= norms.unmasked
            return seen, norms.sums()

        parts = calibration.together(look)
        samples = _require_samples(sum(part[0] for part in parts))
        self.choose(matrices, finished_norms(matrices, [part[1] for part in parts]))
        return samples

    def _block_by_block(self, stacks: Mapping[str, Stack], matrices: Sequence[Matrix], calibration: Calibration) -> int:
        batches: list[dict[str, Any]] = []

        def collect() -> int:
            # kept where they came from rather than on the accelerator
            batches.extend(_on_cpu(inputs) for inputs in calibration.inputs(self._host))
            return sum(map(batch_size, batches))

        samples = _require_samples(sum(calibration.together(collect)))
        device = next(self._host.root.parameters()).device
        _, self._axes = with_axes(self._host, stacks.values(), (_to(device, inputs) for inputs in batches[:1]))
        with bar(_MEASURING, self._progress, len({(m.stack.name, m.block) for m in matrices}), "block") as shown:
            for stack in stacks.values():
                own = [matrix for matrix in matrices if matrix.stack.name == stack.name]
                if own:
                    visit = partial(self._visit, own, shown, calibration)
                    last = max(matrix.block for matrix in own)
                    block_by_block(self._host, stack, batches, partial(_to, device), visit, last, calibration.together)
        return samples

    def _visit(
        self,
        own: Sequence[Matrix],
        shown: Any,
        calibration: Calibration,
        index: int,
        passes: Callable[[], Iterator[tuple[Mapping[str, Any], Callable[[], Any]]]],
    ) -> None:
        here = [matrix for matrix in own if matrix.block == index]
        if not here:
            return
        norms = InputNorms(here, self._axes)

        def look() -> dict[str, Tensor]:
            with norms.observing():
                for inputs, run in passes():
                    norms.batch(inputs)
                    run()
            return norms.sums()

        parts = calibration.together(look)
        self._unmasked |= norms.unmasked
        self.choose(here, finished_norms(here, parts))
        shown.update()


def _bring_back(weight: Tensor, mask: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        weight[mask] = values


def _require_samples(samples: int) -> int:
    if samples == 0:
        raise CalibrationError(
            "The calibration data gave no samples. Give a dataloader that is not empty; an iterator can be used only "
            "once."
        )
    return samples


def _on_cpu(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Copies: a data loader may fill the same tensors again."""
    return {key: value.to("cpu", copy=True) if isinstance(value, Tensor) else value for key, value in inputs.items()}


def _to(device: torch.device, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
