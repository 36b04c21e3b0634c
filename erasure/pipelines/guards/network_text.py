"""The text conditions in a call of a network: where they stand among its arguments, and others in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from erasure.model.conditioning import Conditions


def text_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Conditions:
    """Return the text conditions in the arguments of a network's call after the latents.

    Args:
        args: the positional arguments after the latents: the timestep, perhaps the text states.
        kwargs: the named arguments.
    """
    states = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
    return Conditions(states, (kwargs.get("added_cond_kwargs") or {}).get("text_embeds"))


def with_text(args: Sequence[Any], kwargs: dict[str, Any], conditions: Conditions) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a network's call after the latents, with other text conditions in them.

    Args:
        args: the positional arguments after the latents: the timestep, perhaps the text states.
        kwargs: the named arguments.
        conditions: the conditions of as many samples.
    """
    args, kwargs = list(args), dict(kwargs)
    before = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
    states = conditions.states.to(before)
    if "encoder_hidden_states" in kwargs:
        kwargs["encoder_hidden_states"] = states
    else:
        args[1] = states
    if conditions.pooled is not None:
        pooled = conditions.pooled.to(before)
        if kwargs.get("pooled_projections") is not None:
            kwargs["pooled_projections"] = pooled
        elif "text_embeds" in (kwargs.get("added_cond_kwargs") or {}):
            kwargs["added_cond_kwargs"] = {**kwargs["added_cond_kwargs"], "text_embeds": pooled}
    if conditions.mask is not None:
        kwargs["encoder_attention_mask"] = conditions.mask.to(before.device)
    return args, kwargs
