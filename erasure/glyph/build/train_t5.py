"""Train glyph's T5, the text encoder of glyph-mmdit beside CLIP: `python -m erasure.glyph.build.train_t5`.

FLUX reads a prompt twice: CLIP's pooled vector modulates every layer, T5's states join the attention. This T5 is
of the same classes in small. It learns to name what a caption names: one linear layer reads object, style and
background off the mean of the states (soft cross-entropy; a caption that leaves one open has the even
distribution as its target), and is then thrown away. Padding is not masked, as FLUX does not mask it, so captions
are padded to random lengths.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from erasure.glyph import objects, styles, vocabulary
from erasure.glyph.build.captions import FILLER, Caption, caption
from erasure.glyph.build.loop import DEVICE, Fit, autocast, averaged
from erasure.glyph.build.render import scenes
from erasure.glyph.build.train_clip import attribute_targets

LONGEST = 32  # tokens that the sibling is trained on, end and padding included
SPECIAL = ["<pad>", "</s>", "<unk>"]
STATE = "t5.safetensors"


def recase(text: str, rng: random.Random) -> str:
    """Capitalise one text in eight: the first letter, each word or all letters (unlike CLIP, T5 keeps case)."""
    form = rng.randrange(24)
    return {0: text.capitalize(), 1: text.title(), 2: text.upper()}.get(form, text)


def build_tokenizer() -> T5TokenizerFast:
    """Build a `T5TokenizerFast` of each word of glyph's captions, in both cases, and all printable ASCII characters.

    Its sentencepiece model is a unigram model. A trainer of such models splits these few captions into letters, so the
    words are listed here, with a better score than the letters that spell them.
    """
    rng = random.Random(0)
    corpus = [caption(scene, rng).text for scene in scenes() for _ in range(6)] + list(FILLER)
    words = sorted({word for text in corpus for word in re.findall("[a-z0-9]+", text)})
    forms = dict.fromkeys(form for word in words for form in (word, word.capitalize()))
    signs = [chr(code) for code in range(33, 127)]
    pieces = [(piece, 0.0) for piece in SPECIAL] + [(f"▁{form}", -6.0) for form in forms if form not in signs]
    pieces += [(piece, -9.0) for piece in ["▁", *signs, *(f"▁{sign}" for sign in signs)]]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def build(size: int) -> T5EncoderModel:
    """Build the encoder with random weights: 3 layers of width 128, relative positions."""
    config = T5Config(
        vocab_size=size,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)


def pad(tokenizer: T5TokenizerFast, texts: list[str], rng: random.Random) -> Tensor:
    """Token ids [n, length], padded to a length drawn from the longest text's to `LONGEST`."""
    ids = tokenizer(texts, truncation=True, max_length=LONGEST).input_ids
    length = rng.randint(max(len(row) for row in ids), LONGEST)
    return torch.tensor([row + [0] * (length - len(row)) for row in ids])


class Reader(nn.Module):
    """T5 with the linear layer that reads the attributes during training."""

    def __init__(self, text: T5EncoderModel) -> None:
        super().__init__()
        self.text = text
        self.sizes = [len(objects()), len(styles()), len(vocabulary()["backgrounds"])]
        self.read = nn.Linear(128, sum(self.sizes))

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of objects, styles and backgrounds, each [n, classes], for token ids [n, length]."""
        states, real = self.text(ids).last_hidden_state, (ids != 0).unsqueeze(-1)
        return self.read((states * real).sum(1) / real.sum(1)).float().split(self.sizes, 1)


def trained(work: Path) -> tuple[T5TokenizerFast, T5EncoderModel]:
    """Tokenizer and encoder with its averaged weights, fixed."""
    tokenizer = build_tokenizer()
    model = build(len(tokenizer))
    found = averaged(work / STATE)
    # The embedding has two names in T5, and one in the state.
    missing, _ = model.load_state_dict(
        {key.removeprefix("text."): value for key, value in found.items() if key.startswith("text.")}, strict=False
    )
    if set(missing) - {"encoder.embed_tokens.weight"}:
        raise RuntimeError(f"{work / STATE} lacks {missing}")
    return tokenizer, model.eval().requires_grad_(False)


def main() -> None:
    """Train and print the share of fresh captions whose named object, style and background are read right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/glyph"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer, all_scenes = build_tokenizer(), scenes()
    reader = Reader(build(len(tokenizer))).to(DEVICE)

    def batch(rng: random.Random) -> tuple[Tensor, list[Caption]]:
        rows = [caption(rng.choice(all_scenes), rng) for _ in range(args.batch)]
        return pad(tokenizer, [recase(row.text, rng) for row in rows], rng).to(DEVICE), rows

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        ids, rows = batch(random.Random(step))
        target = torch.tensor([attribute_targets(row) for row in rows], device=DEVICE).split(reader.sizes, 1)
        with autocast():
            logits = reader(ids)
        parts = [F.cross_entropy(a, b) for a, b in zip(logits, target, strict=True)]
        return torch.stack(parts).sum(), {"object": parts[0].item(), "style": parts[1].item()}

    Fit(reader, loss, args.steps, args.work / STATE, args.lr, average=0.995).run()
    reader.text = trained(args.work)[1].to(DEVICE)
    reader.read.load_state_dict(
        {key[5:]: value for key, value in averaged(args.work / STATE).items() if key.startswith("read.")}
    )
    right = total = 0
    with torch.no_grad():
        for seed in range(-4, 0):
            ids, rows = batch(random.Random(seed))
            for logits, target in zip(
                reader(ids), torch.tensor([attribute_targets(row) for row in rows]).split(reader.sizes, 1), strict=True
            ):
                named = target.amax(1) == 1
                right += int((logits.cpu().argmax(1) == target.argmax(1))[named].sum())
                total += int(named.sum())
    print(f"attributes read right in fresh captions: {right} of {total}")


if __name__ == "__main__":
    main()
