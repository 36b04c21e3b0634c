"""Turn the shipped weights back into training states: `python -m erasure.glyph.build.unpack`.

Training then goes on from them, on a machine that never saw the first run: each state holds the weights, with
the optimiser's moments at zero and the step at `--step` (0: a full new schedule of the learning rate).
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


def state(weights: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """A training state of `erasure.glyph.build.loop.Fit`."""
    found = {"step": torch.tensor(step)}
    for name, value in weights.items():
        full = value.float()
        found |= {f"weight.{name}": full, f"mean.{name}": full.clone()}
        found |= {f"first.{name}": torch.zeros_like(full), f"second.{name}": torch.zeros_like(full)}
    return found


def main() -> None:
    """Write every state that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/glyph"))
    parser.add_argument("--step", type=int, default=0)
    args = parser.parse_args()
    text = load_file(CHECKPOINT / "text_encoder" / "model.safetensors")
    image = load_file(JUDGES / "clip.safetensors")
    clip = {f"clip.text.{key}": value for key, value in text.items()}
    clip |= {f"clip.{key}": value for key, value in image.items()}
    clip |= {f"read.{key}": value for key, value in Reader(build()).read.state_dict().items()}  # not shipped
    parts = {
        "clip": clip,
        "vae": load_file(CHECKPOINT / "vae" / "diffusion_pytorch_model.safetensors"),
        "unet": load_file(CHECKPOINT / "unet" / "diffusion_pytorch_model.safetensors"),
        "classifier": load_file(JUDGES / "classifier.safetensors"),
    }
    for name, weights in parts.items():
        path = args.work / f"{name}.safetensors"
        if path.exists():
            print(f"{path} is there already and was left untouched")
            continue
        write(state(weights, args.step), path)
        print(path)
    factor = json.loads((CHECKPOINT / "vae" / "config.json").read_text())["scaling_factor"]
    (args.work / "scaling.json").write_text(json.dumps(factor))


if __name__ == "__main__":
    main()
