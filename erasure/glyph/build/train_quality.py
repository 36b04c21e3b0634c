"""Train the judge of picture quality: `python -m erasure.glyph.build.train_quality`.

It tells well-formed pictures of something (renders of any icon, their reconstructions, the checkpoint's own pictures)
from broken ones: noise, flat colours, blurs, shuffled tiles, blends, decoded noise, predictions that were stopped
early, and pictures of the checkpoint with damaged weights. It never sees a picture of an erased model.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from erasure.glyph import CHECKPOINT, JUDGES
from erasure.glyph.build.captions import caption
from erasure.glyph.build.data import distractors, pixels, renders
from erasure.glyph.build.loop import write
from erasure.glyph.build.train_classifier import shuffle_tiles
from erasure.glyph.vision import Quality

STEPS, GUIDANCE, BATCH = 12, 3.0, 32
DAMAGE = (0.06, 0.1, 0.15, 0.2)  # noise on every weight of the UNet, in standard deviations of the weight
EARLY = (2, 3, 5)  # steps after which sampling is stopped


@contextmanager
def damaged(unet: torch.nn.Module, size: float, seed: int) -> Iterator[None]:
    """Add noise to every matrix of the UNet for the time of the context."""
    draw = torch.Generator().manual_seed(seed)
    kept = {name: value.detach().clone() for name, value in unet.named_parameters() if value.dim() > 1}
    with torch.no_grad():
        for name, value in unet.named_parameters():
            if name in kept:
                value.add_(torch.randn(value.shape, generator=draw) * value.std() * size)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in unet.named_parameters():
                if name in kept:
                    value.copy_(kept[name])


def drawn(pipe: Any, texts: list[str], seed: int, stop: int | None = None) -> Tensor:
    """Draw prompts [n, 3, 64, 64] in [-1, 1]; with `stop`, decode the latents after so many steps."""
    latents: list[Tensor] = []

    def keep(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step + 1 == stop:
            latents.append(tensors["latents"].clone())
        return tensors

    parts = []
    for at in range(0, len(texts), BATCH):
        part = texts[at : at + BATCH]
        draws = [torch.Generator().manual_seed(seed + at + i) for i in range(len(part))]
        latents.clear()
        final = pipe(
            part,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=draws,
            output_type="latent",
            callback_on_step_end=keep,
        ).images
        parts.append(decode(pipe.vae, latents[0] if stop else final))
    return torch.cat(parts)


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Decode scaled latents to pictures in [-1, 1]."""
    parts = [vae.decode(part / vae.config.scaling_factor).sample for part in latents.split(BATCH)]
    return torch.cat(parts).clamp(-1, 1)


@torch.no_grad()
def reconstructed(vae: Any, x: Tensor) -> Tensor:
    """Send pictures through the autoencoder."""
    return torch.cat([vae.decode(vae.encode(part).latent_dist.sample()).sample for part in x.split(BATCH)]).clamp(-1, 1)


def simple_damage(x: Tensor, draw: torch.Generator) -> Tensor:
    """Break pictures [n, 3, 64, 64] in ways that need no network: tiles, blends, blurs, noise, flat colours."""
    parts = list(x.chunk(8))
    parts[0] = shuffle_tiles(parts[0], draw)
    parts[1] = shuffle_tiles(parts[1], draw, side=8)
    parts[2] = 0.5 * parts[2] + 0.5 * parts[2].roll(1, 0).flip(-1)
    parts[3] = F.interpolate(F.avg_pool2d(parts[3], 16), size=64, mode="bilinear")
    parts[4] = F.interpolate(F.avg_pool2d(parts[4], 8), size=64, mode="bicubic").clamp(-1, 1)
    parts[5] = torch.randn(parts[5].shape, generator=draw).mul(0.7).clamp(-1, 1)
    coarse = torch.randn(len(parts[6]), 3, 8, 8, generator=draw) * 0.6
    fine = torch.randn(parts[6].shape, generator=draw) * 0.2
    parts[6] = (F.interpolate(coarse, size=64, mode="bilinear") + fine).clamp(-1, 1)
    flat = torch.rand(len(parts[7]), 3, 1, 1, generator=draw) * 2 - 1
    parts[7] = (flat + torch.randn(parts[7].shape, generator=draw) * 0.02).clamp(-1, 1)
    return torch.cat(parts)


