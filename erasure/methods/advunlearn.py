"""AdvUnlearn: adversarial training of the text encoder (Zhang et al. 2024, arXiv 2405.15234).

The encoder T learns to lead the concept's prompt c away from the concept (ESD's objective) even when an attacker adds
vectors d to its tokens, and to encode the retain prompts r as before. The UNet e_0 stays as it is:

    min_T  || e_0(z, T(c + d)) - [e_0(z, n) - eta (e_0(z, c) - e_0(z, n))] ||^2
           + gamma || e_0(z_r, T(r)) - e_0(z_r, T_0(r)) ||^2
    d = argmin_d || e_0(z, T(c + d)) - e_0(z, T_0(c)) ||^2,  K steps of Adam from random tokens

(eq. 5 and 6 of the paper, T_0 the original encoder). Only the first layers train, or all of them for content concepts.

Cost: z, z_r and all of e_0's answers to T_0 do not depend on T, so two pools of trajectories hold them; then an update
takes K b (F + B) for the attack and (b + b_r)(F + B) for the loss. The published loop samples all of them again:
1,939F + 36B per update with K = 30.

Deviations, undone by `parity=True`: the pools, with the sampler's own t (published: a t that is 39 to 58 too high, and
the same one for z and z_r); more than one vector; the attack's step is in standard deviations of the embeddings
(published: in their own units), its gradients are zeroed between its steps, and its last step counts (published: they
add up, and the result is that before the last update); vectors that are added start at zero (published: at random
tokens); the attack counts tokens, not words; batches; a style is erased from subjects in that style (published: the
bare name, for every kind). Not undone: without `retain_file`, the retain prompts are the checkpoint's vocabulary
(published: 243 prompts "a photo of ..." of COCO's or ImageNet's classes). The published code's other mode, which
alternates between erasing and retaining (`retain_train=iter`), is left out, because the paper does not use it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
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
from erasure.training.objective import Terms
from erasure.training.reweighting import squared
from erasure.training.run import Run
from erasure.training.stopping import Stop

LAYER = re.compile(r"(?:^|\.)encoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class AdvUnlearn(GradientMethod):
    """The settings of AdvUnlearn, with the values tuned on glyph as defaults.

    Defaults that are not the published values (AdvUnlearn.py as its README calls it; the paper for objects and styles):

    - iterations, batch_size, learning_rate, warm_up: published 1000 of 1 at 1e-5, the first 200 without attack; ours
      120 of 4 at 3e-4, the first 20. iterations x rate, how far Adam can move a weight, is 0.01 and 0.036.
    - attack_steps (K), attack_rate: published 30 of 1e-3, with gradients that add up; ours 3 of half the embeddings'
      spread.
    - attack_tokens: published 1; ours 8, see below.
    - retain_weight (gamma), retain_batch_size: published 0.5 and 5; ours 1 and 12, because the rate is higher.
    - retain prompts: published 243 "a photo of ..."; ours the concept's neighbours and the checkpoint's vocabulary.
    - sample_steps: published 50; ours 25 for the concept and 8 for what is retained, since every state is used.

    Args:
        layers: number of the text encoder's layers that train, counted from the first; None: all.
        final_norm: whether the norm after the last layer trains; None: if all layers train.
        negative_guidance: eta, how far the concept is pushed beyond the neutral prediction.
        retain_weight: gamma, the weight of the retain term.
        retain: prompts to keep, in addition to the concept's neighbours and words of the vocabulary.
        retain_file: a CSV file with a column `prompt` (as the published retain sets have), used instead of neighbours
            and vocabulary; prompts that name the concept, or are too long for the text encoder, are left out.
        attack: where the vectors are placed: before the prompt's tokens, after them, instead of them, or added to them.
        attack_tokens: number of vectors. The published single vector does not protect against attackers who use more:
            on cat, P4D with 16 tokens succeeded on 9 of 12 prompts after training with one, on 5 of 12 with eight.
        attack_steps: K, the steps of each attack; 0 trains without an adversary.
        attack_rate: learning rate of the attack, in standard deviations of the token embeddings; in parity mode as it
            is.
        attack_sign: give Adam the sign of the gradient (published as `fast_at`).
        attack_init: start the attack from random tokens, or from the latest vectors.
        warm_up: number of updates without attack.
        iterations: number of updates.
        batch_size: concept samples per update.
        retain_batch_size: retain samples per update.
        learning_rate: Adam's learning rate.
        trajectories: number of concept trajectories in the pool.
        sample_steps: states per concept trajectory.
        retain_trajectories: number of retain trajectories in the pool, of different prompts as far as there are enough.
        retain_sample_steps: states per retain trajectory.
        trajectory_guidance: classifier-free guidance scale of all trajectories.
        measure_every: updates between measurements of how much is erased and kept, on states held out of training
            (`training/curves.py`); the patch's header records them. 0 measures nothing.
        stop: `auto` ends the run when the concept is gone on those states and improves no longer, and goes back and
            lowers the learning rate when neighbours drift too far (`training/stopping.py`); `iterations` is then the
            largest number of updates.
        parity: reproduce the official script, with its defaults and its quirks.
    """

    method: ClassVar[str] = "advunlearn"
    FORGET: ClassVar[str] = "erase"
    RETAIN: ClassVar[tuple[str, ...]] = ("retain",)
    PER_CONCEPT: ClassVar[tuple[str, ...]] = ("iterations", "trajectories")
    NO_STOP: ClassVar[str] = (
        "the measurements do not see the attacker: the plain prompt is erased long before the encoder resists attacks"
    )
    PARITY: ClassVar[dict[str, Any]] = {
        "retain_weight": 0.5,
        "attack_tokens": 1,
        "attack_steps": 30,
        "attack_rate": 1e-3,
        "warm_up": 200,
        "iterations": 1000,
        "batch_size": 1,
        "retain_batch_size": 5,
        "learning_rate": 1e-5,
        "sample_steps": 50,
    }
    PARITY_KINDS: ClassVar[dict[str, dict[str, Any]]] = {"content": {"layers": None, "retain_weight": 0.3}}

    layers: int | None = setting(1, at_least=1)
    final_norm: bool | None = None
    negative_guidance: float = 1.0
    retain_weight: float = setting(1.0, at_least=0)
    retain: tuple[str, ...] = ()
    retain_file: str | None = None
    attack: Place = "prefix"
    attack_tokens: int = setting(8, at_least=1)
    attack_steps: int = setting(3, at_least=0)
    attack_rate: float = setting(0.5, at_least=0)
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
    measure_every: int = setting(0, at_least=0)
    stop: Stop = "never"
    parity: bool = False

    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> State:
        """Choose the prompts, build the two pools and prepare the layers that train.

        Raises:
            ErasureError: the checkpoint has two text encoders, there is nothing to retain, or a prompt leaves no room
                for the vectors.
        """
        if len(text_encoders(base.pipe)) > 1:
            raise ErasureError(
                f"advunlearn trains the one text encoder of Stable Diffusion 1 and 2, and {base.name} reads two: after "
                "one is retrained, the other still encodes the concept. Use another method; nothing was changed"
            )
        named = [concept.bare_pairs() if self.parity else concept.prompt_pairs() for concept in concepts]
        pairs = [pair for prompts in named for pair in prompts]
        count = None if self.parity else self.retain_trajectories  # the published loop has no pool: it takes all
        kept = retain_prompts(base, concepts, count, first=self.retain, file=self.retain_file, seed=run.seed)
        encoder = base.pipe.text_encoder
        tokenizer = base.pipe.tokenizer
        places = [slots(tokenizer, c, self.attack, self.attack_tokens, by_words=self.parity) for c, _ in pairs]
        base.unet.requires_grad_(False)
        pools: list[TrajectoryPool | None] = [None, None]
        if not self.parity:
            parts = (
                ("concept", pairs, self.trajectories, self.sample_steps),
                ("retain", [(text, "") for text in kept], self.retain_trajectories, self.retain_sample_steps),
            )
            for i, (name, texts, count, steps) in enumerate(parts):
                pools[i] = kept_pool(
                    run.path(f"{name}.safetensors"),
                    base,
                    texts,
                    trajectories=max(count, len(texts)),  # at least one for each prompt
                    seed=run.seed + i,
                    steps=steps,
                    guidance=self.trajectory_guidance,
                    batch=16,
                )
        # T_0's states of all prompts are computed before T starts to change.
        base.encode([text for pair in pairs for text in pair] + kept + [""])
        adapter = Weights(encoder, trained(encoder, self.layers, self.final_norm), "text_encoder")
        unit = 1.0 if self.parity else spread(encoder)
        state = State(base, pairs, places, kept, pools[0], pools[1], adapter, unit, run.seed)
        state.latest = [self.first(encoder, place, torch.Generator().manual_seed(run.seed)) for place in places]
        return state

    def first(self, encoder: nn.Module, place: Slots, draw: torch.Generator) -> Tensor:
        """Return the vectors that an attack starts from."""
        return start(encoder, place, draw, zeros=not self.parity)

    def loss(self, state: State, step: int) -> Terms:
        """Attack, then return the erasing and the retain term on one batch."""
        base, draw = state.base, torch.Generator().manual_seed(state.seed * 1_000_003 + step)
        encoder, device = base.pipe.text_encoder, base.device
        number = int(torch.randint(len(state.pairs), (1,), generator=draw))
        place, vectors = state.places[number], None
        if step >= self.warm_up and self.attack_steps:
            first = state.latest[number] if self.attack_init == "latest" else self.first(encoder, place, draw)
            vectors = search(
                lambda d, _: self.attack_loss(state, number, d, draw),
                first,
                self.attack_steps,
                self.attack_rate * state.unit,
                sign=self.attack_sign,
                accumulate=self.parity,
                stale=self.parity,
            )
            state.latest[number] = vectors
        batch, kept = self.states(state, number, step, draw)
        if vectors is None:
            named = encode(encoder, plain(base, [state.pairs[number][0]]), None)
        else:
            named = encode(encoder, place, vectors)
        others = encode(encoder, plain(base, [state.kept[int(i)] for i in kept.pair]), None)
        texts = torch.cat([named.expand(len(batch), -1, -1), others])
        x, t = torch.cat([batch.x, kept.x]).to(device), torch.cat([batch.t, kept.t]).to(device)
        output, retained = base.predict(x, t, Conditions(texts)).float().split([len(batch), len(kept)])
        target = away(batch.neutral.to(device), batch.concept.to(device), self.negative_guidance)
        return {
            "erase": self.forgotten_states(base, squared(output, target), output, batch, self.trajectory_guidance),
            "retain": self.retain_weight * F.mse_loss(retained, kept.concept.to(device)),
        }

    def attack_loss(self, state: State, number: int, vectors: Tensor, draw: torch.Generator) -> Tensor:
        """Return the distance of the attacked encoder's prediction from that of the concept itself, on fresh states."""
        batch, device = self.concept(state, number, draw), state.base.device
        texts = encode(state.base.pipe.text_encoder, state.places[number], vectors).expand(len(batch), -1, -1)
        output = state.base.predict(batch.x.to(device), batch.t.to(device), Conditions(texts)).float()
        return F.mse_loss(output, batch.concept.to(device))

    def states(
        self, state: State, number: int, step: int, draw: torch.Generator
    ) -> tuple[TrajectoryPool, TrajectoryPool]:
        """Return states of the concept's prompt `number`, and of retain prompts, whose `pair` is the prompt's index."""
        if state.retain is not None:
            batch = self.concept(state, number, draw)
            index = torch.randint(len(state.retain), (self.retain_batch_size,), generator=draw)
            return batch, state.retain.take(index)
        # Drawn without replacement until fewer than a batch are left, and at one t with the concept's states.
        count = min(self.retain_batch_size, len(state.kept))
        turn, place = divmod(step, len(state.kept) // count)
        order = torch.randperm(len(state.kept), generator=torch.Generator().manual_seed(state.seed * 100_003 + turn))
        chosen = order[place * count : (place + 1) * count]
        pairs = [state.pairs[number]] * self.batch_size + [(state.kept[int(i)], "") for i in chosen]
        states = self._live(state.base, pairs, draw)
        states.pair = torch.cat([torch.full((self.batch_size,), number), chosen])
        index = torch.arange(len(pairs))
        return states.take(index[: self.batch_size]), states.take(index[self.batch_size :])

    def concept(self, state: State, number: int, draw: torch.Generator) -> TrajectoryPool:
        """Return states of the concept's prompt `number`."""
        if state.pool is None:
            return self._live(state.base, [state.pairs[number]] * self.batch_size, draw)
        own = (state.pool.pair == number).nonzero().flatten()
        index = own[torch.randint(len(own), (self.batch_size,), generator=draw)]
        return state.pool.take(index)

    def _live(self, base: Base, pairs: list[tuple[str, str]], draw: torch.Generator) -> TrajectoryPool:
        """Sample a trajectory for every state, with T_0's predictions, as parity mode does."""
        states = late_states(base, pairs, draw, steps=self.sample_steps, guidance=self.trajectory_guidance)
        return judge(base, states, pairs)

    def snapshot(self, state: State) -> dict[str, Tensor]:
        """Return the latest vectors of every prompt."""
        return {f"latest.{i}": vectors for i, vectors in enumerate(state.latest)}

    def restore(self, state: State, tensors: dict[str, Tensor]) -> None:
        """Restore the latest vectors of every prompt."""
        state.latest = [tensors[f"latest.{i}"].to(old.device) for i, old in enumerate(state.latest)]


def plain(base: Base, texts: list[str]) -> Slots:
    """Return the tokens of prompts, without room for vectors."""
    tokenizer = base.pipe.tokenizer
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    return Slots(tokenizer(texts, return_tensors="pt", **options).input_ids, torch.zeros(0))


def trained(encoder: nn.Module, layers: int | None, final_norm: bool | None = None) -> dict[str, nn.Module]:
    """Return the modules with weights of a text encoder's first layers, by path.

    Layer numbers are compared as numbers: the published code compares their first digits, so that layer 1 also trains
    10 and 11.

    Args:
        encoder: the text encoder.
        layers: how many layers, counted from the first; None: all layers.
        final_norm: whether the norm after the last layer is one of them; None: if all layers are.

    Raises:
        ErasureError: the encoder has fewer layers, or none with a known name.
    """
    modules = {
        path: module
        for path, module in encoder.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    numbered = {path: int(match[1]) for path in modules if (match := LAYER.search(path))}
    count = max(numbered.values(), default=-1) + 1
    if not count or (layers is not None and layers > count):
        raise ErasureError(f"layers={layers}: the text encoder has {count}; nothing was changed")
    last = layers is None if final_norm is None else final_norm
    return {
        path: module
        for path, module in modules.items()
        if numbered.get(path, count) < (count if layers is None else layers)
        or (last and path.endswith("final_layer_norm"))
    }


@dataclass
class State:
    """The state of a run of AdvUnlearn.

    Args:
        base: the checkpoint.
        pairs: (prompt of the concept, neutral prompt).
        places: where the attack's vectors go in each of these prompts.
        kept: retain prompts.
        pool: states of the concept's prompts; None in parity mode.
        retain: states of the retain prompts; None in parity mode.
        adapter: the layers that train.
        unit: of the attack's rate: the standard deviation of the token embeddings, in parity mode 1.
        seed: of the run.
        latest: the latest vectors [k, width] for each prompt.
    """

    base: Base
    pairs: list[tuple[str, str]]
    places: list[Slots]
    kept: list[str]
    pool: TrajectoryPool | None
    retain: TrajectoryPool | None
    adapter: Weights
    unit: float
    seed: int
    latest: list[Tensor] = field(default_factory=list)
