"""Train the classifier with an object and a style head: `python -m erasure.glyph.build.train_classifier`.

The training images are renders; renders after the autoencoder, so that the classifier learns to ignore the decoder's
blur; and images of none of the objects: other icons, shuffled tiles, blends of two images, blurred images and noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from erasure.glyph import objects, styles
from erasure.glyph.build.data import distractors, pixels, renders
from erasure.glyph.build.loop import DEVICE, Fit, autocast, averaged
from erasure.glyph.build.train_clip import augment
from erasure.glyph.build.train_vae import trained as trained_vae
from erasure.glyph.vision import Classifier

IGNORE = -100  # label of samples that a head is not trained on


def reconstructions(images: np.ndarray, work: Path) -> np.ndarray:
    """Return the images, uint8 [n, 64, 64, 3], after encoding and decoding; they are stored in `work`."""
    path = work / f"reconstructions-{len(images)}.npy"
    if not path.is_file():
        vae = trained_vae(work).to(DEVICE, memory_format=torch.channels_last)
        parts = []
        with torch.no_grad(), autocast():
            for x in pixels(images).split(64):
                decoded = vae.decode(vae.encode(x.to(DEVICE)).latent_dist.sample()).sample
                parts.append(((decoded.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
        np.save(path, torch.cat(parts).permute(0, 2, 3, 1).numpy())
    return np.load(path)


def shuffle_tiles(x: Tensor, draw: torch.Generator, side: int = 16) -> Tensor:
    """Shuffle the tiles of each image [n, 3, 64, 64], which leaves texture without an object.

    Args:
        x: the images.
        draw: source of the random order.
        side: side of a tile in pixels.
    """
    n, grid = len(x), x.shape[-1] // side
    cut = x.unfold(2, side, side).unfold(3, side, side).reshape(n, 3, grid * grid, side, side)
    order = torch.rand(n, grid * grid, generator=draw).argsort(1)
    cut = torch.stack([image[:, index] for image, index in zip(cut, order, strict=True)])
    cut = cut.reshape(n, 3, grid, grid, side, side)
    return cut.permute(0, 1, 2, 4, 3, 5).reshape(n, 3, 64, 64)


def without_object(x: Tensor, draw: torch.Generator) -> Tensor:
    """Turn images [n, 3, 64, 64] into images of no object: a quarter each shuffled, blended, blurred and noise."""
    parts = list(x.chunk(4))
    parts[0] = shuffle_tiles(parts[0], draw)
    parts[1] = 0.5 * parts[1] + 0.5 * parts[1].roll(1, 0).flip(-1)
    parts[2] = F.interpolate(F.avg_pool2d(parts[2], 16), size=64, mode="bilinear")
    coarse = torch.randn(len(parts[3]), 3, 8, 8, generator=draw) * 0.6
    fine = torch.randn(parts[3].shape, generator=draw) * 0.2
    parts[3] = (F.interpolate(coarse, size=64, mode="bilinear") + fine).clamp(-1, 1)
    return torch.cat(parts)


@torch.no_grad()
def accuracy(model: Classifier, work: Path) -> dict[str, float]:
    """Return the accuracy on 960 new renders and on their reconstructions, and the share of "none" on distractors."""
    labels, images = renders(960, 4, work)
    shares = {}
    for name, array in (("renders", images[:]), ("reconstructions", reconstructions(images[:], work))):
        out = [model(part) for part in pixels(array).to(DEVICE).split(96)]
        for head, names in (("object", objects()), ("style", styles())):
            truth = torch.tensor([names.index(getattr(scene, head)) for scene in labels])
            guess = torch.cat([o[head] for o in out]).argmax(1).cpu()
            shares[f"{head} on {name}"] = (guess == truth).float().mean().item()
    predicted = model(pixels(distractors(240, 99)).to(DEVICE))["object"].argmax(1)
    shares["none on distractors"] = (predicted == len(objects())).float().mean().item()
    return shares


def main() -> None:
    """Train the classifier, or resume its training, and print its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/glyph"), help="folder of the training states")
    parser.add_argument("--steps", type=int, default=1900, help="training steps")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, help="CPU threads; None leaves PyTorch's default")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    labels, images = renders(24_000, 1, args.work)
    decoded, others = reconstructions(images[:5000], args.work), distractors(3000, 5)
    truth = {
        "object": torch.tensor([objects().index(s.object) for s in labels]),
        "style": torch.tensor([styles().index(s.style) for s in labels]),
    }
    model = Classifier().to(DEVICE)
    model.train()
    clear, blurred, strange, empty = 40, 32, 8, 16

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        draw = torch.Generator().manual_seed(step)
        a = torch.randint(len(images), (clear + empty,), generator=draw)
        b = torch.randint(len(decoded), (blurred,), generator=draw)
        c = torch.randint(len(others), (strange,), generator=draw)
        x = pixels(images[a.numpy()])
        x = torch.cat(
            [x[:clear], pixels(decoded[b.numpy()]), pixels(others[c.numpy()]), without_object(x[clear:], draw)]
        )
        x = augment(
            x.to(DEVICE), draw, blur=0.3
        )  # more blur would make pixel art look like noto, from which it is made
        none = torch.full((strange + empty,), len(objects()))
        labelled = {
            "object": torch.cat([truth["object"][a[:clear]], truth["object"][b], none]),
            "style": torch.cat([truth["style"][a[:clear]], truth["style"][b], torch.full_like(none, IGNORE)]),
        }
        with autocast():
            out = model(x)
        parts = {
            head: F.cross_entropy(out[head].float(), y.to(DEVICE), ignore_index=IGNORE, label_smoothing=0.05)
            for head, y in labelled.items()
        }
        return sum(parts.values(), torch.zeros((), device=DEVICE)), {k: v.item() for k, v in parts.items()}

    fit = Fit(model, loss, args.steps, args.work / "classifier.safetensors", args.lr, weight_decay=0.05, average=0.998)
    fit.run()
    model.load_state_dict(averaged(fit.path))
    model.eval()
    print({name: round(value, 4) for name, value in accuracy(model, args.work).items()})


if __name__ == "__main__":
    main()
