"""Tiny pipelines of every class, and a call that fits all of them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModelWithProjection

from erasure import pipelines
from tests.patch.making import weights
from tests.tiny import WIDTH, tiny_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_vae

PROMPTS = ["a painting of van gogh", "a cat"]
TEXT = {"kind": "text", "threshold": 0.99}  # acts on the first of PROMPTS only
LATENT = {"kind": "latent", "after": 1, "steps": 2, "repeats": 1}
TASKS = [f"ErasedStableDiffusion{size}{task}Pipeline" for size in ("", "XL") for task in ("", "Img2Img", "Inpaint")]


def tiny_xl(cls: type[Any]) -> Any:
    """Return a Stable Diffusion XL pipeline with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = tiny_text_encoder()
        config = first.config.__class__(**{**first.config.to_dict(), "projection_dim": WIDTH})
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=2 * WIDTH,
            attention_head_dim=4,
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        )
        parts = {"unet": unet, "text_encoder": first, "text_encoder_2": CLIPTextModelWithProjection(config)}
        parts["vae"] = tiny_vae()
    pipe = cls(
        **{name: part.eval() for name, part in parts.items()},
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        add_watermarker=False,
        # The UNet of this pipeline takes six time ids, not five.
        **({"requires_aesthetics_score": False} if "XLImg2Img" in cls.__name__ or "XLInpaint" in cls.__name__ else {}),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def task(name: str) -> Any:
    """Return a tiny pipeline of one of the classes in TASKS."""
    cls = getattr(pipelines, name)
    return tiny_xl(cls) if "XL" in name else tiny_pipeline(cls)


def draw(pipe: Any, prompts: Any = PROMPTS, seed: int = 0, **more: Any) -> torch.Tensor:
    """Return latents after two steps [rows, 4, 8, 8]; row i gets the noise of `seed` + i."""
    name = type(pipe).__name__
    if "prompt_embeds" in more:
        rows = len(more["prompt_embeds"])
    else:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        rows, more["prompt"] = len(prompts), prompts
    rows *= more.get("num_images_per_prompt", 1)
    if "Img2Img" in name or "Inpaint" in name:
        more |= {"image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(9)), "strength": 1.0}
    if "Inpaint" in name:
        more["mask_image"] = torch.ones(1, 1, 16, 16)
    if "Img2Img" not in name:
        more |= {"height": 16, "width": 16}
    noise = [torch.Generator().manual_seed(seed + row) for row in range(rows)]
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent", "generator": noise}
    return pipe(**(options | more)).images


def strengths(pipe: Any) -> list[float]:
    """Return the strength of the only patch for each prompt, from the gate log."""
    return [next(iter(entry.values())) for entry in pipe.gate_log]


def hooks(pipe: Any) -> int:
    """Return the number of forward hooks in the UNet."""
    return sum(len(module._forward_hooks) for module in pipe.unet.modules())


class Unchanged:
    """A context that checks at its end that all weights and the image are bit for bit what they were before it."""

    def __init__(self, pipe: Any, **more: Any) -> None:
        self.pipe, self.more = pipe, more

    def __enter__(self) -> torch.Tensor:
        self.before, self.image = weights(self.pipe), draw(self.pipe, **self.more)
        return self.image

    def __exit__(self, kind: Any, *details: Any) -> None:
        if kind is None:
            after = weights(self.pipe)
            assert after.keys() == self.before.keys()
            assert [name for name, value in after.items() if not torch.equal(value, self.before[name])] == []
            assert torch.equal(draw(self.pipe, **self.more), self.image)
            assert hooks(self.pipe) == 0 and self.pipe.get_list_patches() == {}