def examples(count: int, seed: int, work: Path) -> tuple[Tensor, Tensor]:
    """Make pictures uint8 [n, 3, 64, 64] and whether each is well formed [n]; kept in `work`."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    path = work / f"quality-{count}-{seed}.safetensors"
    if path.is_file():
        kept = load_file(path)
        return kept["images"], kept["good"]
    pipe = StableDiffusionPipeline.from_pretrained(CHECKPOINT, safety_checker=None, torch_dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    draw, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    labels, images = renders(4 * count, 700 + seed, work)
    clear = pixels(images[:])
    other = pixels(distractors(count, 800 + seed))
    noise = torch.randn(count // 4, 4, 16, 16, generator=draw)
    texts = [caption(scene, rng).text for scene in labels]
    good = [clear[:count], reconstructed(pipe.vae, clear[count : 2 * count]), other[: count // 2]]
    good += [reconstructed(pipe.vae, other[count // 2 :]), drawn(pipe, texts[:count], 10_000 * seed)]
    bad = [simple_damage(clear[2 * count : 4 * count], draw), decode(pipe.vae, noise)]
    bad += [drawn(pipe, texts[: count // 4], 20_000 * seed + 97 * stop, stop) for stop in EARLY]
    for size in DAMAGE:
        for turn in range(2):
            with damaged(pipe.unet, size, seed + turn):
                bad.append(drawn(pipe, texts[: count // 8], 30_000 * seed + 7 * turn))
    x = torch.cat([*good, *bad])
    whole = torch.cat([torch.ones(sum(map(len, good))), torch.zeros(sum(map(len, bad)))])
    shown = ((x + 1) * 127.5).round().to(torch.uint8)
    write({"images": shown, "good": whole}, path)
    return shown, whole


def main() -> None:
    """Train, print the accuracy on fresh examples, and write the weights beside the other judges."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/glyph"))
    parser.add_argument("--count", type=int, default=240, help="pictures of each kind (default: 240)")
    parser.add_argument("--epochs", type=int, default=12, help="(default: 12)")
    parser.add_argument("--out", type=Path, default=JUDGES / "quality.safetensors")
    args = parser.parse_args()
    torch.manual_seed(0)
    images, good = examples(args.count, 1, args.work)
    model, draw = Quality(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    total = args.epochs * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=total)
    weight = (1 - good.mean()) / good.mean()  # both classes count alike
    for epoch in range(args.epochs):
        losses = []
        for index in torch.randperm(len(images), generator=draw).split(64):
            x = images[index].float() / 127.5 - 1
            x = torch.where(torch.rand(len(x), 1, 1, 1, generator=draw) < 0.5, x.flip(-1), x)
            x = x + torch.randn(x.shape, generator=draw) * 0.03 * torch.rand(len(x), 1, 1, 1, generator=draw)
            loss = F.binary_cross_entropy_with_logits(model(x), good[index], pos_weight=weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}", flush=True)
    write({key: value.half() for key, value in model.state_dict().items()}, args.out)
    fresh, truth = examples(max(16, args.count // 4), 2, args.work)
    with torch.no_grad():
        guess = torch.cat([model.eval()(part.float() / 127.5 - 1) for part in fresh.split(64)]) > 0
    right = guess == (truth > 0.5)
    print({"well formed": right[truth > 0.5].float().mean().item(), "broken": right[truth < 0.5].float().mean().item()})


if __name__ == "__main__":
    main()
