"""Named variants: the modules of a UNet that a method trains."""

from __future__ import annotations

# Variant -> its description, and the test of a module's path. Only Linear and Conv2d modules are ever trained.
TARGETS = {
    "x": ("cross-attention: query, key, value and output", lambda path: "attn2" in path),
    "x-strict": ("cross-attention: key and value", lambda path: path.endswith(("attn2.to_k", "attn2.to_v"))),
    "selfattn": ("self-attention", lambda path: "attn1" in path),
    "u": ("all but cross-attention", lambda path: "attn2" not in path),
    "transformer": ("every layer of the transformer blocks", lambda path: ".attentions." in path),
    "linear": (
        "linear layers of self-attention, feed-forward and time projections",
        lambda path: "attn1" in path or ".ff." in path or "time_emb_proj" in path,
    ),
    "full": ("every Linear and Conv2d", lambda path: True),
}
