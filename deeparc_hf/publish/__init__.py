"""Publishing: the model card (what was removed, what it cost and what it saved), and the push to the Hub.

May import `reports` and what is below it.
"""

from __future__ import annotations

from .card import CARD_FILE, PICTURE_FILE, create_model_card
from .merging import made_by_us

__all__ = ["CARD_FILE", "PICTURE_FILE", "create_model_card", "made_by_us"]
