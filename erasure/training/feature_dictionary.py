"""A dictionary: a sparse autoencoder of one block, and how active its features are for each word and timestep.

It does not depend on what is erased, so it is made once for a base and kept in the folder of the cache
(`config.default_cache`), under a name that is a hash of everything that decides it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erasure.concepts.neighbors import prompt_of, words
from erasure.concepts.similarity import tokens
from erasure.config import default_cache
from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.conditioning import text_encoders
from erasure.model.diffusion import count_metadata, count_stored, counting
from erasure.patch.fingerprint import tensor_bytes
from erasure.patch.safetensors_io import digest, read_layout, write_file
from erasure.training.activations import Recorded, Recording
from erasure.training.run import Run
from erasure.training.sparse_autoencoder import AutoencoderSettings, SparseAutoencoder, train_autoencoder

LOG = logging.getLogger("erasure")
VERSION = "1"  # of what the tensors mean
CHUNK = 16_384  # outputs whose features are computed at a time
TENSORS = ("encoder", "bias", "decoder", "centre")


@dataclass(frozen=True)
class DictionarySettings:
    """What decides a dictionary, besides the base and the seed.

    Args:
        how: the block, and how its outputs are recorded.
        autoencoder: how the autoencoder is trained.
        most_words: largest number of words, spread evenly over all that the base or the list has.
        trajectories: for each word, the first of the word alone, the others in combination with a word of another
            group: objects in styles, styles on objects.
    """

    how: Recording
    autoencoder: AutoencoderSettings
    most_words: int
    trajectories: int


@dataclass(frozen=True)
class Dictionary:
    """An autoencoder and the mean activation of its features.

    Args:
        model: the autoencoder.
        words: the words as pairs (kind, word); the last one is ("", ""), the empty prompt.
        timesteps: t of the steps of the sampler [T].
        means: mean of each feature for each word and step, over trajectories and pixels [words, T, m].
        quality: of the autoencoder: explained variance, active and dead features.
    """

    model: SparseAutoencoder
    words: tuple[tuple[str, str], ...]
    timesteps: tuple[float, ...]
    means: Tensor
    quality: dict[str, float]

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the dictionary to a safetensors file with metadata."""
        tensors = {name: getattr(self.model, name).data for name in TENSORS} | {"means": self.means}
        about = {
            "words": self.words,
            "timesteps": self.timesteps,
            "quality": self.quality,
            "scale": self.model.scale,
            "threshold": self.model.threshold,
        }
        fields = {"about": json.dumps(about)}
        write_file(path, tensors, {**metadata, **fields, "erasure.digest": digest(tensors, fields)})

    @classmethod
    def load(cls, path: Path) -> Dictionary:
        """Read a dictionary from a file that `save` wrote.

        Raises:
            ErasureError: the file is damaged.
        """
        layout = read_layout(path)
        tensors, fields = layout.read(), {"about": layout.metadata.get("about", "")}
        if layout.metadata.get("erasure.digest") != digest(tensors, fields):
            raise ErasureError(f"{path}: its contents do not match its digest")
        about = json.loads(fields["about"])
        features, width = tensors["encoder"].shape
        model = SparseAutoencoder(width, features, torch.Generator())
        for name in TENSORS:
            getattr(model, name).data.copy_(tensors[name])
        model.requires_grad_(False)
        model.scale, model.threshold = about["scale"], about["threshold"]
        listed = tuple((kind, word) for kind, word in about["words"])
        return cls(model, listed, tuple(about["timesteps"]), tensors["means"], about["quality"])


@torch.no_grad()
def mean_features(model: SparseAutoencoder, outputs: Tensor) -> Tensor:
    """Return the mean of each feature at each step [T, m] over outputs [T, n, pixels, d]."""
    rows = []
    for step in outputs.flatten(1, 2):
        parts = [model.features(part.float()).sum(0) for part in step.split(CHUNK)]
        rows.append(torch.stack(parts).sum(0) / len(step))
    return torch.stack(rows)


