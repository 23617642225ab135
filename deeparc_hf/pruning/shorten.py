"""Tensors outside of the blocks lose the parts of those that go (`architectures.per_block`), in place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain

from torch import Tensor
from torch.distributed.tensor import DTensor

from ..architectures import Layout, Subject
from ..architectures.packed import is_quantized
from ..architectures.per_block import PerBlockTensor, left_by_path
from ..core.offload import is_offloaded
from ..core.transaction import Transaction
from ..errors import DeepArcWarning, SurgeryError
from .rebuild import Builds
from .verify import Expectation

__all__ = ["Shortening"]


class Shortening:
    """What a removal takes out of tensors outside of the blocks of a live model; nothing where it drops blocks of a
    whole one (`pruned_type`), which keeps those tensors.

    Raises:
        SurgeryError: if their weights are not all here, or packed.
    """

    def __init__(self, subject: Subject, step: Layout, builds: Builds) -> None:
        self._label = subject.name
        self._left: Mapping[str, tuple[PerBlockTensor, int, Sequence[int]]] = (
            {} if builds.by_package else left_by_path(subject.per_block, step)
        )
        root = subject.host.bare
        found = dict(chain(root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False)))
        self._tensors = {path: found[path] for path in self._left}
        sharded = any(isinstance(tensor, DTensor) for tensor in self._tensors.values())
        if self._tensors and is_quantized(subject.root):
            raise SurgeryError(
                f"{next(iter(self._left))} of {self._label} has a part for each block, and the model is quantized. "
                "Prune it before it is quantized. Nothing was changed."
            )
        if self._tensors and (sharded or is_offloaded(root)):
            raise SurgeryError(
                f"{next(iter(self._left))} of {self._label} has a part for each block, and not all of its weights are "
                "here (they are offloaded or sharded). Load the model whole, on one device, and remove the blocks "
                "there. Nothing was changed."
            )
        self._whole = {path: tensor.detach() for path, tensor in self._tensors.items()}

    @property
    def tensors(self) -> list[Tensor]:
        """Those that become shorter. They stay the same objects, so that an optimizer still knows them."""
        return list(self._tensors.values())

    def fewer(self) -> dict[int, int]:
        """By the `id` of a tensor, how many numbers it loses."""
        return {
            id(self._tensors[path]): whole.numel() - math.prod(tensor.shape_left(whole.shape, length, len(kept)))
            for path, (tensor, length, kept) in self._left.items()
            for whole in (self._whole[path],)
        }

    def carry_out(self, transaction: Transaction) -> None:
        """Take the parts out."""
        for path, (tensor, length, kept) in self._left.items():
            _set(self._tensors[path], tensor.left(self._whole[path], length, kept), transaction)

    def require_told(self, expectation: Expectation) -> None:
        """Refuse (SurgeryError) a tensor of which the outputs do not show which part is which block's, where its family
        does not say so. The tensors are short already.
        """
        for path, (tensor, length, kept) in self._left.items():
            if tensor.known:
                continue
            others = [(index + 1) % length for index in kept]
            attempt = Transaction()
            try:
                _set(self._tensors[path], tensor.left(self._whole[path], length, others), attempt)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeepArcWarning)
                    expectation.check()
            except SurgeryError:
                continue
            finally:
                attempt.roll_back()
            raise SurgeryError(
                f"{path} of {self._label} has a part for each block, and no output of the example shows that those of "
                "the removed blocks were taken out of it. Give a batch on which they matter: example=batch. Or say "
                "verify=False, and answer for it yourself. The model is as it was before."
            )


def _set(tensor: Tensor, value: Tensor, transaction: Transaction) -> None:
    """Give a live tensor other numbers and another shape. Its gradient is let go."""
    transaction.on_failure(partial(setattr, tensor, "data", tensor.data))
    tensor.grad = None
    tensor.data = value
