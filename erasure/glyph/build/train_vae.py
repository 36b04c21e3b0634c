"""Train the autoencoder: 64x64x3 to 16x16x4, `python -m erasure.glyph.build.train_vae`.

Loss: L1 + MSE + half the L1 of the gradients + a small KL. `--decoder-only` goes on with the decoder
under a fixed encoder, so that the UNet's latents stay valid.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from erasure.glyph.build.data import distractors, pixels, renders
from erasure.glyph.build.loop import DEVICE, Fit, autocast, averaged

CHANNELS = (32, 64, 96)
KL_WEIGHT = 1e-3


def build() -> AutoencoderKL:
    """The autoencoder with random weights."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def trained(work: Path) -> AutoencoderKL:
    """The autoencoder with its averaged weights and, where there is one, the decoder that was trained on."""
    vae = build()
    vae.load_state_dict(averaged(work / "vae.safetensors"))
    if (work / "decoder.safetensors").is_file():
        vae.load_state_dict(averaged(work / "decoder.safetensors"), strict=False)
    return vae


def reconstruction_loss(made: Tensor, image: Tensor) -> Tensor:
    """L1 + MSE + 0.5 L1 of horizontal and vertical differences, over [n, 3, h, w] in [-1, 1]."""
    off = made - image
    edges = off.diff(dim=-1).abs().mean() + off.diff(dim=-2).abs().mean()
    return off.abs().mean() + off.pow(2).mean() + 0.5 * edges


def main() -> None:
    """Train, then print the PSNR on fresh renders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/glyph"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--decoder-only", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    _, images = renders(24_000, 1, args.work)
    others = distractors(1500, 2)
    vae = build().to(DEVICE, memory_format=torch.channels_last)
    path = args.work / ("decoder.safetensors" if args.decoder_only else "vae.safetensors")
    if args.decoder_only:
        vae.load_state_dict(averaged(args.work / "vae.safetensors"))
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        draw = torch.Generator().manual_seed(step)
        pick = torch.randint(len(images), (args.batch - 1,), generator=draw).sort().values.numpy()
        extra = others[torch.randint(len(others), (1,), generator=draw).numpy()]
        x = torch.cat([pixels(images[pick]), pixels(extra)]).to(DEVICE, memory_format=torch.channels_last)
        with autocast():
            latent = vae.encode(x).latent_dist
            made = vae.decode(latent.sample()).sample.float()
        kl = 0.5 * (latent.mean.float() ** 2 + latent.var.float() - 1 - latent.logvar.float()).mean()
        psnr = -10 * torch.log10(F.mse_loss(made.clamp(-1, 1), x) / 4)
        return reconstruction_loss(made, x) + KL_WEIGHT * kl, {"psnr": psnr.item(), "kl": kl.item()}

    fit = Fit(vae, loss, args.steps, path, args.lr)
    weights = fit.run()
    vae.load_state_dict(weights, strict=not args.decoder_only)
    _, fresh = renders(480, 3, args.work)
    with torch.no_grad():
        x = pixels(fresh[:]).to(DEVICE)
        made = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in x.split(32)]).clamp(-1, 1)
    print(f"PSNR on 480 fresh renders: {(-10 * torch.log10(F.mse_loss(made, x) / 4)).item():.2f} dB")


if __name__ == "__main__":
    main()
