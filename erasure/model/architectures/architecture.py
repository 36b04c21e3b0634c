"""What the rest of the code asks about a network: its modules by role, how it is told the text, what it predicts.

An architecture has no state. Its functions take the diffusers pipeline that holds the network, and `options`: arguments
of the pipeline's call that belong to the checkpoint, such as `max_sequence_length`, as its preset sets them.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError, unknown
from erasure.model.conditioning import Conditions
from erasure.model.diffusion import guide

Test = Callable[[str], bool]  # of a module's path
Options = Mapping[str, Any]


class Architecture(ABC):
    """A family of networks that share their module names, their inputs and what they predict."""

    name: ClassVar[str]  # for messages and tables
    component: ClassVar[str]  # the pipeline's component that holds the network
    network: ClassVar[str]  # the class of the network
    pipelines: ClassVar[tuple[str, ...]] = ()  # pipelines that concepts can be erased from
    joint: ClassVar[bool] = False  # whether text and image share one attention, so that text states change with depth
    flow: ClassVar[bool] = False  # whether it predicts the velocity noise - image of rectified flow
    guidance: ClassVar[str] = "guidance_scale"  # argument of the pipeline's call: scale of classifier-free guidance
    causal_text: ClassVar[bool] = True  # whether a text state depends on the text before it alone, as CLIP's does
    masked_text: ClassVar[bool] = False  # whether padding is masked, so that what layers read ends with the prompt
    samplers: ClassVar[tuple[str, ...]]  # kinds for `sampler`, the default first
    # Role of a module -> the test of its path. Every role in `roles` that is not in `optional` must match a module.
    roles: ClassVar[Mapping[str, Test]]
    optional: ClassVar[frozenset[str]] = frozenset()
    # Variant -> its description, and the test of a module's path. Only Linear and Conv2d modules are ever trained.
    variants: ClassVar[Mapping[str, tuple[str, Test]]]

    def drift(self, what: str) -> str:
        """Return why nothing about `what` is the text's alone; an empty string where text has its own attention."""
        if not self.joint:
            return ""
        return f"text and image share one attention there, so that {what} change with depth, image and time"

    @abstractmethod
    def check(self, pipe: Any) -> None:
        """Refuse a pipeline that lacks something which erasing needs, such as a text encoder; raises ErasureError."""

    @abstractmethod
    def encode(self, pipe: Any, prompt: str, options: Options) -> Conditions:
        """Return the text conditions of one prompt, encoded as the pipeline itself encodes it."""

    @abstractmethod
    def predict(self, pipe: Any, x: Tensor, t: Any, conditions: Conditions, options: Options) -> Tensor:
        """Return the network's output [n, c, h, w] for latents x [n, c, h, w] at the sampler's timesteps t.

        Args:
            pipe: the diffusers pipeline.
            x: latents, scaled as the sampler scales them.
            t: the sampler's timesteps, one number or [n].
            conditions: the text conditions of the n samples.
            options: of the checkpoint.
        """

    @abstractmethod
    def latent_shape(self, pipe: Any, options: Options) -> tuple[int, int, int]:
        """Return the shape (channels, height, width) of the latents of an image in the native size."""

    @abstractmethod
    def sampler(self, pipe: Any, kind: str) -> Any:
        """Return a new sampler of a kind in `samplers`, with the noise schedule of the checkpoint."""

    @abstractmethod
    def schedule(self, pipe: Any, kind: str, steps: int, shape: tuple[int, int, int], device: torch.device) -> Any:
        """Return a new sampler whose timesteps are set as the pipeline sets them for images of a size.

        Args:
            pipe: the diffusers pipeline.
            kind: as for `sampler`.
            steps: number of steps.
            shape: of the latents (channels, height, width).
            device: where the timesteps are needed.
        """

    def unconditional(self, pipe: Any, empty: Conditions) -> Conditions:
        """Return the conditions that guidance uses for the empty prompt, given its encoding."""
        return empty

    def as_read(self, pipe: Any, prompt: str, options: Options) -> str:
        """Return a prompt as the pipeline hands it to the tokenizer."""
        return prompt

    def guided(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Return classifier-free guidance of two outputs [n, c, h, w] as the pipeline combines them."""
        return guide(unconditional, conditional, scale)

    def rows(self, pipe: Any, conditions: Conditions) -> Tensor:
        """Return the text states of one prompt [tokens, width] as the layers read them that read nothing else."""
        return conditions.states[0]

    def summary(self, conditions: Conditions) -> Tensor | None:
        """Return one vector [n, width] that stands for each of n texts: CLIP's pooled text.

        Where there is none, it is the mean of the states that are not padding.
        """
        if conditions.pooled is not None or conditions.mask is None:
            return conditions.pooled
        mask = conditions.mask.to(conditions.states).unsqueeze(-1)
        return (conditions.states * mask).sum(1) / mask.sum(1)

    def still(self, pipe: Any, paths: Iterable[str]) -> bool:
        """Tell whether training only these modules leaves the output for the empty prompt unchanged."""
        return False

    def distilled(self, pipe: Any) -> bool:
        """Tell whether the network was distilled from a guided one, so that it knows no guidance of its own."""
        return False

    def call(self, pipe: Any, prompts: int, guidance: float, options: Options) -> dict[str, Any]:
        """Return the arguments with which the pipeline draws n prompts at a guidance scale.

        Args:
            pipe: the diffusers pipeline.
            prompts: number of prompts.
            guidance: scale of classifier-free guidance.
            options: of the checkpoint.

        Raises:
            ErasureError: the network is distilled, and the scale is not 1.
        """
        self.check_guidance(pipe, guidance)
        return {**options, self.guidance: guidance}

    def check_guidance(self, pipe: Any, guidance: float) -> None:
        """Refuse classifier-free guidance of a network that was distilled from a guided one.

        Raises:
            ErasureError: the network is distilled, and the scale is not 1.
        """
        if guidance != 1 and self.distilled(pipe):
            raise ErasureError(
                f"guidance {guidance:g} for a guidance-distilled model: it was trained to draw without classifier-free "
                "guidance, and a negative prompt does nothing in it. Give guidance 1 (trajectory_guidance=1); the "
                "guidance that it takes as an input is the pipeline's guidance_scale. Nothing was changed"
            )

    def modules(self, pipe: Any, test: Test) -> dict[str, nn.Module]:
        """Return the Linear and Conv2d modules of the network whose paths pass a test, by path."""
        return {
            path: module
            for path, module in getattr(pipe, self.component).named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and test(path)
        }

    def count(self, pipe: Any) -> dict[str, int]:
        """Count the modules of every role.

        Raises:
            ErasureError: a role that this architecture must have matches no module: its names have changed.
        """
        counted = {role: len(self.modules(pipe, test)) for role, test in self.roles.items()}
        if missing := [role for role, number in counted.items() if not number and role not in self.optional]:
            kind = type(getattr(pipe, self.component)).__name__
            raise ErasureError(
                f"no module of this {kind} has the role {', '.join(missing)}: the names of its modules are not those "
                f"of the architecture {self.name}"
            )
        return counted

    def checked_sampler(self, kind: str) -> str:
        """Return `kind` if it is a sampler of this architecture.

        Raises:
            ErasureError: it is not; the message lists those that are.
        """
        if kind not in self.samplers:
            raise unknown("sampler", kind, self.samplers)
        return kind


class CountedOnly(Architecture):
    """What is said of networks whose modules can be counted, and nothing else yet; to be listed as the first parent."""

    def _unsupported(self) -> ErasureError:
        return ErasureError(f"{self.name}: its modules can be counted, but concepts cannot be erased from it yet")

    def check(self, pipe: Any) -> None:
        """Refuse, because erasing from this network is not supported."""
        raise self._unsupported()

    def encode(self, pipe: Any, prompt: str, options: Options) -> Conditions:
        """Refuse, because erasing from this network is not supported."""
        raise self._unsupported()

    def predict(self, pipe: Any, x: Tensor, t: Any, conditions: Conditions, options: Options) -> Tensor:
        """Refuse, because erasing from this network is not supported."""
        raise self._unsupported()

    def latent_shape(self, pipe: Any, options: Options) -> tuple[int, int, int]:
        """Refuse, because erasing from this network is not supported."""
        raise self._unsupported()

    def sampler(self, pipe: Any, kind: str) -> Any:
        """Refuse, because erasing from this network is not supported."""
        raise self._unsupported()

    def schedule(self, pipe: Any, kind: str, steps: int, shape: tuple[int, int, int], device: torch.device) -> Any:
        """Refuse, because erasing from this network is not supported."""
        raise self._unsupported()


def ends(*names: str) -> Test:
    """Return a test for paths that end with one of the names."""
    return lambda path: path.endswith(names)


def holds(*names: str) -> Test:
    """Return a test for paths that contain one of the names."""
    return lambda path: any(name in path for name in names)


def starts(*names: str) -> Test:
    """Return a test for paths that begin with one of the names."""
    return lambda path: path.startswith(names)


def default(pipe: Any, options: Options, name: str, other: Any = None) -> Any:
    """Return an argument of the pipeline's call: as the checkpoint's options set it, or else its default."""
    if name in options:
        return options[name]
    for parent in type(pipe).__mro__:
        parameters = inspect.signature(vars(parent)["__call__"]).parameters if "__call__" in vars(parent) else {}
        if name in parameters:
            return parameters[name].default
    return other


def times(t: Any, x: Tensor) -> Tensor:
    """Return timesteps, given as one number or [n], as a float tensor [n] next to n samples x."""
    return torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))


def sides(pipe: Any, options: Options, native: int) -> tuple[int, int]:
    """Return height and width in latent pixels, from the options' pixels or else from the native latent side."""
    factor = getattr(pipe, "vae_scale_factor", 8)
    height, width = (options.get(name) for name in ("height", "width"))
    return (height // factor if height else native), (width // factor if width else native)


def missing(pipe: Any, names: Iterable[str]) -> list[str]:
    """Return those components of a pipeline that are absent."""
    return [name for name in names if getattr(pipe, name, None) is None]
