"""Train the UNet on latents of the renders: `python -m erasure.glyph.build.train_unet`.

The UNet predicts noise on Stable Diffusion's schedule, with min-SNR weights (Hang et al. 2023, arXiv 2303.09556,
gamma 5) and stratified timesteps. The text encoder is fixed. One caption in ten is empty, for classifier-free guidance.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from erasure.glyph.build.captions import caption
from erasure.glyph.build.data import pixels, renders
from erasure.glyph.build.loop import DEVICE, Fit, autocast, write
from erasure.glyph.build.train_clip import build as build_clip
from erasure.glyph.build.train_clip import trained
from erasure.glyph.build.train_vae import trained as trained_vae

CHANNELS = (48, 128, 224)
EMPTY = 0.1  # share of empty captions
BROADLY = 0.4  # share of weapons called "a weapon": four objects fit it, so it needs more examples
GAMMA = 5.0  # largest signal-to-noise ratio in the loss weights


def build() -> UNet2DConditionModel:
    """Build the UNet with random weights; it has attention at 8x8, at 4x4 and in the middle block."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Return a DDIM scheduler with the noise schedule of Stable Diffusion 1."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def latents(count: int, work: Path) -> tuple[list, Tensor, float]:
    """Return the scenes of the training images and their latents, which are stored in `work`.

    Args:
        count: number of training images.
        work: folder of the training states.

    Returns:
        The scenes, the scaled latents [count, 4, 16, 16], and the scaling factor, 1 / standard deviation.
    """
    labels, images = renders(count, 5, work, held_out=False)
    path = work / "latents.safetensors"
    if not path.is_file():
        vae = trained_vae(work).to(DEVICE, memory_format=torch.channels_last)
        with torch.no_grad():
            parts = [
                vae.encode(pixels(images[i : i + 64]).to(DEVICE)).latent_dist.mean.cpu() for i in range(0, count, 64)
            ]
        write({"latents": torch.cat(parts)}, path)
    raw = load_file(path)["latents"]
    factor = 1 / raw.std().item()
    (work / "scaling.json").write_text(json.dumps(factor))
    return labels, raw * factor, factor


def main() -> None:
    """Train the UNet; the state is saved every two minutes, and a second call resumes from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/glyph"), help="folder of the training states")
    parser.add_argument("--steps", type=int, default=6300, help="training steps")
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    parser.add_argument("--images", type=int, default=16_000, help="training images to render")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, help="CPU threads; None leaves PyTorch's default")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    labels, stock, _ = latents(args.images, args.work)
    clip = build_clip()
    clip.load_state_dict(trained(args.work))
    text, tokenizer = clip.text.to(DEVICE).eval().requires_grad_(False), clip.tokenizer
    unet = build().to(DEVICE, memory_format=torch.channels_last)
    alphas = scheduler().alphas_cumprod.to(DEVICE)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng, draw = random.Random(step), torch.Generator().manual_seed(step)
        pick = [rng.randrange(len(labels)) for _ in range(args.batch)]
        texts = ["" if rng.random() < EMPTY else caption(labels[i], rng, broadly=BROADLY).text for i in pick]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        x = stock[pick].to(DEVICE)
        stratified = (torch.arange(args.batch) + torch.rand(args.batch, generator=draw)) / args.batch
        t = (stratified * len(alphas)).long().to(DEVICE)
        noise = torch.randn(x.shape, generator=draw).to(DEVICE)
        a = alphas[t].view(-1, 1, 1, 1)
        with autocast():
            states = text(ids.to(DEVICE)).last_hidden_state
            predicted = unet(
                (a.sqrt() * x + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last), t, states
            )
        error = F.mse_loss(predicted.sample.float(), noise, reduction="none").mean((1, 2, 3))
        snr = (a / (1 - a)).flatten()
        return (error * snr.clamp(max=GAMMA) / snr).mean(), {"eps": error.mean().item()}

    fit = Fit(unet, loss, args.steps, args.work / "unet.safetensors", args.lr, warmup=200, average=0.9995)
    fit.run()


if __name__ == "__main__":
    main()
