"""Write the trained parts as the checkpoint of the package: `python -m erasure.glyph.build.export`.

Weights are stored in half precision and loaded as fp32; `erasure.glyph.build.check` measures the result.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from erasure.glyph import CHECKPOINT, JUDGES
from erasure.glyph.build.loop import averaged, write
from erasure.glyph.build.train_clip import build as build_clip
from erasure.glyph.build.train_clip import trained
from erasure.glyph.build.train_unet import build as build_unet
from erasure.glyph.build.train_unet import scheduler
from erasure.glyph.build.train_vae import trained as trained_vae


def half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the tensors in fp16."""
    return {key: value.half() for key, value in tensors.items()}


def autoencoder(work: Path) -> AutoencoderKL:
    """Load the autoencoder with the newest decoder and the measured scaling factor."""
    vae = trained_vae(work)
    vae.register_to_config(scaling_factor=json.loads((work / "scaling.json").read_text()))
    return vae


def unet(work: Path) -> UNet2DConditionModel:
    """Load the UNet with its averaged weights."""
    model = build_unet()
    model.load_state_dict(averaged(work / "unet.safetensors"))
    return model


def shrink(folder: Path, model: nn.Module) -> None:
    """Replace the weight file of a saved component by one in half precision."""
    path = next(folder.glob("*.safetensors"))
    write(half(dict(model.state_dict())), path)


def export(work: Path, folder: Path, judges: Path) -> None:
    """Write the checkpoint and the weights of its judges, each under a temporary name first.

    Args:
        work: folder of the training states.
        folder: folder of the checkpoint, in the layout of diffusers; its Markdown files are kept.
        judges: folder of the judges' weights.
    """
    clip = build_clip()
    clip.load_state_dict(trained(work))
    parts = {"text_encoder": clip.text, "vae": autoencoder(work), "unet": unet(work)}
    pipe = StableDiffusionPipeline(
        tokenizer=clip.tokenizer,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.save_pretrained(fresh)
    for name, model in parts.items():
        shrink(fresh / name, model)
    if folder.is_dir():
        for page in folder.glob("*.md"):
            shutil.copy2(page, fresh)
        shutil.rmtree(folder)
    fresh.rename(folder)
    if (work / "classifier.safetensors").is_file():
        write(half(averaged(work / "classifier.safetensors")), judges / "classifier.safetensors")
    image_tower = {k: v for k, v in trained(work).items() if not k.startswith("text.")}
    write(half(image_tower), judges / "clip.safetensors")


def main() -> None:
    """Export the training states in `--work` and print the size of the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/glyph"), help="folder of the training states")
    parser.add_argument("--folder", type=Path, default=CHECKPOINT, help="folder of the checkpoint")
    parser.add_argument("--judges", type=Path, default=JUDGES, help="folder of the judges' weights")
    args = parser.parse_args()
    export(args.work, args.folder, args.judges)
    total = sum(path.stat().st_size for top in (args.folder, args.judges) for path in top.rglob("*") if path.is_file())
    print(f"{args.folder}: {total / 1e6:.1f} MB including the judges")


if __name__ == "__main__":
    main()
