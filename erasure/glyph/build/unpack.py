"""Turn the shipped weights back into training states: `python -m erasure.glyph.build.unpack`.

With them the scripts can continue training without the files of the first run. Each state holds the weights, zero
optimizer moments, and the step given by `--step` (0 starts the learning rate schedule from the beginning).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from erasure.glyph import CHECKPOINT, JUDGES
from erasure.glyph.build.loop import write
from erasure.glyph.build.train_clip import Reader, build


def training_state(weights: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """Build a training state that `erasure.glyph.build.loop.Fit` can resume from.

    Args:
        weights: name of a parameter -> its value.
        step: the step to continue from.
    """
    state = {"step": torch.tensor(step)}
    for name, value in weights.items():
        full = value.float()
        state |= {f"weight.{name}": full, f"mean.{name}": full.clone()}
        state |= {f"first.{name}": torch.zeros_like(full), f"second.{name}": torch.zeros_like(full)}
    return state


def main() -> None:
    """Write the training states that do not exist in `--work` yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/glyph"), help="folder of the training states")
    parser.add_argument("--step", type=int, default=0, help="step to continue from")
    args = parser.parse_args()
    text = load_file(CHECKPOINT / "text_encoder" / "model.safetensors")
    image = load_file(JUDGES / "clip.safetensors")
    clip = {f"clip.text.{key}": value for key, value in text.items()}
    clip |= {f"clip.{key}": value for key, value in image.items()}
    clip |= {
        f"read.{key}": value for key, value in Reader(build()).read.state_dict().items()
    }  # the checkpoint does not contain this layer
    parts = {
        "clip": clip,
        "vae": load_file(CHECKPOINT / "vae" / "diffusion_pytorch_model.safetensors"),
        "unet": load_file(CHECKPOINT / "unet" / "diffusion_pytorch_model.safetensors"),
        "classifier": load_file(JUDGES / "classifier.safetensors"),
    }
    for name, weights in parts.items():
        path = args.work / f"{name}.safetensors"
        if path.exists():
            print(f"{path} exists already and was left untouched")
            continue
        write(training_state(weights, args.step), path)
        print(path)
    factor = json.loads((CHECKPOINT / "vae" / "config.json").read_text())["scaling_factor"]
    (args.work / "scaling.json").write_text(json.dumps(factor))


if __name__ == "__main__":
    main()
