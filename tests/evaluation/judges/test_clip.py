"""CLIP of transformers and open_clip compared with direct calls, on tiny random networks."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from erasure.errors import ErasureError
from erasure.evaluation.judges.clip import ClipJudge
from tests.evaluation.judging import noise, rows


def test_zero_shot_equals_a_direct_call(clip):
    from transformers import CLIPModel, CLIPProcessor

    images = noise()
    judge = ClipJudge(clip, labels="cat,church,rose")
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    texts = [f"a photo of {label}" for label in judge.heads["object"]]
    with torch.no_grad():
        out = model(**processor(text=texts, images=images, return_tensors="pt", padding=True))
    cosines = 100 * out.logits_per_image / model.logit_scale.exp()
    verdicts = judge.judge(images)
    torch.testing.assert_close(rows(verdicts, "object_cosines"), cosines, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(rows(verdicts, "object"), cosines.softmax(1), atol=1e-3, rtol=1e-3)
    assert cosines.std(1).min() > 0.1 and cosines.std(0).min() > 0.1
    scores = judge.clip_scores(images[:3], texts)
    assert scores == pytest.approx(cosines.diag().tolist(), abs=1e-3)
    features = judge.features(images)
    assert features.shape == (5, 12) and np.allclose((features**2).mean(1), 1, atol=1e-5)
    assert len(judge.clip_scores(images[:1], ["cat " * 200])) == 1


def test_a_clip_with_half_its_weights_does_not_judge_at_random(clip, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(clip, folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if not key.startswith("text_model")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ErasureError, match=r"lacks the weights text_model.*at random"):
        ClipJudge(str(folder), labels="cat,dog")


def test_templates_and_texts_are_averaged_as_unit_vectors(clip):
    image = noise(1)
    single = ClipJudge(
        clip, labels={"a": "photo cat", "b": "drawing cat", "c": "photo dog", "d": "drawing dog"}, template="{}"
    )
    joint = ClipJudge(clip, labels=["cat", "dog"], template="photo {}|drawing {}")
    listed = ClipJudge(
        clip, heads={"style": {"cat": ["photo cat", "drawing cat"], "dog": "photo dog"}}, template=["{}"]
    )
    a, b, c, d = single._embedded["object"]
    seen = torch.from_numpy(single.features(image))[0] / 12**0.5
    expected = [100 * float(seen @ F.normalize(x + y, dim=0)) for x, y in ((a, b), (c, d))]
    assert list(joint.judge(image)[0]["object_cosines"].values()) == pytest.approx(expected, abs=1e-3)
    assert listed.judge(image)[0]["style_cosines"]["cat"] == pytest.approx(expected[0], abs=1e-3)
    assert listed.find("drawing cat") == listed.find("cat") == ("style", ["cat"])


def test_bad_options_of_clip(clip, tmp_path):
    for options, message in [
        ({"labels": "cat"}, "at least two labels"),
        ({"labels": "cat,cat"}, "occurs twice"),
        ({"labels": "cat,dog", "template": "a photo"}, "in the place of the label"),
        ({"labels": "cat,dog", "heads": {"x": ["a", "b"]}}, "not both"),
    ]:
        with pytest.raises(ErasureError, match=message):
            ClipJudge(clip, **options)
    with pytest.raises(ErasureError, match="did you mean 'church'"):
        ClipJudge(clip, labels=["church", "rose"]).find("chruch")
    with pytest.raises(ErasureError, match="cannot be loaded"):
        ClipJudge(str(tmp_path))
    with pytest.raises(ErasureError, match="did you mean 'ViT-B-32'"):
        ClipJudge("open_clip:ViT-B-322/openai")
    with pytest.raises(ErasureError, match="did you mean 'laion2b_s34b_b79k'"):
        ClipJudge("open_clip:ViT-B-32/laion2b_s34b_b79")


@pytest.fixture
def open_model(tmp_path):
    """Save a tiny model of open_clip to a folder, and return both."""
    import open_clip

    torch.manual_seed(0)
    size = {"layers": 1, "width": 64}
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "patch_size": 8, **size},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "heads": 2, **size},
    }
    model = open_clip.CLIP(**config)
    folder = tmp_path / "open"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder, model.eval()


def test_open_clip_equals_a_direct_call(open_model, monkeypatch):
    import open_clip

    folder, model = open_model
    images, labels = noise(), ["cat", "church", "rose"]
    judge = ClipJudge(f"open_clip:local-dir:{folder}", labels=labels)
    transform = open_clip.image_transform(32, is_train=False)
    tokens = open_clip.get_tokenizer("ViT-B-32")([f"a photo of {label}" for label in labels])
    with torch.no_grad():
        seen = model.encode_image(torch.stack([transform(image) for image in images]), normalize=True)
        cosines = 100 * seen @ model.encode_text(tokens, normalize=True).T
    verdicts = judge.judge(images)
    torch.testing.assert_close(rows(verdicts, "object_cosines"), cosines, atol=1e-3, rtol=1e-4)
    assert judge.versions()["library"].startswith("open_clip") and cosines.std(1).min() > 0.1
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    from_file = ClipJudge(f"open_clip:tiny/{folder / 'open_clip_model.safetensors'}", labels=labels)
    torch.testing.assert_close(rows(from_file.judge(images), "object_cosines"), cosines, atol=1e-3, rtol=1e-4)
    assert from_file.versions()["sha256"] == judge.versions()["sha256"]
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ErasureError, match=r"no \.safetensors"):
        ClipJudge(f"open_clip:local-dir:{folder}", labels=labels)
