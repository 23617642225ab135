"""What a search makes small: how far a model with blocks left out is from the whole one, or from the truth.

One file each; `base` says what an objective is.
"""

from .base import Answer, AnswerObjective, ModelObjective, Objective, Score, objectives

__all__ = ["Answer", "AnswerObjective", "ModelObjective", "Objective", "Score", "objectives"]
