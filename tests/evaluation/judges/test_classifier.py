"""Classifiers of transformers and timm compared with direct calls, on tiny random networks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from erasure.errors import ErasureError
from erasure.evaluation.judges.classifier import ClassifierJudge
from erasure.evaluation.judges.labels import class_number, unique_names
from tests.evaluation.judging import CLASSES, MAP, noise, rows


def test_a_transformers_classifier_equals_a_direct_call(vit):
    from transformers import pipeline

    images = noise()
    judge = ClassifierJudge(vit)
    assert judge.heads == {"object": CLASSES}
    direct = pipeline("image-classification", model=vit, device="cpu", top_k=None)
    for verdict, entries in zip(judge.judge(images), direct([i.convert("RGB") for i in images]), strict=True):
        expected = {entry["label"]: entry["score"] for entry in entries}
        assert verdict["object"] == pytest.approx(expected, abs=1e-5)
    assert rows(judge.judge(images), "object").std(0).max() > 0.01


def test_labels_merge_classes_and_other_classes_still_compete(vit):
    images = noise()
    plain, judge = ClassifierJudge(vit), ClassifierJudge(vit, labels=MAP)
    assert judge.heads == {"object": ["fish", "cat", "church", "rose"]}
    before, after = rows(plain.judge(images), "object"), rows(judge.judge(images), "object")
    by_hand = torch.stack([before[:, 0], before[:, 1] + before[:, 2], before[:, 3], before[:, 4]], 1)
    torch.testing.assert_close(after, by_hand)
    torch.testing.assert_close(rows(judge.judge(images), "object_classes"), before)
    closed = ClassifierJudge(vit, labels=MAP, closed=True)
    torch.testing.assert_close(rows(closed.judge(images), "object"), by_hand[:, :2] / by_hand[:, :2].sum(1, True))
    assert judge.find("cat") == judge.find("Persian cat") == ("object", ["cat"])
    assert json.loads(judge.versions()["map"]) == {"fish": [CLASSES[0]], "cat": CLASSES[1:3]}


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ({"cat": "tabi"}, {}, "did you mean 'tabby'"),
        ({"cat": 5}, {}, "number up to 4"),
        ({"cat": "tabby", "pet": "tabby"}, {}, "'cat' and 'pet' both claim class 'tabby'"),
        ({"rose": "church"}, {}, "does not include the class 'rose'"),
        ({"cat": ["tabby", "Persian cat"]}, {"closed": True}, "at least two labels"),
        ({"cat": []}, {}, "stands for nothing"),
        (None, {"backend": "tim"}, "did you mean 'timm'"),
        (None, {"classes": "a,b"}, "2 class names were given, but .* has 5 outputs"),
    ],
)
def test_labels_that_do_not_fit_the_model(vit, labels, options, message):
    with pytest.raises(ErasureError, match=message):
        ClassifierJudge(vit, labels=labels, **options)


def test_two_classes_of_the_same_name_get_numbers():
    names = unique_names(["crane", "tench, Tinca tinca", "crane"])
    assert names == ["crane (0)", "tench, Tinca tinca", "crane (2)"]
    assert class_number("tinca TINCA", names) == 1 and class_number("crane (2)", names) == 2
    with pytest.raises(ErasureError, match=r"ambiguous: 0 .*2 "):
        class_number("crane", names)


def test_a_checkpoint_without_its_head_does_not_judge_at_random(vit, tmp_path):
    from transformers import ViTModel

    ViTModel.from_pretrained(vit, add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(ErasureError, match="lacks the weights classifier.bias.*at random"):
        ClassifierJudge(str(tmp_path), backend="transformers")
    with pytest.raises(ErasureError, match="cannot be loaded"):
        ClassifierJudge(str(tmp_path / "nothing"))


@pytest.mark.parametrize("named", [None, ["ant", "bee", "cow"]])
def test_a_timm_classifier_equals_a_direct_call(tmp_path, named):
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3).eval()
    torch.nn.init.normal_(model.head.weight)
    config = {"label_names": named} if named else None
    save_for_hf(model, tmp_path, model_config=config, safe_serialization=True)
    images = noise()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        expected = model(torch.stack([transform(image) for image in images])).softmax(1)
    judge = ClassifierJudge(str(tmp_path))
    assert judge.heads == {"object": named or ["0", "1", "2"]} and judge.versions()["library"].startswith("timm")
    torch.testing.assert_close(rows(judge.judge(images), "object"), expected)
    assert expected.std(0).max() > 1e-3
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ErasureError, match="needs config.json and model.safetensors"):
        ClassifierJudge(str(tmp_path))


def test_a_published_checkpoint_is_read_only_when_allowed(tmp_path):
    """UnlearnCanvas's form: the `model_state_dict` of a timm network; stretched images, mean and deviation 0.5."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=2).eval()
    torch.nn.init.normal_(model.head.weight)
    path = str(tmp_path / "style.pth")
    torch.save({"model_state_dict": model.state_dict(), "epoch": 1}, path)
    with pytest.raises(ErasureError, match="allow_pth=true"):
        ClassifierJudge(path)
    judge = ClassifierJudge(path, head="style", classes="Cubism,Rust", allow_pth=True, architecture="test_vit")
    image = noise(1)[0]
    stretched = image.resize((160, 160), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(stretched)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = model(pixels).softmax(1)
    verdict = judge.judge([image])
    assert judge.heads == {"style": ["Cubism", "Rust"]} and judge.find("Rust") == ("style", ["Rust"])
    torch.testing.assert_close(rows(verdict, "style"), expected, atol=1e-5, rtol=1e-4)
    torch.save({"model_state_dict": {"x": torch.zeros(1)}}, path)
    with pytest.raises(ErasureError, match="has no head.weight"):
        ClassifierJudge(path, allow_pth=True, architecture="test_vit")
