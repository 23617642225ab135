"""A model in a Trainer follows the layout of the checkpoints that are loaded into it: first the number of blocks, and
when the record has been read (`settle`) which blocks these are.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..architectures import Host, Layout, Stack, Subject, describe, find_host
from ..architectures.hosts import RECORD_KEY
from ..checkpoint.record import PrunedConfig, current_layout, same_structure
from ..core.block_paths import is_inside, place_in
from ..core.compat import buffers_of, load_pre_hooks, parameters_of, running_method, unsaved_buffers
from ..core.local_hooks import LocalHook
from ..core.transaction import Transaction
from ..errors import RecordError, SurgeryError
from ..pruning.freezing import let_statistics_go, thaw
from ..pruning.surgery import follow_record, forget_parameters
from ..publish.files import checkpoints_in
from .follow_adapters import Held, holds_adapters_alone, joined, places_of_adapters

__all__ = [
    "Structure",
    "guard",
    "guard_successors",
    "let_frozen_statistics_go",
    "note_frozen",
    "record_of",
    "settle",
    "thaw_noted",
]

_ADVICE = (
    f"Load the model from the checkpoint's own folder (from_pretrained reads the layout and {RECORD_KEY!r} from its "
    "config.json), then resume."
)
_NOTED = "_deeparc_hf_frozen"  # attribute of a model: what runs have frozen in it


@dataclass(frozen=True)
class Structure:
    """A model's structure at one point of a run: its record (None: it carries none), and what the run froze."""

    record: PrunedConfig | None = None
    frozen: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def freeze(self, model: nn.Module | Subject) -> list[nn.Parameter]:
        """Freeze the blocks in a model of this structure; the parameters that were trainable and no longer are."""
        changed = [] if self.record is None else follow_record(model, self.record, self.frozen)
        note_frozen(model, changed)
        return changed


class _Noted(list[weakref.ref[nn.Parameter]]):
    """What runs have frozen, noted on the model; on a copy of it, or in a pickle, nothing is noted."""

    def __reduce__(self) -> tuple[Any, ...]:
        return list, ()


