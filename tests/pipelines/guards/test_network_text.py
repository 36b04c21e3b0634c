"""Where the text conditions stand in a call of a network."""

from __future__ import annotations

import pytest
import torch

from erasure.model.conditioning import Conditions
from erasure.pipelines.guards.network_text import text_in, with_text

STATES, OTHER = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)


@pytest.mark.parametrize("named", [True, False])
def test_states_are_found_and_replaced_where_they_stand(named):
    args, kwargs = (["t"], {"encoder_hidden_states": STATES}) if named else (["t", STATES], {})
    assert text_in(args, kwargs).states is STATES and text_in(args, kwargs).pooled is None
    new_args, new_kwargs = with_text(args, kwargs, Conditions(OTHER))
    assert torch.equal(text_in(new_args, new_kwargs).states, OTHER)
    assert text_in(args, kwargs).states is STATES  # what was given is left alone


def test_the_pooled_text_of_xl_is_found_and_replaced_and_its_sizes_stay():
    kwargs = {"encoder_hidden_states": STATES, "added_cond_kwargs": {"text_embeds": STATES[:, 0], "time_ids": "sizes"}}
    assert torch.equal(text_in(["t"], kwargs).pooled, STATES[:, 0])
    _, changed = with_text(["t"], kwargs, Conditions(OTHER, OTHER[:, 0]))
    assert torch.equal(text_in(["t"], changed).pooled, OTHER[:, 0])
    assert changed["added_cond_kwargs"]["time_ids"] == "sizes"
