"""The states of a prompt, straight from the text encoder: what the tests of closed forms compare with."""

from __future__ import annotations

import numpy as np
import torch

from erasure.model.base import Base
from tests.tiny import LENGTH


def states(base: Base, text: str) -> np.ndarray:
    """Return all states of a prompt [tokens, width] in fp64."""
    ids = base.pipe.tokenizer(text, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        return base.pipe.text_encoder(ids)[0][0].double().numpy()
