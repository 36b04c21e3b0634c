"""The user's own LoRAs on a pipeline with patches: fused exactly as onto the base, and noticed by the gates."""

from __future__ import annotations

from typing import Any

from erasure.pipelines.stack import patch_stack


class LoraMixin:
    """The LoRA methods of diffusers, adapted to a pipeline with patches.

    Fusing changes weights, so folded patches are taken out of the weights for it and folded in again afterwards: the
    order of loading and fusing changes no bit. The other methods change the predictions of the networks, so latent
    gates discard their cached decisions.
    """

    def fuse_lora(self, *args: Any, **kwargs: Any) -> Any:
        """Fuse LoRAs as diffusers does, into the base weights; patches are folded in on top of them."""
        with patch_stack(self).aside():
            return super().fuse_lora(*args, **kwargs)  # type: ignore[misc]

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> Any:
        """Unfuse LoRAs as diffusers does, from the base weights; patches stay folded in."""
        with patch_stack(self).aside():
            return super().unfuse_lora(*args, **kwargs)  # type: ignore[misc]

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Load a LoRA as diffusers does, and discard the cached decisions of latent gates."""
        patch_stack(self).forget()
        return super().load_lora_weights(*args, **kwargs)  # type: ignore[misc]

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Unload all LoRAs as diffusers does, and discard the cached decisions of latent gates."""
        patch_stack(self).forget()
        return super().unload_lora_weights(*args, **kwargs)  # type: ignore[misc]

    def set_adapters(self, *args: Any, **kwargs: Any) -> Any:
        """Set the weights of LoRAs as diffusers does; the strengths of patches are set with `set_patches`."""
        patch_stack(self).forget()
        return super().set_adapters(*args, **kwargs)  # type: ignore[misc]

    def delete_adapters(self, *args: Any, **kwargs: Any) -> Any:
        """Delete LoRAs as diffusers does; patches are unloaded with `delete_patches`."""
        patch_stack(self).forget()
        return super().delete_adapters(*args, **kwargs)  # type: ignore[misc]

    def enable_lora(self, *args: Any, **kwargs: Any) -> Any:
        """Enable all LoRAs as diffusers does, and discard the cached decisions of latent gates."""
        patch_stack(self).forget()
        return super().enable_lora(*args, **kwargs)  # type: ignore[misc]

    def disable_lora(self, *args: Any, **kwargs: Any) -> Any:
        """Disable all LoRAs as diffusers does, and discard the cached decisions of latent gates."""
        patch_stack(self).forget()
        return super().disable_lora(*args, **kwargs)  # type: ignore[misc]
