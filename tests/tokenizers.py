"""A stand-in for a tokenizer where only its ids and its limit matter."""

from __future__ import annotations

import types
from typing import Any

from tests.models import CLS, MASK, POSITIONS


def tokenizer_like(cls_token_id: int = CLS, mask_token_id: int = MASK) -> Any:
    return types.SimpleNamespace(
        cls_token_id=cls_token_id, mask_token_id=mask_token_id, model_max_length=POSITIONS
    )
