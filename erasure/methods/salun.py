"""SalUn: saliency unlearning (Fan et al. 2024, arXiv 2310.12508).

Trains only the weights that matter most for the concept. Their saliency is the absolute value of the gradient of the
guided prediction's error, summed over the forget images (eq. 4; the published code guides it with g = 7.5):

    S = | sum_i grad || eps - [(1 + g) e(z_t, c) - g e(z_t, "")] ||^2 |

The mask takes a share of all weights, the largest in one ranking. They learn (eq. 6) to answer the concept's prompt c
like another one, c', and to predict the retain images as before:

    L = || e(z_t, c) - sg[e(z_t, c')] ||^2 + alpha || eps - e(z_t^r, r) ||^2

For v-prediction the first term compares raw outputs, the others the noise that the outputs stand for. For rectified
flow (SD3, FLUX) all of them compare velocities (`model/noising.py`).

Cost: 2F per step for every image that the base draws, 2F + 2B per forget image for the mask, and 24F + 16B per update
of 8 + 8 images, as published.

Deviations, undone by `parity=True`: c' is the nearest other word (published: the next class of the list); prompts are
bare words (published: "an image of a cat"; for nudity "a photo of a nude person" and "a photo of a person wearing
clothes", which is also what is retained); student and target see the same latent (published: two draws of the
autoencoder's posterior, which differ for the images of a folder); fewer images and updates at a higher learning rate,
images drawn at random (published: epochs); shorter, less guided sampling. Not undone: published class-wise runs learn
from photographs, whereas here the base draws as many images unless a folder is given (for a folder of M images, 5
epochs are `iterations` = 5 M / 8); styles, for which no script is published, keep our prompts; and the published port
to UnlearnCanvas compares a name with tensors, so that its mask is never applied, which is `density=1`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import anchored, around, prompt_of, retain_prompts, retained, words
from erasure.concepts.similarity import tokens
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.method import GradientMethod
from erasure.model.base import Base
from erasure.model.diffusion import count_metadata, count_stored, counting, guide
from erasure.model.noising import draw_times, noised, predicted, truth
from erasure.model.trajectories import TrajectoryPool, build_pool, in_turn
from erasure.training.adapters import Weights
from erasure.training.image_latents import Images, drawn, read_folder, shown
from erasure.training.objective import Terms
from erasure.training.reweighting import squared
from erasure.training.run import Run
from erasure.training.saliency import read_mask, top, write_mask
from erasure.training.stopping import Stop

NUDITY = ("a photo of a nude person", "a photo of a person wearing clothes")
EVERYTHING = "all"  # the variant that also trains norms and biases, as published


@dataclass(frozen=True)
class SalUn(GradientMethod):
    """The settings of SalUn, with the values tuned on glyph as defaults.

    Defaults that are not the published values (random_label.py as its README calls it):

    - forget_count, retain_count: published about 960 photographs of the class and 8,500 of the others; ours 24 and 48
      pictures that the base draws, because drawing costs more than training.
    - iterations, learning_rate: published 605 (5 epochs) at 1e-5; ours 100 at 5e-5. iterations x rate is 0.006 and
      0.005.
    - sample_steps, sample_guidance: published for nudity 50 and 7.5; ours 15 and 3, glyph's own guidance.

    Args:
        variant: what may train: all (every parameter), or a variant of the other methods; see
            `erasure list models MODEL`.
        density: share of the weights that trains; 1 trains all, without a mask.
        mask: a mask file to use instead of computing a mask.
        save_mask: where to write the mask.
        mask_guidance: g, the guidance scale of the saliency.
        retain_weight: alpha, the weight of the retain term.
        target: the network that answers c': current (with a stopped gradient, as published) or base.
        forget_images: a folder of images of the concept; None: the base draws them. For several concepts, give each a
            subfolder with its name.
        retain_images: a folder of images of everything else, in subfolders named after what they show.
        forget_count: number of images of the concept to draw.
        retain_count: number of images of everything else to draw, up to half of them of the nearest words.
        sample_steps: sampling steps of drawn images.
        sample_guidance: guidance scale of drawn images.
        iterations: number of updates.
        batch_size: forget images per update, and as many retain images.
        learning_rate: Adam's learning rate.
        measure_every: updates between measurements of how much is erased and kept, on states held out of training
            (`training/curves.py`); the patch's header records them. 0 measures nothing.
        stop: `auto` ends the run when the concept is gone on those states and improves no longer, and goes back and
            lowers the learning rate when neighbours drift too far (`training/stopping.py`); `iterations` is then the
            largest number of updates.
        parity: reproduce the official script, with its defaults and its quirks.
    """

    method: ClassVar[str] = "salun"
    NETWORKS: ClassVar[tuple[str, ...]] = ("unet", "sd3", "flux", "pixart", "sana")
    FORGET: ClassVar[str] = "relabel"
    RETAIN: ClassVar[tuple[str, ...]] = ("retain",)
    PER_CONCEPT: ClassVar[tuple[str, ...]] = ("iterations", "forget_count")
    PARITY: ClassVar[dict[str, Any]] = {
        "iterations": 605,  # 5 epochs of 121 batches
        "forget_count": 968,  # an Imagenette class has 858 to 993 photographs
        "retain_count": 968,
        "learning_rate": 1e-5,
        "sample_steps": 50,
        "sample_guidance": 7.5,
    }
    PARITY_KINDS: ClassVar[dict[str, dict[str, Any]]] = {
        "content": {"iterations": 100, "forget_count": 800, "retain_count": 800, "retain_weight": 0.1}
    }

    variant: str = EVERYTHING
    density: float = setting(0.5, above=0, at_most=1)
    mask: str | None = None
    save_mask: str | None = None
    mask_guidance: float = 7.5
    retain_weight: float = setting(0.5, at_least=0)
    target: Literal["current", "base"] = "current"
    forget_images: str | None = None
    retain_images: str | None = None
    forget_count: int = setting(24, at_least=1)
    retain_count: int = setting(48, at_least=1)
    sample_steps: int = setting(15, at_least=1)
    sample_guidance: float = 3.0
    iterations: int = setting(100, at_least=1)
    batch_size: int = setting(8, at_least=1)
    learning_rate: float = setting(5e-5, above=0, below=1)
    measure_every: int = setting(0, at_least=0)
    stop: Stop = "never"
    parity: bool = False

    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> State:
        """Draw or read the images, choose the prompts that they are relabelled to, and compute the mask.

        Raises:
            ErasureError: a folder or mask that cannot be used, nothing to retain, or guidance of a distilled model.
        """
        base.check_guidance(self.sample_guidance)
        masks = read_mask(self.mask, base.network) if self.mask is not None else None
        relabelled = [self.relabelled(base, concept, concepts) for concept in concepts]
        texts = self.kept(base, concepts, run.seed) if self.retain_images is None else []
        options: dict[str, Any] = {"steps": self.sample_steps, "guidance": self.sample_guidance}
        if self.forget_images is not None:
            forget, pseudo = shown(read_folder(base, self.forget_images), relabelled, self.prompts)
        else:
            pseudo = dict(pair for concept in relabelled for pair in self.prompts(concept))
            count, path = max(self.forget_count, len(pseudo)), run.path("forget.safetensors")
            forget = drawn(base, list(pseudo), count, seed=2 * run.seed, path=path, **options)
        if self.retain_images is not None:
            retain = read_folder(base, self.retain_images)
        else:
            count, path = max(self.retain_count, len(texts)), run.path("retain.safetensors")
            retain = drawn(base, texts, count, seed=2 * run.seed + 1, path=path, **options)
        adapter = Weights(base.network, self.trained(base), base.component)
        state = State(base, forget, retain, pseudo, adapter, run.seed)
        try:
            if self.density < 1 or masks is not None:
                self._mask(state, run, masks)
        except BaseException:
            adapter.remove()
            raise
        return state

    def prompts(self, concept: Concept) -> list[tuple[str, str]]:
        """Return pairs (prompt of forget images, the one they are relabelled to), in parity mode in published words."""
        if not self.parity or concept.kind == "style":
            return concept.prompt_pairs()
        if concept.name.lower() == "nudity":
            return [NUDITY]
        return [(shows(name), shows(concept.anchor or "")) for name in concept.names]

    def relabelled(self, base: Base, concept: Concept, concepts: list[Concept]) -> Concept:
        """Return the concept with an anchor: its own, else the nearest word, or in parity mode the next of the list."""
        if concept.anchor is not None or not self.parity:
            return anchored(base, concept, concepts)
        listed = [
            word
            for kind, names in words(base).items()
            for word in names
            if (kind == "style") == (concept.kind == "style")
        ]
        start = listed.index(concept.name) + 1 if concept.name in listed else 0
        kept = {word for _, word in retained(base, concepts)}
        after = [word for word in listed[start:] + listed[:start] if word in kept]
        return (
            replace(concept, anchor=prompt_of(concept.kind, after[0])) if after else anchored(base, concept, concepts)
        )

    def kept(self, base: Base, concepts: list[Concept], seed: int) -> list[str]:
        """Return the prompts of the retain images: those to keep, the nearest words of each concept, and others.

        Raises:
            ErasureError: there is nothing to retain.
        """
        if not retained(base, concepts):
            raise ErasureError(
                "there is nothing to retain: every word of the vocabulary names the concept. Name words to keep with "
                "`keep` (--keep); nothing was changed"
            )
        if self.parity and (texts := published_retain(base, concepts)):
            return texts
        named = {prompt_of(concept.kind, word) for concept in concepts for word in concept.keep}  # kept in any case
        first = [text for text in around(base, concepts) if text not in named][: self.retain_count // 2]
        return retain_prompts(base, concepts, self.retain_count, first=first, seed=seed)

    def trained(self, base: Base) -> dict[str, nn.Module]:
        """Return the modules that may train, by path."""
        if self.variant != EVERYTHING:
            return base.targets(self.variant)
        modules = base.network.named_modules()
        # PixArt's network has a tensor of its own, which belongs to no layer.
        return {
            path: module
            for path, module in modules
            if path and next(module.parameters(recurse=False), None) is not None
        }

    def _mask(self, state: State, run: Run, masks: dict[str, Tensor] | None) -> None:
        """Let only masked weights train: those of `masks`, of an interrupted run, or with the largest saliency."""
        names, path = set(state.adapter.parameters()), run.path("mask.safetensors")
        if masks is not None:
            masks = {name: mask for name, mask in masks.items() if name in names}
            if not any(mask.any() for mask in masks.values()):
                raise ErasureError(
                    f"{self.mask} marks none of the weights that train (variant={self.variant}); nothing was changed"
                )
        elif path is not None and path.is_file():
            masks = read_mask(path, state.base.network)
            count_stored(state.base.network, path)
        else:
            with counting(state.base.network) as spent:
                masks = top(self.saliency(state), self.density)
            if path is not None:
                write_mask(masks, path, metadata=count_metadata(spent))
        if self.save_mask is not None and run.group.main:
            write_mask(masks, self.save_mask)
        state.adapter.mask(masks)

    def saliency(self, state: State) -> dict[str, Tensor]:
        """Return |sum of gradients| of every trained tensor, from one pass over the forget images."""
        base, params = state.base, state.adapter.parameters()
        draw = torch.Generator().manual_seed(state.seed * 30_011)
        for start in range(0, len(state.forget), self.batch_size):
            index = torch.arange(start, min(start + self.batch_size, len(state.forget)))
            z = state.forget.sample(index, draw).to(base.device)
            x, t, eps = self.noised(base, z, draw)
            conditions = base.conditions([""] * len(index) + [state.forget.prompts[int(i)] for i in index])
            empty, named = base.predict(x.repeat(2, 1, 1, 1), t.repeat(2), conditions).float().chunk(2)
            guided = predicted(base, guide(empty, named, 1 + self.mask_guidance), x, t)
            F.mse_loss(guided, truth(base, z, eps)).backward()
        scores = {}
        for name, param in params.items():
            scores[name] = torch.zeros_like(param) if param.grad is None else param.grad.abs()
            param.grad = None
        return scores

    def noised(self, base: Base, z: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_t, t (uniform) and eps for latents z [n, c, h, w]."""
        t = draw_times(base, len(z), draw)
        eps = torch.randn(z.shape, generator=draw).to(base.device)
        return noised(base, z.to(base.device), eps, t), t, eps

    def chosen(self, state: State, step: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the indices of the forget and the retain images of a step; in parity mode, they come in epochs."""
        sizes = len(state.forget), len(state.retain)
        if not self.parity:
            forget, retain = (torch.randint(size, (self.batch_size,), generator=draw) for size in sizes)
            return forget, retain
        # The published loader of forget images does not shuffle, that of retain images does.
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        return positions % sizes[0], in_turn(sizes[1], self.batch_size, step, state.seed)

    def held_out(self, state: State, **options: Any) -> tuple[TrajectoryPool, list[str]]:
        """Return states to measure on; their target is the prediction for c'."""
        pairs = list(state.pseudo.items())
        return build_pool(state.base, pairs, **options), [prompt for prompt, _ in pairs]

    def loss(self, state: State, step: int) -> Terms:
        """Return the relabelling and the retain term on one batch."""
        base, draw = state.base, torch.Generator().manual_seed(state.seed * 1_000_003 + step)
        forget, retain = self.chosen(state, step, draw)
        z = state.forget.sample(forget, draw).to(base.device)
        x, t, eps = self.noised(base, z, draw)
        z_r = state.retain.sample(retain, draw).to(base.device)
        x_r, t_r, eps_r = self.noised(base, z_r, draw)
        seen = x
        if self.parity:  # the published target encodes the image again: another draw of its posterior
            seen = noised(base, state.forget.sample(forget, draw).to(base.device), eps, t)
        named = [state.forget.prompts[int(i)] for i in forget]
        kept = [state.retain.prompts[int(i)] for i in retain]
        pseudo = base.conditions([state.pseudo[text] for text in named])
        with torch.no_grad():
            if self.target == "base":
                with state.adapter.off():
                    target = base.predict(seen, t, pseudo).float()
            else:
                target = base.predict(seen, t, pseudo).float()
        outputs = base.predict(torch.cat([x, x_r]), torch.cat([t, t_r]), base.conditions(named + kept)).float()
        output, output_r = outputs.chunk(2)

        def before() -> Tensor:
            with state.adapter.off():
                return predicted(base, base.predict(x, t, base.conditions(named)).float(), x, t)

        now = predicted(base, output, x, t)
        return {
            "relabel": self.forgotten(squared(output, target), t, now=now, truth=truth(base, z, eps), before=before),
            "retain": self.retain_weight * F.mse_loss(predicted(base, output_r, x_r, t_r), truth(base, z_r, eps_r)),
        }


def shows(text: str) -> str:
    """Return the published prompt of images of a class: "an image of a cat" for "cat"."""
    return f"an image of {text}" if text.startswith(("a ", "an ", "the ")) else f"an image of a {text}"


def published_retain(base: Base, concepts: list[Concept]) -> list[str]:
    """Return the published retain prompts: of all other words, or for nudity of clothed people; none for styles."""
    if any(concept.kind == "style" for concept in concepts):
        return []
    if all(concept.name.lower() == "nudity" for concept in concepts):
        return [NUDITY[1]]
    texts = [shows(word) for kind, word in retained(base, concepts) if kind != "style"]
    return [text for text in texts if tokens(base, text) <= base.pipe.tokenizer.model_max_length]


@dataclass
class State:
    """The state of a run of SalUn.

    Args:
        base: the checkpoint.
        forget: images of the concepts.
        retain: images of everything else.
        pseudo: the prompt that each forget prompt is relabelled to.
        adapter: what trains.
        seed: of the run.
    """

    base: Base
    forget: Images
    retain: Images
    pseudo: dict[str, str]
    adapter: Weights
    seed: int
