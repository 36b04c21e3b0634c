"""Train the autoencoder, from 64x64x3 pixels to 16x16x4 latents: `python -m erasure.glyph.build.train_vae`.

The loss is L1 + MSE + half the L1 of the image gradients + a small KL divergence. `--decoder-only` trains the decoder
further while the encoder is fixed, so that the UNet's latents stay valid.
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
KL_WEIGHT = 1e-3  # weight of the KL divergence in the loss


def build() -> AutoencoderKL:
    """Build the autoencoder with random weights."""
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
    """Load the autoencoder with its averaged weights, and with the decoder that was trained further if there is one."""
    vae = build()
    vae.load_state_dict(averaged(work / "vae.safetensors"))
    if (work / "decoder.safetensors").is_file():
        vae.load_state_dict(averaged(work / "decoder.safetensors"), strict=False)
    return vae


def reconstruction_loss(decoded: Tensor, image: Tensor) -> Tensor:
    """Return L1 + MSE + half the L1 of horizontal and vertical differences, for images [n, 3, h, w] in [-1, 1]."""
    error = decoded - image
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.pow(2).mean() + 0.5 * edges


def main() -> None:
    """Train the autoencoder, or resume its training, and print its PSNR on new renders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/glyph"), help="folder of the training states")
    parser.add_argument("--steps", type=int, default=2000, help="training steps")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--lr", type=float, default=1.2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, help="CPU threads; None leaves PyTorch's default")
    parser.add_argument("--decoder-only", action="store_true", help="train the decoder further")
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
            decoded = vae.decode(latent.sample()).sample.float()
        kl = 0.5 * (latent.mean.float() ** 2 + latent.var.float() - 1 - latent.logvar.float()).mean()
        psnr = -10 * torch.log10(F.mse_loss(decoded.clamp(-1, 1), x) / 4)
        return reconstruction_loss(decoded, x) + KL_WEIGHT * kl, {"psnr": psnr.item(), "kl": kl.item()}

    fit = Fit(vae, loss, args.steps, path, args.lr)
    weights = fit.run()
    vae.load_state_dict(weights, strict=not args.decoder_only)
    _, fresh = renders(480, 3, args.work)
    with torch.no_grad():
        x = pixels(fresh[:]).to(DEVICE)
        decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in x.split(32)]).clamp(
            -1, 1
        )
    print(f"PSNR on 480 new renders: {(-10 * torch.log10(F.mse_loss(decoded, x) / 4)).item():.2f} dB")


if __name__ == "__main__":
    main()