def spread_words(base: Base, most: int) -> tuple[tuple[str, str], ...]:
    """Return about so many words as pairs (kind, word), at least one of each kind, and the empty prompt."""
    longest = base.pipe.tokenizer.model_max_length - 4  # room for "a", "in" and "style" beside both ends
    listed = {
        kind: fitting
        for kind, all_words in words(base).items()
        if (fitting := [word for word in all_words if tokens(base, word) <= longest])
    }
    total = sum(map(len, listed.values()))
    chosen = []
    for kind, own in listed.items():
        count = len(own) if total <= most else max(1, most * len(own) // total)
        chosen += [(kind, own[i * len(own) // count]) for i in range(count)]
    return (*chosen, ("", ""))


def trajectory_prompts(
    listed: Sequence[tuple[str, str]], trajectories: int, fits: Callable[[str], bool]
) -> tuple[tuple[str, ...], ...]:
    """Return the prompts of each word's trajectories: itself, then objects in styles or the style on objects.

    Args:
        listed: the words as pairs (kind, word).
        trajectories: number of prompts for each.
        fits: whether the text encoder reads a prompt in full; others are replaced by the word alone.
    """
    styles = [word for kind, word in listed if kind == "style"]
    nouns = [word for kind, word in listed if kind not in ("style", "")]

    def prompts(number: int, kind: str, word: str) -> Iterator[str]:
        plain = prompt_of(kind, word) if word else ""
        others = nouns if kind == "style" else styles
        for turn in range(trajectories):
            other = others[(number + turn) % len(others)] if others and word and turn else ""
            noun, style = (other, word) if kind == "style" else (word, other)
            text = f"a {noun} in {prompt_of('style', style)}" if other else plain
            yield text if fits(text) else plain

    return tuple(tuple(prompts(number, kind, word)) for number, (kind, word) in enumerate(listed))


def base_key(base: Base) -> str:
    """Return a hash of everything in a base that decides its trajectories: weights, tokenizers and noise schedule."""
    total = hashlib.sha256(f"{VERSION} {type(base.pipe).__name__}".encode())
    total.update(json.dumps(dict(base.scheduler.config), sort_keys=True, default=str).encode())
    parts = [(base.component, base.network)]
    for number, (tokenizer, encoder) in enumerate(text_encoders(base.pipe)):
        total.update(f"{len(tokenizer)} {tokenizer.model_max_length} {tokenizer.pad_token_id}".encode())
        parts.append((f"text_encoder {number}", encoder))
    for name, part in parts:
        for key, param in sorted(part.named_parameters()):
            total.update(f"{name} {key} {list(param.shape)} {param.dtype}".encode())
            total.update(tensor_bytes(param.detach().cpu()))
    return total.hexdigest()


def dictionary_of(base: Base, settings: DictionarySettings, run: Run, cached: bool) -> Dictionary | None:
    """Return the dictionary of a base: from the run's folder, from the cache, or made anew.

    One that this run has made counts its calls of the network, also when the run is resumed; one from the cache counts
    none.

    Args:
        base: the checkpoint.
        settings: what decides the dictionary.
        run: the run, for its seed, folder and progress bar.
        cached: whether to use and fill the cache.

    Returns:
        The dictionary; None in a forecast, in which the network does not run its blocks.

    Raises:
        ErasureError: the network has no such block, or a file cannot be written.
    """
    listed = spread_words(base, settings.most_words)
    longest = base.pipe.tokenizer.model_max_length
    prompts = trajectory_prompts(listed, settings.trajectories, lambda text: tokens(base, text) <= longest)
    own = run.folder / "dictionary.safetensors" if run.folder is not None else None
    if own is not None and own.is_file():
        count_stored(base.network, own)
        return Dictionary.load(own)
    store = None
    if cached and base.device.type != "meta":
        decided = json.dumps([asdict(settings), listed, prompts, run.seed, base_key(base)], sort_keys=True)
        store = default_cache() / f"features-{hashlib.sha256(decided.encode()).hexdigest()[:24]}.safetensors"
        if (found := _read(store)) is not None:
            LOG.info("features of %s: from %s", base.name, store)
            return found
    with counting(base.network) as spent, _folder(run) as folder:
        recorded = Recorded(folder, prompts, run.seed, settings.how)
        if not recorded.collect(base):
            return None
        dictionary = _made(base, recorded, settings, listed, run)
    if own is not None:
        dictionary.save(own, count_metadata(spent))
    if store is not None:
        try:
            dictionary.save(store, {})
        except ErasureError as fault:
            LOG.warning("the features of %s are not stored: %s", base.name, fault)
    return dictionary


def _made(
    base: Base, recorded: Recorded, settings: DictionarySettings, listed: tuple[tuple[str, str], ...], run: Run
) -> Dictionary:
    """Train the autoencoder and measure its features."""
    from tqdm import tqdm

    def bar(steps: Iterable[Any]) -> Iterable[Any]:
        hidden = None if run.progress and run.group.main else True  # None: shown on a terminal only
        return tqdm(steps, desc="autoencoder", unit="step", disable=hidden)

    state = run.folder / "autoencoder.safetensors" if run.folder is not None else None
    model, measured = train_autoencoder(recorded, settings.autoencoder, run.seed, state, bar, base.device)
    means = torch.stack([mean_features(model, outputs) for outputs in recorded.words()])
    schedule = base.schedule(None, settings.how.steps, base.latent_shape())
    timesteps = tuple(float(t) for t in schedule.timesteps)
    figures = {**measured, "dead": float((means.amax((0, 1)) == 0).float().mean())}
    return Dictionary(model, listed, timesteps, means, {name: round(value, 4) for name, value in figures.items()})


def _read(path: Path) -> Dictionary | None:
    """Return the dictionary in a file of the cache; None if there is none, or, with a warning, if it is damaged."""
    if not path.is_file():
        return None
    try:
        return Dictionary.load(path)
    except (ErasureError, ValueError, KeyError, RuntimeError) as fault:
        LOG.warning("%s is damaged (%s): it is made again", path, fault)
        return None


@contextmanager
def _folder(run: Run) -> Iterator[Path]:
    """Give the folder for recorded outputs: the run's, or one that is deleted at the end."""
    if run.folder is not None:
        yield run.folder
        return
    with tempfile.TemporaryDirectory(prefix="erasure-outputs-") as folder:
        yield Path(folder)
