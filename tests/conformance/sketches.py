"""Methods that only the tests know: the closed form that CONTRIBUTING.md writes from nothing, and a runtime method."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import torch

from erasure.config import setting
from erasure.method import RuntimeMethod
from erasure.methods import find
from erasure.model.closed_form import READERS
from erasure.patch import LowRank
from erasure.training.run import FitResult
from tests.conformance.quick import QUICK

GUIDE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


def written() -> type:
    """The class of the closed form in CONTRIBUTING.md, in a module of its own as dataclasses need it."""
    (code,) = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    module = ModuleType("sketch")
    sys.modules[module.__name__] = module
    exec(compile(code, str(GUIDE), "exec", dont_inherit=True), vars(module))
    return module.LastToken


@dataclass(frozen=True)
class Damped(RuntimeMethod):
    """Take the concept's direction out of what the keys and values read, for prompts that are near its name.

    Args:
        share: how much of the direction is taken out.
    """

    method: ClassVar[str] = "damped"
    STOCHASTIC: ClassVar[bool] = False

    share: float = setting(1.0, above=0)

    def collect(self, base, concepts, run):
        names = [name for concept in concepts for name in concept.names]
        named, empty = base.conditions(names), base.conditions([""] * len(names))
        x = torch.ones(len(names), *base.latent_shape())
        with torch.no_grad():  # only to have calls of the UNet that are counted
            differ = base.predict(x, torch.tensor(500), named) - base.predict(x, torch.tensor(500), empty)
        direction = (named.states - empty.states).mean((0, 1))
        down = torch.nn.functional.normalize(direction, dim=0)[None]
        share = self.share * (1 if torch.isfinite(differ).all() else 0)
        layers = {
            path: (down, -share * (module.weight.float() @ down.T), 1.0)
            for path, module in base.unet.named_modules()
            if path.endswith(READERS)
        }
        return FitResult(LowRank({"unet": layers}), {"kind": "text", "texts": names, "power": 1.0, "threshold": 0.0})


METHODS: dict[str, type] = {name: find(name) for name in sorted(QUICK)}
SKETCHES: dict[str, type] = {cls.method: cls for cls in (written(), Damped)}
METHODS |= SKETCHES


def those(kind: type) -> list[str]:
    """The names of the methods of a kind, for tests to be parametrised with."""
    return sorted(name for name, cls in METHODS.items() if issubclass(cls, kind))


class Point:
    """An entry point of another package."""

    def __init__(self, name: str, value: object) -> None:
        self.name, self.value = name, value

    def load(self) -> object:
        return self.value
