"""SAeUron (Cywiński and Deja 2025, ICML, arXiv 2501.18052): a concept's features are switched off in one block.

A sparse autoencoder learns features of the outputs of a cross-attention block along whole trajectories
(`training/sparse_autoencoder.py`); it does not depend on the concept and is kept in a cache. With mu(i, t, D) the mean
activation of feature i at timestep t over the prompts D, c the concept and o all other words (equation 4 of the paper),

    score(i, t) = mu(i, t, D_c) / sum_j mu(j, t, D_c)  -  mu(i, t, D_o) / sum_j mu(j, t, D_o)

and at each t the features with the highest scores are chosen. While pictures are drawn, wherever a chosen feature
exceeds its mean over all words, it is multiplied by multiplier * mu(i, t, D_c) (equation 5). No weight changes.

The patch holds the rows of the chosen features alone. It has no gate of its own: a feature is active or not.

Cost: once for a base, `trajectories` for each of `words` of 2 * sample_steps F each, and the autoencoder's training;
for a concept, `concept_trajectories` of them; while drawing, two thin products in each step.

Deviations from the published code:
- residual: the change of the reconstruction is added to the block's output. The published hook adds the error of the
  reconstruction with the wrong sign, so that even without an active feature the output becomes 2 x^ - x.
- a feature is active above a threshold that is the same for all (the inference of BatchTopK); the published one keeps
  the 32 greatest of each pixel, for which the patch would need the encoder of all features.
- the tables are read by timestep and not by the number of the step, so any sampler and number of steps serve.
- features are counted: `features` at each timestep, where the paper has a percentile (99.999 of 20,480 is one).
- outputs are scaled to the norm sqrt(d) on average, so `multiplier` is in other units than the published one.
- `features` and `multiplier` are settings of the preset. The paper chooses them for each class by a grid search on the
  classifier that it reports with.
- gate=text lets the patch act on prompts near the concept's names alone; the paper has no gate.
There is no parity mode: the published patch is the whole autoencoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import retained
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.method import RuntimeMethod
from erasure.model.base import Base
from erasure.patch import Features
from erasure.training.activations import Recording, record
from erasure.training.feature_dictionary import Dictionary, DictionarySettings, dictionary_of, mean_features
from erasure.training.run import FitResult, Run
from erasure.training.sparse_autoencoder import AutoencoderSettings

SEED = 700_001  # added to the run's: trajectories of the concept that the autoencoder has not seen
TINY = 1e-8
# Of the block, the parameters by whose values the base is recognised.
MARKS = ("proj_out.weight", "transformer_blocks.0.attn2.to_k.weight", "transformer_blocks.0.attn2.to_v.weight")


@dataclass(frozen=True)
class SAeUron(RuntimeMethod):
    """Settings of the runtime method SAeUron.

    Args:
        block: path of the block in the UNet; None takes the second block with cross-attention on the way up.
        features: number of features chosen at each timestep for each concept.
        multiplier: what an active feature is multiplied with, times its mean over the concept; below 0 it turns round.
        concept_trajectories: trajectories of the concept's prompts, at least one for each.
        expansion: features of the autoencoder for each channel of the block.
        active: features that are active at once, on average.
        epochs: passes of its training over the recorded outputs.
        batch_size: outputs in an update.
        learning_rate: of Adam.
        dead_after: outputs after which a feature that was never active counts as dead.
        aux_weight: weight of the loss by which dead features come back.
        words: largest number of words that the autoencoder is trained on.
        trajectories: for each of them.
        positions: pixels of an output that are recorded; None records all.
        sample_steps: number of steps of the sampler.
        trajectory_guidance: guidance scale of the trajectories.
        cache: whether to use and fill the cache of autoencoders.
        gate: `always`, or `text` to act on prompts near the concept's names alone.
        gate_threshold: similarity to a name from which on a text gate lets the patch act.
    """

    method: ClassVar[str] = "saeuron"

    block: str | None = None
    features: int = setting(8, at_least=1)
    multiplier: float = setting(-3.0, below=1)
    concept_trajectories: int = setting(8, at_least=1)
    expansion: int = setting(8, at_least=1)
    active: int = setting(16, at_least=1)
    epochs: int = setting(8, at_least=1)
    batch_size: int = setting(1024, at_least=2)
    learning_rate: float = setting(1e-3, above=0, below=1)
    dead_after: int = setting(100_000, at_least=1)
    aux_weight: float = setting(1 / 32, at_least=0)
    words: int = setting(64, at_least=1)
    trajectories: int = setting(3, at_least=1)
    positions: int | None = setting(None, at_least=1)
    sample_steps: int = setting(25, at_least=1)
    trajectory_guidance: float = 3.0
    cache: bool = True
    gate: Literal["always", "text"] = "always"
    gate_threshold: float = setting(0.9, at_least=0, at_most=1)

    def collect(self, base: Base, concepts: list[Concept], run: Run) -> FitResult:
        """Make the dictionary or read it, measure the concepts' features, choose among them and return their rows.

        Raises:
            ErasureError: the UNet has no such block, or no feature is more active for a concept than for other words.
        """
        payload = run.group.first(lambda: self.chosen(base, concepts, run))
        if self.gate == "always":
            return FitResult(payload)
        names = [name for concept in concepts for name in concept.names]
        return FitResult(payload, {"kind": "text", "texts": names, "power": 0.0, "threshold": self.gate_threshold})

    def chosen(self, base: Base, concepts: list[Concept], run: Run) -> Features:
        """Return the features of the concepts, in the main process."""
        block = self.block or default_block(base.network)
        marks = marks_of(base.network, block)
        how = Recording(block, self.sample_steps, self.trajectory_guidance, self.positions)
        dictionary = dictionary_of(base, self.settings(how), run, self.cache)
        whole = Recording(block, self.sample_steps, self.trajectory_guidance)
        own = []
        for number, concept in enumerate(concepts):
            prompts = [prompt for prompt, _ in concept.prompt_pairs()]
            count = max(self.concept_trajectories, len(prompts))
            first = (run.seed + SEED) * 1_009 + number * count
            outputs = record(
                base, [prompts[i % len(prompts)] for i in range(count)], range(first, first + count), whole
            )
            if dictionary is not None and outputs is not None:
                own.append(mean_features(dictionary.model, outputs))
        if dictionary is None:
            return blank(base, block, marks, self)
        kept = set(retained(base, concepts)) | {("", "")}
        others = dictionary.means[[word in kept for word in dictionary.words]]
        if not len(others):
            raise ErasureError(
                "no word of the autoencoder is kept, so there is nothing to compare the concept's features with. Raise "
                "words, or keep fewer words. Nothing was changed"
            )
        limits, gains = tables(own, others, self.features, self.multiplier)
        index = gains.ne(0).any(0).nonzero().flatten()
        if not len(index):
            names = ", ".join(repr(concept.name) for concept in concepts)
            raise ErasureError(
                f"no feature of {block} is more active for {names} than for other words. Raise words, trajectories or "
                "expansion, or take another block. Nothing was changed"
            )
        return rows(dictionary, base.component, block, marks, index, limits, gains)

    def settings(self, how: Recording) -> DictionarySettings:
        """Return what decides the dictionary; it does not depend on the concept."""
        autoencoder = AutoencoderSettings(
            self.expansion,
            self.active,
            self.epochs,
            self.batch_size,
            self.learning_rate,
            self.dead_after,
            self.aux_weight,
        )
        return DictionarySettings(how, autoencoder, self.words, self.trajectories)


def scores(own: Tensor, others: Tensor) -> Tensor:
    """Return the score of each feature at each timestep [T, m] (equation 4 of the paper).

    Args:
        own: mean activations for the concept [T, m].
        others: mean activations for the other words [T, m].
    """
    shares = (means / (means.sum(-1, keepdim=True) + TINY) for means in (own, others))
    return next(shares) - next(shares)


def tables(own: Sequence[Tensor], others: Tensor, features: int, multiplier: float) -> tuple[Tensor, Tensor]:
    """Return the limits and the gains of all features [T, m]; the gain of a feature that is not chosen is 0.

    A feature that several concepts choose gets the lower of their gains.

    Args:
        own: mean activations for each concept [T, m].
        others: mean activations for each other word [words, T, m].
        features: number of features that are chosen at each timestep for each concept.
        multiplier: of an active feature, times its mean over the concept.
    """
    rest = others.mean(0)
    everything = torch.cat([others, torch.stack(list(own))]).mean(0)
    gains = torch.zeros_like(rest)
    for means in own:
        score = scores(means, rest)
        best = score.topk(min(features, score.shape[1]), dim=1)
        picked = torch.zeros_like(score, dtype=torch.bool).scatter(1, best.indices, best.values > 0)
        gains = torch.where(picked, torch.minimum(gains, multiplier * means - 1), gains)
    return everything, gains


def rows(
    dictionary: Dictionary,
    component: str,
    block: str,
    marks: Mapping[str, Sequence[int]],
    index: Tensor,
    limits: Tensor,
    gains: Tensor,
) -> Features:
    """Return the payload of some features: their rows, in the units of the network, and their tables.

    Args:
        dictionary: of the block.
        component: the network.
        block: the path of the block.
        marks: parameters by which the base is recognised, with their shapes.
        index: the features [k].
        limits: of all features [T, m].
        gains: of all features [T, m].
    """
    model = dictionary.model
    encoder = model.encoder[index]
    return Features(
        component,
        block,
        marks,
        dictionary.timesteps,
        encoder * model.scale,
        model.bias[index] - encoder @ model.centre,
        model.decoder[index] / model.scale,
        limits[:, index].clamp_min(model.threshold),
        gains[:, index],
        {"features": index.tolist(), "of": len(model.bias), "autoencoder": dictionary.quality},
    )


def default_block(network: nn.Module) -> str:
    """Return the path of the second block with cross-attention on the way up, where there are several, else the first.

    That is `up_blocks.1.attentions.1` of Stable Diffusion 1, the paper's for objects.

    Raises:
        ErasureError: the network has none.
    """
    paths = [path for path, _ in network.named_modules() if path.startswith("up_blocks.") and path.count(".") == 3]
    found = [path for path in paths if path.split(".")[2] == "attentions"]
    if not found:
        raise ErasureError("this UNet has no block with cross-attention on the way up. Name one with block=")
    return found[min(1, len(found) - 1)]


def marks_of(network: nn.Module, block: str) -> dict[str, list[int]]:
    """Return the parameters of a block by which the base is recognised, with their shapes.

    Raises:
        ErasureError: the block is none with cross-attention.
    """
    found = {name: list(param.shape) for name, param in network.named_parameters()}
    marks = {f"{block}.{end}": found[f"{block}.{end}"] for end in MARKS if f"{block}.{end}" in found}
    if len(marks) != len(MARKS):
        raise ErasureError(f"block={block}: this is no block with cross-attention. Nothing was changed")
    return marks


def blank(base: Base, block: str, marks: Mapping[str, Sequence[int]], method: SAeUron) -> Features:
    """Return features of zeros, of the right size at most, for a forecast in which no block has run."""
    width, steps = marks[f"{block}.{MARKS[0]}"][0], method.sample_steps
    row, table = torch.zeros(method.features, width), torch.zeros(steps, method.features)
    about: dict[str, Any] = {}
    return Features(base.component, block, marks, range_of(steps), row, row[:, 0], row, table, table, about)


def range_of(steps: int) -> tuple[float, ...]:
    """Return as many distinct numbers as there are steps."""
    return tuple(float(step) for step in range(steps))
