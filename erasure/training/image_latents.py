"""Images that a method learns from, as latents: drawn by the base itself and kept, or read from the user's folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import naming
from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.diffusion import guide, wide

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass
class Images:
    """Latents of n images, each with the prompt that it shows.

    Args:
        mean: of the autoencoder's posterior, scaled as the UNet takes it, [n, c, h, w].
        std: of it; 0 for latents that the base has drawn.
        prompts: n texts.
    """

    mean: Tensor
    std: Tensor
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def sample(self, index: Tensor, draw: torch.Generator) -> Tensor:
        """Latents of the images `index` [b], drawn anew from their posteriors."""
        return self.mean[index] + self.std[index] * torch.randn(self.mean[index].shape, generator=draw)


@torch.no_grad()
def drawn(
    base: Base,
    prompts: list[str],
    count: int,
    *,
    seed: int,
    steps: int,
    guidance: float,
    batch: int = 16,
    path: Path | None = None,
) -> Images:
    """`count` images by the base, dealt over the prompts in turn; from `path` where an earlier run has left them.

    Costs 2 F a step and image. Latents stay latents: no autoencoder is in the way.
    """
    texts = [prompts[i % len(prompts)] for i in range(count)]
    if path is not None and path.is_file():
        mean = load_file(path)["mean"]
        return Images(mean, torch.zeros_like(mean), texts)
    schedule = base.sampler("ddim")
    parts = []
    for start in range(0, count, batch):
        part = texts[start : start + batch]
        schedule.set_timesteps(steps, device=base.device)
        noise = [torch.Generator().manual_seed(seed * 20_011 + start + i) for i in range(len(part))]
        x = torch.stack([torch.randn(base.latent_shape(), generator=one) for one in noise])
        x = x.to(base.device, base.unet.dtype) * schedule.init_noise_sigma
        asked = base.conditions([""] * len(part) + part)
        for t in schedule.timesteps:
            empty, named = base.predict(schedule.scale_model_input(x, t).repeat(2, 1, 1, 1), t, asked).chunk(2)
            x = schedule.step(guide(empty, named, guidance), t, x).prev_sample
        parts.append(x.float().cpu())
    mean = torch.cat(parts)
    if path is not None:
        save_file({"mean": mean}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    return Images(mean, torch.zeros_like(mean), texts)


@torch.no_grad()
def read_folder(base: Base, folder: str | os.PathLike[str], prompt: str = "") -> Images:
    """The user's images; those in a subfolder show what it is called, the others `prompt`. The middle square is taken.

    Raises:
        ErasureError: no folder, no images in it, an image that cannot be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    top = Path(folder)
    if not top.is_dir():
        raise ErasureError(f"{top}: no folder of images")
    paths = sorted(path for path in top.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ErasureError(f"{top}: holds no images; {', '.join(SUFFIXES)} are read")
    vae = base.pipe.vae
    _, height, width = base.latent_shape()
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    mean, std, prompts = [], [], []
    for path in paths:
        try:
            with Image.open(path) as file:
                image = ImageOps.fit(file.convert("RGB"), (width * factor, height * factor))
        except (OSError, UnidentifiedImageError) as fault:
            raise ErasureError(f"{path}: cannot be read as an image: {fault}") from None
        raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = raw.view(1, image.height, image.width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
        with wide(vae):
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        mean.append(posterior.mean.float().cpu() * vae.config.scaling_factor)
        std.append(posterior.std.float().cpu() * vae.config.scaling_factor)
        inside = path.parent.relative_to(top).parts
        prompts.append(inside[-1] if inside else prompt)
    return Images(torch.cat(mean), torch.cat(std), prompts)


def shown(images: Images, concepts: list[Concept]) -> tuple[Images, dict[str, str]]:
    """The images of a folder with the concepts' prompts, and what each prompt is relabelled to.

    An image lies in a subfolder that names its concept, alone or in a longer prompt; of one concept it may lie
    anywhere. Images without a prompt of their own are dealt over the concept's names.

    Raises:
        ErasureError: an image of no concept, a concept without an image.
    """
    texts: list[str] = []
    pseudo: dict[str, str] = {}
    seen = dict.fromkeys((one.name for one in concepts), 0)
    wanted = f"give each concept a subfolder of its name: {', '.join(seen)}"
    for prompt in images.prompts:
        names = {one: [name.lower() for name in one.names] for one in concepts}
        owner = next((one for one in concepts if naming(prompt, names[one])), None)
        if owner is None and len(concepts) > 1:
            raise ErasureError(f"an image of {prompt or 'nothing'!r} among those to forget: {wanted}")
        owner = owner or concepts[0]
        pairs = dict(owner.prompt_pairs())
        bare = list(pairs)[: len(owner.names)]
        text = bare[seen[owner.name] % len(bare)] if prompt.lower() in ("", *names[owner]) else prompt
        seen[owner.name] += 1
        texts.append(text)
        pseudo[text] = pairs.get(text, pairs[bare[0]])
    if missing := [name for name, count in seen.items() if not count]:
        raise ErasureError(f"no image of {', '.join(missing)} among those to forget: {wanted}")
    return replace(images, prompts=texts), pseudo
