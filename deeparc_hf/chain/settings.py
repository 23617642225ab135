"""What a chain launches: a script, what it is given, and how it is launched."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from ..core.plain_text import plain, quoted
from ..errors import ConfigError

__all__ = ["ChainSettings"]

_MODEL, _OUTPUT, _CHECKPOINT = "{model}", "{output}", "{checkpoint}"


@dataclass(frozen=True)
class ChainSettings:
    """A chain, as a YAML file names it. Paths are those of the folder in which the chain is started.

    Attributes:
        model: Hub id or folder of the model that the chain begins with.
        output: the folder for all that it makes.
        script: a Python file that trains a model by a Trainer with an `MPruneCallback`.
        arguments: what the script is given. `{model}` stands for the model that it has to load, `{output}` for the
            output folder of its Trainer, `{checkpoint}` for a checkpoint to go on from; where there is none, that
            argument is left out, and so is the option before it.
        launch: options of `accelerate launch`.
        verify: whether a forward pass must show that each pruned checkpoint computes what it should.
        max_shard_size: of a weights file, as in `prune_checkpoint`.
    """

    model: str
    output: str
    script: str
    arguments: tuple[str, ...]
    launch: tuple[str, ...] = ()
    verify: bool = True
    max_shard_size: str | int | None = None

    def __post_init__(self) -> None:
        for place in (_MODEL, _OUTPUT):
            if not any(place in argument for argument in self.arguments):
                raise ConfigError(
                    f"The script's arguments lack {place}: it must be told which model to load and where to write, as "
                    "in arguments: --model {model} --output_dir {output}."
                )
        if not Path(self.script).is_file():
            raise ConfigError(f"There is no script {self.script} (looked for in {Path.cwd()}).")

    @classmethod
    def from_yaml(cls, file: Path) -> Self:
        """Read a YAML file.

        Raises:
            ConfigError: if it cannot be read, or something in it makes no sense.
        """
        try:
            data = yaml.safe_load(file.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{file} cannot be read: {plain(error)}.") from error
        if not isinstance(data, Mapping):
            raise ConfigError(f"{file} must hold settings as NAME: VALUE, found {quoted(data)}.")
        return cls.from_dict(data, str(file))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str) -> Self:
        """Made of plain values.

        Raises:
            ConfigError: if something in them makes no sense.
        """
        known = tuple(cls.__dataclass_fields__)
        for name in data:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(known)}."
                raise ConfigError(f"{source} has a setting {quoted(name)}, which there is not. {hint}")
        lacking = [name for name in ("model", "output", "script", "arguments") if data.get(name) is None]
        if lacking:
            raise ConfigError(f"{source} lacks {', '.join(lacking)}.")
        texts = {name: data[name] for name in ("model", "output", "script")}
        for name, value in texts.items():
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{source}: {name} must be a text, found {quoted(value)}.")
        words = {name: _words(name, data.get(name, ()), source) for name in ("arguments", "launch")}
        verify = data.get("verify", True)
        if not isinstance(verify, bool):
            raise ConfigError(f"{source}: verify must be true or false, found {quoted(verify)}.")
        return cls(**texts, **words, verify=verify, max_shard_size=data.get("max_shard_size"))

    @property
    def goes_on_within(self) -> bool:
        """Whether the script can be told of a checkpoint to go on from."""
        return any(_CHECKPOINT in argument for argument in self.arguments)

    def filled(self, model: str, output: Path, checkpoint: Path | None) -> list[str]:
        """The script's arguments for one launch."""
        filled: list[str] = []
        for argument in self.arguments:
            if _CHECKPOINT in argument and checkpoint is None:
                if argument == _CHECKPOINT and filled and filled[-1].startswith("-"):
                    filled.pop()
                continue
            for place, value in ((_MODEL, model), (_OUTPUT, str(output)), (_CHECKPOINT, str(checkpoint))):
                argument = argument.replace(place, value)
            filled.append(argument)
        return filled


def _words(name: str, given: Any, source: str) -> tuple[str, ...]:
    """A line as a shell reads it, or a list of words."""
    if isinstance(given, str):
        try:
            return tuple(shlex.split(given))
        except ValueError as error:
            raise ConfigError(f"{source}: {name} is no line that a shell would read: {error}.") from error
    usable = isinstance(given, Sequence) and all(type(word) in (str, int, float) for word in given)
    if not usable:
        raise ConfigError(f"{source}: {name} must be a line, or a list of words, found {quoted(given)}.")
    return tuple(map(str, given))
