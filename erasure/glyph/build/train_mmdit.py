"""Train glyph-mmdit, the FLUX-type sibling: `python -m erasure.glyph.build.train_mmdit`.

A transformer whose attention joins text and image (two-stream blocks, then one-stream blocks), trained by
rectified flow (Liu et al. 2023): it predicts noise minus image at x = (1 - sigma) image + sigma noise, sigma
logit-normal (Esser et al. 2024), no shift. Text comes by two routes, as in FLUX: T5's states (of
`erasure.glyph.build.train_t5`) join the attention, CLIP's pooled vector (glyph's own) modulates every layer.

Why FLUX and not SD3: a folder of SD3 without its third text encoder loads only with `text_encoder_3=None` given,
wants CLIP twice, pads to 77 tokens unmasked and puts 256 zero tokens behind them. FLUX's folder loads as it is,
with the classes that its users have, and a batch is a third as long.

`--export FOLDER` writes what `FluxPipeline.from_pretrained` loads; call it with `height=64, width=64,
max_sequence_length=32, negative_prompt="", true_cfg_scale=3.0`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from erasure.glyph.build.loop import DEVICE, autocast, averaged
from erasure.glyph.build.train_t5 import pad, recase
from erasure.glyph.build.train_t5 import trained as trained_t5
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

WIDTH, HEADS, DOUBLE, SINGLE = 192, 6, 2, 4
ROPE = (8, 12, 12)  # of the 32 channels of a head: text or image, row, column
WITHOUT_POOLED, WITHOUT_STATES = 0.25, 0.1  # captions that come by one route only, so that each learns to carry them
STATE = "mmdit.safetensors"
SCALING = "mmdit-scaling.json"


def build() -> FluxTransformer2DModel:
    """Build the transformer with random weights: 5.1 M parameters, 64 image tokens of 2x2 latent pixels."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=False,
        axes_dims_rope=ROPE,
    )
    modulation = ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")
    # The last layer, not the one of the same name at the end of each one-stream block.
    initialise(model, zero=modulation, small=("timestep_embedder",))
    torch.nn.init.zeros_(model.proj_out.weight)
    return model


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Flow matching in equal steps of sigma: 64 image tokens need no shift."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)


def pack(x: Tensor) -> Tensor:
    """Convert latents [n, 4, 16, 16] to tokens [n, 64, 16] of 2x2 pixels, as FluxPipeline packs them."""
    return FluxPipeline._pack_latents(x, *x.shape)


def places(length: int) -> tuple[Tensor, Tensor]:
    """Return the positions of `length` text tokens (all zero) and of the image tokens [tokens, 3]."""
    return torch.zeros(length, 3), FluxPipeline._prepare_latent_image_ids(1, 8, 8, torch.device("cpu"), torch.float)


def normalise(stock: Tensor, work: Path) -> Tensor:
    """Normalise latents to mean 0 and deviation 1; shift and scale are kept for the exported autoencoder."""
    shift, scale = stock.mean().item(), 1 / stock.std().item()
    (work / SCALING).write_text(json.dumps({"shift_factor": shift, "scaling_factor": scale}))
    return (stock - shift) * scale


def assemble(work: Path) -> FluxPipeline:
    """Return the pipeline with the averaged weights of the run so far."""
    model = build()
    model.load_state_dict(averaged(work / STATE))
    tokenizer, clip = shipped_text()
    tokenizer_2, t5 = trained_t5(work)
    vae = shipped_vae()
    vae.register_to_config(**json.loads((work / SCALING).read_text()))
    return FluxPipeline(
        scheduler=scheduler(),
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer_2,
        transformer=model.eval(),
    )


def drop(captions: list[str], share: float, rng: random.Random) -> list[str]:
    """Return the captions, a share of them emptied."""
    return ["" if rng.random() < share else text for text in captions]


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
    stock = normalise(stock, args.work)
    tokenizer, clip = shipped_text()
    tokenizer_2, t5 = trained_t5(args.work)
    clip, t5 = clip.to(DEVICE), t5.to(DEVICE)
    model = build().to(DEVICE)
    ends = torch.distributions.Normal(0.0, 1.0)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng, draw = random.Random(step), torch.Generator().manual_seed(step)
        pick = [rng.randrange(len(labels)) for _ in range(args.batch)]
        said = texts([labels[i] for i in pick], rng)
        short = tokenizer(drop(said, WITHOUT_POOLED, rng), padding=True, truncation=True, return_tensors="pt")
        long = pad(tokenizer_2, [recase(text, rng) for text in drop(said, WITHOUT_STATES, rng)], rng)
        x = pack(stock[pick]).to(DEVICE)
        sigma = ends.icdf(stratified(args.batch, draw).clamp(1e-4, 1 - 1e-4)).sigmoid().view(-1, 1, 1).to(DEVICE)
        noise = pack(torch.randn(args.batch, 4, 16, 16, generator=draw)).to(DEVICE)
        text_at, image_at = places(long.shape[1])
        with autocast():
            made = model(
                hidden_states=(1 - sigma) * x + sigma * noise,
                encoder_hidden_states=t5(long.to(DEVICE)).last_hidden_state,
                pooled_projections=clip(short.input_ids.to(DEVICE)).pooler_output,
                timestep=sigma.flatten(),
                img_ids=image_at.to(DEVICE),
                txt_ids=text_at.to(DEVICE),
            )
        error = F.mse_loss(made.sample.float(), noise - x)
        return error, {}

    Plateau(model, loss, args.steps, args.work / STATE, args.lr, warmup=200, average=0.999, weight_decay=0.0).run()


if __name__ == "__main__":
    main()
