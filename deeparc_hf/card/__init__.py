"""The model card: what was removed, what it cost and what it saved."""

from .model_card import CARD_FILE, PICTURE_FILE, create_model_card, made_by_us

__all__ = ["CARD_FILE", "PICTURE_FILE", "create_model_card", "made_by_us"]
