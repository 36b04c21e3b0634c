"""Erase a list of names by one closed-form solve, and forecast how well it will work.

What the text encoder says of the list is stored in a cache, by the encoder's weights and the words to keep. A list that
changed in a few names is solved again from there: only the text states of new names are computed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from erasure.concepts.name_list import NameList
from erasure.concepts.neighbors import prompt_of, retained, words
from erasure.concepts.similarity import cosines
from erasure.erasing import LAYERS, check_network, erase, settle
from erasure.errors import ErasureError
from erasure.method import ClosedFormMethod
from erasure.methods import find
from erasure.methods import names as method_names
from erasure.model.base import Base
from erasure.model.closed_form import readers_gram
from erasure.model.listed_base import ListedBase, half_is_fast
from erasure.model.null_space import complement
from erasure.model.readers_only import open_readers
from erasure.model.text_columns import checked_names, own_tokens
from erasure.patch import Patch
from erasure.takedown.cache import stored
from erasure.training.compute import Computing, Engine

LOG = logging.getLogger("erasure")
METHOD = "speed"  # the closed form that keeps the most beside many names (docs/closed-forms.md)
LEAST_RANK = 112  # largest rank of a patch for up to that many names: 11 MB in fp16 on Stable Diffusion 1.5
MANY = 20  # names from which they are edited alone, and not also in contexts
KEPT_SHARE = 0.99  # of the kept states' squared lengths, which the kept space holds in a forecast
HARD, CLOSE = 0.7, 0.9  # share of a change that is not reached, and cosine to a kept name, from which a name is hard
NEAREST = 2  # kept names in a row of the forecast


@dataclass(frozen=True)
class NameForecast:
    """What is expected of one name.

    Args:
        name: the name, or an alias.
        concept: the name of its entry.
        left: share of the wanted change of the layers' answers that the solution does not reach.
        outside: share of the squared lengths of its states that lies outside of the kept space.
        nearest: the nearest kept names with their cosines.
        hard: why it is expected to be hard; empty if it is not.
    """

    name: str
    concept: str
    left: float
    outside: float
    nearest: tuple[tuple[str, float], ...]
    hard: str


@dataclass(frozen=True)
class ListForecast:
    """What is expected of a list.

    Args:
        rows: a row for each name, the hardest first.
        kept: number of words that are kept.
        left_out: words of shipped lists that are not kept, because they are targets or nearly so.
        moved: length of the change of the kept states' answers, as a share of the answers.
        free: number of directions of the text states outside of the kept space.
        width: number of all directions.
        rank: of the patch.
        held_share: share of the squared change that this rank holds.
        sources: lines on where each setting came from.
    """

    rows: tuple[NameForecast, ...]
    kept: int
    left_out: tuple[str, ...]
    moved: float
    free: int
    width: int
    rank: int
    held_share: float
    sources: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the forecast as plain data."""
        return asdict(self)


