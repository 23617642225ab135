"""The settings of weight sparsity."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.settings import Settings, percent_hint, setting, shown
from ..errors import ConfigError, RegistryError
from .methods import methods

__all__ = ["WandaConfig"]


@dataclass(frozen=True)
class WandaConfig(Settings):
    """Settings of weight sparsity (Wanda: Sun et al. 2023, arXiv 2306.11695).

    `start_epoch` and `keep_zeros` are of use to `WandaCallback` only.

    Raises:
        ConfigError: if a value makes no sense; the message says which values do.
    """

    sparsity: float = setting(
        0.5, "Share of the inputs of each output row that is zeroed, in [0, 1): int(inputs * sparsity) of them."
    )
    pattern: str | None = setting(
        None,
        "N:M pattern: of each M consecutive inputs N stay; it stands for sparsity, which is one half then.",
        choices=("2:4", "4:8"),
        cli="N:M pattern: of each M consecutive inputs N stay, half of them; in the place of --sparsity.",
    )
    method: str = setting("wanda", "Sparsity method, by its registered name.")
    sequential: bool = setting(
        True,
        "Choose the zeros of each block on what the sparsified blocks before it put out; otherwise one pass of the "
        "dense model.",
    )
    targets: tuple[str, ...] | None = setting(
        None,
        "Patterns (fnmatch) of module paths of the linear maps to sparsify, e.g. '*.attention.*'; default: all of "
        "every block.",
        cli="Pattern (fnmatch) of module paths of the linear maps to sparsify, e.g. '*.attention.*'; default: all of "
        "every block.",
    )
    calibration_samples: int = setting(128, "Number of calibration samples to measure the inputs on.")
    start_epoch: int = setting(
        0, "Epochs of training before the weights are zeroed; 0 zeroes them at once.", trainer=True
    )
    keep_zeros: bool = setting(
        True, "Keep the zeros while training goes on, and check them at the end of every epoch.", trainer=True
    )
    seed: int = setting(0, "Seed of the choice of calibration samples from a data set.")

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            object.__setattr__(self, "targets", (self.targets,))
        self._to_tuples("targets")
        self._check_types()
        self._check_choices()
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity must be in [0, 1), found {shown(self.sparsity)}.{percent_hint(self.sparsity)}")
        if self.pattern is not None and self.sparsity != 0.5:
            raise ConfigError(
                f"The pattern {self.pattern} zeroes one half, found sparsity {self.sparsity:g} beside it. Give one of "
                "them."
            )
        if self.targets is not None and not self.targets:
            raise ConfigError("targets is an empty list, so nothing would be zeroed. Leave it out for all linear maps.")
        for name, least in (("calibration_samples", 1), ("start_epoch", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, found {getattr(self, name)}.")
        try:
            methods.get(self.method)
        except RegistryError as error:
            raise ConfigError(f"method: {error}") from None

    @property
    def group(self) -> tuple[int, int] | None:
        """N and M of the pattern."""
        if self.pattern is None:
            return None
        keep, size = self.pattern.split(":")
        return int(keep), int(size)
