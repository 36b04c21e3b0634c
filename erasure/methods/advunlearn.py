"""AdvUnlearn: adversarial training of the text encoder (Zhang et al. 2024, arXiv 2405.15234).

The encoder T learns to lead the concept's prompt c away from the concept (ESD's objective) even when an attacker puts
vectors d beside its tokens, and to read the retain prompts r as before. The UNet e_0 stays as it is:

    min_T  || e_0(z, T(c + d)) - [e_0(z, n) - eta (e_0(z, c) - e_0(z, n))] ||^2
           + gamma || e_0(z_r, T(r)) - e_0(z_r, T_0(r)) ||^2
    d = argmin_d || e_0(z, T(c + d)) - e_0(z, T_0(c)) ||^2,  K steps of Adam from random tokens

(eq. 5 and 6 of the paper, T_0 the encoder as it was). Only the first layers train, or all for content concepts.

Cost: z, z_r and all of e_0's answers to T_0 do not depend on T, so two pools of trajectories hold them once; then
an update takes K b (F + B) for the attack and (b + b_r)(F + B). The published loop samples every one of them anew:
1,939F + 36B an update with K = 30.

Deviations, undone by `parity=True`: the pools, with the sampler's own t (published: t is fed 39 to 58 too high);
more vectors than one; gradients of the attack are zeroed between its steps and the last step counts (published: they
add up, and the result is from before the last update); tokens, not words, are counted; batches. `parity` has the
published settings for objects and styles; those for nudity are layers=None and retain_weight=0.3 beside it. The
published code's other mode, which takes turns between erasing and retaining (`retain_train=iter`), is not here: the
paper does not use it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import retain_prompts
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.method import GradientMethod
from erasure.model.base import Base
from erasure.model.conditioning import Conditions, text_encoders
from erasure.model.diffusion import away
from erasure.model.soft_prompt import Place, Slots, encode, search, slots, spread, start
from erasure.model.trajectories import TrajectoryPool, judge, kept_pool, late_states
from erasure.training.adapters import Weights
from erasure.training.run import Run

LAYER = re.compile(r"(?:^|\.)encoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class AdvUnlearn(GradientMethod):
    """Settings of AdvUnlearn.

    Args:
        layers: how many of the text encoder's layers train, from the first; None: all.
        final_norm: train the norm behind the last layer; None: where all layers train.
        negative_guidance: eta.
        retain_weight: gamma.
        retain: prompts to keep, beside those found among the concept's neighbours and the vocabulary.
        retain_file: a CSV with a column `prompt` (the published retain sets have one), in place of what is found;
            prompts that name the concept, or are too long for the text encoder, are left out.
        attack: where the vectors go: prefix, suffix, replace, add.
        attack_tokens: how many; the published one leaves the door open to attackers with more (on cat, P4D with 16
            tokens won 9 of 12 prompts against one, 5 of 12 against eight).
        attack_steps: K; 0 trains without an adversary.
        attack_rate: Adam's step, in standard deviations of the token embeddings.
        attack_sign: give Adam the gradient's sign (published as `fast_at`).
        attack_init: random tokens, or the latest vectors.
        warm_up: updates without attack.
        iterations: updates.
        batch_size: concept samples an update.
        retain_batch_size: retain samples an update.
        learning_rate: of Adam.
        trajectories: concept trajectories in the pool.
        sample_steps: states of each.
        retain_trajectories: retain trajectories in the pool, each of another prompt where there are enough.
        retain_sample_steps: states of each.
        trajectory_guidance: classifier-free guidance of all of them.
        parity: reproduce the official script: its defaults and its quirks.
    """

    method: ClassVar[str] = "advunlearn"
    PARITY: ClassVar[dict[str, Any]] = {
        "retain_weight": 0.5,
        "attack_tokens": 1,
        "attack_steps": 30,
        "attack_rate": 1e-3 / 0.014,  # 1e-3, where CLIP-L's embeddings have a deviation of 0.014
        "warm_up": 200,
        "iterations": 1000,
        "batch_size": 1,
        "retain_batch_size": 5,
        "learning_rate": 1e-5,
        "sample_steps": 50,
    }

    layers: int | None = setting(1, at_least=1)
    final_norm: bool | None = None
    negative_guidance: float = 1.0
    retain_weight: float = 1.0
    retain: tuple[str, ...] = ()
    retain_file: str | None = None
    attack: Place = "prefix"
    attack_tokens: int = setting(8, at_least=1)
    attack_steps: int = setting(3, at_least=0)
    attack_rate: float = 0.5
    attack_sign: bool = False
    attack_init: Literal["random", "latest"] = "random"
    warm_up: int = setting(20, at_least=0)
    iterations: int = setting(120, at_least=1)
    batch_size: int = setting(4, at_least=1)
    retain_batch_size: int = setting(12, at_least=1)
    learning_rate: float = setting(3e-4, above=0, below=1)
    trajectories: int = setting(8, at_least=1)
    sample_steps: int = setting(25, at_least=1)
    retain_trajectories: int = setting(96, at_least=1)
    retain_sample_steps: int = setting(8, at_least=1)
    trajectory_guidance: float = 3.0
    parity: bool = False

    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> State:
        """Prompts, the two pools, the trained layers."""
        if len(text_encoders(base.pipe)) > 1:
            raise ErasureError(
                f"advunlearn trains the one text encoder of Stable Diffusion 1 and 2, and {base.name} reads two: with "
                "one retrained the other still says the concept. Use esd, salun, spm or unguide; nothing was changed"
            )
        pairs = [pair for concept in concepts for pair in concept.prompt_pairs()]
        count = None if self.parity else self.retain_trajectories  # the published loop has no pool: it takes all
        kept = retain_prompts(base, concepts, count, first=self.retain, file=self.retain_file, seed=run.seed)
        encoder = base.pipe.text_encoder
        read = base.pipe.tokenizer
        places = [slots(read, c, self.attack, self.attack_tokens, by_words=self.parity) for c, _ in pairs]
        base.unet.requires_grad_(False)
        pools: list[TrajectoryPool | None] = [None, None]
        if not self.parity:
            wanted = (
                ("concept", pairs, self.trajectories, self.sample_steps),
                ("retain", [(text, "") for text in kept], self.retain_trajectories, self.retain_sample_steps),
            )
            for i, (name, texts, count, steps) in enumerate(wanted):
                pools[i] = kept_pool(
                    run.path(f"{name}.safetensors"),
                    base,
                    texts,
                    trajectories=max(count, len(texts)),  # at least one of each
                    seed=run.seed + i,
                    steps=steps,
                    guidance=self.trajectory_guidance,
                    batch=16,
                )
        # Everything that T_0 says is known before T starts to change.
        base.encode([text for pair in pairs for text in pair] + kept + [""])
        adapter = Weights(encoder, trained(encoder, self.layers, self.final_norm), "text_encoder")
        state = State(base, pairs, places, kept, pools[0], pools[1], adapter, spread(encoder), run.seed)
        state.latest = [start(encoder, place, torch.Generator().manual_seed(run.seed)) for place in places]
        return state

    def loss(self, state: State, step: int) -> dict[str, Tensor]:
        """The attack, then erasing and retaining on one batch."""
        base, draw = state.base, torch.Generator().manual_seed(state.seed * 1_000_003 + step)
        encoder, device = base.pipe.text_encoder, base.device
        number = int(torch.randint(len(state.pairs), (1,), generator=draw))
        place, vectors = state.places[number], None
        if step >= self.warm_up and self.attack_steps:
            begun = state.latest[number] if self.attack_init == "latest" else start(encoder, place, draw)
            vectors = search(
                lambda d, _: self.attack_loss(state, number, d, draw),
                begun,
                self.attack_steps,
                self.attack_rate * state.unit,
                sign=self.attack_sign,
                accumulate=self.parity,
                stale=self.parity,
            )
            state.latest[number] = vectors
        batch, kept = self.concept(state, number, draw), self.kept(state, draw)
        if vectors is None:
            named = encode(encoder, plain(base, [state.pairs[number][0]]), None)
        else:
            named = encode(encoder, place, vectors)
        others = encode(encoder, plain(base, [state.kept[int(i)] for i in kept.pair]), None)
        texts = torch.cat([named.expand(len(batch), -1, -1), others])
        x, t = torch.cat([batch.x, kept.x]).to(device), torch.cat([batch.t, kept.t]).to(device)
        made, held = base.predict(x, t, Conditions(texts)).float().split([len(batch), len(kept)])
        wanted = away(batch.neutral.to(device), batch.concept.to(device), self.negative_guidance)
        return {
            "erase": F.mse_loss(made, wanted),
            "retain": self.retain_weight * F.mse_loss(held, kept.concept.to(device)),
        }

    def attack_loss(self, state: State, number: int, vectors: Tensor, draw: torch.Generator) -> Tensor:
        """How far the attacked encoder's answer is from the concept itself, on fresh states."""
        batch, device = self.concept(state, number, draw), state.base.device
        texts = encode(state.base.pipe.text_encoder, state.places[number], vectors).expand(len(batch), -1, -1)
        made = state.base.predict(batch.x.to(device), batch.t.to(device), Conditions(texts)).float()
        return F.mse_loss(made, batch.concept.to(device))

    def concept(self, state: State, number: int, draw: torch.Generator) -> TrajectoryPool:
        """States of the concept's prompt `number`."""
        if state.pool is None:
            return self._live(state.base, [state.pairs[number]] * self.batch_size, draw)
        own = (state.pool.pair == number).nonzero().flatten()
        index = own[torch.randint(len(own), (self.batch_size,), generator=draw)]
        return state.pool.take(index)

    def kept(self, state: State, draw: torch.Generator) -> TrajectoryPool:
        """States of retain prompts; `pair` says which."""
        pool = state.retain
        if pool is None:
            chosen = torch.randperm(len(state.kept), generator=draw)[: self.retain_batch_size]
            found = self._live(state.base, [(state.kept[int(i)], "") for i in chosen], draw)
            found.pair = chosen
            return found
        index = torch.randint(len(pool), (self.retain_batch_size,), generator=draw)
        return pool.take(index)

    def _live(self, base: Base, pairs: list[tuple[str, str]], draw: torch.Generator) -> TrajectoryPool:
        """Parity: a trajectory for every sample, and T_0's answers anew."""
        found = late_states(base, pairs, draw, steps=self.sample_steps, guidance=self.trajectory_guidance)
        return judge(base, found, pairs)

    def snapshot(self, state: State) -> dict[str, Tensor]:
        """The latest vectors of every prompt."""
        return {f"latest.{i}": vectors for i, vectors in enumerate(state.latest)}

    def restore(self, state: State, tensors: dict[str, Tensor]) -> None:
        """Put them back."""
        state.latest = [tensors[f"latest.{i}"].to(one.device) for i, one in enumerate(state.latest)]


