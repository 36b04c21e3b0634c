"""Receler: erasers in cross-attention, trained against an attacker and only where the concept is (arXiv 2311.17717).

Each cross-attention gets an eraser, a low-rank term on its output projection. For the concept's prompt c the UNet is
led away from it (ESD's objective) even with an attacker's rows r behind the prompt's own text states, and the erasers'
outputs o are held at zero on pixels that do not show the concept:

    L = || e(x_t, c + r) - [ e_0(x_t, n) - eta (e_0(x_t, c) - e_0(x_t, n)) ] ||^2
        + lambda mean over layers, pixels outside of M and channels of o^2
    r = argmin_r || e(x_t, c + r) - e_0(x_t, c) ||^2,  K steps of Adam from the rows found before

e_0 is the base and n the neutral prompt. M is where the base's attention to the name, stretched to [0, 1], is at least
the threshold (Huang et al. 2024).

Cost: a pool of T trajectories of S states takes 2TS F; each sample of an update takes 1F for its mask, K (F + B) for
the attack and 1F + 1B for the loss. The published loop takes about 101F + 51B per update.

Deviations from the official code. The eraser is linear and reads what the output projection reads, so that it is an
exact LoRA which any program loads; the published one, up(GELU(down(o))) on the projection's output, is no change of
weights and fits no patch. There is therefore no parity mode. Besides: states of the base's trajectories, all of them,
at the sampler's own t (published: of the network that trains, at a t up to 20 higher); masks from all layers
(published: those of 16 x 16); the rows start as the prompt's own (published: uniform in [0, 1]), Adam starts anew in
every update and has no weight decay; the loss is that of the rows after the last step (published: before it), and
with `attack_steps=0` there is training without an attacker (published: none at all).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.method import GradientMethod
from erasure.model.attention_maps import AttentionMaps, masks, outside
from erasure.model.base import Base
from erasure.model.conditioning import Conditions
from erasure.model.diffusion import away
from erasure.model.soft_prompt import search
from erasure.model.text_columns import last_place, named_pairs, places_of_name
from erasure.model.trajectories import TrajectoryPool, in_turn, kept_pool
from erasure.training.adapters import LowRankTerm
from erasure.training.objective import Terms
from erasure.training.reweighting import squared
from erasure.training.run import Run
from erasure.training.stopping import Stop


@dataclass(frozen=True)
class Receler(GradientMethod):
    """The settings of Receler, with the values tuned on glyph as defaults.

    Defaults that are not the published values (train_receler.py): 500 updates of 1 sample, rank 128, 50 steps of the
    attack and 50 sampling steps are published.

    Args:
        rank: rank of the erasers.
        negative_guidance: eta, how far the concept is pushed beyond the neutral prediction.
        local_weight: lambda, the weight of the erasers' outputs outside of the concept.
        mask_threshold: from which share of the largest attention on a pixel belongs to the concept.
        attack_rows: number of text states that the attacker changes, from the one behind the prompt's last word on; at
            most as many as the text encoder has.
        attack_steps: K, the steps of each attack; 0 trains without an attacker.
        attack_rate: learning rate of the attack, in standard deviations of the text states.
        iterations: number of updates, each for one prompt.
        batch_size: samples per update.
        learning_rate: Adam's learning rate.
        trajectories: number of base trajectories in the pool.
        sample_steps: states per trajectory.
        trajectory_guidance: classifier-free guidance scale of the trajectories.
        measure_every: updates between measurements of how much is erased and kept, on states held out of training
            (`training/curves.py`); the patch's header records them. 0 measures nothing.
        stop: only `never`; see `GradientMethod`.
    """

    method: ClassVar[str] = "receler"
    FORGET: ClassVar[str] = "erase"
    RETAIN: ClassVar[tuple[str, ...]] = ("local",)
    PER_CONCEPT: ClassVar[tuple[str, ...]] = ("iterations", "trajectories")
    NO_STOP: ClassVar[str] = (
        "the measurements do not see the attacker: the plain prompt is erased long before the erasers resist attacks"
    )

    rank: int = setting(16, at_least=1)
    negative_guidance: float = 1.0
    local_weight: float = setting(0.1, at_least=0)
    mask_threshold: float = setting(0.1, at_least=0, at_most=1)
    attack_rows: int = setting(16, at_least=1)
    attack_steps: int = setting(4, at_least=0)
    attack_rate: float = setting(0.1, above=0)
    iterations: int = setting(100, at_least=1)
    batch_size: int = setting(4, at_least=1)
    learning_rate: float = setting(1e-3, above=0, below=1)
    trajectories: int = setting(8, at_least=1)
    sample_steps: int = setting(25, at_least=1)
    trajectory_guidance: float = 3.0
    measure_every: int = setting(0, at_least=0)
    stop: Stop = "never"

    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> State:
        """Find the names in the prompts, build the pool and put the erasers in place.

        Raises:
            ErasureError: a prompt leaves no room for the attacker's rows.
        """
        named = [pair for concept in concepts for pair in named_pairs(concept)]
        spans, first = [], []
        for pair in named:
            rows = base.encode([pair.prompt])[0]
            start = last_place(base, pair.prompt) + 1
            if self.attack_steps and start >= len(rows):
                raise ErasureError(f"{pair.prompt[:40]!r} leaves no room for attack_rows; nothing was changed")
            spans.append(places_of_name(base, pair))
            first.append((start, rows[start : start + self.attack_rows].float().clone()))
        pairs = [(pair.prompt, pair.instead) for pair in named]
        pool = kept_pool(
            run.path("pool.safetensors"),
            base,
            pairs,
            trajectories=max(self.trajectories, len(pairs)),
            seed=run.seed,
            steps=self.sample_steps,
            guidance=self.trajectory_guidance,
        )
        targets = {path: module for path, module in base.targets("x").items() if path.endswith(".to_out.0")}
        draw = torch.Generator().manual_seed(run.seed)
        adapter = LowRankTerm(base.network, targets, rank=self.rank, generator=draw, component=base.component)
        unit = float(base.encode([prompt for prompt, _ in pairs]).float().std())
        starts, latest = [start for start, _ in first], [rows for _, rows in first]
        return State(base, pairs, spans, pool, adapter, run, unit, starts, latest)

    def loss(self, state: State, step: int) -> Terms:
        """Attack one prompt, then return the erasing term and the erasers' outputs outside of the concept."""
        base, device = state.base, state.base.device
        number = int(in_turn(len(state.pairs), 1, step, state.run.seed))
        draw = torch.Generator().manual_seed(state.run.seed * 1_000_003 + step)
        own = (state.pool.pair == number).nonzero().flatten()
        batch = state.pool.take(own[torch.randint(len(own), (self.batch_size,), generator=draw)])
        x, t = batch.x.to(device), batch.t.to(device)
        neutral, concept = batch.neutral.to(device), batch.concept.to(device)
        if self.attack_steps:
            state.latest[number] = search(
                lambda rows, _: F.mse_loss(base.predict(x, t, state.attacked(number, rows, len(x))).float(), concept),
                state.latest[number],
                self.attack_steps,
                self.attack_rate * state.unit,
            )
        where = self.shown(state, number, x, t)
        rows = state.latest[number] if self.attack_steps else None
        with state.alone(), state.adapter.recorded() as erasers:
            output = base.predict(x, t, state.attacked(number, rows, len(x))).float()
        losses = squared(output, away(neutral, concept, self.negative_guidance))
        return {
            "erase": self.forgotten_states(base, losses, output, batch, self.trajectory_guidance),
            "local": self.local_weight * outside(list(erasers.values()), where) + 0 * output.sum(),
        }

    def shown(self, state: State, number: int, x: Tensor, t: Tensor) -> Tensor:
        """Return where the base's attention to the name lies on each sample [n, h, w]; anywhere, without maps."""
        base, size = state.base, (x.shape[2], x.shape[3])
        with torch.no_grad(), state.alone(), state.adapter.off(), AttentionMaps(base.unet) as maps:
            base.predict(x, t, base.conditions([state.pairs[number][0]]).expand(len(x)))
            found = list(maps.layers.values())
        if not found:
            return torch.ones(len(x), *size, dtype=torch.bool, device=x.device)
        return masks(found, *state.spans[number], size, self.mask_threshold)

    def snapshot(self, state: State) -> dict[str, Tensor]:
        """Return the attacker's latest rows for every prompt."""
        return {f"latest.{i}": rows for i, rows in enumerate(state.latest)}

    def restore(self, state: State, tensors: dict[str, Tensor]) -> None:
        """Restore the attacker's latest rows for every prompt."""
        state.latest = [tensors[f"latest.{i}"].to(old.device) for i, old in enumerate(state.latest)]


