"""SalUn: saliency unlearning (Fan et al. 2024, arXiv 2310.12508).

Only the weights that matter most for the concept train. Their saliency is the absolute sum, over the forget images,
of the gradient of the guided prediction's error (eq. 4; the published code guides it with g = 7.5)

    S = | sum_i grad || eps - [(1 + g) e(z_t, c) - g e(z_t, "")] ||^2 |

and the mask takes the largest share of all weights in one ranking. They learn (eq. 6) to answer the concept's
prompt c as another one, c', and to draw the retain images as before:

    L = || e(z_t, c) - sg[e(z_t, c')] ||^2 + alpha || eps - e(z_t^r, r) ||^2

For v-prediction the first term is taken of the raw outputs, the others of the noise that they stand for.

Cost: 2 F a step for every image that the base draws, 2F + 2B a forget image for the mask, 24F + 16B an update of
8 + 8 images, as published.

Deviations, undone by `parity=True`: c' is the nearest other word (published: the next class of the list); student
and target see the same latent (published: two draws of the autoencoder's posterior, which differ for the images of a
folder); fewer updates at a higher rate; shorter, less guided sampling. Not undone: published class-wise runs learn
from photographs, here the base draws the images unless a folder is given; and the published port to UnlearnCanvas
compares a name with tensors, so that its mask is never applied: `density=1` is that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import anchored, around, prompt_of, retain_prompts, retained, words
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.method import GradientMethod
from erasure.model.base import Base
from erasure.model.diffusion import add_noise, guide, to_eps
from erasure.training.adapters import Weights
from erasure.training.image_latents import Images, drawn, read_folder, shown
from erasure.training.run import Run
from erasure.training.saliency import read_mask, top, write_mask

EVERYTHING = "all"  # norms and biases too, as published


@dataclass(frozen=True)
class SalUn(GradientMethod):
    """Settings of SalUn.

    Args:
        variant: what may train: all (every parameter), or a variant of the other methods (x, full, ...).
        density: share of the weights that trains; 1 is no mask.
        mask: a mask file to use instead of computing one.
        save_mask: where to write the mask.
        mask_guidance: g of the saliency.
        retain_weight: alpha.
        target: the network that answers c': current (with a stopped gradient, as published) or base.
        forget_images: a folder of images of the concept; None: the base draws them. Of several concepts, each has
            its subfolder, named by it.
        retain_images: a folder of images of everything else; subfolders are named by what they show.
        forget_count: images of the concept to draw.
        retain_count: images of everything else to draw: up to half of them of the nearest words.
        sample_steps: of drawn images.
        sample_guidance: of drawn images.
        iterations: updates.
        batch_size: forget images an update, and as many retain images.
        learning_rate: of Adam.
        parity: reproduce the official script: its defaults and its quirks.
    """

    method: ClassVar[str] = "salun"
    PARITY: ClassVar[dict[str, Any]] = {
        "iterations": 605,
        "learning_rate": 1e-5,
        "retain_weight": 0.1,
        "sample_steps": 50,
        "sample_guidance": 7.5,
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
    parity: bool = False

    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> State:
        """Images, the prompts that they are relabelled to, the mask."""
        given = read_mask(self.mask, base.unet) if self.mask is not None else None
        led = [self.relabelled(base, one, concepts) for one in concepts]
        texts = self.kept(base, concepts, run.seed) if self.retain_images is None else []
        options: dict[str, Any] = {"steps": self.sample_steps, "guidance": self.sample_guidance}
        if self.forget_images is not None:
            forget, pseudo = shown(read_folder(base, self.forget_images), led)
        else:
            pseudo = dict(pair for one in led for pair in one.prompt_pairs())
            count, path = max(self.forget_count, len(pseudo)), run.path("forget.safetensors")
            forget = drawn(base, list(pseudo), count, seed=2 * run.seed, path=path, **options)
        if self.retain_images is not None:
            retain = read_folder(base, self.retain_images)
        else:
            count, path = max(self.retain_count, len(texts)), run.path("retain.safetensors")
            retain = drawn(base, texts, count, seed=2 * run.seed + 1, path=path, **options)
        adapter = Weights(base.unet, self.trained(base))
        state = State(base, forget, retain, pseudo, adapter, run.seed)
        try:
            if self.density < 1 or given is not None:
                self._masked(state, run, given)
        except BaseException:
            adapter.remove()
            raise
        return state

    def relabelled(self, base: Base, concept: Concept, concepts: list[Concept]) -> Concept:
        """The concept with what its prompts are to show: its anchor, else the nearest word; as published, the next."""
        if concept.anchor is not None or not self.parity:
            return anchored(base, concept, concepts)
        listed = [
            word
            for kind, several in words(base).items()
            for word in several
            if (kind == "style") == (concept.kind == "style")
        ]
        at = listed.index(concept.name) + 1 if concept.name in listed else 0
        left = {word for _, word in retained(base, concepts)}
        after = [word for word in listed[at:] + listed[:at] if word in left]
        return (
            replace(concept, anchor=prompt_of(concept.kind, after[0])) if after else anchored(base, concept, concepts)
        )

    def kept(self, base: Base, concepts: list[Concept], seed: int) -> list[str]:
        """Prompts of the retain images: what is to be kept, the nearest words of each concept, others.

        Raises:
            ErasureError: there is nothing to retain.
        """
        if not retained(base, concepts):
            raise ErasureError("no retain images: every word of the vocabulary is the concept; name others with keep")
        named = {prompt_of(one.kind, word) for one in concepts for word in one.keep}  # they stay in any case
        first = [text for text in around(base, concepts) if text not in named][: self.retain_count // 2]
        return retain_prompts(base, concepts, self.retain_count, first=first, seed=seed)

    def trained(self, base: Base) -> dict[str, nn.Module]:
        """The modules that may train, by path."""
        if self.variant != EVERYTHING:
            return base.targets(self.variant)
        modules = base.unet.named_modules()
        return {path: one for path, one in modules if next(one.parameters(recurse=False), None) is not None}

    def _masked(self, state: State, run: Run, given: dict[str, Tensor] | None) -> None:
        names, path = set(state.adapter.parameters()), run.path("mask.safetensors")
        if given is not None:
            masks = {name: mask for name, mask in given.items() if name in names}
            if not any(mask.any() for mask in masks.values()):
                raise ErasureError(f"{self.mask}: marks none of the weights that train (variant={self.variant})")
        elif path is not None and path.is_file():
            masks = read_mask(path, state.base.unet)
        else:
            masks = top(self.saliency(state), self.density)
            if path is not None:
                write_mask(masks, path)
        if self.save_mask is not None and run.group.main:
            write_mask(masks, self.save_mask)
        state.adapter.mask(masks)

    def saliency(self, state: State) -> dict[str, Tensor]:
        """|sum of gradients| of every trained tensor, one pass over the forget images."""
        base, params = state.base, state.adapter.parameters()
        draw = torch.Generator().manual_seed(state.seed * 30_011)
        for start in range(0, len(state.forget), self.batch_size):
            index = torch.arange(start, min(start + self.batch_size, len(state.forget)))
            x, t, eps = self.noised(base, state.forget.sample(index, draw), draw)
            asked = base.conditions([""] * len(index) + [state.forget.prompts[int(i)] for i in index])
            empty, named = base.predict(x.repeat(2, 1, 1, 1), t.repeat(2), asked).float().chunk(2)
            made = to_eps(base.scheduler, guide(empty, named, 1 + self.mask_guidance), x, t)
            F.mse_loss(made, eps).backward()
        found = {}
        for name, param in params.items():
            found[name] = torch.zeros_like(param) if param.grad is None else param.grad.abs()
            param.grad = None
        return found

    def noised(self, base: Base, z: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, t and eps for latents z [n, c, h, w], t uniform."""
        t = torch.randint(base.scheduler.config.num_train_timesteps, (len(z),), generator=draw).to(base.device)
        eps, z = torch.randn(z.shape, generator=draw).to(base.device), z.to(base.device)
        return add_noise(base.scheduler, z, eps, t), t, eps

    def loss(self, state: State, step: int) -> dict[str, Tensor]:
        """Relabelling and retaining on one batch."""
        base, draw = state.base, torch.Generator().manual_seed(state.seed * 1_000_003 + step)
        forget = torch.randint(len(state.forget), (self.batch_size,), generator=draw)
        retain = torch.randint(len(state.retain), (self.batch_size,), generator=draw)
        x, t, eps = self.noised(base, state.forget.sample(forget, draw), draw)
        x_r, t_r, eps_r = self.noised(base, state.retain.sample(retain, draw), draw)
        seen = x
        if self.parity:  # the published target encodes the image once more: another draw of its posterior
            seen = add_noise(base.scheduler, state.forget.sample(forget, draw).to(base.device), eps, t)
        named = [state.forget.prompts[int(i)] for i in forget]
        kept = [state.retain.prompts[int(i)] for i in retain]
        pseudo = base.conditions([state.pseudo[text] for text in named])
        with torch.no_grad():
            if self.target == "base":
                with state.adapter.off():
                    wanted = base.predict(seen, t, pseudo).float()
            else:
                wanted = base.predict(seen, t, pseudo).float()
        out = base.predict(torch.cat([x, x_r]), torch.cat([t, t_r]), base.conditions(named + kept)).float()
        made, held = out.chunk(2)
        return {
            "relabel": F.mse_loss(made, wanted),
            "retain": self.retain_weight * F.mse_loss(to_eps(base.scheduler, held, x_r, t_r), eps_r),
        }


@dataclass
class State:
    """What a run of SalUn holds; `pseudo` maps a forget prompt to the one it is relabelled to."""

    base: Base
    forget: Images
    retain: Images
    pseudo: dict[str, str]
    adapter: Weights
    seed: int
