"""Train glyph-dit, the PixArt-type sibling: `python -m erasure.glyph.build.train_dit`.

A transformer with cross-attention to glyph's CLIP states at every depth, noise prediction on Stable Diffusion's
schedule, stratified timesteps. The error of the image counts by its signal-to-noise ratio between 0.5 and 5: the
upper end is min-SNR (Hang et al. 2023), and without the lower one the noisy steps, which settle background and
style, hardly counted (at 30,000 samples the named background was drawn in 8 % of 64 images).

Padding is masked, as PixArt does, and CLIP is causal: the states do not depend on how far a prompt is padded, so a
batch is as long as its longest caption. `--export FOLDER` writes what `PixArtSigmaPipeline.from_pretrained` loads.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import Tensor

from erasure.glyph.build.loop import DEVICE, autocast, averaged
from erasure.glyph.build.train_unet import GAMMA, scheduler
from erasure.glyph.build.transformer import (
    Plateau,
    initialise,
    latents,
    parser,
    save,
    shipped_text,
    shipped_vae,
    stratified,
    texts,
)

WIDTH, HEADS, LAYERS = 256, 4, 6
STATE = "dit.safetensors"
FLOOR = 0.5  # of the signal-to-noise ratio that an error of the image counts by; GAMMA is the upper end


def build() -> PixArtTransformer2DModel:
    """Build the transformer with random weights: 7.0 M parameters, 64 image tokens of 2x2 latent pixels."""
    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        cross_attention_dim=WIDTH,
        sample_size=16,
        patch_size=2,
        caption_channels=128,
        use_additional_conditions=False,
    )
    initialise(model, zero=("proj_out",), small=("adaln_single",))
    return model


def assemble(work: Path) -> PixArtSigmaPipeline:
    """Return the pipeline with the averaged weights of the run so far."""
    model = build()
    model.load_state_dict(averaged(work / STATE))
    tokenizer, text = shipped_text()
    return PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=text, vae=shipped_vae(), transformer=model.eval(), scheduler=scheduler()
    )


def main() -> None:
    """Train the transformer; the state is saved every two minutes, and a second call resumes from it."""
    args = parser(__doc__, steps=10_000, batch=32, lr=1e-3).parse_args()
    if args.export:
        save(assemble(args.work), args.export)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    labels, stock = latents(args.images, args.work)
    stock = stock * shipped_vae().config.scaling_factor
    tokenizer, text = shipped_text()
    text.to(DEVICE)
    model = build().to(DEVICE)
    alphas = scheduler().alphas_cumprod.to(DEVICE)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng, draw = random.Random(step), torch.Generator().manual_seed(step)
        pick = [rng.randrange(len(labels)) for _ in range(args.batch)]
        batch = tokenizer(texts([labels[i] for i in pick], rng), padding=True, truncation=True, return_tensors="pt")
        x = stock[pick].to(DEVICE)
        t = (stratified(args.batch, draw) * len(alphas)).long().to(DEVICE)
        noise = torch.randn(x.shape, generator=draw).to(DEVICE)
        a = alphas[t].view(-1, 1, 1, 1)
        with autocast():
            made = model(
                (a.sqrt() * x + (1 - a).sqrt() * noise),
                encoder_hidden_states=text(batch.input_ids.to(DEVICE)).last_hidden_state,
                encoder_attention_mask=batch.attention_mask.to(DEVICE),
                timestep=t,
            )
        error = F.mse_loss(made.sample.float(), noise, reduction="none").mean((1, 2, 3))
        snr = (a / (1 - a)).flatten()
        return (error * snr.clamp(FLOOR, GAMMA) / snr).mean(), {"eps": error.mean().item()}

    Plateau(model, loss, args.steps, args.work / STATE, args.lr, warmup=200, average=0.999, weight_decay=0.0).run()


if __name__ == "__main__":
    main()
