"""Transformers whose modules are counted, and nothing else yet: FLUX.2 and Z-Image."""

from __future__ import annotations

from erasure.model.architectures.architecture import CountedOnly, ends, holds, starts
from erasure.model.architectures.mmdit import TEXT_STREAM, JointAttention


class Flux2(CountedOnly, JointAttention):
    """FLUX.2: two-stream and one-stream blocks without pooled text, with one modulation for all blocks of a kind.

    A one-stream block has one layer for queries, keys, values and feed-forward together, so that no variant trains its
    keys and values alone.
    """

    name = "flux2"
    network = "Flux2Transformer2DModel"
    roles = {
        "joint attention": lambda path: ".attn." in path and path.startswith("transformer_blocks."),
        "text stream": ends(*TEXT_STREAM),
        "single-stream blocks": starts("single_transformer_blocks."),
        "text entry": starts("context_embedder"),
        "feed-forward": holds(".ff.", ".ff_context."),
        "modulation": holds("modulation", "norm_out.linear"),
    }


class ZImage(CountedOnly, JointAttention):
    """Z-Image: one stream of text and image, after two blocks for each of them alone."""

    name = "z-image"
    network = "ZImageTransformer2DModel"
    roles = {
        "single-stream attention": lambda path: ".attention." in path and path.startswith("layers."),
        "single-stream blocks": starts("layers."),
        "text refiner": starts("context_refiner."),
        "image refiner": starts("noise_refiner."),
        "text entry": starts("cap_embedder."),
        "feed-forward": holds(".feed_forward."),
        "modulation": holds("adaLN_modulation"),
    }
    variants = {
        "x": ("attention: queries, keys, values and outputs", holds(".attention.")),
        "x-strict": ("attention: keys and values", ends("attention.to_k", "attention.to_v")),
        "qk": ("attention: queries and keys", ends("attention.to_q", "attention.to_k")),
        "text": ("the blocks that read text alone", starts("context_refiner.")),
        "u": ("all but attention", lambda path: ".attention." not in path),
        "transformer": ("every layer of the one-stream blocks", starts("layers.")),
        "full": ("every Linear and Conv2d", lambda path: True),
    }
