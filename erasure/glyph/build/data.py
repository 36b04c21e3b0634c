"""Rendered images for training: made once per seed on all cores, and stored in one file that training reads."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from erasure.glyph import styles, vocabulary
from erasure.glyph.build.render import Scene, dataset, render


def _part(arguments: tuple[int, int, bool | None]) -> tuple[list[Scene], np.ndarray]:
    count, seed, held_out = arguments
    pairs = list(dataset(count, seed, held_out=held_out))
    return [scene for scene, _ in pairs], np.stack([image for _, image in pairs])


def renders(count: int, seed: int, folder: Path, *, held_out: bool | None = None) -> tuple[list[Scene], np.ndarray]:
    """Return labelled renders, read from `folder` or rendered and stored there.

    Args:
        count: number of renders.
        seed: seed of the renders.
        folder: folder of the stored files.
        held_out: as `scenes` takes it.

    Returns:
        The scenes, and the images, uint8 [count, 64, 64, 3].
    """
    name = f"renders-{count}-{seed}-{held_out}"
    images, labels = folder / f"{name}.npy", folder / f"{name}.json"
    if not labels.is_file():
        workers = os.cpu_count() or 1
        parts = 4 * workers
        jobs = [(count // parts + (i < count % parts), seed * 1000 + i, held_out) for i in range(parts)]
        with ProcessPoolExecutor(workers) as pool:
            rendered = list(pool.map(_part, [job for job in jobs if job[0]]))
        folder.mkdir(parents=True, exist_ok=True)
        np.save(images, np.concatenate([array for _, array in rendered]))
        rows = [[scene.object, scene.style, scene.background] for part, _ in rendered for scene in part]
        temporary = labels.with_suffix(".tmp")
        temporary.write_text(json.dumps(rows))
        os.replace(temporary, labels)
    return [Scene(*row) for row in json.loads(labels.read_text())], np.load(images, mmap_mode="r")


def distractors(count: int, seed: int) -> np.ndarray:
    """Render icons that are none of the objects, in random styles.

    Args:
        count: number of images.
        seed: seed of all random choices.

    Returns:
        The images, uint8 [count, 64, 64, 3].
    """
    rng = np.random.default_rng(seed)
    words = vocabulary()
    colours, images = list(words["backgrounds"]), []
    for _ in range(count):
        style = str(rng.choice(styles()))
        background = str(rng.choice(colours)) if words["styles"][style].get("background", True) else ""
        scene = Scene("cat", style, background)
        images.append(np.asarray(render(scene, int(rng.integers(2**31)), str(rng.choice(words["distractors"])))))
    return np.stack(images)


def pixels(images: np.ndarray) -> Tensor:
    """Convert images, uint8 [n, h, w, 3], to a float tensor [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(np.array(images, order="C")).permute(0, 3, 1, 2).float() / 127.5 - 1
