"""What drives a chain: it launches link after link, and prunes the model's files in between.

All that is done lies in the output folder. A link's file is written before it is launched, and what it tells is written
whole when it is done: a chain that was killed goes on with the link that has not told yet.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.companions import copy_companions
from ..checkpoint.record import PrunedConfig
from ..core.checks import MalformedError, read_json
from ..core.files import alone, whole_folder, write_whole
from ..errors import ConfigError, LaunchError, RecordError
from ..healing.stored import load_healings
from ..pruning.on_disk import DiskSurgery, in_bytes
from ..pruning.plan import PruningPlan
from ..publish.card import create_model_card
from ..reports.run_report import RUN_REPORT
from ..trainer.link import WHOLE, Kind, Link, Standing, Told, Wish
from ..trainer.reporter import PLAN_FILE
from .launching import launch
from .settings import ChainSettings

__all__ = ["Chain"]

CHAIN_FILE, LINK_FILE = "chain.json", "link.json"
_FORMAT_VERSION = 1
_DONE = "done"
_WAITS = "Another chain is at work there, or a link that has outlived one: waiting for its end."
_WHAT = {
    Kind.TRAIN: "trains",
    Kind.HEAL: "fits repairs",
    Kind.END: "ends: what the script does after its training, with the model that is left",
}


class Chain:
    """A chain of trainings in an output folder.

    Args:
        say: told what is done, a line each.
    """

    def __init__(self, settings: ChainSettings, say: Callable[[str], None]) -> None:
        in_bytes(settings.max_shard_size)
        self.settings = settings
        self.out = Path(settings.output).expanduser().resolve()
        self.say = say

    @property
    def model(self) -> Path:
        """The folder of the model that the chain ends with."""
        return self.out / "model"

    def run(self) -> Path:
        """Begin the chain, or go on with it where it stood; the folder of its model.

        Raises:
            ConfigError: if the folder holds something else, or a chain with other settings.
            LaunchError: if the script fails; started again, the chain goes on with that link.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        waits = partial(self.say, _WAITS)
        with alone(self.out / "chain.lock", waits) as lock:
            if self._is_complete():
                self.say(f"The chain in {self.settings.output} is complete.")
                return self.model
            number, link = self._stands_at()
            while True:
                told = self._told(number, link, lock)
                if link.kind is Kind.END:
                    break
                number, link = number + 1, self._next(number + 1, told)
                self._tidy(link)
            self._finish(link, told)
        return self.model

    # ---- where it stands ----

    def _is_complete(self) -> bool:
        """Whether it is done; its settings are noted, or compared with those that it began with."""
        file = self.out / CHAIN_FILE
        asked = json.loads(json.dumps({k: v for k, v in vars(self.settings).items() if k != "output"}))
        if not file.exists():
            others = sorted(path.name for path in self.out.iterdir() if path.name != "chain.lock")
            if others:
                raise ConfigError(
                    f"{self.settings.output} holds {others[0]!r} and no chain. Give another output folder."
                )
            self._note(asked, complete=False)
            return False
        try:
            known = read_json(file)
            then, complete = dict(known["asked"]), bool(known["complete"])
        except (MalformedError, KeyError, TypeError, ValueError) as error:
            raise RecordError(f"{file} cannot be read ({error}). Begin the chain in another output folder.") from error
        changed = sorted(name for name in {*asked, *then} if asked.get(name) != then.get(name))
        if changed:
            raise ConfigError(
                f"{self.settings.output} holds a chain with other settings ({', '.join(changed)}). Give the same ones "
                "to go on with it, or another output folder."
            )
        return complete

    def _note(self, asked: Mapping[str, Any], complete: bool) -> None:
        known = {"format_version": _FORMAT_VERSION, "asked": asked, "complete": complete}
        write_whole(self.out / CHAIN_FILE, json.dumps(known, indent=1) + "\n")

    def _folder(self, number: int) -> Path:
        return self.out / "links" / f"{number:03d}"

    def _stands_at(self) -> tuple[int, Link]:
        """The last link that was begun; the first one where there is none."""
        numbers = [int(p.parent.name) for p in self.out.glob(f"links/*/{LINK_FILE}") if p.parent.name.isdigit()]
        if numbers:
            return max(numbers), Link.read(self._folder(max(numbers)) / LINK_FILE)
        return 1, self._written(1, Kind.TRAIN, self.settings.model, Standing(self.settings.model))

    def _written(self, number: int, kind: Kind, model: str, standing: Standing, **more: Any) -> Link:
        folder = self._folder(number)
        size = self.settings.max_shard_size
        link = Link(kind, model, folder / "output", folder, standing, max_shard_size=size, **more)
        link.write(folder / LINK_FILE)
        return link

    # ---- one link ----

    def _told(self, number: int, link: Link, lock: Any) -> Told:
        """What a link tells, which is launched unless it has told before."""
        if link.told.is_file() and (link.kind is not Kind.END or (link.folder / _DONE).exists()):
            return Told.read(link.told)
        checkpoint = self._newest_checkpoint(link)
        link.told.unlink(missing_ok=True)
        for left in (link.saved, link.repairs, *([] if checkpoint else [link.output])):
            shutil.rmtree(left, ignore_errors=True)
        goes_on = "" if checkpoint is None else f", on from {checkpoint.name}"
        self.say(f"Link {number} {_WHAT[link.kind]}{goes_on}.")
        settings = self.settings
        arguments = settings.filled(link.model, link.output, checkpoint)
        code = launch(settings.launch, settings.script, arguments, link.folder / LINK_FILE, lock)
        # a link that has told is done, whatever its processes end with; behind the last one the script goes on
        if code != 0 and (link.kind is Kind.END or not link.told.is_file()):
            raise LaunchError(
                f"{settings.script} ended with exit code {code}; what it printed says why. When that is mended, the "
                "same command goes on from here."
            )
        if not link.told.is_file():
            raise ConfigError(
                f"{settings.script} ended without an error, and its Trainer did not take part in the chain. Give it an "
                "MPruneCallback, and have the script call train()."
            )
        if link.kind is Kind.END:  # it has told before the rest of the script ran
            (link.folder / _DONE).touch()
        return Told.read(link.told)

    def _newest_checkpoint(self, link: Link) -> Path | None:
        """The newest whole checkpoint of a link that was interrupted, where the script can go on from one."""
        found = [p for p in link.output.glob("checkpoint-*") if (p / WHOLE).is_file() and p.name[11:].isdigit()]
        if not self.settings.goes_on_within or link.kind is not Kind.TRAIN:
            return None
        return max(found, key=lambda path: int(path.name[11:]), default=None)

    def _next(self, number: int, told: Told) -> Link:
        """The link that follows, with its model."""
        standing = told.standing
        if told.wish is Wish.PRUNE:
            start = self._folder(number) / "start"
            if not start.exists():
                self._prune(told, start)
            pruned = {"plan": told.plan, "repairs": told.repairs, "stages": dict(told.stages)}
            return self._written(number, Kind.TRAIN, str(start), standing, pruned=pruned)
        if told.wish is Wish.HEAL:
            return self._written(number, Kind.HEAL, told.model, standing, after=told.plan)
        if told.wish is Wish.TRAIN:
            return self._written(number, Kind.TRAIN, told.model, standing)
        if not self.model.exists():
            with whole_folder(self.model) as draft:
                shutil.copytree(told.model, draft, copy_function=_linked, dirs_exist_ok=True)
        return self._written(number, Kind.END, str(self.model), standing)

    def _prune(self, told: Told, start: Path) -> None:
        """Write the smaller model, with the tokenizer or processor that lies beside the larger one."""
        plan, standing = PruningPlan.from_dict(told.plan), told.standing
        healings = [] if told.repairs is None else load_healings(Path(told.repairs))
        gone = sum(map(len, plan.removed.values()))
        self.say(f"Taking {gone} block{'' if gone == 1 else 's'} out of the model's files.")
        surgery = DiskSurgery.of(told.model, plan, auto_class=standing.model_class, healings=healings)
        with whole_folder(start) as draft:
            record = surgery.write(draft, verify=self.settings.verify, max_shard_size=self.settings.max_shard_size)
            if record.base_model is None and standing.base_model is not None:
                base = {"base_model": standing.base_model, "base_revision": standing.base_revision}
                dataclasses.replace(record, **base).save_pretrained(draft)
            copy_companions(told.model, draft)

    def _tidy(self, link: Link) -> None:
        """Remove what no link will need: models that were left behind, and checkpoints of links that are done."""
        kept = {Path(link.model), Path(link.standing.accepted), link.folder}
        for folder in self.out.glob("links/*"):
            if folder == link.folder:
                continue
            for model in (folder / "model", folder / "start"):
                if model not in kept:
                    shutil.rmtree(model, ignore_errors=True)
            for checkpoint in folder.glob("output/checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)

    # ---- the end ----

    def _finish(self, link: Link, told: Told) -> None:
        """Put report, plan, record and card beside the model."""
        for name in (f"{RUN_REPORT}.json", f"{RUN_REPORT}.md", PLAN_FILE):
            if (link.output / name).is_file():
                shutil.copy2(link.output / name, self.model / name)
        if told.record is not None:
            PrunedConfig.from_dict(told.record).save_pretrained(self.model)
            create_model_card(self.model, model_name=self.out.name)
        for folder in self.out.glob("links/*"):
            for model in (folder / "model", folder / "start"):
                shutil.rmtree(model, ignore_errors=True)
        asked = dict(read_json(self.out / CHAIN_FILE)["asked"])
        self._note(asked, complete=True)


def _linked(source: str, target: str) -> str:
    """A file in a second place, without a copy where the file system allows that. Settings are copied: they change."""
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
        except OSError:
            pass
        else:
            return target
    return str(shutil.copy2(source, target))
