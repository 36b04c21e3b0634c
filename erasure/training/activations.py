"""Outputs of one block of the network along sampled trajectories, kept in files so that memory stays bounded.

There is one file for each word, `words-NNNN.safetensors`, with the outputs of all its trajectories. A run that is
killed reads the files that it finds, with the costs that they took.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.diffusion import count_metadata, count_stored, counting
from erasure.model.trajectories import walk
from erasure.patch.module_keys import find_module
from erasure.patch.safetensors_io import write_file

BATCH = 8  # trajectories that run together
LARGEST = 65_504.0  # of fp16


@dataclass(frozen=True)
class Recording:
    """How a block's outputs are recorded.

    Args:
        block: path of the block in the network.
        steps: number of steps of the sampler.
        guidance: scale of classifier-free guidance.
        positions: pixels of each output that are kept, drawn anew for each step; None keeps all.
    """

    block: str
    steps: int
    guidance: float
    positions: int | None = None


@torch.no_grad()
def record(base: Base, prompts: Sequence[str], seeds: Sequence[int], how: Recording) -> Tensor | None:
    """Sample a trajectory for each prompt, and return the block's outputs for the prompts' own halves of the batches.

    Args:
        base: the checkpoint.
        prompts: one for each trajectory.
        seeds: of the initial noise; the first one also decides which pixels are kept.
        how: the block, and how it is recorded.

    Returns:
        The outputs [steps, n, pixels, d] in fp16 on the CPU; None if the network did not run its blocks, as in a
        forecast.

    Raises:
        ErasureError: the network has no such block.
    """
    block = find_module(base.network, how.block)
    if block is None:
        raise ErasureError(f"the {base.component} of {base.name} has no block {how.block!r}. Nothing was changed")
    draw = torch.Generator().manual_seed(seeds[0])
    parts = []
    for start in range(0, len(prompts), BATCH):
        texts, found = prompts[start : start + BATCH], list[Tensor]()

        def keep(_: Any, __: Any, output: Any, count: int = len(texts), found: list[Tensor] = found) -> None:
            value = output[0] if isinstance(output, tuple) else output.sample
            pixels = value[:count].flatten(2).transpose(1, 2)
            if how.positions is not None:
                chosen = torch.randperm(pixels.shape[1], generator=draw)[: how.positions].sort().values
                pixels = pixels[:, chosen.to(pixels.device)]
            found.append(pixels.float().clamp(-LARGEST, LARGEST).half().cpu())

        handle = block.register_forward_hook(keep)
        try:
            walk(
                base,
                [(text, "") for text in texts],
                seeds=list(seeds[start : start + BATCH]),
                steps=how.steps,
                guidance=how.guidance,
            )
        finally:
            handle.remove()
        parts += [torch.stack(found)] if found else []
    return torch.cat(parts, 1) if parts else None


@dataclass(frozen=True)
class Recorded:
    """The recorded outputs of many words, in the files of a folder.

    Args:
        folder: the folder.
        prompts: for each word the prompts of its trajectories; every word has equally many.
        seed: from which those of the noise derive.
        how: the block, and how it is recorded.
    """

    folder: Path
    prompts: tuple[tuple[str, ...], ...]
    seed: int
    how: Recording

    def path(self, word: int) -> Path:
        """Return the path of the file of a word, by its number."""
        return self.folder / f"words-{word:04}.safetensors"

    def collect(self, base: Base) -> bool:
        """Record every word whose file does not exist yet, and return whether the network ran its blocks.

        Raises:
            ErasureError: the network has no such block, or the folder cannot be written to.
        """
        for word, prompts in enumerate(self.prompts):
            if self.path(word).is_file():
                count_stored(base.network, self.path(word))
                continue
            first = self.seed * 1_000_003 + word * len(prompts)
            with counting(base.network) as spent:
                outputs = record(base, prompts, range(first, first + len(prompts)), self.how)
            if outputs is not None:
                write_file(self.path(word), {"outputs": outputs}, count_metadata(spent))
        return self.path(len(self.prompts) - 1).is_file()

    def read(self, word: int) -> Tensor:
        """Return the outputs of a word [steps, n, pixels, d] in fp16."""
        return load_file(self.path(word))["outputs"]

    def words(self) -> Iterator[Tensor]:
        """Read the outputs of one word after the other."""
        return (self.read(word) for word in range(len(self.prompts)))
