"""The training loop of glyph's parts: it can be resumed, averages the weights and shows a progress bar."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

EVERY = 4  # steps between updates of the averaged weights
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    """Return a context in which PyTorch computes in bfloat16 where it is safe, if the machine has instructions for it.

    This is 1.3 to 1.5 times as fast on a CPU with AVX-512 BF16, and more on a GPU. A CPU without them is ten times
    slower in bfloat16 than in fp32.
    """
    fast = DEVICE.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=fast)


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """Save tensors under a temporary name and rename the file, so that an interruption never leaves a damaged file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary)
    os.replace(temporary, path)


@dataclass
class Fit:
    """Training of a model with AdamW, warm-up and cosine decay.

    The state (weights, moments, average, step) is saved to `path` regularly, and a run that finds the file resumes
    from it.

    Args:
        model: the model; parameters without gradients stay as they are.
        loss: maps the step to the loss and to figures for the progress bar.
        steps: number of steps.
        path: file of the training state.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        average: decay of the running mean of the weights, which `run` returns.
        weight_decay: weight decay of AdamW.
        save_seconds: seconds between two saves of the state.
        floor: final learning rate as a share of the peak.
        figures: running means of the loss and its figures.
    """

    model: nn.Module
    loss: Callable[[int], tuple[Tensor, dict[str, float]]]
    steps: int
    path: Path
    lr: float
    warmup: int = 100
    average: float = 0.999
    weight_decay: float = 0.01
    save_seconds: float = 120.0
    floor: float = 0.02
    figures: dict[str, float] = field(default_factory=dict)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then cosine decay to `floor` of the peak."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))

    def run(self, until: float | None = None) -> dict[str, Tensor]:
        """Train to the end, or for `until` seconds, and return the averaged weights.

        Raises:
            SystemExit: the loss is not finite; the saved state is left untouched.
        """
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        params = dict(self.model.named_parameters())
        optimizer = torch.optim.AdamW(
            [params[name] for name in names],
            lr=self.lr,
            betas=(0.9, 0.99),
            weight_decay=self.weight_decay,
            fused=True,
        )
        mean = {name: params[name].detach().clone() for name in names}
        start, started = self._resume(optimizer, params, names, mean), time.monotonic()
        saved = started
        bar = tqdm(range(start, self.steps), initial=start, total=self.steps, desc=self.path.stem, mininterval=10)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = self.rate(step)
            loss, figures = self.loss(step)
            if not torch.isfinite(loss):
                raise SystemExit(
                    f"{self.path.stem}: the loss is {loss.item()} at step {step}; {self.path} was left untouched"
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([params[name] for name in names], 1.0)
            optimizer.step()
            if step % EVERY == 0:  # updating the average reads all weights, so not at every step
                decay = min(self.average, (1 + step) / (10 + step)) ** EVERY
                with torch.no_grad():
                    torch._foreach_lerp_(list(mean.values()), [params[name] for name in names], 1 - decay)
            for key, value in {"loss": loss.item(), **figures}.items():
                self.figures[key] = value if key not in self.figures else 0.98 * self.figures[key] + 0.02 * value
            bar.set_postfix({key: f"{value:.4g}" for key, value in self.figures.items()}, refresh=False)
            now = time.monotonic()
            stop = until is not None and now - started > until
            if now - saved > self.save_seconds or stop or step + 1 == self.steps:
                self._save(optimizer, params, names, mean, step + 1)
                saved = now
            if stop:
                break
        return mean

    def _save(self, optimizer: torch.optim.AdamW, params: dict, names: list[str], mean: dict, step: int) -> None:
        state = {"step": torch.tensor(step)}
        for name in names:
            moments = optimizer.state[params[name]]
            state |= {f"weight.{name}": params[name], f"mean.{name}": mean[name]}
            state |= {f"first.{name}": moments["exp_avg"], f"second.{name}": moments["exp_avg_sq"]}
        write(state, self.path)

    def _resume(self, optimizer: torch.optim.AdamW, params: dict, names: list[str], mean: dict) -> int:
        if not self.path.is_file():
            return 0
        state = load_file(self.path)
        step = int(state["step"])
        with torch.no_grad():
            for name in names:
                params[name].copy_(state[f"weight.{name}"])
                mean[name].copy_(state[f"mean.{name}"])
                optimizer.state[params[name]] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": state[f"first.{name}"].to(params[name].device).clone(),
                    "exp_avg_sq": state[f"second.{name}"].to(params[name].device).clone(),
                }
        return step


def averaged(path: Path) -> dict[str, Tensor]:
    """Read the averaged weights from the file of a training state."""
    return {key[5:]: value for key, value in load_file(path).items() if key.startswith("mean.")}
