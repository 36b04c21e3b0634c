"""What text gates read in a prompt inside ComfyUI: the similarity of CLIP states, as erased pipelines compute it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from erasure.concepts.similarity import TextStates, gammas
from erasure.errors import ErasureError
from erasure.pipelines.gates.text import TextGate
from erasure.pipelines.loaded import Loaded

ENCODERS = ("l", "h", "g")  # ComfyUI's names of CLIP encoders, in the order in which diffusers' pipelines hold them


def strengths(clip: Any, entries: Mapping[str, Loaded], prompt: str) -> dict[str, float]:
    """Return the strength of each patch for one prompt: what is set, times what its gate says.

    ComfyUI reads a long prompt in parts. Each part is compared by itself, and the largest strength counts.

    Args:
        clip: a CLIP of ComfyUI.
        entries: the patches by name.
        prompt: the prompt; weights such as `(word:1.2)` and embeddings do not count.

    Raises:
        ErasureError: a patch has a text gate and the model no CLIP encoder.
    """
    texts = list(dict.fromkeys(text for entry in entries.values() for text in _texts(entry)))
    near: list[dict[str, float]] = []
    if texts:
        rows = gammas(states(clip, [prompt]), states(clip, texts, whole=False))
        near = [dict(zip(texts, row, strict=True)) for row in rows]
    found = {}
    for name, entry in entries.items():
        gate = entry.gate
        gain = 1.0
        if isinstance(gate, TextGate):
            gain = max(gate.strength(max(row[text] for text in gate.texts)) for row in near)
        found[name] = entry.strength * gain
    return found


def _texts(entry: Loaded) -> tuple[str, ...]:
    return entry.gate.texts if isinstance(entry.gate, TextGate) else ()


def states(clip: Any, texts: list[str], whole: bool = True) -> TextStates:
    """Encode texts with the first CLIP encoder, up to its last layer and norm, whatever layer the images are made with.

    Args:
        clip: a CLIP of ComfyUI.
        texts: n texts.
        whole: encode all parts of a long text, each as one row; otherwise only its first part.

    Raises:
        ErasureError: the model has no CLIP encoder.
    """
    key, encoder = _encoder(clip)
    names, parts = [], []
    for text in texts:
        chunks = clip.tokenize(text)[key]
        for number, chunk in enumerate(chunks if whole else chunks[:1]):
            names.append(text if len(chunks) == 1 else f"{text} (part {number + 1})" if whole else text)
            parts.append([_token(entry[0], encoder) for entry in chunk])
    clip.load_model()
    encoded = _last_states(encoder, torch.tensor(parts))
    special = set(encoder.special_tokens.values())
    flat = torch.nn.functional.normalize(encoded.flatten(1).float().cpu(), dim=1)
    return TextStates(names, flat, [set(part) - special for part in parts])


def _encoder(clip: Any) -> tuple[str, Any]:
    """Return ComfyUI's name of the first CLIP encoder, and the encoder."""
    for key in ENCODERS:
        encoder = getattr(clip.cond_stage_model, f"clip_{key}", None)
        if encoder is not None:
            return key, encoder
    raise ErasureError(
        "a text gate needs a CLIP text encoder, and this model has none. To let the patch act on every prompt, load it "
        "with gate: always"
    )


def _token(token: Any, encoder: Any) -> int:
    """Return the number of a token; an embedding, which has none, counts as the end of the text."""
    return int(token) if isinstance(token, int) else int(encoder.special_tokens["end"])


def _last_states(encoder: Any, ids: Tensor) -> Tensor:
    """Return the last hidden states after the final norm [rows, tokens, width]."""
    device = encoder.transformer.get_input_embeddings().weight.device
    with torch.no_grad():
        output: Tensor = encoder.transformer(ids.to(device))[0]
    return output
