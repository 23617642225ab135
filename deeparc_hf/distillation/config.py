"""The settings of distillation."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.settings import Settings, percent_hint, setting, shown
from ..errors import ConfigError

__all__ = ["DistillConfig"]


@dataclass(frozen=True)
class DistillConfig(Settings):
    """Settings of distillation: the unpruned model teaches while the pruned one is retrained.

    Raises:
        ConfigError: if a value makes no sense; the message says which values do.
    """

    alpha: float = setting(
        0.5, "Weight of the divergence from the teacher's outputs, in [0, 1]; the loss on the labels keeps 1 - alpha."
    )
    temperature: float = setting(
        2.0, "Both outputs are softened by it before they are compared, above 0; 1 leaves them as they are."
    )
    hidden: float = setting(
        0.0,
        "Weight of the distance between the hidden states of both models where blocks were removed; 0 leaves it out.",
    )
    dtype: str | None = setting(
        None,
        "Precision of the teacher; default: that of the model. A half precision halves its memory.",
        choices=("float32", "bfloat16", "float16"),
    )

    def __post_init__(self) -> None:
        self._check_types()
        self._check_choices()
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha must be in [0, 1], found {shown(self.alpha)}.{percent_hint(self.alpha)}")
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be above 0, found {self.temperature:g}. 2 to 4 are usual.")
        if self.hidden < 0:
            raise ConfigError(f"hidden must be 0 or more, found {self.hidden:g}.")
        if self.alpha == 0 and self.hidden == 0:
            raise ConfigError(
                "alpha and hidden are both 0, so the teacher would have no say. Raise one of them, or leave distill "
                "out."
            )
