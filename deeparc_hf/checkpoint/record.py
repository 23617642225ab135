"""The record of what was done to a checkpoint over its life. It lives in config.json under the key `pruning_config`.

A downloaded record is hostile input: everything in it is checked before it is used, and sizes are bounded.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..architectures import Layout, Subject, describe
from ..architectures.hosts import RECORD_KEY
from ..core.caller import warn_caller
from ..core.checks import Entry, MalformedError, read_json
from ..core.environment import package_versions
from ..core.hub_help import hub_help
from ..core.plain_text import LIMIT, listed, quoted
from ..errors import RecordError
from .record_checks import check_iteration, check_sparsity, refuse_full, stack_in
from .record_view import record_html

__all__ = [
    "PrunedConfig",
    "StackRecord",
    "check_record",
    "current_layout",
    "current_record",
    "renumbered",
    "same_structure",
]

FORMAT_VERSION = 1
_KEYS = ("format_version", "base_model", "base_revision", "stacks", "iterations", "sparsity", "versions")


@dataclass(frozen=True)
class StackRecord:
    """One stack: its length in the base model, and the ORIGINAL indices of the blocks that are left."""

    length: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class PrunedConfig:
    """What was done to a checkpoint; also a recipe to do it to the base checkpoint again (`load_pruned`).

    Attributes:
        stacks: by stack name, composed over all iterations.
        base_model: Hub id that the model was loaded from before its first pruning; None if it came from a local folder
            or from scratch. If it was trained in between, without leaving memory, its weights were no longer those of
            that checkpoint.
        base_revision: its commit, if known.
        iterations: one entry a pruning, oldest first: settings, calibration samples, removed and frozen blocks
            (ORIGINAL indices) and, where measured, metrics.
        sparsity: zeroed weights, if any: {"settings": {...}, "samples": n, "matrices": {module path: {"zeros": n,
            "size": n}}}.
        versions: packages that made the last pruning.
    """

    stacks: Mapping[str, StackRecord]
    base_model: str | None = None
    base_revision: str | None = None
    iterations: tuple[Mapping[str, Any], ...] = ()
    sparsity: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """Which of the original blocks are left."""
        return Layout({name: stack.length for name, stack in self.stacks.items()}, self.kept)

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """Original indices of the blocks that are left, by stack."""
        return {name: stack.kept for name, stack in self.stacks.items()}

    @property
    def removed(self) -> dict[str, tuple[int, ...]]:
        """Original indices of the blocks that are gone, by stack."""
        return {**dict.fromkeys(self.stacks, ()), **self.layout.removed}

    @property
    def frozen(self) -> dict[str, tuple[int, ...]]:
        """Blocks that the last pruning froze, as indices of the model as it is now."""
        last = (self.iterations[-1].get("frozen") if self.iterations else None) or {}
        return self.layout.places({name: last[name] for name in self.stacks if last.get(name)})

    @property
    def zeros(self) -> tuple[int, int, int] | None:
        """Zeros, weights and number of the sparse matrices; None where nothing was zeroed."""
        matrices = (self.sparsity or {}).get("matrices") or {}
        zeros, size = (sum(matrix[key] for matrix in matrices.values()) for key in ("zeros", "size"))
        return (zeros, size, len(matrices)) if matrices else None

    def _repr_html_(self) -> str:
        return record_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "format_version": FORMAT_VERSION,
            "base_model": self.base_model,
            "base_revision": self.base_revision,
            "stacks": {name: {"length": stack.length, "kept": list(stack.kept)} for name, stack in self.stacks.items()},
            "iterations": [json.loads(json.dumps(entry)) for entry in self.iterations],
            "sparsity": None if self.sparsity is None else json.loads(json.dumps(self.sparsity)),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, data: Any) -> PrunedConfig:
        """Read a record, checking everything.

        Raises:
            RecordError: naming the entry that is wrong, what was found and what was expected.
        """
        try:
            return cls._read(Entry(data))
        except MalformedError as error:
            raise RecordError(
                f"The pruning record is malformed: {error}. Download the checkpoint again, or delete {RECORD_KEY!r} "
                "from its config.json to use it as a plain checkpoint."
            ) from None

    @classmethod
    def _read(cls, entry: Entry) -> PrunedConfig:
        version = entry["format_version"].value
        if type(version) is int and version > FORMAT_VERSION:
            raise RecordError(
                f"This checkpoint's pruning record has format version {quoted(version)}, newer than {FORMAT_VERSION}, "
                "which this version of deeparc_hf reads: pip install -U deeparc_hf."
            )
        entry["format_version"].whole(1, FORMAT_VERSION)
        unknown = sorted(map(str, set(entry.value) - set(_KEYS)))
        if unknown:
            warn_caller(
                "The pruning record has entries that this version of deeparc_hf does not know and ignores: "
                f"{listed(unknown)}. pip install -U deeparc_hf may help.",
            )
        stacks = {name: StackRecord(*stack_in(name, stack)) for name, stack in entry["stacks"].named().items()}
        iterations = entry["iterations"].items() if "iterations" in entry.value else []
        for iteration in iterations:
            check_iteration(iteration, {name: stack.length for name, stack in stacks.items()})
        base_model, base_revision, sparsity = (entry.get(k) for k in ("base_model", "base_revision", "sparsity"))
        if sparsity is not None:
            check_sparsity(sparsity)
        versions = entry["versions"].named(limit=LIMIT) if "versions" in entry.value else {}
        return cls(
            stacks=stacks,
            base_model=None if base_model is None else base_model.text(),
            base_revision=None if base_revision is None else base_revision.text(),
            iterations=tuple(iteration.value for iteration in iterations),
            sparsity=None if sparsity is None else sparsity.value,
            versions={name: version.text(LIMIT) for name, version in versions.items()},
        )

    @classmethod
    def from_pretrained(cls, repo_or_path: str | os.PathLike[str], **hub: Any) -> PrunedConfig:
        """Read the record of a checkpoint in a folder or on the Hub; only its config.json is read.

        Args:
            repo_or_path: a folder, or a Hub id.
            hub: passed on to `huggingface_hub.hf_hub_download` (revision, token, cache_dir, local_files_only, ...).

        Raises:
            RecordError: if the checkpoint carries no record, or a malformed one.
            FileNotFoundError: if the folder has no config.json. The Hub's own errors pass through, with a line of help.
        """
        path = Path(repo_or_path)
        if path.is_dir():
            path = path / "config.json"
            if not path.is_file():
                raise FileNotFoundError(
                    f"{repo_or_path} has no config.json. Give the folder that save_pretrained wrote."
                )
        elif not path.is_file():
            from huggingface_hub import hf_hub_download

            with hub_help(repo_or_path):
                path = Path(hf_hub_download(str(repo_or_path), "config.json", **hub))
        try:
            config = read_json(path)
        except MalformedError as error:
            raise RecordError(f"The config.json of {repo_or_path} cannot be used: {error}.") from error
        record = config.get(RECORD_KEY) if isinstance(config, Mapping) else None
        if record is None:
            raise RecordError(
                f"{repo_or_path} has no pruning record ({RECORD_KEY!r} in its config.json): it was not pruned by "
                "deeparc_hf."
            )
        return cls.from_dict(record)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the record into the folder's config.json, beside what is there; it is made if there is none."""
        path = Path(folder) / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            config = read_json(path) if path.is_file() else {}
            Entry(config).must_be(isinstance(config, dict), "an object")
        except MalformedError as error:
            raise RecordError(f"The config.json of {folder} cannot be used: {error}. Nothing was written.") from error
        config[RECORD_KEY] = self.to_dict()
        path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    @classmethod
    def from_model(cls, model: nn.Module | Subject) -> PrunedConfig:
        """The record that a model carries.

        Raises:
            RecordError: if it carries none, a malformed one, or one that does not fit the model.
        """
        subject = describe(model)
        if subject.host.record() is None:
            raise RecordError(f"{subject.name} carries no pruning record: it was not pruned by deeparc_hf.")
        return current_record(subject)

    def renamed(self, prefix: str, names: Iterable[str]) -> PrunedConfig:
        """The record with its stacks named as another head of the same base model names them.

        A classifier calls "bert.encoder.layer" what the bare encoder calls "encoder.layer"; `prefix` ("bert") is what
        may differ.
        """
        names = list(names)
        by_base = {name.removeprefix(f"{prefix}."): name for name in names}

        def name(old: str) -> str:
            return by_base.get(old.removeprefix(f"{prefix}."), old)

        if len({name(n) for n in self.stacks}) < len(self.stacks):
            raise RecordError(f"The pruning record names one stack twice: {listed(self.stacks)}.")
        iterations = []
        for entry in self.iterations:
            renamed = {
                key: {name(n): v for n, v in entry[key].items()}
                for key in ("removed", "frozen", "thresholds")
                if entry.get(key)
            }
            iterations.append({**entry, **renamed})
        return dataclasses.replace(
            self,
            stacks={name(n): s for n, s in self.stacks.items()},
            iterations=tuple(iterations),
            sparsity=_renamed_matrices(self.sparsity, prefix, names),
        )

    def check_fits(self, lengths: Mapping[str, int]) -> None:
        """Check the record against the number of blocks that each stack of a model has.

        Raises:
            RecordError: if a stack is missing or has another number of blocks.
        """
        for name, stack in self.stacks.items():
            if name not in lengths:
                has = listed(lengths)
                raise RecordError(
                    f"The pruning record names the stack {quoted(name)}, which this model lacks. Its stacks: {has}."
                )
            if lengths[name] != len(stack.kept):
                raise RecordError(
                    f"The pruning record says that {len(stack.kept)} of {stack.length} blocks of {name} are left, but "
                    f"the model has {lengths[name]}. Its config.json and its weights do not belong together; delete "
                    f"{RECORD_KEY!r} from config.json if the record is wrong."
                )

    def compose(self, step: Layout, iteration: Mapping[str, Any]) -> PrunedConfig:
        """The record after one more pruning.

        Args:
            step: the blocks that stay, as indices of the model now.
            iteration: what to note of this pruning; block indices in "removed" and "frozen" are translated to original
                ones.

        Raises:
            RecordError: if the record would be too long to be read again.
        """
        refuse_full(len(self.iterations), 1)
        entry = dict(iteration)
        for key in ("removed", "frozen"):
            originals = self.layout.indices(entry.get(key) or {})
            entry[key] = {name: list(blocks) for name, blocks in originals.items() if blocks}
        layout = self.layout.then(step)
        return PrunedConfig(
            {name: StackRecord(layout.lengths[name], layout.kept[name]) for name in step.kept},
            self.base_model,
            self.base_revision,
            (*self.iterations, entry),
            renumbered(self.sparsity, step),
            package_versions(),
        )

    def with_mark(self, mark: str | None) -> PrunedConfig:
        """The record with a mark of the weights as its last pruning left them (`weights_mark`): it tells whether they
        were trained since.
        """
        last = {key: value for key, value in self.iterations[-1].items() if key != "left"}
        marked = last if mark is None else {**last, "left": mark}
        return dataclasses.replace(self, iterations=(*self.iterations[:-1], marked))


