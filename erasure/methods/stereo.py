"""STEREO: search thoroughly for words that bring a concept back, then erase it with all of them (arXiv 2408.16807).

First stage, in rounds k = 1, 2, ..: the network is led away from the concept's prompt, and later from the word found
last, v (ESD's objective, with the network e' that the round began with as the teacher); then a new word is learnt on
the base's pictures z of the concept, by textual inversion on the erased network (Gal et al. 2022, arXiv 2208.01618):

    L_search = || e(x_t, v_{k-1}) - [ e'(x_t, n) - eta (e'(x_t, v_{k-1}) - e'(x_t, n)) ] ||^2,  v_0 the prompt c
    v_k = argmin_v || eps - e(z_t, v) ||^2

Second stage, once and from the base's weights again: the prompt p, c or one of the K words, is answered like anchors a
and unlike all of these prompts (the compositional objective):

    L = || e(x_t, p) - [ e_0(n) + w_a (e_0(a) - e_0(n)) - w_e (mean_j e_0(v_j) - e_0(n)) ] ||^2,  j = 0 .. K

Only the second stage's weights become the patch. All of it is one run of updates, in which either the weights or the
word trains, so that a run can be interrupted anywhere; the optimizer begins anew with each part.

Cost: pool and pictures take 2F for each state; then, for each sample, 1F + 1B in the first search, 3F + 1B in later
ones, 1F + 1B of inversion, and in the second stage (K + 2) F + 1B. The published code walks to every state: 49F more.

Deviations from the official code: states of the base's trajectories for c in both stages (published: of the network
that trains, for each prompt); batches; a word starts at random tokens (published: at a given word, such as "art"); the
empty prompt n is for a style the subject without it; anchors are the concept's anchor or else its neighbours
(published: a list for each concept, made by hand). The published code means w_a = w_e = 1, but takes 1 from a scale
whose sign says which is which, so that it runs with w_a = 1 and w_e = 3; its first stage has eta = 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import around
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.method import GradientMethod
from erasure.model.base import Base
from erasure.model.conditioning import Conditions, text_encoders
from erasure.model.diffusion import away, to_eps
from erasure.model.soft_prompt import Slots, encode_word, inversion_loss, token_table, word_slots
from erasure.model.text_columns import named_pairs
from erasure.model.trajectories import TrajectoryPool, in_turn, kept_pool
from erasure.training.attacked_weights import AttackedWeights
from erasure.training.image_latents import Images, drawn
from erasure.training.objective import Terms
from erasure.training.reweighting import squared
from erasure.training.run import Run
from erasure.training.stopping import Stop

Part = Literal["search", "invert", "erase"]


@dataclass(frozen=True)
class Stereo(GradientMethod):
    """The settings of STEREO. Those of ESD's part are ESD's, tuned on glyph; those of the search are not tuned.

    Args:
        variant: which modules train; see `erasure list models MODEL`.
        rounds: rounds of the search, and so the number of words found; 0 leaves the first stage out.
        search_iterations: updates of the weights in each round.
        inversion_iterations: updates of the word in each round.
        iterations: number of all updates: `rounds` x (`search_iterations` + `inversion_iterations`), and those of the
            second stage.
        negative_guidance: eta of the first stage.
        anchor_weight: w_a, how far the second stage leads towards the anchors.
        erase_weight: w_e, how far it leads away from the concept.
        anchors: number of neighbours that are anchors, where the concept has no anchor.
        word_tokens: number of vectors of each word.
        batch_size: samples per update of the weights.
        inversion_batch_size: samples per update of a word.
        learning_rate: Adam's learning rate in the second stage.
        search_rate: in the first stage.
        inversion_rate: of the words, in standard deviations of the token embeddings.
        images: pictures of the concept that the base draws for the inversion.
        trajectories: number of base trajectories in the pool.
        sample_steps: states per trajectory, and steps of the pictures.
        trajectory_guidance: classifier-free guidance scale of both.
        measure_every: updates between measurements of how much is erased and kept, on states held out of training
            (`training/curves.py`); the patch's header records them. 0 measures nothing.
        stop: only `never`; see `GradientMethod`.
    """

    method: ClassVar[str] = "stereo"
    FORGET: ClassVar[str] = "erase"
    PER_CONCEPT: ClassVar[tuple[str, ...]] = (
        "iterations",
        "search_iterations",
        "inversion_iterations",
        "images",
        "trajectories",
    )
    NO_STOP: ClassVar[str] = "the measurements do not see the words that it erases, and it has two stages"
    NO_SPARSITY: ClassVar[str] = "its weights train twice from the base's own, with words in between"

    variant: str = "x"
    rounds: int = setting(2, at_least=0)
    search_iterations: int = setting(40, at_least=1)
    inversion_iterations: int = setting(60, at_least=1)
    iterations: int = setting(260, at_least=1)
    negative_guidance: float = 1.0
    anchor_weight: float = setting(1.0, at_least=0)
    erase_weight: float = setting(1.0, at_least=0)
    anchors: int = setting(8, at_least=1)
    word_tokens: int = setting(1, at_least=1)
    batch_size: int = setting(8, at_least=1)
    inversion_batch_size: int = setting(8, at_least=1)
    learning_rate: float = setting(1.35e-4, above=0, below=1)
    search_rate: float = setting(1.35e-4, above=0, below=1)
    inversion_rate: float = setting(0.5, above=0)
    images: int = setting(8, at_least=1)
    trajectories: int = setting(8, at_least=1)
    sample_steps: int = setting(25, at_least=1)
    trajectory_guidance: float = 3.0
    measure_every: int = setting(0, at_least=0)
    stop: Stop = "never"

    def __post_init__(self) -> None:
        """Check every setting, and that updates are left for the second stage; raises ErasureError."""
        super().__post_init__()
        if self.iterations <= self.searching:
            raise ErasureError(
                f"iterations={self.iterations}: {self.rounds} rounds of {self.search_iterations} + "
                f"{self.inversion_iterations} updates leave none for the second stage; give more than {self.searching}"
            )

    @property
    def searching(self) -> int:
        """Return the number of updates of the first stage."""
        return self.rounds * (self.search_iterations + self.inversion_iterations)

    def part(self, step: int) -> tuple[Part, int, int]:
        """Return the part of the run that an update belongs to, its round, and the number of the update in it."""
        if step >= self.searching:
            return "erase", self.rounds, step - self.searching
        turn, index = divmod(step, self.search_iterations + self.inversion_iterations)
        if index < self.search_iterations:
            return "search", turn, index
        return "invert", turn, index - self.search_iterations

    def rate(self, step: int) -> float:
        """Return the factor on the learning rate, so that each part of the run has its own."""
        rates = {"search": self.search_rate, "invert": self.inversion_rate, "erase": self.learning_rate}
        return rates[self.part(step)[0]] / self.learning_rate

    def restarts(self, step: int) -> bool:
        """Tell whether a part of the run begins with this update."""
        return self.part(step)[2] == 0

    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> State:
        """Build the pool, draw the pictures, and prepare the modules that train and the words.

        Raises:
            ErasureError: no anchor can be found, a prompt leaves no room for the word, or no module fits the variant.
        """
        named = [(i, pair) for i, own in enumerate(concepts) for pair in named_pairs(replace(own, anchor=None))]
        beside = [pair.prompt.rpartition(pair.name) for _, pair in named]
        places = word_slots(base.pipe, [(before, after) for before, _, after in beside], self.word_tokens)
        given = [anchor for concept in concepts if concept.anchor for _, anchor in concept.prompt_pairs()]
        free = [concept for concept in concepts if not concept.anchor]
        anchors = list(dict.fromkeys([*given, *(around(base, free)[: self.anchors] if free else [])]))
        if not anchors and self.anchor_weight:
            raise ErasureError("no word of the vocabulary can be an anchor; give one, or set anchor_weight=0")
        pairs = [(pair.prompt, pair.instead) for _, pair in named]
        options: dict[str, Any] = {"steps": self.sample_steps, "guidance": self.trajectory_guidance}
        count, path = max(self.trajectories, len(pairs)), run.path("pool.safetensors")
        pool = kept_pool(path, base, pairs, trajectories=count, seed=run.seed, **options)
        images = Images(torch.empty(0), torch.empty(0), [])
        if self.rounds:
            count, path = max(self.images, len(pairs)), run.path("images.safetensors")
            images = drawn(base, [prompt for prompt, _ in pairs], count, seed=run.seed, path=path, **options)
        for _, encoder in text_encoders(base.pipe):
            encoder.requires_grad_(False)  # gradients pass through it to the words
        table = token_table(base.pipe)
        words = torch.zeros(len(concepts), self.word_tokens, table.shape[1], device=table.device)
        adapter = AttackedWeights(base.network, base.targets(self.variant), words, base.component)
        owners = torch.tensor([owner for owner, _ in named])
        return State(base, pairs, owners, places, anchors, pool, images, adapter, run.seed, float(table.std()))

    def loss(self, state: State, step: int) -> Terms:
        """Return the objective of the part of the run that the update belongs to."""
        part, turn, index = self.part(step)
        if index == 0:
            self.begin(state, part, turn)
        state.adapter.train(words=part == "invert")
        if part == "invert":
            return {"invert": self.inverted(state, torch.Generator().manual_seed(state.seed * 1_000_003 + step))}
        batch, device = state.pool.batch(self.batch_size, step, state.seed), state.base.device
        x, t = batch.x.to(device), batch.t.to(device)
        if part == "search":
            prompts, target = self.searched(state, batch, x, t, turn)
        else:
            prompts, target = self.composed(state, batch, x, t, step)
        output = state.base.predict(x, t, prompts).float()
        return {
            "erase": self.forgotten_states(state.base, squared(output, target), output, batch, self.trajectory_guidance)
        }

    def begin(self, state: State, part: Part, turn: int) -> None:
        """Begin a part of the run: with a new word, or with the word that the round before has found."""
        adapter = state.adapter
        if part == "invert":
            table, draw = token_table(state.base.pipe), torch.Generator().manual_seed(state.seed * 100_003 + turn)
            chosen = torch.randint(len(table), adapter.words.shape[:2], generator=draw)
            adapter.words.data.copy_(table[chosen.to(table.device)] / state.unit)
            return
        if turn:
            state.found[turn - 1 :] = [state.unit * adapter.words.detach().clone()]
        if part == "erase":
            adapter.restart()
        adapter.mark()

    def inverted(self, state: State, draw: torch.Generator) -> Tensor:
        """Return the loss of the words: how badly the erased network denoises the concept's pictures with them."""
        base, conditions = state.base, state.worded(state.unit * state.adapter.words)

        def predict(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
            output = base.predict(x, t, conditions[index % len(state.pairs)]).float()  # pictures show prompts in turn
            return to_eps(base.scheduler, output, x, t)

        return inversion_loss(
            base.scheduler, state.images.mean.to(base.device), predict, self.inversion_batch_size, draw
        )

    @torch.no_grad()
    def searched(
        self, state: State, batch: TrajectoryPool, x: Tensor, t: Tensor, turn: int
    ) -> tuple[Conditions, Tensor]:
        """Return the prompts of a round of the search, and what the network should answer."""
        base, neutral, concept = state.base, batch.neutral.to(x.device), batch.concept.to(x.device)
        if not turn:
            return state.plain(batch.pair), away(neutral, concept, self.negative_guidance)
        words = state.worded(state.found[turn - 1])[batch.pair]
        empty = base.conditions([state.pairs[int(i)][1] for i in batch.pair])
        with state.adapter.earlier():
            both = base.predict(x.repeat(2, 1, 1, 1), t.repeat(2), Conditions.cat([empty, words])).float()
        neutral, concept = both.chunk(2)
        return words, away(neutral, concept, self.negative_guidance)

    @torch.no_grad()
    def composed(
        self, state: State, batch: TrajectoryPool, x: Tensor, t: Tensor, step: int
    ) -> tuple[Conditions, Tensor]:
        """Return the prompts of the second stage, and the compositional target."""
        base, count = state.base, len(batch)
        neutral, concept = batch.neutral.to(x.device), batch.concept.to(x.device)
        words = [state.worded(vectors)[batch.pair] for vectors in state.found]
        asked = list(words)
        if self.anchor_weight:
            chosen = in_turn(len(state.anchors), count, step, state.seed + 1)
            asked.append(base.conditions([state.anchors[int(i)] for i in chosen]))
        answers: tuple[Tensor, ...] = ()
        if asked:
            with state.adapter.off():
                calls = (x.repeat(len(asked), 1, 1, 1), t.repeat(len(asked)), Conditions.cat(asked))
                answers = base.predict(*calls).float().chunk(len(asked))
        unlike = torch.stack([concept, *answers[: len(words)]]).mean(0)
        target = neutral - self.erase_weight * (unlike - neutral)
        if self.anchor_weight:
            target = target + self.anchor_weight * (answers[-1] - neutral)
        which = in_turn(1 + len(words), count, step, state.seed + 2)
        rows = which * count + torch.arange(count)
        return Conditions.cat([state.plain(batch.pair), *words])[rows.to(x.device)], target

    def snapshot(self, state: State) -> dict[str, Tensor]:
        """Return the words found so far, and the weights that the present round began with."""
        found = {f"found.{i}": vectors for i, vectors in enumerate(state.found)}
        return found | {f"earlier.{name}": value for name, value in state.adapter.marked().items()}

    def restore(self, state: State, tensors: dict[str, Tensor]) -> None:
        """Restore the words found so far, and the weights that the present round began with."""
        device = state.adapter.words.device
        count = sum(name.startswith("found.") for name in tensors)
        state.found = [tensors[f"found.{i}"].to(device) for i in range(count)]
        earlier = {name.removeprefix("earlier."): value for name, value in tensors.items() if "earlier." in name}
        state.adapter.restore_marked(earlier)


@dataclass
class State:
    """The state of a run of STEREO.

    Args:
        base: the checkpoint.
        pairs: (prompt of the concept, neutral prompt).
        owners: the concept of each pair, whose word stands in the name's place [pairs].
        places: slots of the word in each prompt, for each text encoder.
        anchors: prompts to lead to.
        pool: base states of the prompts.
        images: the base's pictures of the prompts, in turn.
        adapter: the weights and the words that train.
        seed: of the run.
        unit: of the words: the standard deviation of the token embeddings.
        found: vectors of the words of each round [concepts, tokens, width].
    """

    base: Base
    pairs: list[tuple[str, str]]
    owners: Tensor
    places: list[Slots]
    anchors: list[str]
    pool: TrajectoryPool
    images: Images
    adapter: AttackedWeights
    seed: int
    unit: float
    found: list[Tensor] = field(default_factory=list)

    def plain(self, pair: Tensor) -> Conditions:
        """Return the conditions of the concept's prompts of samples, by the index of their pair [n]."""
        return self.base.conditions([self.pairs[int(i)][0] for i in pair])

    def worded(self, vectors: Tensor) -> Conditions:
        """Return the conditions of all prompts with words in the place of the names; gradients flow to the vectors."""
        return encode_word(self.base.pipe, self.places, vectors[self.owners])
