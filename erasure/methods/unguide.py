"""UnGuide: LoRA-assisted guidance (Polowczyk et al. 2025, arXiv 2508.05755).

A rank-1 LoRA learns to lead the concept's prompt c beyond a reference prompt c_ref:

    L = || e_L(x, c) - [ e_0(x, c_ref) - eta (e_0(x, c) - e_0(x, c_ref)) ] ||^2

When images are generated, the outputs of both networks are combined as w e_0 + (1 - w) e_L. The weight w is decided
for each prompt after the first steps (pipelines/gates/latent.py): if the LoRA moves the prompt more than it moves the
empty one, the concept is present, and w = -1 leads away from it; otherwise w = 1 gives the base alone.

Cost: a pool of T trajectories of S states takes 3TS F; each update takes 1F + 1B per sample. The published script takes
54F + 1B per update, and 440F to decide on a prompt (10 repeats).

Deviations, undone by `parity=True`: base trajectories, with all of their states and the sampler's own t (published:
trajectories with the LoRA on, and a t that is 39 to 58 too high); all linear layers except those of cross-attention
(published for nudity; for objects the keys and values of cross-attention, which on glyph move other prompts as much as
the concept's); c and c_ref are the concept's name and its anchor or nearest word (published: "a photo of the cat" and
"a photo of the forest", a background for each class of CIFAR-10; for nudity "a photo of a nude person" and "a photo of
a person wearing clothes"); the gate decides later, for styles earlier and along the prompt's own guidance
(pipelines/gates/latent.py), at the sampler's own t (published: a t that is 39 to 58 too high), and its limit is set by
what the LoRA does to other prompts (published: 1); w = 1 where the concept is absent (published: 2, which leads other
prompts away from the LoRA); a paired sequential test stops the repeats early (published: all of them).

Not undone: the published references exist for CIFAR-10 and nudity alone. In parity mode other objects are led to "a
photo of the" nearest word, unless an anchor is given, and styles, for which no script is published, keep our prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import anchored, around, retain_prompts
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.method import GradientMethod
from erasure.model.base import Base
from erasure.model.diffusion import away
from erasure.model.trajectories import Measure, TrajectoryPool, judge, kept_pool, late_states, shifts
from erasure.training.adapters import LowRankTerm
from erasure.training.objective import Terms
from erasure.training.reweighting import squared
from erasure.training.run import Run
from erasure.training.stopping import Stop

OTHERS = 16  # number of other prompts that the gate is calibrated with
# The published references of the classes of CIFAR-10: "a photo of the {class}" becomes "a photo of the {reference}".
REFERENCES = {
    "airplane": "street",
    "automobile": "sea",
    "bird": "ground",
    "cat": "forest",
    "deer": "sea",
    "dog": "forest",
    "frog": "sky",
    "horse": "forest",
    "ship": "sky",
    "truck": "sky",
}
NUDITY = ("a photo of a nude person", "a photo of a person wearing clothes")
STYLED = 6  # number of styles that the concept's own prompts are calibrated in
CALIBRATED = 3  # noises per prompt
LEAST = 0.05  # smallest ratio by guidance: a prompt that the LoRA barely moves never opens the gate


@dataclass(frozen=True)
class UnGuide(GradientMethod):
    """The settings of UnGuide, with the values tuned on glyph as defaults.

    Defaults that are not the published values (the official scripts for objects):

    - variant: published `x-strict` for objects, `linear` for nudity; ours `linear` for every kind, because on glyph the
      keys and values of cross-attention move other prompts as much as the concept's.
    - iterations, batch_size, learning_rate: published 200 of 1 at 3e-5; ours 100 of 8 at 3e-4. iterations x rate, how
      far Adam can move a factor, is 0.006 and 0.03.
    - trajectory_guidance, sample_steps, decide_guidance, decide_steps: published 9, 50, 7.5, 50; ours 3, 25, 3, 25,
      glyph's own.
    - c_ref: published a background; ours the nearest word.
    - weight_off: published 2; ours 1, so that a prompt without the concept keeps the base bit for bit.
    - ratio, early: published 1 and all repeats; ours calibrated, and stopped once the decision is clear.

    Args:
        variant: which layers get a LoRA; see `erasure list models MODEL`.
        rank: rank of the LoRA.
        scale: alpha; the LoRA's product is multiplied by it, whatever the rank.
        negative_guidance: eta, how far the concept is pushed beyond c_ref.
        iterations: number of updates.
        batch_size: samples per update.
        learning_rate: Adam's learning rate.
        trajectories: number of base trajectories in the pool.
        sample_steps: states per trajectory.
        trajectory_guidance: classifier-free guidance scale of the trajectories.
        weight_on: w where the concept is present.
        weight_off: w elsewhere; the paper's is 2.
        decide_after: number of steps, of `decide_steps`, after which a prompt is decided on.
        decide_steps: steps of the sampler that decides.
        decide_guidance: guidance scale of the sampler that decides.
        measure: how the LoRA's effect on a prompt is measured: norm, as published, or guidance
            (pipelines/gates/latent.py).
        ratio: how many times more than the empty prompt the LoRA must move a prompt for the gate to open, or (by
            guidance) which share of the prompt's own guidance it must take back; None: the ratio that best separates
            the concept's prompts from those of its neighbours and a sample of other words.
        repeats: largest number of noises to decide by.
        early: stop the repeats once the decision is clear.
        measure_every: updates between measurements of how much is erased and kept, on states held out of training
            (`training/curves.py`); the patch's header records them. 0 measures nothing.
        stop: `auto` ends the run when the concept is gone on those states and improves no longer, and goes back and
            lowers the learning rate when neighbours drift too far (`training/stopping.py`); `iterations` is then the
            largest number of updates.
        parity: reproduce the official script, with its defaults and its quirks.
    """

    method: ClassVar[str] = "unguide"
    NETWORKS: ClassVar[tuple[str, ...]] = ("unet", "sd3", "flux", "pixart", "sana", "qwen-image")
    FORGET: ClassVar[str] = "lead"
    PER_CONCEPT: ClassVar[tuple[str, ...]] = ("iterations", "trajectories", "rank")
    NO_STOP: ClassVar[str] = (
        "the LoRA is a direction to guide away from, which the gate switches on for the concept alone, so neither its "
        "own predictions nor their drift say what images will show"
    )
    PARITY: ClassVar[dict[str, Any]] = {
        "variant": "x-strict",
        "iterations": 200,
        "batch_size": 1,
        "learning_rate": 3e-5,
        "sample_steps": 50,
        "trajectory_guidance": 9.0,
        "weight_off": 2.0,
        "decide_steps": 50,
        "decide_guidance": 7.5,
        "early": False,
        "ratio": 1.0,
    }
    PARITY_KINDS: ClassVar[dict[str, dict[str, Any]]] = {"content": {"variant": "linear"}}

    variant: str = "linear"
    rank: int = setting(1, at_least=1)
    scale: float = 8.0
    negative_guidance: float = 2.0
    iterations: int = setting(100, at_least=1)
    batch_size: int = setting(8, at_least=1)
    learning_rate: float = setting(3e-4, above=0, below=1)
    trajectories: int = setting(12, at_least=1)
    sample_steps: int = setting(25, at_least=1)
    trajectory_guidance: float = 3.0
    weight_on: float = -1.0
    weight_off: float = 1.0
    decide_after: int = setting(10, at_least=1)
    decide_steps: int = setting(25, at_least=2)
    decide_guidance: float = 3.0
    measure: Measure = "norm"
    ratio: float | None = None
    repeats: int = setting(10, at_least=1)
    early: bool = True
    measure_every: int = setting(0, at_least=0)
    stop: Stop = "never"
    parity: bool = False

    def __post_init__(self) -> None:
        """Check every setting, and that the decision comes before the last step; raises ErasureError."""
        super().__post_init__()
        if self.decide_after >= self.decide_steps:
            raise ErasureError(
                f"decide_after={self.decide_after}: must be below decide_steps={self.decide_steps}, so 1 to "
                f"{self.decide_steps - 1}"
            )

    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> State:
        """Choose the prompts and their references, build the pool and put the LoRA in place.

        Raises:
            ErasureError: the gate could not measure what would be trained, or no module fits the variant.
        """
        for scale in (self.trajectory_guidance, self.decide_guidance):
            base.check_guidance(scale)
        targets = base.targets(self.variant)
        if self.measure == "norm" and base.still(targets):
            raise ErasureError(
                f"variant={self.variant}: cross-attention alone cannot move the empty prompt of {base.name}, which is "
                "all zeros, so the gate has no unit for measure=norm and could not decide on a prompt. Set "
                "measure=guidance, or a variant with other layers, such as linear. Nothing was trained"
            )
        pairs = [pair for concept in concepts for pair in self.led(base, concept, concepts)]
        pool = None
        if not self.parity:
            pool = kept_pool(
                run.path("pool.safetensors"),
                base,
                pairs,
                trajectories=max(self.trajectories, len(pairs)),
                seed=run.seed,
                steps=self.sample_steps,
                guidance=self.trajectory_guidance,
            )
        adapter = LowRankTerm(
            base.network,
            targets,
            rank=self.rank,
            alpha=self.scale * self.rank,
            generator=torch.Generator().manual_seed(run.seed),
            component=base.component,
            normal=True,
        )
        others = self.others(base, concepts, run.seed)
        return State(base, pairs, self.named(concepts, others), others, pool, adapter, run.seed)

    def led(self, base: Base, concept: Concept, concepts: list[Concept]) -> list[tuple[str, str]]:
        """Return pairs (prompt of the concept, reference prompt), in parity mode in the published words."""
        if not self.parity or concept.kind == "style":
            return anchored(base, concept, concepts).prompt_pairs()
        if concept.name.lower() == "nudity":
            return [(NUDITY[0], concept.anchor or NUDITY[1])]
        reference = concept.anchor
        if reference is None:
            word = REFERENCES.get(concept.name.lower()) or anchored(base, concept, concepts).anchor
            reference = f"a photo of the {word}"
        return [(f"a photo of the {name}", reference) for name in concept.names]

    @staticmethod
    def others(base: Base, concepts: list[Concept], seed: int) -> list[str]:
        """Return OTHERS prompts that do not name the concepts: half plain words, neighbours first, half in styles."""
        near = around(base, concepts)
        texts = retain_prompts(base, concepts, 1_000, seed=seed)
        words = list(dict.fromkeys([*near[: OTHERS // 4], *(text for text in texts if " in " not in text)]))
        styled = [text for text in texts if " in " in text]
        return [*words[: OTHERS // 2], *styled[: OTHERS // 2]]

    @staticmethod
    def named(concepts: list[Concept], others: list[str]) -> list[str]:
        """Return the concepts' prompts: those they are erased from, and objects in the styles of the other prompts."""
        styles = [text.split(" in ", 1)[1] for text in others if " in " in text][:STYLED]
        prompts = [prompt for concept in concepts for prompt, _ in concept.prompt_pairs()]
        objects = [concept for concept in concepts if concept.kind != "style"]
        prompts += [f"a {concept.name} in {style}" for concept in objects for style in styles]
        return list(dict.fromkeys(prompts))

    def loss(self, state: State, step: int) -> Terms:
        """Return the objective on one batch."""
        batch, device = self.tuples(state, step), state.base.device
        conditions = state.base.conditions([state.pairs[int(i)][0] for i in batch.pair])
        output = state.base.predict(batch.x.to(device), batch.t.to(device), conditions).float()
        target = away(batch.neutral.to(device), batch.concept.to(device), self.negative_guidance)
        return {
            "lead": self.forgotten_states(state.base, squared(output, target), output, batch, self.trajectory_guidance)
        }

    def tuples(self, state: State, step: int) -> TrajectoryPool:
        """Return the batch of states for a step; in parity mode with the LoRA on, and the published t."""
        if state.pool is not None:
            return state.pool.batch(self.batch_size, step, state.seed)
        draw = torch.Generator().manual_seed(state.seed * 1_000_003 + step)
        chosen = torch.randint(len(state.pairs), (self.batch_size,), generator=draw).tolist()
        pairs = [state.pairs[i] for i in chosen]
        states = late_states(state.base, pairs, draw, steps=self.sample_steps, guidance=self.trajectory_guidance)
        states.pair = torch.tensor(chosen)
        with state.adapter.off():
            return judge(state.base, states, pairs)

    def gate(self, state: State) -> dict[str, Any]:
        """Return the latent gate: its weights, and how it decides."""
        options = {
            "after": self.decide_after,
            "steps": self.decide_steps,
            "guidance": self.decide_guidance,
            "measure": self.measure,
            **({"late": True} if self.parity else {}),
        }
        ratio = self.ratio if self.ratio is not None else self.calibrated(state, options)
        return {
            "kind": "latent",
            "on": self.weight_on,
            "off": self.weight_off,
            **options,
            "repeats": self.repeats,
            "early": self.early,
            "ratio": ratio,
        }

    def calibrated(self, state: State, options: dict[str, Any]) -> float:
        """Return the ratio that separates named from other prompts; by norm it is at least 1, the empty prompt's."""
        base, seeds = state.base, range(CALIBRATED)

        def moved(prompt: str) -> float:
            return sum(shifts(base, prompt, seeds, state.adapter.on, **options)) / len(seeds)

        with state.adapter.off():
            unit = moved("") if self.measure == "norm" else 1.0
            named, other = ([moved(prompt) for prompt in texts] for texts in (state.named, state.others))
        if not other or unit <= 0:
            return 1.0
        ratio = cut(named, other) / unit
        return round(max(1.0 if self.measure == "norm" else LEAST, ratio), 3)


def cut(above: list[float], below: list[float]) -> float:
    """Return the number that separates two samples with the best balanced accuracy, in the middle of the widest gap."""
    values = sorted({*above, *below})

    def merit(pair: tuple[float, float]) -> tuple[float, float]:
        right = sum(x >= pair[1] for x in above) / len(above) + sum(x <= pair[0] for x in below) / len(below)
        return right, pair[1] - pair[0]

    low, high = max(zip(values, values[1:], strict=False), key=merit, default=(values[0], values[0]))
    return (low + high) / 2


@dataclass
class State:
    """The state of a run of UnGuide.

    Args:
        base: the checkpoint.
        pairs: (prompt of the concept, reference prompt).
        named: prompts that name the concepts, to calibrate the gate with.
        others: prompts that do not.
        pool: base states; None in parity mode.
        adapter: the LoRA.
        seed: of the run.
    """

    base: Base
    pairs: list[tuple[str, str]]
    named: list[str]
    others: list[str]
    pool: TrajectoryPool | None
    adapter: LowRankTerm
    seed: int