class Follower:
    """Hook on the loading of weights into one model, as when a checkpoint is resumed or the best one is loaded.

    It does nothing where somebody else than its Trainer (None: whoever) loads weights, and on copies of the model.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = None if trainer is None else weakref.ref(trainer)
        self.output: str | Path | None = None  # the Trainer's output folder
        self.optimizer: weakref.ref[torch.optim.Optimizer] | None = None  # one that follows too
        self.provisional: Transaction | None = None  # takes back what was done since `settle`
        self.adapters: Held | None = None  # what was loaded since then, where it was adapters alone

    @classmethod
    def of(cls, root: nn.Module, trainer: Any) -> Follower:
        """A Trainer's follower on a model, as long as the Trainer lives; it is made where there is none."""
        for follower in _followers(root):
            if (follower._trainer and follower._trainer()) is trainer:
                return follower
        follower = cls(trainer)
        # a pickle or a copy of the model holds nothing of this
        handle = root.register_load_state_dict_pre_hook(LocalHook(follower))
        if trainer is not None:
            weakref.finalize(trainer, handle.remove).atexit = False
        return follower

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self._trainer is not None:
            trainer = self._trainer()
            if trainer is None or not (running_method(trainer) or "").startswith("_load"):
                return
        self._follow(module, state_dict, prefix)

    def _follow(self, module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Give a model the blocks that a state dict has, which is about to be loaded into it."""
        subject = describe(module)
        stacks = subject.stacks
        alone = holds_adapters_alone(module, state_dict)
        if not alone:
            _name_as_the_model_does(subject.host, state_dict, prefix)
        held = {name: _blocks_in(state_dict, prefix, name) for name in stacks}
        self.adapters = joined(self.adapters, held) if alone else None
        if alone:
            changed = [name for name, blocks in held.items() if blocks]
        elif _is_shard(module, state_dict, prefix, held):
            return
        else:
            for name, blocks in held.items():
                _refuse_incomplete(stacks[name], blocks)
            changed = [name for name, blocks in held.items() if blocks and len(blocks) != len(stacks[name])]
        now, likely, removed = current_layout(subject), _records_in(self.output) if changed else (), {}
        for name in changed:
            hints = [r.kept[name] for r in likely if name in r.kept and set(r.kept[name]) <= set(now.kept[name])]
            fitting = places_of_adapters if alone else _places_for
            places = fitting(stacks[name], held[name], [now.places({name: hint})[name] for hint in hints])
            removed[name] = [place for place in range(len(stacks[name])) if place not in places]
        removed = {name: places for name, places in removed.items() if places}
        if not removed:
            return
        target = (record_of(subject) or PrunedConfig({})).compose(Layout.without(subject.lengths, removed), {})
        self.provisional = undo = self.provisional or Transaction()
        before = list(module.parameters())
        try:
            follow_record(subject, target, {}, undo)
        except (SurgeryError, RecordError) as error:
            raise SurgeryError(f"The model cannot follow the checkpoint that is loaded: {error} {_ADVICE}") from error
        optimizer = None if self.optimizer is None else self.optimizer()
        if optimizer is not None:
            stay = {id(parameter) for parameter in module.parameters()}
            forget_parameters(optimizer, [parameter for parameter in before if id(parameter) not in stay])


def guard(
    model: nn.Module,
    output: str | Path | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    trainer: Any = None,
) -> None:
    """Have the model follow the number of blocks of whatever a Trainer (None: whoever) loads into it from now on.

    Args:
        output: the Trainer's output folder. The records of the checkpoints in it tell which blocks are likely to be
            meant, which matters where the user has frozen some: an optimizer is made before `settle` knows.
        optimizer: one that exists already; it follows too.
    """
    follower = Follower.of(_root(model), trainer)
    follower.output = output
    if optimizer is not None:
        follower.optimizer = weakref.ref(optimizer)


def guard_successors(model: nn.Module, trainer: Any, output: str | Path | None = None) -> None:
    """Guard the models of the same class that a Trainer makes with its model_init when a training begins: it loads a
    checkpoint into one before any callback is asked.
    """
    kind, known = type(_root(model)), weakref.ref(trainer)

    def notice(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        maker = known()
        if type(module) is kind and maker is not None and running_method(maker) == "call_model_init":
            Follower.of(module, maker).output = output

    weakref.finalize(trainer, register_module_module_registration_hook(notice).remove).atexit = False


def _followers(root: nn.Module) -> list[Follower]:
    return [hook.act for hook in load_pre_hooks(root) if isinstance(hook, LocalHook) and isinstance(hook.act, Follower)]


def _root(model: nn.Module | Subject) -> nn.Module:
    return model.root if isinstance(model, Subject) else find_host(model).root


def note_frozen(model: nn.Module | Subject, parameters: Iterable[nn.Parameter]) -> None:
    """Note what a run froze on the model: a later run in the same process must be able to thaw it."""
    root = _root(model)
    vars(root)[_NOTED] = _Noted([*vars(root).get(_NOTED, ()), *map(weakref.ref, parameters)])


def thaw_noted(model: nn.Module | Subject, transaction: Transaction | None = None) -> None:
    """Make trainable again what runs have frozen, and nothing that the user has frozen."""
    root = _root(model)
    noted = _noted(root)
    vars(root).pop(_NOTED, None)
    with transaction or Transaction() as transaction:
        thaw(noted, transaction)


def let_frozen_statistics_go(model: nn.Module) -> None:
    """Have the statistics of BatchNorms that a run froze follow the model's mode again: its training is over."""
    root = _root(model)
    let_statistics_go(root, _noted(root))


def _noted(root: nn.Module) -> list[nn.Parameter]:
    return [parameter for noted in vars(root).get(_NOTED, ()) if (parameter := noted()) is not None]


def settle(
    model: nn.Module | Subject,
    start: Structure,
    accepted: Structure,
    current: Structure,
    at_start: Callable[[], None] | None = None,
) -> tuple[Transaction | None, list[nn.Parameter]]:
    """Give a model whose weights have been loaded from a checkpoint the structure that the checkpoint's record tells.

    Args:
        start, accepted, current: how the model was when the run began, before the pruning that may be taken back, and
            when the checkpoint was saved.
        at_start: called if the model has the structure that the run began with, while its weights are not in place yet.

    Returns:
        How to get from the checkpoint's structure back to the accepted one (None if the model was loaded in the
        checkpoint's structure, so that there is no way back), and the parameters that were frozen.

    Raises:
        SurgeryError: if the model was neither loaded from the checkpoint, nor is it the one that the run began with.
    """
    subject = describe(model)
    loaded = {name: stack.blocks for name, stack in subject.stacks.items()}
    provisional, adapters = None, None
    for follower in _followers(subject.root):
        adapters, follower.adapters = adapters or follower.adapters, None
        if follower.provisional is not None:
            provisional, follower.provisional = follower.provisional, None
            provisional.roll_back()
    subject = describe(subject)
    live = record_of(subject)
    if at_start is not None and same_structure(live, start.record):
        at_start()
    if provisional is None and same_structure(live, current.record):
        return (Transaction() if same_structure(accepted.record, current.record) else None), current.freeze(subject)
    if not same_structure(live, start.record):
        raise SurgeryError(
            "The model was pruned otherwise than the one in the checkpoint that is resumed: their records differ. "
            f"Build the model as it was built when the run began. Or: {_ADVICE}"
        )
    lengths = _required_counts(current.record, loaded, adapters)
    undo = Transaction()
    for record, transaction in ((accepted.record, None), (current.record, undo)):
        if record is not None:
            follow_record(subject, record, {}, transaction)
            subject = describe(subject)
            subject.host.set_record(record.to_dict())  # it may differ in zeroed weights alone
    for name, stack in subject.stacks.items():
        if name in lengths:
            places = range(lengths[name]) if adapters is None else sorted(adapters[name])
            sources, targets = ([blocks[place] for place in places] for blocks in (loaded[name], stack.blocks))
            _take_over(sources, targets, None if adapters is None else [adapters[name][place] for place in places])
    return undo, current.freeze(subject)


def _required_counts(
    record: PrunedConfig | None, loaded: Mapping[str, Sequence[nn.Module]], adapters: Held | None
) -> dict[str, int]:
    """By stack, the number of blocks that a checkpoint's record says; what was loaded must have as many (else a
    SurgeryError).
    """
    lengths = {} if record is None else record.layout.counts
    found = {name: len(blocks) for name, blocks in loaded.items() if name in lengths}
    if adapters is not None:  # they do not tell how many blocks there are behind the last one that has any
        found = {name: count for name, count in lengths.items() if all(at < count for at in adapters[name])}
    if found != lengths or record is None:
        raise SurgeryError(
            f"By its record the checkpoint has {lengths or 'all'} blocks, but what was loaded has {found or 'fewer'}. "
            f"{_ADVICE}"
        )
    return lengths


def record_of(model: nn.Module | Subject) -> PrunedConfig | None:
    """The record that a model carries; None if it carries none."""
    subject = describe(model)
    return None if subject.host.record() is None else PrunedConfig.from_model(subject)


def _take_over(
    sources: Sequence[nn.Module], targets: Sequence[nn.Module], adapters: Sequence[Mapping[str, Tensor]] | None = None
) -> None:
    """Move tensors from blocks to others of the same shapes. An optimizer may hold them, so they stay the same objects.

    Blocks that are not among the targets get copies: they may come back, and must not share anything then.

    Args:
        adapters: what of each source was loaded, where that was adapters alone: the rest is the block's own.
    """
    own = [_slots(source) for source in sources]
    if adapters is not None:
        own = [
            {(path, name): held for (path, name), held in slots.items() if f"{path}.{name}" in tensors}
            for slots, tensors in zip(own, adapters, strict=True)
        ]
    moved = [{slot: held[slot[1]] for slot, held in slots.items()} for slots in own]
    for source, kept in zip(sources, own, strict=True):
        if not any(source is target for target in targets):
            for (_, name), held in kept.items():
                held[name] = copy.deepcopy(held[name])
    trained = [{slot: held[slot[1]].requires_grad for slot, held in _slots(target).items()} for target in targets]
    for target, tensors, flags in zip(targets, moved, trained, strict=True):
        slots = _slots(target)
        for slot, tensor in tensors.items():
            if slot not in slots:
                raise SurgeryError(
                    f"The checkpoint that is loaded holds a {'.'.join(slot)} of a block that has none in this model. "
                    "Build the model, and its adapters, as it was built when the run began."
                )
            slots[slot][slot[1]] = tensor
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(flags[slot])


def _slots(block: nn.Module) -> dict[tuple[str, str], dict[str, Any]]:
    """Where a block holds the tensors that checkpoints hold: by path of the module and name, the module's own dict."""
    slots: dict[tuple[str, str], dict[str, Any]] = {}
    for path, module in block.named_modules():
        # a buffer that is not saved was not loaded either: it belongs to the block's place
        for held, unsaved in ((parameters_of(module), ()), (buffers_of(module), unsaved_buffers(module))):
            slots |= {(path, n): held for n, value in held.items() if value is not None and n not in unsaved}
    return slots


def _name_as_the_model_does(host: Host, state_dict: dict[str, Any], prefix: str) -> None:
    """Rename keys as `from_pretrained` would, which the Trainer does not: it would leave out what ViT saves."""
    own = {f"{prefix}{key}": value.shape for key, value in host.root.state_dict().items()}
    foreign = [key for key in state_dict if key.startswith(prefix) and key not in own]
    if not foreign:
        return
    namer = host.key_namer()
    for key in foreign:
        renamed = f"{prefix}{namer(key.removeprefix(prefix))}"
        # a tensor that would have to be fused with others keeps its name, and is refused below
        if renamed not in state_dict and own.get(renamed) == state_dict[key].shape:
            state_dict[renamed] = state_dict.pop(key)
    if not own.keys() & state_dict.keys():
        raise SurgeryError(
            f"The checkpoint that is loaded is of another model: not one of its tensors ({foreign[0]}, ...) is one of "
            f"{host.label}'s. Load it into a model of its own kind."
        )


def _records_in(output: str | Path | None) -> list[PrunedConfig]:
    """Records of the checkpoints of a Trainer, the newest first. They are hints: what cannot be read is passed over."""
    found = []
    folders = [] if output is None else checkpoints_in(Path(output))
    steps = {folder: folder.name.rpartition("-")[2] for folder in folders}
    for folder in sorted((f for f in folders if steps[f].isdigit()), key=lambda f: int(steps[f]), reverse=True):
        with suppress(RecordError, OSError):
            found.append(PrunedConfig.from_pretrained(folder))
    return found


# ---- what a state dict holds of a model's blocks, and which blocks of the model have the same shapes ----


def _refuse_incomplete(stack: Stack, blocks: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Refuse a checkpoint that lacks tensors of its blocks: the Trainer would leave the model's own there."""
    whole = [set(block.state_dict()) for block in stack.blocks]
    for index, tensors in blocks.items():
        if not any(keys <= tensors.keys() for keys in whole):
            lacking = min(min(keys - tensors.keys()) for keys in whole)
            raise SurgeryError(
                "The checkpoint that is loaded holds the tensors of its blocks otherwise than the model does: "
                f"block {index} of {stack.name} has no {lacking}, and the Trainer would leave what the model has "
                "there. Training of this kind of model cannot be resumed: load the checkpoint with from_pretrained and "
                "start a new training."
            )


def _blocks_in(state_dict: Mapping[str, Any], prefix: str, stack: str) -> dict[int, dict[str, Tensor]]:
    """Tensors of a stack in a state dict, by the index of their block."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        place = place_in(stack, key[len(prefix) :]) if key.startswith(prefix) else None
        if place is not None:
            index, inner = place
            found.setdefault(index, {})[inner] = value
    return found


def _is_shard(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, held: Mapping[str, Mapping[int, Any]]
) -> bool:
    """Whether the state dict is one of several, which cannot tell how many blocks there are: `settle` compares them."""
    if any(sorted(blocks) != list(range(len(blocks))) for blocks in held.values()):
        return True
    own = {key: id(tensor) for key, tensor in module.state_dict(keep_vars=True).items()}
    # tied tensors are saved once
    there = {own[key] for key in own if f"{prefix}{key}" in state_dict or any(is_inside(name, key) for name in held)}
    return not there.issuperset(own.values())


def _places_for(
    stack: Stack, blocks: Mapping[int, Mapping[str, Tensor]], likely: Sequence[Sequence[int]]
) -> Sequence[int]:
    """Blocks of the stack, in order, that have the shapes of the checkpoint's: likely ones, else the first that do."""
    shapes = [{key: value.shape for key, value in block.state_dict().items()} for block in stack.blocks]
    wanted = [{key: value.shape for key, value in blocks[index].items()} for index in range(len(blocks))]
    for places in likely:
        if [shapes[place] for place in places] == wanted:
            return places
    found: list[int] = []
    for shape in wanted:
        start = found[-1] + 1 if found else 0
        place = next((i for i in range(start, len(stack)) if shapes[i] == shape), None)
        if place is None:
            raise SurgeryError(
                f"The checkpoint that is loaded holds {len(blocks)} blocks in {stack.name}, the model has {len(stack)}"
                + (", and they do not fit" if len(blocks) < len(stack) else "")
                + f". {_ADVICE}"
            )
        found.append(place)
    return found