def current_record(subject: Subject) -> PrunedConfig:
    """The record that a model carries, or an empty one.

    Raises:
        RecordError: if it is malformed, or does not fit the model.
    """
    stored = subject.host.record()
    if stored is None:
        return PrunedConfig({}, *subject.host.loaded_from())
    record = PrunedConfig.from_dict(stored).renamed(subject.host.base_prefix, subject.stacks)
    record.check_fits(subject.lengths)
    return record


def current_layout(subject: Subject) -> Layout:
    """Which of the original blocks a model has, by its record."""
    layout = current_record(subject).layout
    return Layout.whole({n: length for n, length in subject.lengths.items() if n not in layout.lengths}).then(layout)


def check_record(model: nn.Module | Subject, prunings: int = 1) -> None:
    """Refuse, before any work, a record that is malformed, does not fit the model or has no room for more prunings."""
    refuse_full(len(current_record(describe(model)).iterations), prunings)


def same_structure(one: PrunedConfig | None, other: PrunedConfig | None) -> bool:
    """Whether two records (None: none) tell of the same prunings, whatever they say of zeroed weights."""
    return _structure(one) == _structure(other)


def _structure(record: PrunedConfig | None) -> dict[str, Any] | None:
    if record is None or not (record.stacks or record.iterations):
        return None
    return dataclasses.replace(record, sparsity=None, versions={}).to_dict()


def _renamed_matrices(
    sparsity: Mapping[str, Any] | None, prefix: str, stacks: Iterable[str]
) -> Mapping[str, Any] | None:
    """Name matrices as a model with these stacks names them: with or without the prefix of the headless model."""
    if sparsity is None:
        return None
    bare = {stack.removeprefix(f"{prefix}."): stack for stack in stacks}

    def name(old: str) -> str:
        path = old.removeprefix(f"{prefix}.")
        stack = next((short for short in bare if path.startswith(f"{short}.")), None)
        return old if stack is None else bare[stack] + path[len(stack) :]

    matrices = sparsity.get("matrices", {})
    renamed = {name(old): entry for old, entry in matrices.items()}
    if len(renamed) < len(matrices):
        raise RecordError("The pruning record lists the zeros of one matrix twice. Download the checkpoint again.")
    return {**sparsity, "matrices": renamed}


def renumbered(sparsity: Mapping[str, Any] | None, step: Layout) -> Mapping[str, Any] | None:
    """What a record says of zeroed weights after blocks were removed: matrices of removed blocks are gone, the others
    follow their blocks.
    """
    return None if sparsity is None else {**sparsity, "matrices": step.renamed_keys(sparsity.get("matrices", {}))}
