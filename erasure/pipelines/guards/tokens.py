"""The form `tokens`: the tokens of a prompt that name a text are projected away from it (SAFREE, arXiv 2410.12761).

For each text encoder, p_0 is the state at the end token of the prompt and p_i that of the prompt with token i hidden.
With P_C the projector onto the span of the texts' end states and P_I that onto the span of p_1 ... p_n,

    d_i = |(I - P_C) p_i|
    token i is a trigger if d_i > (1 + margin) mean of the other d_j, of a prompt of one token (1 + margin) d_0
    e <- (I - P_C) P_I e  for the states e of the triggers

so that what is left of them is no part of the texts and yet of the prompt. Prompts without a trigger keep every bit.

How long the filtered states serve is decided by how far the projection turns the whole prompt (self-validation):

    beta = 1 - mean over the tokens of cos(e, (I - P_C) P_I e)
    share of the noise schedule, from its noisy end = steps / (1 + exp(-slope (beta - midpoint)))

and after it the prompt serves as it is. Of two text encoders, each decides about its own states, and the larger beta
holds for both; the pooled text that the network reads besides is projected where its encoder has a trigger.

Cost: the text encoder on n + 1 rows for each prompt. With re-attention (reattention.py) one more row of the network for
each prompt that has a trigger, while it is filtered: 1.5 times the base's under classifier-free guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from erasure.config import setting
from erasure.model.architectures import Architecture
from erasure.model.conditioning import Conditions, text_encoders
from erasure.pipelines.guards.form import Acting, Drawing, Form, begun, rows_of
from erasure.pipelines.guards.masked_prompts import ends, projector, unregularised_projector, without_each
from erasure.pipelines.guards.network_text import text_in, with_text
from erasure.pipelines.guards.reattention import SkippedFeatures
from erasure.pipelines.replaced_forward import ReplacedForward, pick, split

PUBLISHED_STEPS = 50  # of the published script, whose filter counts steps


@dataclass(frozen=True)
class Tokens(Form):
    """The settings of the filter.

    Args:
        margin: how much farther from the texts a prompt must be without a token for it to be a trigger (alpha).
        steps: largest share of the noise schedule in which filtered states serve, from its noisy end.
        midpoint: beta at half of that share.
        slope: how sharply the share rises with beta.
        padding: whether the states at the end token and after it are filtered too, where a token is.
        negative: whether guidance also leads away from the texts: they take the place of the unconditional rows.
        reattention: whether features are compared with those of the prompt as it is (reattention.py).
        wide_scale: factor of re-attention on the widest features.
        narrow_scale: factor of re-attention on the second widest.
        published: whether tokens are hidden, subspaces made, single tokens judged and steps rounded as in the published
            code.
    """

    NEEDS_PROMPTS: ClassVar[bool] = True

    margin: float = setting(0.01, at_least=0)
    steps: float = setting(0.2, above=0, at_most=1)
    midpoint: float = setting(0.5333, at_least=0, at_most=2)
    slope: float = setting(50.0, above=0)
    padding: bool = False
    negative: bool = False
    reattention: bool = False
    wide_scale: float = setting(0.9, at_least=0)
    narrow_scale: float = setting(0.2, at_least=0)
    published: bool = False

    @classmethod
    def unsuited(cls, architecture: Architecture) -> str:
        """Return why no prompt can be judged: a network that reads another encoder than CLIP, or one besides it."""
        if super().unsuited(architecture):
            return "it judges a prompt by the state at its end token, and this network does not read that of CLIP alone"
        return ""

    @classmethod
    def prepare(cls, drawing: Drawing, guards: Sequence[Acting[Tokens]]) -> Callable[[], TokenFilter]:
        """Encode the texts of the guards, and each prompt with each of its tokens hidden."""
        prompts = drawing.prompts or []
        filters = [[guard.form.filters(drawing.pipe, guard.texts, prompt) for prompt in prompts] for guard in guards]
        negatives = [drawing.conditions(", ".join(guard.texts)) if guard.form.negative else None for guard in guards]
        return partial(TokenFilter, drawing, guards, filters, negatives)

    def filters(self, pipe: Any, texts: Sequence[str], prompt: Sequence[str]) -> list[EncoderFilter]:
        """Return what happens to a prompt's states, for each text encoder.

        Args:
            pipe: the diffusers pipeline.
            texts: what to keep out.
            prompt: the prompt's text, or several for as many encoders.
        """
        found = []
        project = unregularised_projector if self.published else projector
        for number, (tokenizer, _) in enumerate(text_encoders(pipe)):
            text = prompt[number] if number < len(prompt) else prompt[0]
            if hasattr(pipe, "maybe_convert_prompt"):  # words that were learnt by textual inversion
                text = pipe.maybe_convert_prompt(text, tokenizer)
            kept_out = ends(pipe, texts, number)
            hidden = without_each(pipe, text, number, by_id=self.published)
            count = hidden.tokens[0]
            if not count:
                continue
            away = project(kept_out.states)
            triggers = self.triggers((hidden.states - hidden.states @ away).norm(dim=1))
            turn = project(hidden.states[1:]) @ (torch.eye(len(away), dtype=away.dtype) - away)
            pooled = None
            if hidden.pooled is not None and kept_out.pooled is not None:
                out = project(kept_out.pooled)
                pooled = project(hidden.pooled[1:]) @ (torch.eye(len(out), dtype=out.dtype) - out)
            found.append(EncoderFilter(number, triggers, turn.float(), None if pooled is None else pooled.float()))
        return found

    def triggers(self, distances: Tensor) -> Tensor:
        """Return which tokens are triggers [n].

        Args:
            distances: d [n + 1], of the prompt and of the prompt with each token hidden.
        """
        rest = distances[1:]
        if self.published:  # the mean of no other token is NaN, below which nothing is
            others = (rest.sum() - rest) / (len(rest) - 1)
            return ~(rest < (1 + self.margin) * others)
        others = distances[:1] if len(rest) == 1 else (rest.sum() - rest) / (len(rest) - 1)
        return rest > (1 + self.margin) * others

    def share(self, beta: float) -> float:
        """Return the share of the noise schedule in which filtered states serve, from its noisy end."""
        exponent = max(min(self.slope * (self.midpoint - beta), 500.0), -500.0)
        share = self.steps / (1 + math.exp(exponent))
        # The published loop counts steps from 0 and filters up to and including the number that it has rounded.
        return (round(PUBLISHED_STEPS * share) + 1) / PUBLISHED_STEPS if self.published else share


@dataclass(frozen=True)
class EncoderFilter:
    """What happens to one prompt's states of one text encoder.

    Args:
        number: of the text encoder.
        triggers: which of the prompt's tokens are triggers [n].
        turn: the transposed (I - P_C) P_I [width, width].
        pooled: the same for the pooled text, if the network reads it from this encoder.
    """

    number: int
    triggers: Tensor
    turn: Tensor
    pooled: Tensor | None

    def chosen(self, length: int, padding: bool) -> Tensor:
        """Return which of the `length` states are filtered; with `padding`, all after the last token as well."""
        count = len(self.triggers)
        rows = torch.zeros(length, dtype=torch.bool)
        rows[1 : count + 1] = self.triggers
        rows[count + 1 :] = padding and bool(self.triggers.any())
        return rows


class TokenFilter(ReplacedForward):
    """A replacement for the network's forward that filters the text states of the prompts.

    Args:
        drawing: the call.
        guards: the guards that act in it.
        filters: for each guard and prompt, what happens to its states in each text encoder.
        negatives: for each guard the conditions of its texts, if guidance leads away from them.
    """

    def __init__(
        self,
        drawing: Drawing,
        guards: Sequence[Acting[Tokens]],
        filters: Sequence[Sequence[list[EncoderFilter]]],
        negatives: Sequence[Conditions | None],
    ) -> None:
        self._drawing, self._guards, self._negatives = drawing, guards, negatives
        self._rows = len(guards[0].shares) * drawing.images
        self._filters = [[entry for entry in row for _ in range(drawing.images)] for row in filters]
        self._shares = [guard.shares.repeat_interleave(drawing.images) for guard in guards]
        self._widths = [encoder.config.hidden_size for _, encoder in text_encoders(drawing.pipe)]
        super().__init__(drawing.network, drawing.base.component)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with filtered states of the prompts.

        Args:
            args: arguments of the network.
            kwargs: named arguments of the network.

        Raises:
            ErasureError: the batch is not that of the prompts.
        """
        self.calls += 1
        sample, args, kwargs = split(args, kwargs)
        first, _ = rows_of(sample, self._rows)
        text = text_in(args, kwargs)
        time = args[0] if args else kwargs["timestep"]
        schedule = begun(time, self._drawing.pipe.scheduler, len(sample))[first:]
        changed, live = self._filtered(text, first, schedule)
        if changed is None:
            return self._forward(sample, *args, **kwargs)
        with self._compared(live, first, (sample, *args), kwargs):
            new_args, new_kwargs = with_text(args, kwargs, changed)
            return self._forward(sample, *new_args, **new_kwargs)

    def _filtered(self, text: Conditions, first: int, schedule: Tensor) -> tuple[Conditions | None, list[Tensor]]:
        """Return the changed conditions of the batch, or None, and which rows of prompts each guard filters."""
        states, pooled = text.states.clone(), None if text.pooled is None else text.pooled.clone()
        touched, live = False, []
        for guard, filters, shares, negative in zip(
            self._guards, self._filters, self._shares, self._negatives, strict=True
        ):
            if negative is not None and first:
                share = shares.to(states)
                states[:first] += share.view(-1, 1, 1) * (negative.states.to(states) - text.states[:first])
                if pooled is not None and negative.pooled is not None and text.pooled is not None:
                    pooled[:first] += share.view(-1, 1) * (negative.pooled.to(pooled) - text.pooled[:first])
                touched = True
            acting = torch.zeros(self._rows, dtype=torch.bool)
            for row in range(self._rows):
                own = text[[first + row]]
                new = self._turned(guard.form, filters[row], own) if shares[row] else None
                if new is None or float(schedule[row]) < 1 - guard.form.share(new[1]):
                    continue
                acting[row] = touched = True
                states[first + row] += float(shares[row]) * (new[0].states - own.states)[0]
                if pooled is not None and new[0].pooled is not None and own.pooled is not None:
                    pooled[first + row] += float(shares[row]) * (new[0].pooled - own.pooled)[0]
            live.append(acting)
        return (Conditions(states, pooled) if touched else None), live

    def _turned(
        self, form: Tokens, filters: Sequence[EncoderFilter], text: Conditions
    ) -> tuple[Conditions, float] | None:
        """Return the filtered conditions of one prompt and its beta; None if it has no trigger."""
        if not any(bool(entry.triggers.any()) for entry in filters):
            return None
        parts, pooled, betas = list(text.states.split(self._widths, -1)), text.pooled, []
        for entry in filters:
            part = parts[entry.number]
            turned = (part.float() @ entry.turn.to(part.device)).to(part.dtype)
            count = len(entry.triggers) + 2  # with the start and end tokens
            with torch.no_grad():
                alike = torch.cosine_similarity(part[0, :count].float(), turned[0, :count].float(), dim=-1)
            betas.append(1 - float(alike.mean()))
            rows = entry.chosen(part.shape[1], form.padding).to(part.device)
            parts[entry.number] = torch.where(rows[:, None], turned, part)
            if pooled is not None and entry.pooled is not None and bool(entry.triggers.any()):
                pooled = (pooled.float() @ entry.pooled.to(pooled.device)).to(pooled.dtype)
        return Conditions(torch.cat(parts, -1), pooled), max(betas)

    @contextmanager
    def _compared(
        self, live: Sequence[Tensor], first: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[None]:
        """Compare the features of the filtered rows with those of their prompts as they are, inside the context."""
        forms = [guard.form for guard in self._guards]
        wanted = [(form, rows) for form, rows in zip(forms, live, strict=True) if form.reattention and bool(rows.any())]
        with ExitStack() as scope:
            for form, rows in wanted:
                # Other hooks may expect the rows of all prompts.
                kept = torch.ones_like(rows) if self._drawing.whole else rows
                batch = first + self._rows
                chosen = torch.cat([torch.zeros(first, dtype=torch.bool), kept])
                features = SkippedFeatures(self._network, (form.wide_scale, form.narrow_scale))
                with features.keeping():
                    self._forward(*pick(args, chosen, batch), **pick(kwargs, chosen, batch))
                at, of = first + rows.nonzero().flatten(), rows[kept].nonzero().flatten()
                scope.enter_context(features.compared(batch, at, of))
            yield