def plain(base: Base, texts: list[str]) -> Slots:
    """Prompts without room for vectors."""
    read = base.pipe.tokenizer
    options = {"padding": "max_length", "max_length": read.model_max_length, "truncation": True}
    return Slots(read(texts, return_tensors="pt", **options).input_ids, torch.zeros(0))


def trained(encoder: nn.Module, layers: int | None, final_norm: bool | None = None) -> dict[str, nn.Module]:
    """The modules of the first `layers` layers that hold weights, by path; None: all.

    The number is compared as a number: the published code compares its first digits, so that layer 1 trains 10 and
    11 too.

    Raises:
        ErasureError: the encoder has fewer layers, or none that are known.
    """
    holding = {
        path: one for path, one in encoder.named_modules() if next(one.parameters(recurse=False), None) is not None
    }
    numbered = {path: int(found[1]) for path in holding if (found := LAYER.search(path))}
    count = max(numbered.values(), default=-1) + 1
    if not count or (layers is not None and layers > count):
        raise ErasureError(f"layers={layers}: the text encoder has {count}")
    last = layers is None if final_norm is None else final_norm
    return {
        path: one
        for path, one in holding.items()
        if numbered.get(path, count) < (count if layers is None else layers)
        or (last and path.endswith("final_layer_norm"))
    }


@dataclass
class State:
    """What a run of AdvUnlearn holds; `unit` is the deviation of the token embeddings."""

    base: Base
    pairs: list[tuple[str, str]]
    places: list[Slots]
    kept: list[str]
    pool: TrajectoryPool | None
    retain: TrajectoryPool | None
    adapter: Weights
    unit: float
    seed: int
    latest: list[Tensor] | Any = None
