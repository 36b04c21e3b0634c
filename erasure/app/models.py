"""The models that the page offers, each loaded once, with the stack of whoever is being served."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from erasure.errors import ErasureError, unknown
from erasure.evaluation.defaults import GLYPH
from erasure.evaluation.judges.registry import check_judge
from erasure.method import GradientMethod
from erasure.methods import find, names
from erasure.model import presets
from erasure.model.base import Base
from erasure.model.loading import quiet, resolve
from erasure.patch import Patch
from erasure.patch.module_keys import NETWORKS
from erasure.pipelines.classes import load_pipeline

MOST = 2  # models in memory at a time
QUICKEST, SECOND = "uce", "esd"  # the method that is chosen at first: where there is a closed form, and elsewhere


class Models:
    """The models that visitors may choose, and those of them that are in memory.

    Args:
        own: folders, `.safetensors` files or hub ids that are offered besides the bundled models.
        device: where to compute; None: the accelerator if there is one.
        any_path: whether visitors may name folders and files of this machine themselves.
        judges: judges that are offered besides glyph's, as `find_judge` takes them.

    Raises:
        ErasureError: one of `own` does not exist or is no model, or a judge is of no known kind.
    """

    def __init__(
        self,
        own: Sequence[str] = (),
        device: str | None = None,
        any_path: bool = True,
        judges: Sequence[str] = (),
    ) -> None:
        for name in own:
            resolve(name)
        for judge in judges:
            check_judge(judge)
        self.judges = [GLYPH, *judges]
        self.offered = [*own, *presets.bundled()]
        self.device, self.any_path = device, any_path
        self._loaded: dict[str, Any] = {}

    def choices(self) -> list[tuple[str, str]]:
        """Return the offered models as pairs of what the page shows and the name."""
        return [(label(name), name) for name in self.offered]

    def check(self, name: str) -> str:
        """Return the name of a model that a visitor may use.

        Raises:
            ErasureError: it is not offered and paths are not allowed, or it does not exist.
        """
        if name in self.offered:
            return name
        if not self.any_path:
            raise ErasureError(
                f"{name}: visitors cannot open files of this machine. Whoever started the page can offer the model "
                "with `erasure app --model`"
            )
        if not Path(name).expanduser().exists():
            raise unknown("model", name, self.offered)
        resolve(name)
        return name

    def check_judge(self, judge: str) -> str:
        """Return a judge, as `find_judge` takes it, that a visitor may use.

        Raises:
            ErasureError: it is not offered and paths are not allowed, because a judge names folders and files.
        """
        if judge not in self.judges and not self.any_path:
            raise ErasureError(
                f"{judge}: visitors cannot open files of this machine, so only these judges are offered: "
                f"{', '.join(self.judges)}. Whoever started the page can offer more with `erasure app --judge`"
            )
        return judge

    def open(self, name: str) -> Any:
        """Return the pipeline of a model, and load it unless it is in memory; of several the latest two are kept.

        Raises:
            ErasureError: the model may not be used or cannot be loaded.
        """
        self.check(name)
        if name not in self._loaded:
            quiet()
            while len(self._loaded) >= MOST:
                del self._loaded[next(iter(self._loaded))]
            pipe = load_pipeline(name, device=self.device)
            pipe.set_progress_bar_config(disable=True)
            self._loaded[name] = pipe
        self._loaded[name] = self._loaded.pop(name)
        return self._loaded[name]

    @contextmanager
    def patched(self, name: str, patches: Mapping[str, tuple[Patch, float]]) -> Iterator[Any]:
        """Give the pipeline of a model with one visitor's patches on it, and take them off again.

        Args:
            name: the model.
            patches: the patches and their strengths, by name.
        """
        pipe = self.open(name)
        pipe.unload_patches()
        try:
            if patches:
                pipe.load_patches({key: patch for key, (patch, _) in patches.items()})
                pipe.set_patches({key: strength for key, (_, strength) in patches.items()})
            yield pipe
        finally:
            pipe.unload_patches()


def label(name: str) -> str:
    """Return what the page shows for a model: the name, and of a path only its last part."""
    return name if name in presets.bundled() else Path(name).name


def base_of(name: str, pipe: Any) -> Base:
    """Return a pipeline without patches as a base to erase from, under the name that the visitor chose it by."""
    return replace(Base.of(pipe), name=name)


def suited(pipe: Any) -> list[str]:
    """Return the methods that can erase from a model, the one that is chosen at first in front."""
    architecture = Base.of(pipe).architecture
    able = [name for name in names() if not find(name).unsuited(architecture)]
    first = [name for name in (QUICKEST, SECOND) if name in able]
    return [*first[:1], *(name for name in able if name not in first[:1])]


def method_label(name: str) -> str:
    """Return what the page shows for a method: its name, and whether it trains."""
    trains = issubclass(find(name), GradientMethod)
    return f"{name} · {'trains' if trains else 'no training'}"


def watched(pipe: Any) -> list[nn.Module]:
    """Return the modules at whose calls work may stop: the network that denoises first, then the text encoders."""
    parts = (getattr(pipe, name, None) for name in (*NETWORKS, "text_encoder", "text_encoder_2", "text_encoder_3"))
    return [part for part in parts if isinstance(part, nn.Module)]
