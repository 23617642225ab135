"""Weight sparsity on a live model: measure the inputs of its linear maps, zero the weights that matter least, note it
in the record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import Subject, describe
from ..architectures.adapters import is_adapted
from ..architectures.packed import is_quantized
from ..checkpoint.record import PrunedConfig, current_record
from ..core.environment import package_versions
from ..core.offload import holding
from ..core.sentence_encoders import forget_figures
from ..core.transaction import Transaction
from ..errors import CalibrationError, ConfigError, RecordError, UnsupportedModelError
from ..observe.calibration import Calibration
from ..observe.forward import evaluating, require_weights
from .config import WandaConfig
from .input_norms import measured_inputs
from .masks import Zeros, choose_lowest, choose_pattern, zero_chosen
from .matrices import Matrix, find_matrices, matrices_named
from .methods import methods
from .report import MatrixSparsity, SparsityReport

__all__ = ["keep_recorded", "matrices_for", "recorded_mask", "recorded_matrices", "sparsify", "sparsify_model"]


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
    return sparsify(model, calibration, config, progress=progress)


def sparsify(
    model: nn.Module | Subject,
    calibration: Calibration | None,
    config: WandaConfig,
    *,
    progress: bool = True,
    note: Callable[[str, Tensor], None] = lambda name, mask: None,
) -> SparsityReport:
    """`sparsify_model` for one of several processes, whose zeros are the same in all.

    Args:
        note: is given each matrix's name and mask: True where the weight is to be zero, by this or an earlier
            sparsification.
    """
    subject = describe(model)
    host = subject.host
    record = current_record(subject)  # a record that does not fit is refused before any work is done
    matrices = matrices_for(subject, config)
    require_weights(host, UnsupportedModelError, offloaded=True)
    earlier = (record.sparsity or {}).get("matrices", {})
    if not methods.get(config.method).needs_inputs:
        calibration = None
    elif calibration is None:
        raise CalibrationError(
            f"The method {config.method!r} needs calibration data. Give a dataloader, or method='magnitude'."
        )
    own = {matrix.name: matrix for matrix in matrices}
    found: dict[str, MatrixSparsity] = {}
    entry: dict[str, dict[str, int]] = {}
    with Transaction() as transaction:
        with evaluating(host.root):
            for seen, norms in measured_inputs(subject, matrices, calibration, config.sequential, progress):
                samples = seen
                for name, norm in norms.items():
                    matrix = own[name]
                    with holding(matrix.module, transaction=transaction) as elsewhere:
                        weight, mask = matrix.weight.detach(), _chosen(matrix, config, norm)
                        asked = int(mask.sum())
                        if not elsewhere:
                            transaction.on_failure(partial(weight.masked_scatter_, mask, weight[mask]))
                        whole = mask
                        if name in earlier:
                            whole = mask | recorded_mask(matrix, earlier[name]["zeros"])
                        zero_chosen(weight, mask)
                        zeros, size = _zeros(matrix), weight.numel()
                    found[name] = MatrixSparsity(asked, zeros, size, matrix.stack.name, matrix.role)
                    entry[name] = {"zeros": int(whole.sum()), "size": size}
                    note(name, whole)
        found, entry = {name: found[name] for name in own}, {name: entry[name] for name in own}
        sparsity = {"settings": config.to_dict(), "samples": samples, "matrices": {**earlier, **entry}}
        host.own_configs(transaction)
        forget_figures(host.outer, transaction)
        host.set_record(
            dataclasses.replace(record, sparsity=sparsity, versions=record.versions or package_versions()).to_dict()
        )
    return SparsityReport(config, found, samples)


def matrices_for(subject: Subject, config: WandaConfig) -> list[Matrix]:
    """The matrices that the settings mean; a pattern must fit all of them."""
    if is_quantized(subject.root):
        raise UnsupportedModelError(
            f"{subject.name} is quantized: weights that are packed by quantization cannot be zeroed one by one. "
            "Sparsify the model first and quantize it afterwards."
        )
    matrices = find_matrices(subject, config.targets)
    _, size = config.group or (1, 1)
    for matrix in matrices:
        inputs = matrix.rows().shape[1]
        if inputs % size:
            raise ConfigError(
                f"The pattern {config.pattern} needs a number of inputs divisible by {size}, but {matrix.name} has "
                f"{inputs}. Leave it out: targets=[...], patterns of the module paths that are meant. Nothing was "
                "changed."
            )
    return matrices


def recorded_matrices(model: nn.Module | Subject, record: PrunedConfig) -> dict[str, tuple[Matrix, int]]:
    """The matrices that a record lists as sparse, with their number of zeros, which may not be less than it says."""
    entries = (record.sparsity or {}).get("matrices", {})
    own = matrices_named(describe(model), entries)
    found = {}
    for name, entry in entries.items():
        if name not in own or own[name].weight.numel() != entry["size"]:
            what = "lacks it" if name not in own else f"has {own[name].weight.numel():,} there"
            raise RecordError(
                f"The record lists {name!r} with {entry['size']:,} weights as sparse, but the model {what}."
            )
        zeros = _zeros(own[name])
        if zeros < entry["zeros"]:
            raise RecordError(
                f"By the record {entry['zeros']:,} of the {entry['size']:,} weights of {name} are zero, but in the "
                f"model {zeros:,} are: it was trained without WandaCallback, or the record belongs to other weights. "
                "Sparsify it again with sparsify_model."
            )
        found[name] = (own[name], zeros)
    return found


def keep_recorded(zeros: Zeros, model: nn.Module | Subject, record: PrunedConfig) -> bool:
    """Keep the zeros that a record lists, where they are not kept yet; whether it lists any."""
    entries, listed = (record.sparsity or {}).get("matrices", {}), recorded_matrices(model, record)
    for name, (matrix, _) in listed.items():
        if not zeros.holds(matrix.weight):
            zeros.add(matrix.weight, recorded_mask(matrix, entries[name]["zeros"]))
    return bool(listed)


def recorded_mask(matrix: Matrix, count: int) -> Tensor:
    """Which of a matrix's zeros a record means that counts `count` of them: all, as a rule; where there are more, the
    same number in each row, the earlier ones.
    """
    zeros = matrix.rows() == 0
    each, rest = divmod(count, len(zeros))
    chosen = zeros & (zeros.cumsum(dim=1) <= each)
    return matrix.shaped(chosen if rest == 0 and int(chosen.sum()) == count else zeros)


def _chosen(matrix: Matrix, config: WandaConfig, norm: Tensor | None) -> Tensor:
    """The weights of a matrix to zero by their scores, in the shape of its weight."""
    weight = matrix.weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise CalibrationError(
            f"The weights of {matrix.name} hold NaN or infinity, so they cannot be compared. Check the model."
        )
    method, group = methods.get(config.method)(), config.group
    score = method.score(matrix.rows(weight), None if norm is None else norm.to(weight.device))
    return matrix.shaped(choose_lowest(score, config.sparsity) if group is None else choose_pattern(score, *group))


def _zeros(matrix: Matrix) -> int:
    return int((matrix.weight.detach() == 0).sum())
