"""What a callback keeps in a checkpoint's trainer_state.json: dataclasses of JSON types with a format version."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["Saved"]

FORMAT_VERSION = 1


class Saved:
    """Base of such dataclasses."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, a copy."""
        return {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def fields_of(cls, data: Any) -> dict[str, Any] | None:
        """The fields in what `to_dict` gave; None if it is anything else, or of another version of this package."""
        known = {spec.name for spec in dataclasses.fields(cls)}  # type: ignore[arg-type]
        whole = (
            isinstance(data, Mapping)
            and data.get("format_version") == FORMAT_VERSION
            and set(data) == known | {"format_version"}
        )
        return {name: data[name] for name in known} if whole else None
