"""Distillation: the unpruned model teaches the pruned one while that is retrained (Hinton et al. 2015, arXiv
1503.02531).

A forward hook on the model adds the teacher's term to the loss that it puts out in training mode:

    loss = (1 - alpha) * loss on the labels + alpha * T^2 * KL(teacher || student) + hidden * distance of hidden states

The divergence is a mean over what the labels' loss is a mean of. Hidden states (as in patient distillation, Sun et al.
2019, arXiv 1908.09355) are compared where blocks were removed: what the kept block before a site puts out with what the
teacher's last removed block does, as the squared distance of a position relative to the teacher's size.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import describe
from ..core.copies import FUSED, independent_copy
from ..core.local_hooks import LocalHook
from ..errors import ConfigError, SurgeryError
from ..healing.sites import Site
from ..observe.axes import Axes, find_axes
from ..observe.batches import without_labels
from ..observe.hooks import hidden_states, hooked
from ..observe.outputs import IGNORED, heads_of, is_logits, label_mask
from ..similarity.divergence import divergence
from .config import DistillConfig
from .fused import FusedHead, FusedOutput

__all__ = ["Distillation", "make_teacher"]

_FOLLOWS = 0.05  # relative change of the loss with num_items_in_batch from which on it is taken to follow it


def make_teacher(model: nn.Module, dtype: str | None = None) -> nn.Module:
    """A copy of a model that teaches: in eval mode, without gradients, in another precision if one is named.

    Raises:
        SurgeryError: if the model cannot be copied.
    """
    try:
        teacher = independent_copy(model)
    except Exception as error:
        raise SurgeryError(
            f"{type(model).__name__} cannot be copied, and its copy was to teach ({type(error).__name__}: {error}). "
            "Leave distill out."
        ) from error
    for parameter in teacher.parameters():
        parameter.grad = None
    return teacher.requires_grad_(False).eval().to(dtype=None if dtype is None else getattr(torch, dtype))


class Distillation:
    """A teacher at work: attached to a model from the moment that this is made until `stop`.

    Args:
        model: the student, unwrapped, as the Trainer calls it.
        teacher: from `make_teacher`.
        sites: where blocks are missing that the teacher has, as the teacher numbers them, each with the student's index
            of the kept block.
        fused_head: whether the trainer may ask for log-probabilities instead of logits, and its loss is their negative
            mean (TRL's SFTTrainer).

    Attributes:
        reached: whether a gradient of the term arrived since this was last set to False.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        config: DistillConfig,
        sites: Sequence[tuple[Site, int]],
        *,
        fused_head: bool = False,
    ) -> None:
        self.reached = False
        self._model = weakref.ref(model)
        self._teacher = teacher
        self._config = config
        described = describe(teacher)
        self._host, self._stacks = described.host, described.stacks
        self._sites = list(sites) if config.hidden else []
        self._seen: dict[tuple[str, int], Tensor] = {}
        self._listening = False
        self._axes: Mapping[str, Axes | str] = {}
        self._follows_items: bool | None = None  # whether the model's loss is divided by num_items_in_batch
        self._checked = False
        self._may_fuse, self._fused = fused_head, None
        self._precision: Callable[[], AbstractContextManager[Any]] = nullcontext  # that the student's blocks ran in
        own = describe(model).stacks
        blocks = [own[site.stack].blocks[kept] for site, kept in self._sites]
        self._trains = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
        handles = [
            model.register_forward_pre_hook(self._hook(Distillation._before), with_kwargs=True),
            model.register_forward_hook(self._hook(torch.compiler.disable(Distillation._after)), with_kwargs=True),
        ]
        if fused_head:  # the teacher's forward is then the class's, without what accelerate has put around the model's
            first = next(iter(own.values())).blocks[0]
            handles.append(first.register_forward_pre_hook(self._hook(Distillation._note_precision)))
        taught_by = [self._stacks[site.stack].blocks[site.removed[-1]] for site, _ in self._sites]
        for who, watched in (("student", blocks), ("teacher", taught_by)):
            for number, block in enumerate(watched):
                handles.append(block.register_forward_hook(self._hook(Distillation._take, who, number)))
        attached = ExitStack()
        for handle in handles:
            attached.callback(handle.remove)
        self._detach = weakref.finalize(self, attached.close)

    def stop(self) -> None:
        """Leave the model as it was."""
        self._detach()

    # ---- what the hooks call ----

    def _hook(self, act: Callable[..., Any], *first: Any) -> LocalHook:
        """A hook that does nothing once the distillation is gone, nor on copies of the model."""
        known = weakref.ref(self)

        def hook(*args: Any) -> Any:
            at_work = known()
            return None if at_work is None else act(at_work, *first, *args)

        return LocalHook(hook)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if module is not self._model():
            return None
        self._seen, self._fused = {}, None
        self._listening = bool(self._sites) and module.training
        if self._may_fuse and module.training and torch.is_grad_enabled() and kwargs.get(FUSED):
            self._fused = FusedHead(kwargs)
        return args, kwargs

    def _note_precision(self, module: nn.Module, args: Any) -> None:
        device = next(module.parameters()).device.type
        on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self._precision = partial(torch.autocast, device, dtype=dtype, enabled=on)

    def _take(self, who: str, number: int, module: nn.Module, args: Any, output: Any) -> None:
        if self._listening:
            self._seen[who, number] = hidden_states(output)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The output with the teacher's term in its loss; None where there is nothing to add to."""
        if module is not self._model() or not module.training or not torch.is_grad_enabled():
            return None
        fused, loss = self._fused, _loss_of(output)
        if loss is None and fused is None:
            return None
        if not isinstance(output, Mapping):
            raise ConfigError(
                f"{type(module).__name__} puts out a tuple, which does not say what is a logit. Set "
                "model.config.return_dict = True, or leave distill out."
            )
        if kwargs.get(FUSED) or not any(is_logits(name) for name, value in output.items() if value is not None):
            raise ConfigError(
                f"{type(module).__name__} puts out no logits in this training, so there is nothing to compare with the "
                "teacher's: its loss is fused with its head (Liger kernels, trainers of TRL other than SFTTrainer). "
                "Train with the stock Trainer or SFTTrainer, without such a kernel, or leave distill out."
            )
        names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        if fused is not None:
            return self._fused_output(fused, {**inputs, "shift_labels": fused.labels}, output)
        term = self._term(inputs, output)
        self._require_reach(term)
        output["loss"] = ((1 - self._config.alpha) * loss + term).reshape(loss.shape)
        return output

    def _fused_output(self, fused: FusedHead, inputs: Mapping[str, Any], output: Any) -> FusedOutput:
        """What a fused head would put out, with the teacher's term at each label."""
        count = int((fused.labels != IGNORED).sum())
        more = output["logits"].new_zeros(count, dtype=torch.float32)
        taught = self._ask(inputs)
        parts = self._divergences(taught, output, inputs) if self._config.alpha and count else []
        if parts and (len(parts) > 1 or parts[0].shape != more.shape):
            raise ConfigError(
                f"{type(self._host.root).__name__} puts out {len(parts)} heads, or logits that do not stand at its "
                "labels, and a loss that is fused with the head is of one token at each label. Leave distill out."
            )
        for part in parts:
            more = more + self._config.alpha * part
        if self._sites and count:
            more = more + self._config.hidden * self._hidden_distance(inputs)
        self._listening, self._seen = False, {}
        if count:
            self._require_reach(more)
        return fused.output(output, self._config.alpha, more)

    def _require_reach(self, term: Tensor) -> None:
        """Have it noted when the term's gradient arrives."""
        if not term.requires_grad:
            raise ConfigError(
                "Nothing that the hidden states at the sites depend on is trained, and alpha is 0, so the teacher has "
                "no say. Freeze fewer blocks, or give DistillConfig an alpha above 0."
            )
        term.register_hook(self._arrived)

    # ---- the term ----

    def _term(self, inputs: Mapping[str, Any], output: Any) -> Tensor:
        taught = self._ask(inputs)
        share = self._share(inputs)
        self._listening = False
        term = torch.zeros((), device=next(self._teacher.parameters()).device)
        if self._config.alpha:
            parts = [_mean(part) for part in self._divergences(taught, output, inputs)]
            term = self._config.alpha * torch.stack(parts).mean()
        if self._sites:
            term = term + self._config.hidden * self._hidden_distance(inputs)
        self._seen = {}
        return term * share

    def _divergences(self, taught: Any, output: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
        """For each head, how far each row is from the teacher's."""
        heat = self._config.temperature
        ours, theirs = (heads_of(self._host, given, inputs) for given in (output, taught))
        return [
            divergence(o, t, heat) * (1.0 if t.kind == "values" else heat**2) for o, t in zip(ours, theirs, strict=True)
        ]

    def _ask(self, inputs: Mapping[str, Any], **more: Any) -> Any:
        """What the teacher puts out."""
        given = self._cast(inputs)
        if not more:
            given = {key: value for key, value in without_labels(self._host, given).items() if key != "shift_labels"}
        if "use_cache" in inspect.signature(type(self._teacher).forward).parameters:
            given["use_cache"] = False
        ran: list[bool] = []
        checked = () if self._checked else (next(iter(self._stacks.values())).blocks[0],)
        checks = (block.register_forward_pre_hook(lambda *_: ran.append(True)) for block in checked)
        with hooked(checks), torch.no_grad(), self._precision():
            output = self._teacher(**given, **more)
        if checked and not ran:
            raise ConfigError(
                f"The forward of {type(self._teacher).__name__} was replaced by one that a copy of the model shares, "
                "so the copy cannot teach. Leave distill out, or leave the model's forward as it is."
            )
        self._checked = True
        return output

    def _cast(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs in the teacher's precision."""
        dtype = next(self._teacher.parameters()).dtype
        return {
            key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in inputs.items()
            if key != "num_items_in_batch"
        }

    def _share(self, inputs: Mapping[str, Any]) -> Tensor | float:
        """The share of this micro-batch in the optimizer's step, where the model's own loss is scaled by it."""
        items, mask = inputs.get("num_items_in_batch"), label_mask(self._host, inputs)
        if items is None or mask is None:
            return 1.0
        if self._follows_items is None:
            losses = [_loss_of(self._ask(inputs, num_items_in_batch=items * factor)) for factor in (1, 4)]
            once, more = (float("nan") if loss is None else float(loss) for loss in losses)
            # a loss of 0, or of no label at all, tells nothing
            self._follows_items = abs(once - more) > _FOLLOWS * abs(once) if abs(once) > 0 else None
        return mask.sum() / items if self._follows_items else 1.0

    def _hidden_distance(self, inputs: Mapping[str, Any]) -> Tensor:
        distances = []
        for number, (site, _) in enumerate(self._sites):
            ours, theirs = (self._seen.get((who, number)) for who in ("student", "teacher"))
            if ours is None or theirs is None:
                raise ConfigError(
                    f"A block beside the site {site} did not run in a training step, so hidden states cannot be "
                    "compared."
                )
            if not ours.requires_grad and self._trains[number]:
                raise ConfigError(
                    f"No gradient flows through what block {site.kept} of {site.stack} puts out. Set "
                    "use_reentrant=False for activation checkpointing, or leave hidden out of DistillConfig."
                )
            axes = self._axes_of(site.stack, inputs)
            padding = axes.padding(inputs, theirs.shape)
            ours, theirs = (axes.rows(value).float() for value in (ours, theirs))
            least = torch.finfo(torch.float32).tiny
            far = (ours - theirs).square().sum(dim=-1) / theirs.square().sum(dim=-1).clamp(min=least)
            if padding.unknown:
                raise ConfigError(
                    f"Which positions of {site.stack} are padding cannot be told, and they would be learnt from. Give "
                    "batches of texts of one length, or leave hidden out of DistillConfig."
                )
            if padding.mask is not None:
                far = far[padding.mask.to(far.device)]
            distances.append(_mean(far))
        return torch.stack(distances).mean()

    def _axes_of(self, stack: str, inputs: Mapping[str, Any]) -> Axes:
        """What the dimensions of hidden states mean, found on the first batch."""
        if not self._axes:
            stacks = [self._stacks[site.stack] for site, _ in self._sites]
            self._axes = find_axes(self._host, stacks, self._cast(inputs))
        axes = self._axes.get(stack)
        if not isinstance(axes, Axes):
            raise ConfigError(
                f"The hidden states of {stack} cannot be compared: {axes}. Leave hidden out of DistillConfig."
            )
        return axes

    def _arrived(self, gradient: Tensor) -> None:
        self.reached = True


def _loss_of(output: Any) -> Tensor | None:

    if isinstance(output, Mapping):
        loss = output.get("loss")
        return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None
    first = output[0] if isinstance(output, (tuple, list)) and output else None
    return first if isinstance(first, Tensor) and first.ndim == 0 else None


def _mean(values: Tensor) -> Tensor:
    """The mean; 0 where there is nothing, as in a micro-batch in which no token has a label."""
    return values.sum() / max(len(values), 1) if values.ndim == 1 else values.mean()
