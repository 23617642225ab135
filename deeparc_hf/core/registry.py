"""Registries: one file adds one family, similarity metric or sparsity method. All files of a folder are imported
when an entry is first asked for, and their errors are raised.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from ..errors import RegistryError
from .plain_text import did_you_mean, quoted

__all__ = ["Registry"]

T = TypeVar("T")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Registry(Generic[T]):
    """Named classes, derived from `base`, in the modules of one package; `kind` is what messages call an entry."""

    def __init__(self, kind: str, package: str, base: type) -> None:
        self.kind = kind
        self.package = package
        self.base = base
        self._entries: dict[str, type[T]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that adds an entry.

        Raises:
            RegistryError: if the name is not lower snake case, is taken, or the class does not derive from the base.
        """

        def add(cls: type[T]) -> type[T]:
            if not _NAME.fullmatch(name):
                raise RegistryError(f"{name!r} is not a valid name for a {self.kind}: use lower case, digits and _.")
            if not (isinstance(cls, type) and issubclass(cls, self.base)):
                raise RegistryError(f"{cls!r} cannot be a {self.kind}: it must derive from {self.base.__name__}.")
            taken = self._entries.get(name)
            if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
                raise RegistryError(
                    f"The {self.kind} {name!r} is registered already, by {taken.__module__}.{taken.__qualname__}. "
                    f"Give {cls.__qualname__} another name."
                )
            cls.name = name  # type: ignore[attr-defined]
            self._entries[name] = cls
            return cls

        return add

    def unregister(self, name: str) -> None:
        """Take an entry out again, as the tests of one that lives outside of the package do when they end."""
        del self._entries[name]

    def get(self, name: str) -> type[T]:
        """The entry of that name.

        Raises:
            RegistryError: if there is none; the message lists the names and the nearest one.
        """
        self._load()
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            hint = did_you_mean(str(name), self._entries)
            raise RegistryError(
                f"There is no {self.kind} named {quoted(name)}.{hint} Known: {', '.join(self.names())}."
            ) from None

    def names(self) -> list[str]:
        """All names, sorted."""
        self._load()
        return sorted(self._entries)

    def __iter__(self) -> Iterator[type[T]]:
        """The entries, by name."""
        return iter([self._entries[name] for name in self.names()])

    def _load(self) -> None:
        if self._loaded:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__, prefix=f"{self.package}."):
            importlib.import_module(module.name)
        self._loaded = True
