"""The rule of `stop=auto`: when a run has erased enough, when its updates are too large, and what it says at its end.

It reads the curves of `curves.py`, which come from states that nothing trains on. After each measurement, with E the
`erased` of the noise level where it is smallest, and D the largest `drift`:

- D > DRIFT: the weights go back to those of the measurement before. If the concept was gone there, the run ends;
  otherwise it goes on from there at RATE of the learning rate. This happens at most LOWERED times.
- E >= GONE, so at every noise level, and less than GAIN above the measurement before: the run ends.
- The largest number of updates (`iterations`) is taken: the run ends, whether or not the concept is gone.

Measurements come after 1, 2, 3, 4, 6, 8, 12, .. updates, each after half as many again, because how far a run comes
with an update depends on its learning rate. How the thresholds were chosen: docs/erase.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

LOG = logging.getLogger("erasure")

Stop = Literal["never", "auto"]

GONE = 0.4
GAIN = 0.03
DRIFT = 0.9
RATE = 1 / 3
LOWERED = 3
GROWTH = 1.5  # from one measurement to the next


def due(step: int) -> bool:
    """Return whether the rule measures after `step` updates.

    >>> [step for step in range(1, 41) if due(step)]
    [1, 2, 3, 4, 6, 8, 12, 18, 26, 39]
    """
    return step in {math.ceil(GROWTH**power) for power in range(4 * step.bit_length())}


@dataclass
class StopRule:
    """The rule, and what it remembers from measurement to measurement.

    Args:
        limit: the largest number of updates.
        good: the trained tensors at the last measurement whose drift is within the bound, by name.
        step: the number of updates at that measurement.
        least: E at that measurement.
        most: D at that measurement.
        rate: the present factor on the learning rate.
        lowered: how often the rate was lowered.
        why: why the run ended: `gone`, `drift` or `updates`; empty while it goes on.
    """

    limit: int
    good: dict[str, Tensor]
    step: int = 0
    least: float = 0.0
    most: float = 0.0
    rate: float = 1.0
    lowered: int = 0
    why: str = ""

    @classmethod
    def start(cls, limit: int, params: Mapping[str, nn.Parameter]) -> StopRule:
        """Return the rule at the start of a run; the untrained tensors are the first that it can go back to."""
        return cls(limit, {name: param.detach().clone() for name, param in params.items()})

    @property
    def gone(self) -> bool:
        """Return whether the concept is gone at every noise level, at the last good measurement."""
        return self.least >= GONE

    @torch.no_grad()
    def see(
        self,
        step: int,
        erased: Sequence[float],
        drift: Sequence[float],
        params: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Take a measurement, and put the weights back if the drift is too large.

        Args:
            step: the number of updates so far.
            erased: of each noise level.
            drift: of each noise level.
            params: the trained tensors by name.
            optimizer: of these; its moments are cleared when the weights go back.
        """
        least, most = min(erased), max(drift)
        if most <= DRIFT:
            settled = least >= GONE and least - self.least < GAIN
            self.step, self.least, self.most = step, least, most
            self.good = {name: param.detach().clone() for name, param in params.items()}
            self.why = "gone" if settled else "updates" if step == self.limit else ""
            return
        for name, param in params.items():
            param.copy_(self.good[name])
        for moments in optimizer.state.values():
            for value in moments.values():
                value.zero_()
        if self.gone or step == self.limit or self.lowered == LOWERED:
            self.why = "drift"
        else:
            self.lowered, self.rate = self.lowered + 1, self.rate * RATE
            LOG.info("drift %.2f after %d updates: back to %d, and on at a lower rate", most, step, self.step)

    def tensors(self) -> dict[str, Tensor]:
        """Return what the rule remembers, for a checkpoint."""
        state = torch.tensor([self.step, self.least, self.most, self.rate, self.lowered], dtype=torch.float64)
        return {"state": state, **{f"good.{name}": value for name, value in self.good.items()}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` returned, when a run is resumed."""
        if "state" in tensors:
            step, self.least, self.most, self.rate, lowered = tensors["state"].tolist()
            self.step, self.lowered = int(step), int(lowered)
            self.good = {name: tensors[f"good.{name}"].to(value) for name, value in self.good.items()}

    def to_json(self) -> dict[str, Any]:
        """Return why the run ended and where, as plain data for the header of a patch."""
        return {
            "why": self.why,
            "gone": self.gone,
            "step": self.step,
            "limit": self.limit,
            "erased": round(self.least, 4),
            "drift": round(self.most, 4),
            "lowered": self.lowered,
            "bounds": {"gone": GONE, "gain": GAIN, "drift": DRIFT},
            "text": self.text(),
        }

    def text(self) -> str:
        """Return for people why the run ended, and what may help if the concept is not gone."""
        whys = {
            "gone": "erasing improves no longer",
            "drift": f"the drift passed {DRIFT:g}, after the learning rate was lowered {self.lowered} times",
            "updates": f"all {self.limit} updates were taken",
        }
        advice = {"drift": "a lower learning_rate", "updates": "more iterations or a higher learning_rate"}
        return (
            f"the concept is {'' if self.gone else 'not '}gone: {whys[self.why]}. The patch is the state after "
            f"{self.step} updates (erased {self.least:.2f} at the least erased noise level, {GONE:g} is gone; largest "
            f"drift {self.most:.2f})" + ("" if self.gone else f". What may help: {advice[self.why]}")
        )

    def log(self) -> None:
        """Log why the run ended, as a warning if the concept is not gone."""
        LOG.log(logging.INFO if self.gone else logging.WARNING, "%s", self.text())
