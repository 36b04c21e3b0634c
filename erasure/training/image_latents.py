"""Images that a method learns from, as latents: drawn by the base itself, or read from a folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import naming
from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.diffusion import count_metadata, count_stored, counting, wide

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass
class Images:
    """The latents of n images, each with the prompt that it shows.

    Args:
        mean: mean of the autoencoder's posterior, in the network's scale, [n, c, h, w].
        std: its standard deviation; 0 for latents that the base has drawn.
        prompts: n texts.
    """

    mean: Tensor
    std: Tensor
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def sample(self, index: Tensor, draw: torch.Generator) -> Tensor:
        """Draw latents of the images `index` [b] from their posteriors."""
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
    """Draw images with the base, as latents: no autoencoder is needed. Costs 2F per step and image.

    Args:
        base: the checkpoint.
        prompts: distributed over the images in turn.
        count: number of images.
        seed: seed of the noise.
        steps: sampling steps.
        guidance: guidance scale.
        batch: images per call.
        path: a file that the latents are read from if it exists, and else written to; None: neither.
    """
    texts = [prompts[i % len(prompts)] for i in range(count)]
    if path is not None and path.is_file():
        count_stored(base.network, path)
        mean = load_file(path)["mean"]
        return Images(mean, torch.zeros_like(mean), texts)
    parts = []
    with counting(base.network) as spent:
        for start in range(0, count, batch):
            part = texts[start : start + batch]
            schedule = base.schedule(None, steps, base.latent_shape())
            noise = [torch.Generator().manual_seed(seed * 20_011 + start + i) for i in range(len(part))]
            x = torch.stack([torch.randn(base.latent_shape(), generator=generator) for generator in noise])
            x = x.to(base.device, base.network.dtype) * schedule.init_noise_sigma
            conditions = base.conditions([""] * len(part) + part)
            for t in schedule.timesteps:
                empty, named = base.predict(schedule.scale_model_input(x, t).repeat(2, 1, 1, 1), t, conditions).chunk(2)
                x = schedule.step(base.guided(empty, named, guidance), t, x).prev_sample
            parts.append(x.float().cpu())
    mean = torch.cat(parts)
    if path is not None:
        save_file({"mean": mean}, path.with_suffix(".tmp"), count_metadata(spent))
        os.replace(path.with_suffix(".tmp"), path)
    return Images(mean, torch.zeros_like(mean), texts)


@torch.no_grad()
def decoded(base: Base, images: Images, batch: int = 16) -> Tensor:
    """Return images as pixels [n, 3, h, w] in [-1, 1], in fp32 on the CPU, from the means of their latents."""
    vae = base.pipe.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    parts = []
    with wide(vae):
        for latents in images.mean.split(batch):
            z = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + shift
            parts.append(vae.decode(z).sample.float().clamp(-1, 1).cpu())
    return torch.cat(parts)


@torch.no_grad()
def read_folder(base: Base, folder: str | os.PathLike[str], prompt: str = "") -> Images:
    """Read the images of a folder, cropped to the centre, as latents.

    Images in a subfolder show what the subfolder is named after, the others `prompt`.

    Raises:
        ErasureError: there is no such folder, it holds no images, or one of them cannot be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    top = Path(folder)
    if not top.is_dir():
        raise ErasureError(f"{top} is not a folder: give a folder of images")
    paths = sorted(path for path in top.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ErasureError(f"{top} holds no images; the types {', '.join(SUFFIXES)} are read")
    vae = base.pipe.vae
    _, height, width = base.latent_shape()
    factor = base.pipe.vae_scale_factor
    shift = getattr(vae.config, "shift_factor", None) or 0.0  # autoencoders of rectified flow have one
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
            encoded = vae.encode(pixels.to(vae.device, vae.dtype))
        posterior = getattr(encoded, "latent_dist", None)
        latents = encoded.latent if posterior is None else posterior.mean  # SANA's autoencoder returns no posterior
        mean.append((latents.float().cpu() - shift) * vae.config.scaling_factor)
        spread = torch.zeros_like(latents) if posterior is None else posterior.std
        std.append(spread.float().cpu() * vae.config.scaling_factor)
        folders = path.parent.relative_to(top).parts
        prompts.append(folders[-1] if folders else prompt)
    return Images(torch.cat(mean), torch.cat(std), prompts)


def shown(
    images: Images,
    concepts: list[Concept],
    pairs_of: Callable[[Concept], list[tuple[str, str]]] = Concept.prompt_pairs,
) -> tuple[Images, dict[str, str]]:
    """Return the images of a folder with the concepts' prompts, and the prompt that each is relabelled to.

    The subfolder of an image names its concept, alone or in a longer prompt; for one concept no subfolder is needed.
    Images without a prompt of their own are distributed over the concept's names.

    Args:
        images: the images, with the prompts of `read_folder`.
        concepts: what they may show.
        pairs_of: returns the pairs (prompt, prompt that it is relabelled to) of a concept, those of its names first.

    Raises:
        ErasureError: an image belongs to none of the concepts, or a concept has no image.
    """
    texts: list[str] = []
    pseudo: dict[str, str] = {}
    counts = dict.fromkeys((concept.name for concept in concepts), 0)
    advice = f"give each concept a subfolder with its name: {', '.join(counts)}"
    for prompt in images.prompts:
        names = {concept: [name.lower() for name in concept.names] for concept in concepts}
        owner = next((concept for concept in concepts if naming(prompt, names[concept])), None)
        if owner is None and len(concepts) > 1:
            label = f"of {prompt!r}" if prompt else "outside any subfolder"
            raise ErasureError(f"the images to forget include one {label}: {advice}")
        owner = owner or concepts[0]
        pairs = dict(pairs_of(owner))
        bare = list(pairs)[: len(owner.names)]
        text = bare[counts[owner.name] % len(bare)] if prompt.lower() in ("", *names[owner]) else prompt
        counts[owner.name] += 1
        texts.append(text)
        pseudo[text] = pairs.get(text, pairs[bare[0]])
    if missing := [name for name, count in counts.items() if not count]:
        raise ErasureError(f"the images to forget include no image of {', '.join(missing)}: {advice}")
    return replace(images, prompts=texts), pseudo
