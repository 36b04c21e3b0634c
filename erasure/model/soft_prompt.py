"""Soft prompts: trainable vectors among the token embeddings of a prompt, and the search for such vectors.

Some methods train against soft prompts, and some attacks search for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erasure.errors import ErasureError, unknown
from erasure.model.conditioning import Conditions, read, text_encoders
from erasure.model.diffusion import add_noise

Place = Literal["prefix", "suffix", "replace", "add"]  # where the vectors go in a prompt
PLACES = get_args(Place)


@dataclass(frozen=True)
class Slots:
    """One or several tokenised prompts with positions for k vectors.

    Args:
        ids: token ids [1, length], or [n, length] for n prompts, with placeholders where the vectors go.
        at: positions of the vectors [k], or [n, k] for n prompts.
        add: whether the vectors are added to the tokens' own embeddings instead of replacing them.
    """

    ids: Tensor
    at: Tensor
    add: bool = False


def slots(tokenizer: Any, text: str, place: str, count: int, *, by_words: bool = False) -> Slots:
    """Tokenise a prompt and choose the positions of the vectors in it.

    Args:
        tokenizer: the pipeline's tokenizer.
        text: the prompt.
        place: where the vectors go: before the text (`prefix`), after it (`suffix`), in its place (`replace`), or added
            to the embeddings of its tokens (`add`).
        count: number of vectors, ignored with `add`, which has one vector for each token of the text.
        by_words: assume that the n words of the text are n tokens, as the published AdvUnlearn does. Where words have
            more tokens, `count` tokens after the n-th are lost (n tokens with `add`), and the tokens behind them stay.

    Raises:
        ErasureError: the place is unknown, `count` is below 1, the tokenizer's length is exceeded, or there is no
            token to add to.
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
    tail: list[int] = []
    if by_words:
        n = len(text.split())
        words, tail = words[:n], words[n + count :]
        if place in ("add", "replace"):  # the published code fills the n freed positions with the next token
            tail = [(tail or [end])[0]] * n + tail
    room = [end] * count
    placed = {"prefix": room + words, "suffix": words + room, "replace": room, "add": words}
    row = [start, *placed[place], *tail]
    first = 1 + (len(words) if place == "suffix" else 0)
    return _fitted(tokenizer, text, row, range(first, first + count), place == "add")


