"""The user's own LoRAs beside patches: fused exactly as onto the base, and seen by the gates."""

from __future__ import annotations

from typing import Any

from erasure.pipelines.stack import patch_stack


class LoraMixin:
    """diffusers' LoRA verbs, for a pipeline with patches.

    Fusing changes weights: folded patches are taken off for it and put back, so that every order of the two gives the
    same bits. The other verbs change what the network answers, so the latent gate decides anew.
    """

    def fuse_lora(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers; patches lie on top of what is fused."""
        with patch_stack(self).aside():
            return super().fuse_lora(*args, **kwargs)  # type: ignore[misc]

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers; patches stay."""
        with patch_stack(self).aside():
            return super().unfuse_lora(*args, **kwargs)  # type: ignore[misc]

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers."""
        patch_stack(self).forget()
        return super().load_lora_weights(*args, **kwargs)  # type: ignore[misc]

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers."""
        patch_stack(self).forget()
        return super().unload_lora_weights(*args, **kwargs)  # type: ignore[misc]

    def set_adapters(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers: of LoRAs; patches have `set_patches`."""
        patch_stack(self).forget()
        return super().set_adapters(*args, **kwargs)  # type: ignore[misc]

    def delete_adapters(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers: of LoRAs; patches have `delete_patches`."""
        patch_stack(self).forget()
        return super().delete_adapters(*args, **kwargs)  # type: ignore[misc]

    def enable_lora(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers."""
        patch_stack(self).forget()
        return super().enable_lora(*args, **kwargs)  # type: ignore[misc]

    def disable_lora(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers."""
        patch_stack(self).forget()
        return super().disable_lora(*args, **kwargs)  # type: ignore[misc]
