"""Glyph's tokenizer: CLIP's byte-level BPE with merges learnt from glyph's captions."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from erasure.glyph.build.captions import FILLER, caption
from erasure.glyph.build.render import scenes

START, END = "<|startoftext|>", "<|endoftext|>"
SPLIT = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def build(merges: int = 480) -> CLIPTokenizer:
    """Train the tokenizer, which has 514 + `merges` entries.

    The entries are every byte, every byte at the end of a word, the merges, and the start and end tokens. Any text can
    be encoded. As in Stable Diffusion 1, the end token is also the padding.

    Args:
        merges: number of merges.
    """
    from tokenizers import Regex

    rng = random.Random(0)
    corpus = [caption(scene, rng).text for scene in scenes() for _ in range(6)] + list(FILLER) * 20
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    raw.train_from_iterator(corpus, trainer)
    import json

    learnt = [tuple(pair) for pair in json.loads(raw.to_str())["model"]["merges"]][:merges]
    entries = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in learnt), START, END]
    vocab = {entry: index for index, entry in enumerate(entries)}
    return CLIPTokenizer(
        vocab=vocab,
        merges=learnt,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=77,
    )
