"""A sparse autoencoder of a block's outputs, of which few of many features are active at once (BatchTopK).

For an output x [d], scaled so that outputs have the mean norm sqrt(d) around their centre c,

    z = relu(E (x - c) + b)          x^ = D^T z' + c          the rows of D have unit length

In training, z' keeps the B k greatest entries of z over a batch of B outputs (Bussmann et al. 2024, arXiv 2412.06410).
Afterwards it keeps those above one threshold, at which k are active on average: whether a feature is active then
depends on its own row of E alone. The loss (Gao et al. 2024, arXiv 2406.04093) is

    |x - x^|^2 / |x - mean|^2  +  aux |r - D_dead^T z_dead|^2 / |r - mean|^2,    r = x - x^

where the second term lets features that have not been active for long (dead ones) rebuild the error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.training.activations import Recorded

HELD_OUT = 16  # one of so many recorded outputs is not trained on, but measured on
MOST_HELD = 8_192  # outputs that are measured on
IN_MEMORY = 2**29  # numbers of outputs that are held at a time: 1 GiB
CHECKPOINT_EVERY = 200  # updates
EPSILON = 1e-12


@dataclass(frozen=True)
class AutoencoderSettings:
    """How an autoencoder is trained.

    Args:
        expansion: features per dimension of the outputs.
        active: k, features that are active at once, on average.
        epochs: passes over the recorded outputs.
        batch_size: B, outputs in an update.
        learning_rate: of Adam.
        dead_after: outputs after which a feature that was never active counts as dead.
        aux_weight: weight of the term for dead features.
    """

    expansion: int = 16
    active: int = 32
    epochs: int = 5
    batch_size: int = 4096
    learning_rate: float = 4e-4
    dead_after: int = 10_000_000
    aux_weight: float = 1 / 32


class SparseAutoencoder(nn.Module):
    """An autoencoder for outputs of d numbers with m features.

    Args:
        width: d.
        features: m.
        draw: for the first decoder, whose rows are random directions; the first encoder is the same.
    """

    def __init__(self, width: int, features: int, draw: torch.Generator) -> None:
        super().__init__()
        rows = nn.functional.normalize(torch.randn(features, width, generator=draw), dim=1)
        self.encoder, self.decoder = nn.Parameter(rows.clone()), nn.Parameter(rows.clone())
        self.bias, self.centre = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(width))
        self.scale, self.threshold = 1.0, 0.0

    @torch.no_grad()
    def fit_scale(self, outputs: Tensor) -> None:
        """Set the scale and the first centre from outputs [n, d]."""
        centre = outputs.mean(0)
        spread = (outputs - centre).norm(dim=1).mean()
        self.scale = float(outputs.shape[1] ** 0.5 / spread.clamp_min(EPSILON))
        self.centre.copy_(centre * self.scale)

    def before_cut(self, x: Tensor) -> Tensor:
        """Return z [n, m] of scaled outputs x [n, d]."""
        return ((x - self.centre) @ self.encoder.T + self.bias).relu()

    def decode(self, z: Tensor) -> Tensor:
        """Return x^ [n, d] of features z [n, m], as scaled outputs."""
        return z @ self.decoder + self.centre

    def features(self, outputs: Tensor) -> Tensor:
        """Return z' [n, m] of outputs [n, d] as the network gives them: what exceeds the threshold."""
        z = self.before_cut(outputs * self.scale)
        return z.masked_fill(z <= self.threshold, 0.0)

    def loss(self, x: Tensor, active: int, dead: Tensor, aux_weight: float) -> tuple[Tensor, Tensor]:
        """Return the loss of scaled outputs, and which features were active [m].

        Args:
            x: scaled outputs [n, d].
            active: k.
            dead: mask of the dead features [m].
            aux_weight: weight of the term for them.
        """
        z = self.before_cut(x)
        kept = top(z, active * len(x))
        rest = x - self.decode(kept)
        loss = share_of_variance(rest, x)
        count = min(int(dead.sum()), x.shape[1] // 2)
        if aux_weight and count:
            left = rest.detach()
            waking = top(z[:, dead], count * len(x)) @ self.decoder[dead]
            loss = loss + aux_weight * share_of_variance(left - waking, left)
        return loss, (kept > 0).any(0)

    @torch.no_grad()
    def along_the_sphere(self) -> None:
        """Remove the part of the decoder's gradient along its rows, which their unit length undoes anyway."""
        gradient = self.decoder.grad
        if gradient is not None:
            gradient -= (gradient * self.decoder).sum(1, keepdim=True) * self.decoder

    @torch.no_grad()
    def normalise(self) -> None:
        """Give the rows of the decoder unit length."""
        self.decoder.div_(self.decoder.norm(dim=1, keepdim=True).clamp_min(EPSILON))

    @torch.no_grad()
    def fit_threshold(self, outputs: Tensor, active: int) -> None:
        """Set the threshold at which k features are active on average in outputs [n, d]."""
        z = self.before_cut(outputs * self.scale).flatten()
        place = max(1, z.numel() - active * len(outputs))
        self.threshold = float(z.kthvalue(place).values)


def top(z: Tensor, count: int) -> Tensor:
    """Return z with everything but its `count` greatest entries set to 0, over the whole batch."""
    flat = z.flatten()
    chosen = flat.topk(min(count, flat.numel()), sorted=False).indices
    return torch.zeros_like(flat).scatter(0, chosen, flat[chosen]).view_as(z)


def share_of_variance(rest: Tensor, x: Tensor) -> Tensor:
    """Return |rest|^2 / |x - mean|^2 over a batch [n, d]: 0 for a perfect reconstruction, 1 for the mean."""
    return rest.square().sum() / (x - x.mean(0)).square().sum().clamp_min(EPSILON)


@torch.no_grad()
def quality(model: SparseAutoencoder, outputs: Tensor) -> dict[str, float]:
    """Return how good an autoencoder is on outputs [n, d] that it was not trained on.

    Returns:
        `explained_variance`, 1 for a perfect reconstruction, and `active`, the mean number of active features (L0).
    """
    z = model.features(outputs)
    x = outputs * model.scale
    rest = share_of_variance(x - model.decode(z), x)
    return {"explained_variance": float(1 - rest), "active": float((z > 0).sum(1).float().mean())}


def train_autoencoder(
    recorded: Recorded,
    settings: AutoencoderSettings,
    seed: int,
    state: Path | None,
    bar: Any = iter,
    device: str | torch.device = "cpu",
) -> tuple[SparseAutoencoder, dict[str, float]]:
    """Train an autoencoder on recorded outputs, from a checkpoint if there is one.

    Args:
        recorded: the outputs.
        settings: how it is trained.
        seed: of the first weights and of the order of the outputs.
        state: file of the checkpoint; None keeps none.
        bar: wraps the updates, for a progress bar.
        device: where it is trained.

    Returns:
        The autoencoder, with its threshold, and its `quality` on outputs that were held out.

    Raises:
        ErasureError: the loss is not a number.
    """
    draw = torch.Generator().manual_seed(seed)
    held = held_out(recorded).to(device)
    model = SparseAutoencoder(held.shape[1], settings.expansion * held.shape[1], draw)
    model = model.to(device)
    model.fit_scale(held)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    idle = torch.zeros(len(model.bias), dtype=torch.long, device=device)  # outputs since each feature was active
    first = _restore(state, model, optimizer, idle)
    for step, batch in bar(batches(recorded, settings.epochs, settings.batch_size, seed, first)):
        x = batch.to(device) * model.scale
        loss, fired = model.loss(x, settings.active, idle >= settings.dead_after, settings.aux_weight)
        if not torch.isfinite(loss):
            raise ErasureError(
                f"the loss of the autoencoder is not a number at update {step}. A lower learning_rate usually helps; "
                "nothing was changed"
            )
        optimizer.zero_grad()
        loss.backward()
        model.along_the_sphere()
        optimizer.step()
        model.normalise()
        idle += len(batch)
        idle[fired] = 0
        if state is not None and (step + 1) % CHECKPOINT_EVERY == 0:
            _write(state, model, optimizer, idle, step + 1)
    model.requires_grad_(False)
    model.fit_threshold(held, settings.active)
    figures = quality(model, held)
    return model.cpu(), figures


def held_out(recorded: Recorded) -> Tensor:
    """Return the outputs that are measured on [n, d]: one of HELD_OUT, and of those at most MOST_HELD, of all words."""
    parts = [outputs.flatten(0, 2)[::HELD_OUT].float() for outputs in recorded.words()]
    held = torch.cat(parts)
    return held[:: max(1, -(-len(held) // MOST_HELD))]


def batches(recorded: Recorded, epochs: int, size: int, seed: int, first: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Yield the number and the outputs [size, d] of each update; some words at a time are in memory and are mixed.

    Args:
        recorded: the outputs.
        epochs: passes over them.
        size: outputs in an update; what is left over of the words in memory waits for the next epoch.
        seed: of the order.
        first: the number of the first update that is yielded.
    """
    sample = recorded.read(0)
    each = sample[..., 0].numel() - len(range(0, sample[..., 0].numel(), HELD_OUT))
    together, total = max(1, IN_MEMORY // sample.numel()), len(recorded.prompts)
    step = 0
    for epoch in range(epochs):
        draw = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(total, generator=draw).tolist()
        for start in range(0, total, together):
            words = order[start : start + together]
            shuffled = torch.randperm(each * len(words), generator=draw)
            count = max(1, len(shuffled) // size)
            if step + count <= first:
                step += count
                continue
            pool = torch.cat([_trained(recorded.read(word)) for word in words])
            for part in range(count):
                if step >= first:
                    yield step, pool[shuffled[part * size : (part + 1) * size]].float()
                step += 1


def _trained(outputs: Tensor) -> Tensor:
    """Return the outputs of a word that are trained on [n, d]: all but those that are held out."""
    flat = outputs.flatten(0, 2)
    return flat[torch.arange(len(flat)) % HELD_OUT != 0]


def _write(path: Path, model: SparseAutoencoder, optimizer: torch.optim.Optimizer, idle: Tensor, step: int) -> None:
    tensors = {"step": torch.tensor(step), "idle": idle}
    for name, param in model.named_parameters():
        moments = optimizer.state[param]
        tensors |= {name: param.data, f"first.{name}": moments["exp_avg"], f"second.{name}": moments["exp_avg_sq"]}
    temporary = path.with_suffix(".tmp")
    save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, temporary)
    os.replace(temporary, path)


@torch.no_grad()
def _restore(path: Path | None, model: SparseAutoencoder, optimizer: torch.optim.Optimizer, idle: Tensor) -> int:
    """Put a checkpoint back, and return the number of updates that it has seen; 0 without one."""
    if path is None or not path.is_file():
        return 0
    tensors = load_file(path)
    idle.copy_(tensors["idle"])
    for name, param in model.named_parameters():
        param.copy_(tensors[name])
        optimizer.state[param] = {
            "step": tensors["step"].float(),
            "exp_avg": tensors[f"first.{name}"].to(param.device),
            "exp_avg_sq": tensors[f"second.{name}"].to(param.device),
        }
    return int(tensors["step"])
