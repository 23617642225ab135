"""The record of what was done to a checkpoint, in its config.json. A downloaded one is hostile: all is checked."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..architectures import Layout, Subject, describe
from ..architectures.hosts import RECORD_KEY
from ..core.block_paths import is_inside
from ..core.caller import warn_caller
from ..core.checks import MAX_BLOCKS, MAX_ENTRIES, Entry, MalformedError, read_json
from ..core.environment import package_versions
from ..core.hub_help import hub_help
from ..core.plain_text import LIMIT, listed, plain, quoted
from ..core.tables import html_table, spans
from ..errors import RecordError
from .record_checks import check_iteration, check_sparsity

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
_TARGETS = ("num_blocks", "keep_ratio", "threshold")


@dataclass(frozen=True)
class StackRecord:
    """One stack: its length in the base model, and the ORIGINAL indices of the blocks that are left."""

    length: int
    kept: tuple[int, ...]

    @classmethod
    def read(cls, name: str, stack: Entry) -> StackRecord:
        """Read a stack, checking everything; what is wrong is a MalformedError."""
        Entry(name, "stacks").must_be(name.strip() == name, "named without spaces around the names")
        length, kept = stack["length"].whole(1, MAX_BLOCKS), stack["kept"]
        indices = kept.wholes(most=length)
        rising = all(a < b for a, b in itertools.pairwise(indices))
        good = bool(indices) and rising and indices[-1] < length
        kept.must_be(good, f"rising block indices from 0 to {length - 1}, none twice")
        return cls(length, indices)


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
        """What is left of each stack, each pruning, zeroed weights; blocks by original numbers."""
        base = self.base_model or "a checkpoint that is not on the Hub"
        times = len(self.iterations)
        what = f"Pruned {times} time{'s' * (times != 1)}" if self.stacks or times else "No block was removed"
        stacks = [
            [name, stack.length, len(stack.kept), spans(stack.kept), spans(self.removed[name])]
            for name, stack in self.stacks.items()
        ]
        end = []
        if self.zeros is not None:
            zeros, size, matrices = self.zeros
            end = [f"Zeroed weights: {100 * zeros / max(1, size):.2f} % of {size:,} in {matrices} matrices."]
        headers = ["stack", "blocks before", "left", "these are left", "removed"]
        table = html_table(f"{what}; before, {base}", headers, stacks, end)
        if not times:
            return table
        headers = ["pruning", "removed", "frozen", "asked for", "samples"]
        prunings = [[number, *_shown(entry)] for number, entry in enumerate(self.iterations, 1)]
        return "\n".join([table, html_table("Prunings, oldest first", headers, prunings)])

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
                f"{listed(unknown)}. pip install -U deeparc_hf may help."
            )
        stacks = {name: StackRecord.read(name, stack) for name, stack in entry["stacks"].named().items()}
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
        by_base = {name.removeprefix(f"{prefix}."): name for name in names}

        def name(old: str) -> str:  # of a stack, or of a matrix in one
            path = old.removeprefix(f"{prefix}.")
            stack = next((short for short in by_base if path == short or is_inside(short, path)), None)
            return old if stack is None else by_base[stack].removesuffix(stack) + path

        def renamed(entries: Mapping[str, Any]) -> dict[str, Any]:
            return {name(old): entry for old, entry in entries.items()}

        stacks = renamed(self.stacks)
        if len(stacks) < len(self.stacks):
            raise RecordError(f"The pruning record names one stack twice: {listed(self.stacks)}.")
        by_stack = ("removed", "frozen", "thresholds")
        iterations = tuple(
            {**entry, **{key: renamed(entry[key]) for key in by_stack if entry.get(key)}} for entry in self.iterations
        )
        sparsity = self.sparsity
        if sparsity is not None:
            matrices = sparsity.get("matrices", {})
            sparsity = {**sparsity, "matrices": renamed(matrices)}
            if len(sparsity["matrices"]) < len(matrices):
                raise RecordError(
                    "The pruning record lists the zeros of one matrix twice. Download the checkpoint again."
                )
        return dataclasses.replace(self, stacks=stacks, iterations=iterations, sparsity=sparsity)

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

    def require_room(self, prunings: int) -> None:
        """Refuse to add to the record what could not be read again.

        Raises:
            RecordError: if it would list more than `MAX_ENTRIES` prunings.
        """
        count = len(self.iterations)
        if count + prunings > MAX_ENTRIES:
            raise RecordError(
                f"The model's record lists {count} prunings, and one of more than {MAX_ENTRIES} is not read again. "
                "Nothing was removed. Set pruning_config to None in the model's config to begin a new record."
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
        self.require_room(1)
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
    current_record(describe(model)).require_room(prunings)


def same_structure(one: PrunedConfig | None, other: PrunedConfig | None) -> bool:
    """Whether two records (None: none) tell of the same prunings, whatever they say of zeroed weights."""
    return _structure(one) == _structure(other)


def _structure(record: PrunedConfig | None) -> dict[str, Any] | None:
    if record is None or not (record.stacks or record.iterations):
        return None
    return dataclasses.replace(record, sparsity=None, versions={}).to_dict()


def renumbered(sparsity: Mapping[str, Any] | None, step: Layout) -> Mapping[str, Any] | None:
    """What a record says of zeroed weights after blocks were removed: matrices of removed blocks are gone, the others
    follow their blocks.
    """
    return None if sparsity is None else {**sparsity, "matrices": step.renamed_keys(sparsity.get("matrices", {}))}


def _shown(iteration: Mapping[str, Any]) -> list[str]:
    """What a notebook shows of a pruning: removed and frozen blocks, what was asked for, samples."""
    try:
        check_iteration(Entry(iteration), {})
    except MalformedError as error:  # it was made by hand: one that is read is refused
        return [plain(error), "-", "-", "-"]
    blocks = [
        "; ".join(f"{plain(name, 60)}: {spans(found)}" for name, found in (iteration.get(key) or {}).items() if found)
        for key in ("removed", "frozen")
    ]
    settings = iteration.get("settings") or {}
    asked = (f"{name}={plain(settings[name], 80)}" for name in _TARGETS if settings.get(name) is not None)
    samples = plain(iteration.get("samples", "-"))
    return [*(found or "-" for found in blocks), next(asked, "blocks by name"), samples]
