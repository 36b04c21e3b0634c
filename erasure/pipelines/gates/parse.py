"""Reading the gate of a patch from its header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from erasure.errors import ErasureError, unknown
from erasure.patch import Delta, LowRank, Patch
from erasure.patch.module_keys import NETWORKS
from erasure.pipelines.gates.latent import LatentGate
from erasure.pipelines.gates.text import TextGate

KINDS = ("always", "text", "latent")
CLASSES: dict[str, Any] = {"text": TextGate, "latent": LatentGate}  # `always` needs no settings


def parse_gate(patch: Patch) -> TextGate | LatentGate | None:
    """Return the gate that the header of a patch describes, or None for `always`.

    A text gate without `texts` compares prompts with the names and aliases of the patch's concepts.

    Args:
        patch: the patch; its header has a table `gate` with the key `kind` and the settings of that kind.

    Raises:
        ErasureError: the kind or a key is unknown, a value is out of range, or the payload cannot be gated.
    """
    settings: Mapping[str, Any] = patch.gate
    kind = settings["kind"]
    if kind not in KINDS:
        raise unknown("gate", kind, KINDS)
    allowed = ["kind", *(field.name for field in fields(CLASSES[kind]))] if kind in CLASSES else ["kind"]
    for key in settings:
        if key not in allowed:
            raise unknown(f"key of a gate of kind {kind}", key, allowed)
    if kind == "always":
        return None
    if isinstance(patch.payload, Delta):
        raise ErasureError(
            f"a {kind} gate needs a low-rank payload, but this patch holds differences of whole weights, which act on "
            "every prompt alike"
        )
    if kind == "latent":
        if not isinstance(patch.payload, LowRank):
            raise ErasureError(
                "a latent gate compares the network with and without a low-rank change, and guards and features "
                "change no weight; they can have a text gate"
            )
        if len(patch.components) != 1 or patch.components[0] not in NETWORKS:
            raise ErasureError(
                f"a latent gate needs a patch that changes the {' or the '.join(NETWORKS)} alone, but this one changes "
                f"{', '.join(patch.components)}"
            )
        return LatentGate(**{key: value for key, value in settings.items() if key != "kind"})
    texts = settings.get("texts")
    if texts is None:
        texts = [
            name
            for concept in patch.concepts
            for name in [concept.get("name"), *_text_list("aliases of a concept", concept.get("aliases"))]
        ]
    numbers = {key: settings[key] for key in ("power", "threshold", "scale") if key in settings}
    return TextGate(tuple(_text_list("texts of a text gate", texts)), **numbers)


def _text_list(noun: str, texts: Any) -> list[Any]:
    if texts is not None and not isinstance(texts, list):
        raise ErasureError(f"the {noun} must be a list, not {texts!r}")
    return texts or []
