"""What the two transformer siblings of glyph share: their art as latents, text, start values, schedule, export.

Both learn from the shipped checkpoint's autoencoder and text encoder, so that nothing but the shipped files is
needed to train them.
"""

from __future__ import annotations

import argparse
import filecmp
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from erasure.glyph import CHECKPOINT
from erasure.glyph.build.captions import caption
from erasure.glyph.build.data import pixels, renders
from erasure.glyph.build.export import shrink
from erasure.glyph.build.loop import DEVICE, Fit, write
from erasure.glyph.build.render import Scene

EMPTY = 0.1  # captions left empty, for classifier-free guidance
BROADLY = 0.4  # "a weapon" has four answers, and needs more examples


class Plateau(Fit):
    """A fit at a constant rate that falls to zero over the last quarter of the steps.

    Until the fall begins, `--steps` may be changed from call to call: the rate does not depend on it. The fall is
    1 - sqrt (Hägele et al. 2024, "Scaling laws and compute-optimal training beyond fixed training durations").
    """

    fall = 0.25

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, level, then 1 - sqrt."""
        begin = (1 - self.fall) * self.steps
        if step < begin:
            return self.lr * min(1.0, (step + 1) / self.warmup)
        return self.lr * (1 - math.sqrt(min(1.0, (step - begin) / (self.steps - begin))))


def parser(description: str | None, *, steps: int, batch: int, lr: float) -> argparse.ArgumentParser:
    """Return the parser of the training scripts' options."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--work", type=Path, default=Path("build/glyph"), help="where the states and latents lie")
    made.add_argument("--steps", type=int, default=steps)
    made.add_argument("--batch", type=int, default=batch)
    made.add_argument("--images", type=int, default=24_000, help="renders to learn from")
    made.add_argument("--lr", type=float, default=lr)
    made.add_argument("--threads", type=int)
    made.add_argument("--export", type=Path, help="only write the averaged weights as a diffusers folder there")
    return made


def shipped_vae() -> AutoencoderKL:
    """Return the autoencoder that glyph ships, in fp32."""
    return AutoencoderKL.from_pretrained(CHECKPOINT / "vae", torch_dtype=torch.float32).eval()


def shipped_text() -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Return the tokenizer and the frozen text encoder that glyph ships (width 128, 77 positions)."""
    text = CLIPTextModel.from_pretrained(CHECKPOINT / "text_encoder", dtype=torch.float32)
    return CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer"), text.eval().requires_grad_(False)


def latents(count: int, work: Path) -> tuple[list[Scene], Tensor]:
    """Return scenes and the unscaled means [count, 4, 16, 16] of their encoded renders, kept in a file."""
    labels, images = renders(count, 5, work, held_out=False)
    path = work / f"shipped-latents-{count}.safetensors"
    if not path.is_file():
        vae = shipped_vae().to(DEVICE, memory_format=torch.channels_last)
        with torch.no_grad():
            parts = [vae.encode(pixels(images[i : i + 64]).to(DEVICE)).latent_dist.mean for i in range(0, count, 64)]
        write({"latents": torch.cat(parts)}, path)
    return labels, load_file(path)["latents"]


def texts(scenes: list[Scene], rng: random.Random) -> list[str]:
    """Return a caption for each scene; one in ten is empty."""
    return ["" if rng.random() < EMPTY else caption(scene, rng, broadly=BROADLY).text for scene in scenes]


def stratified(count: int, draw: torch.Generator) -> Tensor:
    """Draw stratified numbers [count] in [0, 1): one from each of `count` equal parts, in order."""
    return (torch.arange(count) + torch.rand(count, generator=draw)) / count


def initialise(model: nn.Module, zero: tuple[str, ...], small: tuple[str, ...]) -> None:
    """Xavier weights and no biases, as DiT (Peebles and Xie 2023).

    Layers with a name that holds one of `zero` start at 0, of `small` at a deviation of 0.02.
    """
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        if any(part in name for part in zero):
            nn.init.zeros_(module.weight)
        elif any(part in name for part in small):
            nn.init.normal_(module.weight, std=0.02)
        else:
            nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def share(folder: Path) -> None:
    """Replace files that glyph ships too by links to them, if the folder lies beside its checkpoint."""
    if folder.resolve().parent != CHECKPOINT.parent:
        return
    for path in folder.rglob("*"):
        shipped = CHECKPOINT / path.relative_to(folder)
        if path.suffix in (".safetensors", ".json") and shipped.is_file() and filecmp.cmp(path, shipped, shallow=False):
            path.unlink()
            path.symlink_to(os.path.relpath(shipped, path.parent))


def save(pipe: Any, folder: Path) -> None:
    """Write the pipeline in half precision; it is made beside its place, then renamed."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.save_pretrained(fresh)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            shrink(fresh / name, part)
    share(fresh)
    if folder.is_dir():
        for kept in folder.glob("*.md"):
            shutil.copy2(kept, fresh)
        shutil.rmtree(folder)
    fresh.rename(folder)
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {total / 1e6:.1f} MB")