def between(tokenizer: Any, before: str, after: str, count: int) -> Slots:
    """Tokenise two pieces of text with positions for `count` vectors between them.

    Args:
        tokenizer: the pipeline's tokenizer.
        before: the text before the vectors; may be empty.
        after: the text after the vectors; may be empty.
        count: number of vectors.

    Raises:
        ErasureError: `count` is below 1, or the tokenizer's length is exceeded.
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
            f"{text[:40]!r} with {len(at)} vectors takes {len(row) + 1} tokens; there is room for only {length}"
        )
    row = [*row, tokenizer.eos_token_id]
    # Padded as pipelines do: with the end token on Stable Diffusion 1, with "!" on 2 and for XL's second encoder.
    row += [tokenizer.pad_token_id] * (length - len(row))
    return Slots(torch.tensor([row]), torch.tensor(list(at)), add)


def join(places: Sequence[Slots]) -> Slots:
    """Combine the slots of several prompts, which must have equally many vectors, into one batch."""
    ids, at = [prompt.ids for prompt in places], [prompt.at for prompt in places]
    return Slots(torch.cat(ids), torch.stack(at), places[0].add)


def encode(encoder: Any, where: Slots, vectors: Tensor | None) -> Tensor:
    """Encode a prompt with vectors in its slots.

    Gradients flow to the vectors and to the trained parameters of the encoder.

    Args:
        encoder: the text encoder.
        where: the prompt or prompts with their slots.
        vectors: vectors [k, width], or [n, k, width] for a batch; None keeps the placeholders.

    Returns:
        Text states [n, length, width].
    """
    rows = len(where.ids) if vectors is None or vectors.dim() == 2 else len(vectors)
    ids = where.ids.to(next(encoder.parameters()).device).expand(rows, -1)
    with placing(encoder, where, vectors):
        return encoder(ids)[0]


@contextmanager
def placing(encoder: Any, where: Slots, vectors: Tensor | None) -> Iterator[None]:
    """Make a text encoder read vectors in the slots of a prompt inside the context.

    Args:
        encoder: the text encoder.
        where: the prompt or prompts with their slots.
        vectors: vectors [k, width] or [n, k, width]; None changes nothing.
    """
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


def word_slots(pipe: Any, around: Sequence[tuple[str, str]], count: int) -> list[Slots]:
    """Tokenise prompts with positions for `count` vectors, the same for all text encoders of a pipeline.

    Args:
        pipe: the pipeline, whose tokenizers have one vocabulary.
        around: for each prompt, the text before and the text after the positions.
        count: number of vectors, at least 1.

    Returns:
        One batch of slots per text encoder.

    Raises:
        ErasureError: the prompt is too long for that many vectors, or `count` is below 1.
    """
    places = []
    for tokenizer, _ in text_encoders(pipe):
        found = join([between(tokenizer, before, after, count) for before, after in around])
        # XL's second encoder pools its state at the first end token, so no end token may be a placeholder.
        special = set(tokenizer.all_special_ids)
        found.ids.scatter_(1, found.at, next(i for i in range(len(tokenizer)) if i not in special))
        places.append(found)
    return places


def encode_word(pipe: Any, places: Sequence[Slots], vectors: Tensor) -> Conditions:
    """Encode prompts with vectors in their slots by all text encoders of a pipeline; gradients flow to the vectors.

    Args:
        pipe: the pipeline.
        places: one `Slots` per text encoder, as `word_slots` returns them.
        vectors: [n, k, width], or [k, width] for all prompts alike; on XL both encoders' vectors side by side.
    """
    encoders = [encoder for _, encoder in text_encoders(pipe)]
    widths = [encoder.get_input_embeddings().embedding_dim for encoder in encoders]
    with ExitStack() as scope:
        for encoder, found, part in zip(encoders, places, vectors.split(widths, -1), strict=True):
            scope.enter_context(placing(encoder, found, part))
        return read(pipe, [found.ids for found in places])


def token_table(pipe: Any) -> Tensor:
    """Return the table of token embeddings [vocabulary, width], of both encoders side by side on XL."""
    tables = [encoder.get_input_embeddings().weight.detach().float() for _, encoder in text_encoders(pipe)]
    return torch.cat(tables, -1)


def inversion_loss(
    scheduler: Any,
    latents: Tensor,
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    batch: int,
    draw: torch.Generator,
) -> Tensor:
    """Return E || eps - e(x_t, t) ||^2 over images, which a new word for them minimises (arXiv 2208.01618, eq. 2).

    Args:
        scheduler: the checkpoint's scheduler, for its noise schedule.
        latents: of the images [n, c, h, w].
        predict: returns the predicted noise for x_t, t and the indices of the images [batch].
        batch: number of samples, drawn with replacement.
        draw: random generator on the CPU.
    """
    index = torch.randint(len(latents), (batch,), generator=draw)
    t = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=draw).to(latents.device)
    noise = torch.randn(latents[index].shape, generator=draw).to(latents)
    return F.mse_loss(predict(add_noise(scheduler, latents[index], noise, t), t, index), noise)


def spread(encoder: Any) -> float:
    """Return the standard deviation of an encoder's token embeddings, in which step sizes are measured."""
    return float(encoder.get_input_embeddings().weight.detach().float().std())


def start(encoder: Any, where: Slots, draw: torch.Generator, *, zeros: bool = True) -> Tensor:
    """Return initial vectors [k, width] for a search: embeddings of random tokens, or zeros if they are added.

    Args:
        encoder: the text encoder.
        where: the prompt with its slots.
        draw: random generator on the CPU that chooses the tokens.
        zeros: start vectors that are added at zero; if false, at random tokens too, as the published AdvUnlearn does.
    """
    table = encoder.get_input_embeddings().weight.detach().float()
    if where.add and zeros:
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
    """Minimise a loss over the vectors with Adam; gradients of other tensors are not touched.

    Args:
        loss: function of the vectors and the number of the step, from 0, that returns a scalar.
        vectors: initial vectors [k, width] or [n, k, width]; they are not changed.
        steps: number of steps.
        rate: learning rate of Adam, in the units of the embeddings.
        sign: give Adam the sign of the gradient, as the published AdvUnlearn's `fast_at` does.
        accumulate: never set the gradient to zero, as the published AdvUnlearn does. With `sign`, every step then keeps
            the direction of the first.
        stale: return the vectors from before the last update, as the published AdvUnlearn does. A search of one step
            then changes nothing.

    Returns:
        The final vectors, detached, in the shape of `vectors`.
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
