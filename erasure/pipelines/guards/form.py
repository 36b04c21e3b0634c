"""What the forms of a guard have in common: settings that are checked, and what they attach for one call."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from erasure.config import build, check_settings
from erasure.errors import ErasureError
from erasure.model.architectures import Architecture, architecture_of
from erasure.model.base import Base
from erasure.model.conditioning import Conditions
from erasure.model.loading import name_of
from erasure.patch import Guard


@dataclass(frozen=True)
class Drawing:
    """One call of a pipeline, as guards see it.

    Args:
        pipe: the pipeline.
        network: its network that denoises, without the wrapper of `torch.compile`.
        prompts: the texts of each prompt, or None if only embeddings are known.
        images: number of images per prompt.
        whole: whether other hooks expect the rows of all prompts in every call of the network.
    """

    pipe: Any
    network: nn.Module
    prompts: list[list[str]] | None
    images: int
    whole: bool

    @cached_property
    def base(self) -> Base:
        """Return the checkpoint in the pipeline, which encodes texts."""
        return Base(name_of(self.pipe), self.pipe)

    def conditions(self, text: str) -> Conditions:
        """Return the network's conditions for one text [1, tokens, width], as guidance uses them for an empty one."""
        return self.base.conditions([text])


class Attached(Protocol):
    """What acts during one call.

    Args:
        component: the component in which it acts.
        calls: how often it has run.
    """

    component: str
    calls: int

    def remove(self) -> None:
        """Detach it, so that nothing of it is left."""


F = TypeVar("F", bound="Form")


@dataclass(frozen=True)
class Acting(Generic[F]):
    """One guard in one call.

    Args:
        form: its form, with its settings.
        texts: its texts.
        shares: its strength for each prompt [prompts], scale included.
    """

    form: F
    texts: tuple[str, ...]
    shares: Tensor


class Form(ABC):
    """A kind of change while drawing: a frozen dataclass whose fields are its settings, declared with `setting`."""

    NEEDS_PROMPTS: ClassVar[bool] = False  # whether it reads the words of the prompt
    NETWORKS: ClassVar[tuple[str, ...]] = ("unet",)  # architectures in which it can act, by name
    OPTIONAL: ClassVar[tuple[str, ...]] = ()  # settings that older patches lack: their defaults are what those did

    def __post_init__(self) -> None:
        """Check every setting against its declared range; raises ErasureError."""
        check_settings(self)

    @classmethod
    def unsuited(cls, architecture: Architecture) -> str:
        """Return why the form cannot act in networks of an architecture; an empty string where it can."""
        return "" if architecture.name in cls.NETWORKS else "it has not been carried over to this network"

    @classmethod
    @abstractmethod
    def prepare(cls, drawing: Drawing, guards: Sequence[Acting[Any]]) -> Callable[[], Attached]:
        """Encode what the guards of this form need, and return a function that lets them act.

        Args:
            drawing: the call.
            guards: the guards, sorted so that the order of loading changes no bit.

        Returns:
            A function whose result acts from then on, until its `remove` is called.
        """


def make_form(guard: Guard, forms: Mapping[str, type[Form]]) -> Form:
    """Return the form of a guard with its settings.

    Raises:
        ErasureError: the form is not known, a setting is missing or unknown, or a value is not allowed.
    """
    if guard.form not in forms:
        raise ErasureError(
            f"a guard of the form {guard.form!r} is not known to this version of Erasure, which has "
            f"{', '.join(forms)}; upgrade erasure-diffusion"
        )
    cls: Any = forms[guard.form]
    needed = [field.name for field in dataclasses.fields(cls) if field.name not in cls.OPTIONAL]
    missing = [name for name in needed if name not in guard.settings]
    if missing:
        raise ErasureError(f"a guard of the form {guard.form} lacks the settings {', '.join(missing)}")
    return build(cls, guard.settings)


def check_network(name: str, form: Form, kind: str, pipe: Any) -> str:
    """Return the component that a guard acts in.

    Args:
        name: the name of the patch, for the message.
        form: the guard's form.
        kind: the name of the form.
        pipe: the pipeline.

    Raises:
        ErasureError: the form cannot act in the pipeline's network.
    """
    architecture = architecture_of(pipe)
    if reason := form.unsuited(architecture):
        network = type(getattr(pipe, architecture.component)).__name__
        raise ErasureError(
            f"patch {name!r} is a guard of the form {kind}, which cannot act in a {network}: {reason}. "
            "Nothing was loaded"
        )
    return architecture.component


def rows_of(sample: Tensor, prompts: int) -> tuple[int, bool]:
    """Return where the rows of the prompts begin in a batch, and whether unconditional rows precede them.

    Args:
        sample: the latents of the network's call.
        prompts: number of images of the call.

    Raises:
        ErasureError: the batch is neither that of the prompts nor twice as large, as under classifier-free guidance.
    """
    rows = len(sample)
    if rows not in (prompts, 2 * prompts):
        raise ErasureError(
            f"a guard was opened for {prompts} images, but the network was called with a batch of {rows}; it knows "
            f"{prompts} rows, and {2 * prompts} under classifier-free guidance"
        )
    return rows - prompts, rows != prompts


def begun(time: Any, scheduler: Any, rows: int) -> Tensor:
    """Return for each row of a batch which share of the noise schedule is left, 1 at its noisy end [rows].

    Args:
        time: the timesteps of the network's call, one for all rows or one for each.
        scheduler: the pipeline's scheduler.
        rows: number of rows.
    """
    times = torch.as_tensor(time).detach().flatten().double().cpu() / scheduler.config.num_train_timesteps
    return times.expand(rows) if len(times) == 1 else times