@dataclass
class State:
    """The state of a run of Receler.

    Args:
        base: the checkpoint.
        pairs: (prompt of the concept, neutral prompt).
        spans: places of the name in each prompt: of its first token, and behind its last.
        pool: base states.
        adapter: the erasers.
        run: the run.
        unit: of the attack's rate: the standard deviation of the text states.
        starts: place of the attacker's first row in each prompt.
        latest: the attacker's latest rows [k, width] for each prompt.
    """

    base: Base
    pairs: list[tuple[str, str]]
    spans: list[tuple[int, int]]
    pool: TrajectoryPool
    adapter: LowRankTerm
    run: Run
    unit: float
    starts: list[int]
    latest: list[Tensor] = field(default_factory=list)

    def attacked(self, number: int, rows: Tensor | None, count: int) -> Conditions:
        """Return the conditions of a prompt with the attacker's rows in it, for `count` samples."""
        plain = self.base.conditions([self.pairs[number][0]])
        if rows is not None:
            start = self.starts[number]
            states = plain.states.float()
            plain = replace(plain, states=torch.cat([states[:, :start], rows[None], states[:, start + len(rows) :]], 1))
        return plain.expand(count)

    def alone(self) -> Any:
        """Return a context in which this process computes all rows: maps and erasers' outputs are not shared."""
        return self.run.engine.alone() if self.run.engine is not None else nullcontext()
