"""CLIP's tokenizer, built from open_clip's vocabulary."""

from __future__ import annotations

import open_clip
import pytest

from erasure.model.clip_tokenizer import SIZE, clip_tokenizer

TEXTS = [
    "a photo of a cat",
    "A Photo  of an ASTRONAUT riding a horse on mars, 8k (trending:1.2)",
    "it's the dog's caf\u00e9 \u2014 \u65e5\u672c\u8a9e",
    'Van Gogh\'s "Starry Night"',
    "",
]


def test_known_ids():
    assert clip_tokenizer()("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(clip_tokenizer()) == SIZE == clip_tokenizer().vocab_size


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_open_clips_own(text):
    ids = open_clip.get_tokenizer("ViT-L-14")(text)[0].tolist()
    assert clip_tokenizer()(text).input_ids == ids[: ids.index(SIZE - 1) + 1]


def test_padding_is_the_end_token_or_id_0():
    rows = [clip_tokenizer(*pad)("a cat", padding="max_length").input_ids for pad in ((), ("!",))]
    assert rows[0] == [49406, 320, 2368, *[49407] * 74] and rows[1] == [49406, 320, 2368, 49407, *[0] * 73]
