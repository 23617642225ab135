"""What the objects behind a training's data keep (random generators, counters, places in a stream), put back in place
after a calibration: copies would share what functions keep in closures and globals.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools
import io
import itertools
import random
import sys
import sysconfig
import threading
import types
import weakref
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue, SimpleQueue
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainerCallback

from ..core.compat import version_of
from ..errors import CalibrationError

__all__ = ["ReadOnceError", "apart", "untouched"]

# what is beyond is taken for rows: objects, nearest first; entries of a container; bytes of a tensor, and of all
# tensors
_OBJECTS, _ENTRIES, _ONE, _ALL = 20_000, 1_000_000, 1 << 16, 1 << 24
_PLAIN = frozenset(
    {type(None), bool, int, float, complex, str, bytes, slice, range, torch.dtype, torch.device, torch.Size}
)
# the training itself and its machinery: calibration reads no rows from them
_NOT_DATA = (
    Trainer,
    TrainerCallback,
    torch.optim.Optimizer,
    LRScheduler,
    Accelerator,
    Executor,
    types.ModuleType,
    weakref.ref,
)
_FEEDS = (threading.Thread, Queue, SimpleQueue)
_C_DATA = (ctypes.c_int.__base__, ctypes.Array, ctypes.Structure)  # multiprocessing.Value and Array
_CALLABLES = (
    types.FunctionType,
    types.MethodType,
    types.BuiltinMethodType,
    types.MethodWrapperType,
    functools.partial,
    functools.partialmethod,
    functools.cached_property,
    staticmethod,
    classmethod,
    property,
)

_OVER_SEQUENCES = (
    *map(type, (iter([]), iter(()), iter(""), iter(b""), iter(range(0)), iter(range(1 << 70)), reversed([]))),
    itertools.count,
)
_OVER_ITERATORS = (zip, map, enumerate, filter)


@contextmanager
def untouched(
    roots: Iterable[tuple[str, Any]], model: nn.Module | None = None, *, is_stream: bool = False
) -> Iterator[Callable[[], None]]:
    """Afterwards the objects, and all that they refer to, hold what they held before.

    Kept are attributes (of objects, and of the user's own classes and functions), closures, globals that the user's own
    functions name, the contents of containers, states of random generators, places in files, small tensors and arrays.
    Not kept are the random states of the process (`forward.evaluating` does that), and rows that are changed in place
    beyond the limits above: read copies (`apart`).

    Args:
        roots: the objects, each with what messages call it.
        model: the training's model, which a collator may hold: it is left alone.
        is_stream: whether rows come one after the other, so that none can be fetched again.

    Yields:
        A function to call while rows are read; it raises a CalibrationError where a tensor was changed that is too
        large to be put back.

    Raises:
        ReadOnceError: if something can be read once only, so that what is read cannot be put back.
    """
    walk = _Walk(model, is_stream)
    try:
        for name, root in roots:
            walk.keep(name, root)
        yield walk.check
    finally:
        walk.put_back()


class ReadOnceError(CalibrationError):
    """Data can be read once only."""


class _Walk:
    """A walk over objects, nearest first, that notes how to put back what they hold; arguments as in `untouched`."""

    def __init__(self, model: nn.Module | None, is_stream: bool) -> None:
        self._seen: dict[int, Any] = {}  # holds on to what it has seen, so that no id is used twice
        alone = [
            np.random.get_state.__self__,  # type: ignore[attr-defined]
            random.getstate.__self__,  # type: ignore[attr-defined]
            torch.default_generator,
            *(model.modules() if model else ()),
        ]
        self._alone = {id(value) for value in alone}
        self._stream = is_stream
        self._queue: deque[tuple[str, Any, bool]] = deque()
        self._restore: list[Callable[[], Any]] = []
        self._copies: dict[int, Any] = {}
        self._large: list[tuple[str, Tensor, int]] = []
        self._bytes = 0

    def keep(self, name: str, root: Any) -> None:
        """Note what a root and all behind it hold."""
        if _is_bare_iterator(root):
            raise _once(name, root)
        self._push(name, root, True)
        while self._queue:
            self._visit(*self._queue.popleft())

    def put_back(self) -> None:
        for restore in reversed(self._restore):
            restore()
        self._restore = []

    def check(self) -> None:
        """Raise where something was changed that was too large to keep."""
        for name, tensor, version in self._large:
            if version_of(tensor) != version:
                size = tensor.numel() * tensor.element_size() / 2**20
                raise CalibrationError(
                    f"Reading rows changes {name} in place, a tensor of {size:.0f} MB, which is too large to put back."
                )

    # ---- the walk ----

    def _push(self, name: str, value: Any, own: bool) -> None:
        if type(value) in _PLAIN or id(value) in self._seen or id(value) in self._alone or len(self._seen) >= _OBJECTS:
            return
        self._seen[id(value)] = value
        self._queue.append((name, value, own))

    def _visit(self, name: str, value: Any, own: bool) -> None:
        """Keep one object; `own`: whether the user's own code holds it, and not something inside a library."""
        if isinstance(value, _NOT_DATA) or str(type(value).__module__).partition(".")[0] in ("deeparc_hf", "tqdm"):
            return
        if isinstance(value, type):
            self._class(name, value)
        elif isinstance(value, _CALLABLES) or hasattr(
            type(value), "__self__"
        ):  # compiled classes have types of their own
            self._callable(name, value)
        elif isinstance(value, Tensor):
            self._tensor(name, value)
        elif isinstance(value, io.IOBase):
            self._file(name, value)
        elif own and self._stream and isinstance(value, _FEEDS):
            raise _once(name, value)
        elif not self._leaf(value):
            self._holder(name, value)

    def _parts(self, name: str, parts: Iterable[Any], own: bool) -> None:
        """Look at what cannot be exchanged where it is held."""
        for part in parts:
            if self._is_read_once(part):
                raise _once(name, part)
            self._push(name, part, own)

    def _is_read_once(self, value: Any) -> bool:
        """Whether it is a bare iterator, and no data base's cursor in a data set that fetches rows by their index."""
        return _is_bare_iterator(value) and (self._stream or not hasattr(value, "execute"))

    def _entries(
        self, name: str, read: Callable[[], dict[Any, Any]], write: Callable[[dict[Any, Any]], Any], own: bool = True
    ) -> None:
        """Keep what a holder holds, by key. While rows are read, copies stand in for iterators."""
        kept = read()
        if len(kept) > _ENTRIES:
            return
        copies = {}
        for key, value in kept.items():
            if type(value) in _PLAIN:
                continue
            label = f"{name}.{key}" if isinstance(key, str) else name
            if self._is_read_once(value):
                copies[key] = self._stand_in(label, value)
            else:
                self._push(label, value, own)
        if copies:
            write({**kept, **copies})

        def restore() -> None:
            now = read()
            if list(now) != list(kept) or any(a is not b for a, b in zip(now.values(), kept.values(), strict=True)):
                write(kept)

        self._restore.append(restore)

    def _stand_in(self, name: str, iterator: Any) -> Any:
        if id(iterator) not in self._copies:
            self._copies[id(iterator)] = _copied_iterator(iterator)
            self._seen[id(iterator)] = iterator
        if self._copies[id(iterator)] is None:
            raise _once(name, iterator)
        return self._copies[id(iterator)]

    def _holder(self, name: str, value: Any) -> None:
        own = _is_own(type(value).__module__) or isinstance(value, (dict, list, tuple, set, frozenset, deque))
        if isinstance(value, dict):
            self._entries(name, lambda: dict(value.items()), functools.partial(_write_dict, value), own)
        elif isinstance(value, (list, deque)):
            read = lambda: dict(enumerate(itertools.islice(value, _ENTRIES + 1)))  # noqa: E731
            self._entries(name, read, functools.partial(_write_list, value), own)
        elif isinstance(value, (tuple, frozenset)):
            self._parts(name, value, own)
        elif isinstance(value, set):
            members = set(value)
            self._parts(name, members, own)
            self._restore.append(lambda: None if value == members else _write_set(value, members))
        kind = type(value).__name__
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._entries(kind, lambda: dict(attributes.items()), functools.partial(_write_dict, attributes), own)
        if _slots_of(value):
            self._entries(kind, lambda: _slots_of(value), functools.partial(_write_slots, value), own)
        self._push(kind, type(value), own)

    # ---- code ----

    def _callable(self, name: str, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._function(value)
            return
        parts = [getattr(value, part, None) for part in ("__self__", "__func__", "func", "fget")]
        self._parts(name, [*parts, *getattr(value, "args", ()), *getattr(value, "keywords", {}).values()], True)

    def _function(self, function: types.FunctionType) -> None:
        name, own = function.__name__, _is_own(function.__module__)
        self._parts(name, [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()], own)
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._entries(name, functools.partial(_read_cell, variable, cell), functools.partial(_write_cell, cell))
        if not own:
            return
        self._push(name, function.__dict__, True)
        names: set[str] = set()
        space, codes = function.__globals__, [function.__code__]
        for code in codes:  # and the functions within it
            names.update(code.co_names)
            codes.extend(constant for constant in code.co_consts if isinstance(constant, types.CodeType))
        known = sorted(names & space.keys())
        self._entries(function.__module__, lambda: {key: space.get(key) for key in known}, space.update)

    def _class(self, name: str, cls: type) -> None:
        if not _is_own(cls.__module__):
            return
        plain = [
            key for key, value in vars(cls).items() if not key.startswith("__") and not hasattr(type(value), "__get__")
        ]

        def write(entries: dict[str, Any]) -> None:
            for key, value in entries.items():
                if vars(cls).get(key) is not value:
                    setattr(cls, key, value)

        self._entries(name, lambda: {key: vars(cls).get(key) for key in plain}, write)
        for value in (*vars(cls).values(), *cls.__bases__):
            if isinstance(value, (*_CALLABLES, type)):
                self._push(name, value, True)

    # ---- what refers to nothing else ----

    def _leaf(self, value: Any) -> bool:
        """Keep a random generator, an array or memory; whether it is one."""
        if isinstance(value, torch.Generator):
            self._note(value.set_state, value.get_state().clone())
        elif isinstance(value, np.random.Generator):
            self._push("generator", value.bit_generator, False)
        elif isinstance(value, np.random.BitGenerator):
            self._note(functools.partial(setattr, value, "state"), value.state)
        elif isinstance(value, np.random.RandomState):
            self._note(value.set_state, value.get_state(legacy=False))
        elif isinstance(value, np.ndarray):
            if value.flags.writeable and not isinstance(value, np.memmap) and self._afford(value.nbytes):
                self._note(functools.partial(value.__setitem__, ...), value.copy())
        elif isinstance(value, _C_DATA):
            self._note(
                lambda content: memoryview(value).cast("B").__setitem__(slice(None), content),
                bytes(memoryview(value).cast("B")),
            )
        elif isinstance(value, bytearray):
            self._note(functools.partial(value.__setitem__, slice(None)), bytes(value))
        else:
            if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
                self._note(value.setstate, value.getstate())  # one of a class of the user's has attributes besides
            return False
        return True

    def _note(self, write: Callable[[Any], Any], state: Any) -> None:
        self._restore.append(functools.partial(write, state))

    def _afford(self, size: int) -> bool:
        if size > _ONE or self._bytes + size > _ALL:
            return False
        self._bytes += size
        return True

    def _tensor(self, name: str, tensor: Tensor) -> None:
        if (
            tensor.layout is not torch.strided
            or tensor.device.type == "meta"
            or tensor.is_inference()
            or tensor.requires_grad
        ):
            return
        if not self._afford(tensor.numel() * tensor.element_size()):
            self._large.append((name, tensor, version_of(tensor)))
            return
        self._note(lambda kept: None if torch.equal(tensor, kept) else tensor.copy_(kept), tensor.detach().clone())

    def _file(self, name: str, file: io.IOBase) -> None:
        if file.closed or file in (sys.stdin, sys.stdout, sys.stderr) or not file.readable():
            return
        try:
            place = file.tell()
        except OSError as error:  # a pipe, or a text file in the middle of its lines
            raise _once(name, file) from error
        self._restore.append(lambda: None if file.closed else file.seek(place))


def _once(name: str, value: Any) -> ReadOnceError:
    """What to raise where rows that calibration reads would be lost for the training."""
    return ReadOnceError(
        f"The training data can be read once only ({name} is a {type(value).__name__}): what calibration reads from "
        "it, the training would never see."
    )


@functools.cache
def _libraries() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    return tuple({Path(paths[name]).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")})


@functools.cache
def _is_own(module: Any) -> bool:
    """Whether code is the user's own, whose globals and classes may keep something, and no library's."""
    if not isinstance(module, str) or module.partition(".")[0] in ("builtins", "deeparc_hf"):
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return module == "__main__"
    return not any(library in Path(file).resolve().parents for library in _libraries())


def _read_cell(name: str, cell: types.CellType) -> dict[str, Any]:
    try:
        return {name: cell.cell_contents}
    except ValueError:  # nothing in it
        return {}


def _write_cell(cell: types.CellType, entries: dict[str, Any]) -> None:
    if not entries:
        del cell.cell_contents
    for value in entries.values():
        cell.cell_contents = value


def _write_dict(target: dict[Any, Any], entries: dict[Any, Any]) -> None:
    kind = OrderedDict if isinstance(target, OrderedDict) else dict  # past methods of a class of the user's
    kind.clear(target)
    kind.update(target, entries)


def _write_list(target: list[Any] | deque[Any], entries: dict[int, Any]) -> None:
    target.clear()
    target.extend(entries.values())


def _write_set(target: set[Any], members: set[Any]) -> None:
    target.clear()
    target.update(members)


def _write_slots(target: Any, entries: dict[Any, Any]) -> None:
    for slot in _slots_of(target).keys() - entries.keys():
        slot.__delete__(target)
    for slot, value in entries.items():
        slot.__set__(target, value)


# ---- copies ----


def apart(row: Any) -> Any:
    """A row as a collator may change it: containers, tensors and arrays are copied, and everything else is shared."""
    kind = type(row)
    if kind is dict:
        return {key: apart(value) for key, value in row.items()}
    if isinstance(row, UserDict):  # what a tokenizer gives
        copied = copy.copy(row)
        copied.data = apart(dict(row.data))
        return copied
    if isinstance(row, dict) or dataclasses.is_dataclass(row):
        return copy.deepcopy(row)
    if kind in (list, tuple):
        return kind(apart(value) for value in row)
    if isinstance(row, Tensor):
        return row.clone()
    if isinstance(row, np.ndarray):
        return row.copy()
    return row


def _is_bare_iterator(value: Any) -> bool:
    """Whether the place of an iterator cannot be read or set from outside: a generator, or what `iter(rows)` gives."""
    if not hasattr(type(value), "__next__") or isinstance(value, (io.IOBase, Mapping)):
        return False
    return not hasattr(value, "__dict__") and not _slots_of(value)


def _slots_of(value: Any) -> dict[Any, Any]:
    """What an object keeps in `__slots__`, by the descriptors of the slots."""
    found = {}
    for cls in type(value).__mro__:
        if "__slots__" not in vars(cls):
            continue
        for name, slot in vars(cls).items():
            if hasattr(slot, "__set__") and hasattr(slot, "__objclass__") and name not in ("__dict__", "__weakref__"):
                try:
                    found[slot] = slot.__get__(value)
                except AttributeError:  # nothing in it
                    continue
    return found


def _copied_iterator(iterator: Any) -> Any | None:
    """An iterator that goes on from the same place over the same rows; None where there is no such copy."""
    if not isinstance(iterator, (*_OVER_SEQUENCES, *_OVER_ITERATORS)):
        return None
    try:
        reduced: Any = iterator.__reduce__()
        make, arguments, *state = reduced
    except TypeError:  # Python 3.14 copies no itertools
        return None
    if isinstance(iterator, _OVER_ITERATORS):
        pairs = [(part, _copied_iterator(part) if _is_bare_iterator(part) else part) for part in arguments]
        if any(part is not None and copy is None for part, copy in pairs):
            return None
        arguments = tuple(copy for _, copy in pairs)
    fresh = make(*arguments)
    if state and state[0] is not None:
        fresh.__setstate__(state[0])
    return fresh
