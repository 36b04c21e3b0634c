"""Soft prompts: vectors among the token embeddings of a prompt, and the search for them.

AdvUnlearn trains against them, and attacks search for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError, unknown

Place = Literal["prefix", "suffix", "replace", "add"]  # where the vectors go in a prompt
PLACES = get_args(Place)


@dataclass(frozen=True)
class Slots:
    """A tokenised prompt, or several, with room for k vectors.

    Args:
        ids: tokens [1, length], or [n, length] for several prompts, with placeholders where the vectors go.
        at: positions of the vectors [k], or [n, k].
        add: add the vectors to the tokens' own embeddings instead of replacing them.
    """

    ids: Tensor
    at: Tensor
    add: bool = False


def slots(tokenizer: Any, text: str, place: str, count: int, *, by_words: bool = False) -> Slots:
    """Make room for `count` vectors before, after, in place of, or added to the tokens of `text`.

    With `add` there are as many vectors as the text has tokens, whatever `count` is.

    Args:
        by_words: assume that the n words of the text are n tokens, as the published AdvUnlearn does: where a word has
            several, the `count` tokens after the n-th are replaced by the vectors (for `add`: n of them), and the
            rest stay.

    Raises:
        ErasureError: an unknown place, no room, a count below 1, or an empty text to add to.
    """
    if place not in PLACES:
        raise unknown("place", place, PLACES)
    if count < 1:
        raise ErasureError(f"{count} vectors were asked for; at least 1 is needed")
    end = tokenizer.eos_token_id
    start, *words = tokenizer(text, verbose=False).input_ids[:-1]
    if place == "add":
        if not words:
            raise ErasureError("an empty prompt has no tokens to add to")
        count = len(text.split()) if by_words else len(words)
    rest: list[int] = []
    if by_words:
        n = len(text.split())
        words, rest = words[:n], words[n + count :]
        if place in ("add", "replace"):  # what they free is filled with whatever stands first behind it
            rest = [(rest or [end])[0]] * n + rest
    room = [end] * count
    placed = {"prefix": room + words, "suffix": words + room, "replace": room, "add": words}
    row = [start, *placed[place], *rest]
    first = 1 + (len(words) if place == "suffix" else 0)
    return _fitted(tokenizer, text, row, range(first, first + count), place == "add")


def between(tokenizer: Any, before: str, after: str, count: int) -> Slots:
    """Make room for `count` vectors between two pieces of text, either of which may be empty.

    Raises:
        ErasureError: no room, or a count below 1.
    """
    if count < 1:
        raise ErasureError(f"{count} vectors were asked for; at least 1 is needed")
    end = tokenizer.eos_token_id
    start, *head = tokenizer(before, verbose=False).input_ids[:-1]
    tail = tokenizer(after, verbose=False).input_ids[1:-1]
    row = [start, *head, *[end] * count, *tail]
    first = 1 + len(head)
    return _fitted(tokenizer, f"{before} {after}", row, range(first, first + count))


def _fitted(tokenizer: Any, text: str, row: list[int], at: range, add: bool = False) -> Slots:
    length = tokenizer.model_max_length
    if len(row) + 1 > length:
        raise ErasureError(
            f"{text[:40]!r} with {len(at)} vectors takes {len(row) + 1} tokens; there is room for {length}"
        )
    row = [*row, tokenizer.eos_token_id]
    # Filled up as pipelines do: with the end on Stable Diffusion 1, with "!" on 2 and for XL's second encoder.
    row += [tokenizer.pad_token_id] * (length - len(row))
    return Slots(torch.tensor([row]), torch.tensor(list(at)), add)


def join(places: Sequence[Slots]) -> Slots:
    """Join the slots of several prompts, each with the same number of vectors, into one batch."""
    return Slots(torch.cat([one.ids for one in places]), torch.stack([one.at for one in places]), places[0].add)


def encode(encoder: Any, where: Slots, vectors: Tensor | None) -> Tensor:
    """Encode a prompt with `vectors` [k, width] or [n, k, width] in its slots; return states [n, length, width].

    Gradients flow to the vectors and to the trained parameters of the encoder. None leaves the placeholders in.
    """
    rows = len(where.ids) if vectors is None or vectors.dim() == 2 else len(vectors)
    ids = where.ids.to(next(encoder.parameters()).device).expand(rows, -1)
    with placing(encoder, where, vectors):
        return encoder(ids)[0]


@contextmanager
def placing(encoder: Any, where: Slots, vectors: Tensor | None) -> Iterator[None]:
    """Make the encoder read `vectors` in the slots of `where` inside the context; None changes nothing."""
    if vectors is None:
        yield
        return

    def put(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        row = torch.arange(len(output), device=output.device)[:, None]
        at = where.at.to(output.device)
        changed[row, at] = vectors.to(output.dtype) + (output[row, at] if where.add else 0)
        return changed

    handle = encoder.get_input_embeddings().register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def spread(encoder: Any) -> float:
    """Return the standard deviation of the token embeddings, which is the unit of a step."""
    return float(encoder.get_input_embeddings().weight.detach().float().std())


def start(encoder: Any, where: Slots, draw: torch.Generator) -> Tensor:
    """Return initial vectors [k, width]: embeddings of random tokens, or zeros where they are to be added."""
    table = encoder.get_input_embeddings().weight.detach().float()
    if where.add:
        return torch.zeros(len(where.at), table.shape[1], device=table.device)
    return table[torch.randint(len(table), (len(where.at),), generator=draw).to(table.device)].clone()


def search(
    loss: Callable[[Tensor, int], Tensor],
    vectors: Tensor,
    steps: int,
    rate: float,
    *,
    sign: bool = False,
    accumulate: bool = False,
    stale: bool = False,
) -> Tensor:
    """Minimise `loss(vectors, step)` over the vectors with Adam; no other gradient is touched.

    Args:
        rate: learning rate of Adam, in the embeddings' own unit.
        sign: give Adam the gradient's sign (published as `fast_at`).
        accumulate: never zero the gradient, as the published AdvUnlearn does. With `sign`, the direction of the first
            step is then kept for good.
        stale: return the vectors from before the last update, as the published code also does: one step is then no
            attack at all.

    Returns:
        The vectors found, detached [k, width] or [n, k, width].
    """
    current = vectors.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([current], lr=rate)
    before, total = current.detach().clone(), torch.zeros_like(vectors)
    for step in range(steps):
        (gradient,) = torch.autograd.grad(loss(current, step), current)
        total = total + gradient if accumulate else gradient
        total = total.sign() if sign else total
        current.grad, before = total.clone(), current.detach().clone()
        optimizer.step()
    return before if stale else current.detach()