def erase_list(
    model: Any,
    names: NameList | Mapping[str, Any] | str | os.PathLike[str],
    method: str = METHOD,
    *,
    out: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    dtype: str = "fp16",
    preset: str | None = None,
    file: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Patch:
    """Erase all names of a list by one closed-form solve, and return the patch; the model is left as it was.

    Args:
        model: as for `erase`. Of a single file only the text encoders and the layers that read them are loaded.
        names: the list, its fields as plain data, or the path of its file.
        method: the name of a closed form.
        out: where to save the patch.
        cache: folder of the cache; None: `default_cache()`.
        dtype: type of the tensors in the file; the error that it makes is in the header.
        preset: as for `erase`.
        file: settings that `settings` override, as `erase` reads them from a file.
        settings: single settings of the method.

    Raises:
        ErasureError: anything that `NameList` or `erase` refuse, or a method that is not a closed form.
    """
    base, names = prepared(model, names, method)
    with stored(base, cache):
        chosen = {**_suited(method, names), **(file or {}), **settings}
        return erase(base, list(names.concepts), method, out=out, dtype=dtype, preset=preset, progress=False, **chosen)


def plan_list(
    model: Any,
    names: NameList | Mapping[str, Any] | str | os.PathLike[str],
    method: str = METHOD,
    *,
    cache: str | os.PathLike[str] | None = None,
    preset: str | None = None,
    file: Mapping[str, Any] | None = None,
    **settings: Any,
) -> ListForecast:
    """Forecast what `erase_list` with the same arguments will reach; the model is left as it was.

    The states that it computes are stored in the cache, so that erasing afterwards takes seconds.

    Raises:
        ErasureError: as for `erase_list`.
    """
    base, names = prepared(model, names, method)
    computing, layers = Computing.split({**_suited(method, names), **(file or {})}, settings)
    settled = settle(base, list(names.concepts), method, dict(zip(LAYERS, layers, strict=True)), preset=preset)
    settled.chosen.method.check_options(computing)
    with stored(base, cache), Engine(base, computing, unet=False):
        return _forecast(base, settled.chosen.method, settled.concepts, tuple(settled.lines()))


def _forecast(
    base: ListedBase, method: ClosedFormMethod, concepts: list[Any], sources: tuple[str, ...]
) -> ListForecast:
    columns = method.columns(base, concepts)
    blocks = base.last_blocks
    change = method.state_map(base, concepts)
    named = checked_names(base, concepts)
    gram, keep = readers_gram(base.unet), columns.keep.double().cpu()
    free = complement(keep, KEPT_SHARE)
    kept = retained(base, concepts)
    texts = [prompt_of(kind, word) for kind, word in kept]
    near = cosines(base, texts, [prompt_of(concept.kind, name) for concept, name in named]).T if texts else None
    rows = []
    for i, ((concept, name), (edit, guide)) in enumerate(zip(named, blocks, strict=True)):
        missed = (edit @ change.right.T) @ change.left.T + edit - guide
        left = (_square(missed, gram) / max(_square(edit - guide, gram), 1e-300)) ** 0.5
        best = [] if near is None else near[i].topk(min(NEAREST, len(texts)))
        nearest = tuple((texts[j], float(value)) for value, j in zip(*map(Tensor.tolist, best), strict=True))
        outside = float((edit @ free).square().sum() / edit.square().sum())
        rows.append(NameForecast(name, concept.name, left, outside, nearest, hard(left, nearest)))
    answers = _square(keep, gram)
    moved = (_square((keep @ change.right.T) @ change.left.T, gram) / answers) ** 0.5 if answers else 0.0
    known = {word for _, word in kept}
    left_out = tuple(word for words in base.listed.values() for word in words if word not in known)
    order = tuple(sorted(rows, key=lambda row: -row.left))
    shape = free.shape
    return ListForecast(order, len(kept), left_out, moved, shape[1], shape[0], change.rank, base.held_share, sources)


def hard(left: float, nearest: Sequence[tuple[str, float]]) -> str:
    """Return why a name is expected to be hard to erase, in words; empty if it is not.

    Args:
        left: share of the wanted change that the solution does not reach.
        nearest: the nearest kept names with their cosines.
    """
    reasons = [f"{left:.0%} of the change is not reached"] if left >= HARD else []
    reasons += [f"nearly the kept {name!r}" for name, cosine in nearest[:1] if cosine >= CLOSE]
    return "; ".join(reasons)


def _square(states: Tensor, gram: Tensor) -> float:
    """Return the squared length of all layers' answers to states [n, d]."""
    return float(((states @ gram) * states).sum().clamp_min(0))


def prepared(
    model: Any, names: NameList | Mapping[str, Any] | str | os.PathLike[str], method: str
) -> tuple[ListedBase, NameList]:
    """Return the base for a list, and the list, after checking both.

    Raises:
        ErasureError: anything that `NameList` refuses, or a method that is not a closed form.
    """
    cls = find(method)
    if not issubclass(cls, ClosedFormMethod):
        raise ErasureError(
            f"{method} does not solve for a whole list at once: choose a closed form ({', '.join(closed_forms())}), or "
            "erase the concepts by name. Nothing was changed"
        )
    base = open_readers(model) if isinstance(model, str | os.PathLike) else Base.of(model)
    check_network(method, base)
    if base.architecture.masked_text:
        raise ErasureError(
            f"{base.name}: a list needs CLIP's text states, padding included, and this network masks it. Erase "
            "the names without a list, one by one or in Python as a list of concepts. Nothing was changed"
        )
    if isinstance(names, str | os.PathLike):
        names = NameList.read(names, base.words)
    elif isinstance(names, Mapping):
        names = NameList.of(names, base.words)
    for spelling in names.merged:
        LOG.warning("%r stands twice in the list, and is erased once", spelling)
    count = sum(len(concept.names) for concept in names.concepts)
    options: dict[str, Any] = {"asked": names.keep, "record": names.to_json()}
    options |= {"most_rank": max(LEAST_RANK, count), "half": half_is_fast() and not cls.EXACT}
    listed = ListedBase.on(base, names.words(words(base)), **options)
    _check_tokens(listed, names)
    return listed, names


def closed_forms() -> list[str]:
    """List the names of the methods that solve for a list."""
    return method_names(ClosedFormMethod)


def _check_tokens(base: ListedBase, names: NameList) -> None:
    """Refuse words to keep that the text encoder cannot tell from a name to erase.

    Raises:
        ErasureError: naming both; or anything that `checked_names` refuses.
    """
    owners = {own_tokens(base, name): name for _, name in checked_names(base, names.concepts)}
    both = [(word, owners[key]) for _, word in names.keep if (key := own_tokens(base, word)) in owners]
    if both:
        shown = ", ".join(f"{word!r} like {name!r}" for word, name in both[:5])
        raise ErasureError(
            f"the text encoder reads {shown}: what is to be kept has the same tokens as what is to be erased. Take "
            "each out of one of the lists. Nothing was changed"
        )


def _suited(method: str, names: NameList) -> dict[str, Any]:
    """Return settings that suit the length of a list."""
    known = {field.name for field in fields(find(method))}  # type: ignore[arg-type]
    return {"contexts": False} if len(names.concepts) > MANY and "contexts" in known else {}
