"""The checkpoint that concepts are erased from: its components, its text encodings, and its modules by type."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from erasure.concepts.vocabulary import Vocabulary
from erasure.concepts.word_lists import WordLists
from erasure.errors import ErasureError, unknown
from erasure.model import presets
from erasure.model.architectures import Architecture, architecture_of
from erasure.model.architectures import pipelines as erasable
from erasure.model.conditioning import Conditions, place
from erasure.model.loading import best_device, call_of, look, name_of, open_pipeline, resolve
from erasure.model.quantising import is_quantised


@dataclass(frozen=True)
class Block:
    """The states of one name to edit, which are not read before they are needed.

    Args:
        key: what decides the states, in words: the prompts, those in their stead, and which states are taken.
        prompts: all prompts whose states `make` reads.
        make: returns the states [n, d], their guides [n, d] and their weights [n], in float64.
    """

    key: str
    prompts: tuple[str, ...]
    make: Callable[[Any], tuple[Tensor, Tensor, Tensor]]


@dataclass
class Base:
    """A loaded checkpoint: the components that erasing needs, each of them in memory once.

    Args:
        name: the model's name, as the user gave it.
        pipe: the diffusers pipeline that holds the components.
        about: the detected type of the model, in words.
    """

    name: str
    pipe: Any
    about: str = ""
    _texts: dict[str, Conditions] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls, model: str | os.PathLike[str] = "glyph", *, device: str | torch.device | None = None, **options: Any
    ) -> Base:
        """Load a checkpoint as the plain diffusers pipeline of its type.

        Args:
            model: the name of a bundled checkpoint, a diffusers folder, a `.safetensors` file or a hub id.
            device: the device to compute on; None chooses `best_device()`.
            options: arguments of diffusers' `from_pretrained`, and `config` for a single file (see
                `single_file.identify`).

        Raises:
            ErasureError: the model is unknown or cannot be loaded, or there is no such device.
        """
        import diffusers

        detected = look(resolve(model), **options)
        if detected.pipeline not in erasable():
            raise ErasureError(
                f"{model}: {detected.about}. Concepts can be erased from {', '.join(erasable())}; their patches load "
                "into the other pipelines of the family. Nothing was loaded"
            )
        pipe = open_pipeline(getattr(diffusers, detected.pipeline), model, **options)
        architecture_of(pipe).check(pipe)
        try:
            return cls(os.fspath(model), pipe.to(device or best_device()), detected.about)
        except (RuntimeError, AssertionError) as fault:
            raise ErasureError(f"{model} cannot be put on {device or best_device()}: {fault}") from None

    @classmethod
    def of(cls, value: Base | str | os.PathLike[str] | Any) -> Base:
        """Return a base from a base, from the name or path of a model, or from a diffusers pipeline.

        Args:
            value: a base is returned as it is; a name or path is loaded; a base made from a pipeline shares its
                components, which stay where they are.

        Raises:
            ErasureError: the model cannot be loaded, concepts cannot be erased from such a pipeline, or the pipeline
                has active patches.
        """
        if isinstance(value, Base):
            return value
        if isinstance(value, str | os.PathLike):
            return cls.load(value)
        architecture_of(value).check(value)
        patches = value.get_list_patches() if hasattr(value, "get_list_patches") else {}
        if active := [name for name, entry in patches.items() if entry["strength"]]:
            raise ErasureError(
                f"This pipeline has active patches ({', '.join(active)}); the new erasure would depend on them. "
                "Unload or disable them first (unload_patches(), or set_patches({})). Nothing was changed"
            )
        return cls(name_of(value), value)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Return the words that this checkpoint was taught, or None if they are not known."""
        return presets.vocabulary(self.name)

    @property
    def words(self) -> Vocabulary | WordLists:
        """Return what says of which kind a concept is: the checkpoint's vocabulary if it is known, else our lists."""
        return self.vocabulary or WordLists()

    def family(self, given: str | None = None) -> presets.Family:
        """Return the family that the checkpoint belongs to, whose preset holds the settings that suit it.

        Args:
            given: the name of a preset to take instead.

        Raises:
            ErasureError: there is no such preset.
        """
        return presets.family(self.pipe, self.name, given)

    @property
    def architecture(self) -> Architecture:
        """Return the kind of network that the checkpoint has, and what is particular to it.

        Raises:
            ErasureError: the network is of no known kind.
        """
        return architecture_of(self.pipe)

    @property
    def component(self) -> str:
        """Return the name of the component that holds the network, such as `unet`."""
        return self.architecture.component

    @property
    def network(self) -> Any:
        """Return the network that denoises, a UNet or a transformer, of which only one copy is in memory."""
        return getattr(self.pipe, self.component)

    @property
    def quantised(self) -> bool:
        """Return whether layers of the network are quantised, so that only what acts beside them can be trained."""
        return any(map(is_quantised, self.network.parameters()))

    @property
    def unet(self) -> Any:
        """Return the network of a checkpoint that has a UNet."""
        return self.pipe.unet

    @property
    def options(self) -> Mapping[str, Any]:
        """Return the arguments of the pipeline's call that belong to the checkpoint, from its family's preset."""
        if self.component == "unet":
            return {}
        preset = self.family().preset
        return {} if preset is None else preset.call

    @property
    def scheduler(self) -> Any:
        """Return the checkpoint's own scheduler, from whose configuration all samplers are made."""
        return self.pipe.scheduler

    @property
    def device(self) -> torch.device:
        """Return the device that the network computes on, also where its weights are offloaded between calls."""
        return place(self.pipe, self.network)

    def sampler(self, kind: str | None = None) -> Any:
        """Return a new sampler with the checkpoint's noise schedule.

        Args:
            kind: `ddim` or `pndm`, for models of rectified flow `euler`; None: the first that the architecture has.

        Raises:
            ErasureError: an unknown kind of sampler, or one that the architecture does not have.
        """
        return self.architecture.sampler(self.pipe, kind or self.architecture.samplers[0])

    def schedule(self, kind: str | None, steps: int, shape: tuple[int, int, int]) -> Any:
        """Return a new sampler whose timesteps are set for `steps` steps and latents of a shape.

        Raises:
            ErasureError: as for `sampler`.
        """
        kind = kind or self.architecture.samplers[0]
        return self.architecture.schedule(self.pipe, kind, steps, shape, self.device)

    def latent_shape(self, scale: float | tuple[float, float] = 1.0) -> tuple[int, int, int]:
        """Return the shape (channels, height, width) of latents, in latent pixels.

        Args:
            scale: factor on the native size, or two factors for height and width.
        """
        channels, height, width = self.architecture.latent_shape(self.pipe, self.options)
        tall, wide = scale if isinstance(scale, tuple) else (scale, scale)
        return channels, round(height * tall), round(width * wide)

    def check_guidance(self, scale: float) -> None:
        """Refuse guidance of a distilled model; raises ErasureError."""
        self.architecture.check_guidance(self.pipe, scale)

    @property
    def distilled(self) -> bool:
        """Tell whether the model was distilled from a guided one, so that guidance 1 is all that it knows."""
        return self.architecture.distilled(self.pipe)

    def call(self, prompts: int, guidance: float) -> dict[str, Any]:
        """Return the arguments with which the pipeline draws n prompts at a guidance scale.

        Raises:
            ErasureError: the model is distilled, and the scale is not 1.
        """
        return call_of(self.pipe, prompts, guidance, self.family())

    def encode(self, prompts: list[str]) -> Tensor:
        """Return the text encoder's states for prompts [n, tokens, width].

        Each prompt is encoded once and then kept in memory.

        Raises:
            ErasureError: a prompt has more tokens than the text encoder reads.
        """
        return self._encoded(prompts).states

    def rows(self, prompt: str) -> Tensor:
        """Return the text states of a prompt [tokens, width], as the layers read them that read nothing but text.

        Raises:
            ErasureError: the prompt has more tokens than the text encoder reads.
        """
        return self.architecture.rows(self.pipe, self._encoded([prompt]))

    def as_read(self, text: str) -> str:
        """Return a text as the pipeline hands it to the tokenizer."""
        return self.architecture.as_read(self.pipe, text, self.options)

    def summary(self, prompts: list[str]) -> Tensor | None:
        """Return one vector [n, width] that stands for each prompt; None where its state at the end token does.

        Raises:
            ErasureError: a prompt has more tokens than a text encoder reads.
        """
        return None if self.component == "unet" else self.architecture.summary(self._encoded(prompts))

    def conditions(self, prompts: list[str]) -> Conditions:
        """Return the network's text conditions for n prompts; for the empty prompt, those that guidance uses.

        Raises:
            ErasureError: a prompt has more tokens than the text encoder reads.
        """
        encoded = self._encoded(prompts)
        if "" not in prompts or encoded.pooled is None:
            return encoded
        architecture, parts = self.architecture, [encoded[i : i + 1] for i in range(len(prompts))]
        return Conditions.cat(
            [
                part if text else architecture.unconditional(self.pipe, part)
                for text, part in zip(prompts, parts, strict=True)
            ]
        )

    def predict(self, x: Tensor, t: Any, conditions: Conditions) -> Tensor:
        """Return the network's output [n, c, h, w]: noise, v, clean latents or a velocity, depending on the checkpoint.

        Args:
            x: latents [n, c, h, w], scaled as the sampler scales them.
            t: timesteps, one number or [n].
            conditions: the text conditions of the n samples.
        """
        return self.architecture.predict(self.pipe, x, t, conditions, self.options)

    def guided(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Return classifier-free guidance of two outputs [n, c, h, w] as the checkpoint's pipeline combines them."""
        return self.architecture.guided(unconditional, conditional, scale)

    def _encoded(self, prompts: list[str]) -> Conditions:
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._texts:
                self._texts[prompt] = self.architecture.encode(self.pipe, prompt, self.options)
        return Conditions.cat([self._texts[prompt] for prompt in prompts])

    def blocks(self, jobs: Sequence[Block]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the states, guides and weights of each name that is edited together with others; see `Block`."""
        return [job.make(self) for job in jobs]

    def kept_states(self, prompts: list[str], part: str, read: Callable[..., Tensor]) -> Tensor:
        """Return the states of kept prompts, one a row: those that `read` returns for this base, prompts and part."""
        return read(self, prompts, part)

    def targets(self, variant: str) -> dict[str, nn.Module]:
        """Return the Linear and Conv2d modules of the network that a variant trains, by their paths.

        Args:
            variant: a name in the architecture's `variants`, such as `x` or `x-strict`.

        Raises:
            ErasureError: an unknown variant, or one that matches no module of this checkpoint.
        """
        variants = self.architecture.variants
        if variant not in variants:
            raise unknown("variant", variant, variants)
        modules = self.architecture.modules(self.pipe, variants[variant][1])
        if not modules:
            raise ErasureError(f"variant {variant!r} matches no module of this {type(self.network).__name__}")
        return modules

    def still(self, paths: Iterable[str]) -> bool:
        """Tell whether training only these modules leaves the network's output for the empty prompt unchanged.

        Args:
            paths: the paths of the modules in the network.
        """
        return self.architecture.still(self.pipe, paths)
