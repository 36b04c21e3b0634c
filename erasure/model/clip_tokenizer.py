"""CLIP's tokenizer, built from the vocabulary that open_clip ships, because single-file checkpoints have none."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import Any

from erasure.errors import ErasureError

FILE = "bpe_simple_vocab_16e6.txt.gz"
SIZE = 49408  # tokens; the first 512 are bytes, the last two special
START, END = "<|startoftext|>", "<|endoftext|>"


@cache
def vocabulary() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Read CLIP's token ids and the merges of its byte-pair encoding (Radford et al. 2021, section 2.4).

    Returns:
        The id of each token, and the pairs of tokens that are merged, in order.

    Raises:
        ErasureError: open_clip's file cannot be read.
    """
    import open_clip
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    path = Path(open_clip.__file__).with_name(FILE)
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except OSError as fault:
        raise ErasureError(f"{path}: CLIP's vocabulary cannot be read: {fault.strerror or fault}") from None
    letters = list(bytes_to_unicode().values())  # in the order of their ids
    pairs = lines[1 : 1 + SIZE - 2 - 2 * len(letters)]
    merges = tuple((first, second) for first, second in (line.split() for line in pairs))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    return {token: number for number, token in enumerate(tokens)}, merges


def clip_tokenizer(pad: str = END) -> Any:
    """Build a CLIPTokenizer from transformers for prompts of up to 77 tokens.

    Args:
        pad: the padding token, which is the end token for CLIP-L and `!` (id 0) for OpenCLIP's encoders.

    Raises:
        ErasureError: open_clip's file cannot be read.
    """
    from transformers import CLIPTokenizer

    ids, merges = vocabulary()
    return CLIPTokenizer(vocab=dict(ids), merges=list(merges), model_max_length=77, pad_token=pad)
