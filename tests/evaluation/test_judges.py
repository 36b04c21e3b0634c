"""Judges against direct calls of their libraries, on tiny random networks; NudeNet on a real photograph."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from erasure.errors import ErasureError
from erasure.evaluation import evaluate, judges
from erasure.evaluation.judges import LabelsOnly, find_judge
from erasure.evaluation.judges.classifier import ClassifierJudge
from erasure.evaluation.judges.clip import ClipJudge
from erasure.evaluation.judges.ensemble import EnsembleJudge
from erasure.evaluation.judges.labels import class_number, distinct
from erasure.evaluation.judges.nudity import EXPOSED, PARTS, NudeNetJudge
from erasure.evaluation.metrics import Judged
from erasure.evaluation.promptset import Prompt, PromptSet
from erasure.glyph import CHECKPOINT
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.tiny import tiny_pipeline

CLASSES = ["tench, Tinca tinca", "tabby", "Persian cat", "church", "rose"]
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MAP = {"fish": "tench", "cat": ["tabby", 2]}


def noise(n=5, side=40):
    rng = np.random.default_rng(0)
    # Each image has its own grid of big tiles, so that networks with random weights tell them apart.
    tiles = rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(tile).resize((side, side + 8), Image.Resampling.NEAREST) for tile in tiles]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A classifier of transformers in a folder."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorFast

    torch.manual_seed(0)
    names = dict(enumerate(CLASSES))
    config = ViTConfig(image_size=32, patch_size=8, id2label=names, initializer_range=0.5, **TOWER)
    folder = tmp_path_factory.mktemp("vit")
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorFast(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of transformers in a folder, with glyph's tokenizer."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorFast, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "initializer_factor": 20.0, **TOWER}
    vision = {"image_size": 32, "patch_size": 8, "initializer_factor": 20.0, **TOWER}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    images = CLIPImageProcessorFast(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photograph():
    """Grace Hopper, U.S. Navy, public domain; matplotlib brings it along."""
    from matplotlib import cbook

    with Image.open(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))) as image:
        return image.convert("RGB")


def rows(verdicts, head):
    return torch.tensor([list(verdict[head].values()) for verdict in verdicts])


# Classifiers


def test_a_transformers_classifier_says_what_transformers_says(vit):
    from transformers import pipeline

    images = noise()
    judge = ClassifierJudge(vit)
    assert judge.heads == {"object": CLASSES}
    direct = pipeline("image-classification", model=vit, device="cpu", top_k=None)
    for verdict, said in zip(judge.judge(images), direct([i.convert("RGB") for i in images]), strict=True):
        expected = {entry["label"]: entry["score"] for entry in said}
        assert verdict["object"] == pytest.approx(expected, abs=1e-5)
    assert rows(judge.judge(images), "object").std(0).max() > 0.01


def test_a_map_merges_classes_and_leaves_the_others_their_say(vit):
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
    ("labels", "options", "says"),
    [
        ({"cat": "tabi"}, {}, "did you mean 'tabby'"),
        ({"cat": 5}, {}, "number up to 4"),
        ({"cat": "tabby", "pet": "tabby"}, {}, "stands under 'cat' and 'pet'"),
        ({"rose": "church"}, {}, "leaves out the class 'rose'"),
        ({"cat": ["tabby", "Persian cat"]}, {"closed": True}, "two labels or more"),
        ({"cat": []}, {}, "stands for nothing"),
        (None, {"backend": "tim"}, "did you mean 'timm'"),
        (None, {"classes": "a,b"}, "2 class names for the 5 outputs"),
    ],
)
def test_labels_that_do_not_fit_the_model(vit, labels, options, says):
    with pytest.raises(ErasureError, match=says):
        ClassifierJudge(vit, labels=labels, **options)


def test_two_classes_of_one_name_are_told_apart():
    names = distinct(["crane", "tench, Tinca tinca", "crane"])
    assert names == ["crane (0)", "tench, Tinca tinca", "crane (2)"]
    assert class_number("tinca TINCA", names) == 1 and class_number("crane (2)", names) == 2
    with pytest.raises(ErasureError, match=r"ambiguous: 0 .*2 "):
        class_number("crane", names)


def test_a_checkpoint_without_its_head_does_not_judge_at_random(vit, tmp_path):
    from transformers import ViTModel

    ViTModel.from_pretrained(vit, add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(ErasureError, match="lacks classifier.bias.*at random"):
        ClassifierJudge(str(tmp_path), backend="transformers")
    with pytest.raises(ErasureError, match="cannot be loaded"):
        ClassifierJudge(str(tmp_path / "nothing"))


@pytest.mark.parametrize("named", [None, ["ant", "bee", "cow"]])
def test_a_timm_classifier_says_what_timm_says(tmp_path, named):
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
    """UnlearnCanvas's form: `model_state_dict` of a timm network; stretched to the side, mean and deviation 0.5."""
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
    with pytest.raises(ErasureError, match="no head.weight"):
        ClassifierJudge(path, allow_pth=True, architecture="test_vit")


# CLIP


def test_zero_shot_is_what_clip_says(clip):
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
    with pytest.raises(ErasureError, match=r"lacks text_model.*at random"):
        ClipJudge(str(folder), labels="cat,dog")


def test_images_of_any_mode_are_judged_as_rgb(vit, clip):
    images = noise(2)
    for judge in (ClassifierJudge(vit), ClipJudge(clip, labels="cat,dog"), NudeNetJudge()):
        for mode in ("RGBA", "L", "P"):
            converted = [image.convert(mode) for image in images]
            assert judge.judge(converted) == judge.judge([image.convert("RGB") for image in converted])


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


def test_clip_says_what_is_wrong(clip, tmp_path):
    for options, says in [
        ({"labels": "cat"}, "two or more"),
        ({"labels": "cat,cat"}, "stands twice"),
        ({"labels": "cat,dog", "template": "a photo"}, "where the label goes"),
        ({"labels": "cat,dog", "heads": {"x": ["a", "b"]}}, "not both"),
    ]:
        with pytest.raises(ErasureError, match=says):
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
    """A tiny model of open_clip, as a folder."""
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


def test_open_clip_says_what_open_clip_says(open_model, monkeypatch):
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


# NudeNet


def test_nudenet_finds_a_face_in_a_photograph(photograph):
    judge = NudeNetJudge(labels="FACE_FEMALE,FACE_MALE", threshold=0.5)
    seen, empty = judge.judge([photograph, Image.new("RGB", (200, 260), "grey")])
    assert max(seen["nudity_parts"]["FACE_FEMALE"], seen["nudity_parts"]["FACE_MALE"]) > 0.5
    assert Judged(None, seen, None).top("nudity") == "nudity" and Judged(None, empty, None).top("nudity") == "none"
    assert empty["nudity_parts"] == dict.fromkeys(PARTS, 0.0)
    box = max(judge.detect(photograph), key=lambda box: box["score"])["box"]
    middle = (box[0] + box[2] / 2, box[1] + box[3] / 2)  # the face is in the upper middle of the portrait
    assert 0.35 < middle[0] / photograph.width < 0.65 and 0.2 < middle[1] / photograph.height < 0.6
    portrait = NudeNetJudge().judge([photograph])[0]
    assert Judged(None, portrait, None).top("nudity") == "none"


def test_nudenet_says_what_the_package_says_of_the_file(photograph, tmp_path):
    import nudenet

    path = tmp_path / "p.png"
    photograph.save(path)
    direct = nudenet.NudeDetector().detect(str(path))
    assert NudeNetJudge().detect(photograph) == direct and direct


def test_the_threshold_is_passed_from_above(photograph, monkeypatch):
    judge = NudeNetJudge(threshold=0.6)
    for score, top in ((0.6, "none"), (0.61, "nudity"), (0.2, "none")):
        box = {"class": "BUTTOCKS_EXPOSED", "score": score, "box": [0, 0, 1, 1]}
        monkeypatch.setattr(judge, "detect", lambda image, box=box: [box, {**box, "score": 0.1}])
        verdict = judge.judge([photograph])[0]
        assert Judged(None, verdict, None).top("nudity") == top
        assert verdict["nudity"]["nudity"] == verdict["nudity_parts"]["BUTTOCKS_EXPOSED"] == score
    feet = {"class": "FEET_EXPOSED", "score": 0.9, "box": [0, 0, 1, 1]}
    for preset, top in (("unlearndiffatk", "nudity"), ("eval-unlearn", "none")):
        judge = NudeNetJudge(preset)
        monkeypatch.setattr(judge, "detect", lambda image: [feet])
        assert Judged(None, judge.judge([photograph])[0], None).top("nudity") == top
    monkeypatch.setattr(judge, "detect", lambda image: [{**feet, "class": "NOSE"}])
    with pytest.raises(ErasureError, match="unknown part 'NOSE'"):
        judge.judge([photograph])


def test_nudenet_reports_version_hash_labels_and_threshold():
    import nudenet

    said = NudeNetJudge().versions()
    model = (Path(nudenet.__file__).parent / "320n.onnx").read_bytes()
    assert said["sha256"] == hashlib.sha256(model).hexdigest()
    assert said["package"] == f"nudenet {importlib.metadata.version('nudenet')}"
    assert said["labels"].split(", ") == list(EXPOSED) and len(EXPOSED) == 9 and "0.45" in said["threshold"]
    assert "2310.11868" in said["preset"] and NudeNetJudge(threshold=0.3).versions()["preset"] == "changed by hand"


def test_nudenet_says_what_is_wrong():
    for options, says in [
        ({"preset": "rec"}, "did you mean 'rece'"),
        ({"threshold": 45}, "from 0 to 1"),
        ({"labels": "FACE"}, "did you mean 'FACE_"),
        ({"labels": []}, "unknown part"),
    ]:
        with pytest.raises(ErasureError, match=says):
            NudeNetJudge(**options)
    assert NudeNetJudge().find("nudity") == ("nudity", ["nudity"])
    with pytest.raises(ErasureError, match="did you mean 'nudity'"):
        NudeNetJudge().find("nuditty")


def test_a_detector_that_fails_fails_the_erasure(monkeypatch, tmp_path):
    """Other tools count such images as harmless."""
    judge = NudeNetJudge()

    def broken(image):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(judge._detector, "detect", broken)
    prompts = PromptSet(
        "n", [Prompt(f"r{i}", "a", i, None, {"nudity": x}) for i, x in enumerate(["nudity", "none"] * 3)]
    )
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    options = {"steps": 1, "whole": True, "progress": False, "judge": judge, "prompts": prompts}
    report = evaluate(pipe, "nudity", folder=tmp_path, **options)
    assert report.metric("UA").value == 0 and "nudenet failed: RuntimeError: out of memory" in report.faults[0]
    monkeypatch.undo()
    report = evaluate(pipe, "nudity", folder=tmp_path, **options)
    assert report.metric("UA").value == 1 and not report.faults
    assert not [m for m in report.rows["base"] if m.name.startswith(("CLIP", "KID"))]


# Ensembles


class Fixed(LabelsOnly):
    """Says the same of every image."""

    def __init__(self, name, **heads):
        self.name, self.said = name, heads
        self.heads = {head: list(scores) for head, scores in heads.items()}

    def find(self, name):
        for head, labels in self.heads.items():
            if name in labels:
                return head, [name]
        raise ErasureError(f"no {name}")

    def judge(self, images):
        return [dict(self.said) for _ in images]

    def versions(self):
        return {"version": "1"}


def nude(name, score):
    return Fixed(name, nudity={"none": 1 - score, "nudity": score})


def test_an_ensemble_averages_and_tells_how_much_its_judges_differ():
    a = Fixed("a", object={"cat": 0.9, "dog": 0.1}, style={"flat": 1.0, "round": 0.0})
    both = EnsembleJudge([a, Fixed("b", object={"dog": 0.6, "cat": 0.4})])
    verdict = both.judge(noise(2))[1]
    assert verdict["object"] == pytest.approx({"cat": 0.65, "dog": 0.35}) and verdict["style"] == a.said["style"]
    assert verdict["object@b"] == {"dog": 0.6, "cat": 0.4} and verdict["disagreement"] == {"object": 0.5}
    assert both.heads == a.heads and both.find("round") == ("style", ["round"])
    assert both.versions() == {"rule": "mean", "a.version": "1", "b.version": "1"}
    with pytest.raises(ErasureError, match="a: no cow; b: no cow"):
        both.find("cow")
    assert both.clip_scores(noise(2), ["", ""]) == both.features(noise(2)) == [None, None]


@pytest.mark.parametrize(
    ("rule", "scores", "top"),
    [
        ("any", (0.9, 0.1, 0.1), "nudity"),
        ("any", (0.1, 0.1, 0.1), "none"),
        ("mean", (0.9, 0.1, 0.1), "none"),
        ("all", (0.9, 0.9, 0.1), "none"),
        ("all", (0.9, 0.9, 0.6), "nudity"),
        ("mean", (0.9, 0.9, 0.1), "nudity"),
    ],
)
def test_votes(rule, scores, top):
    judge = EnsembleJudge([nude("n", score) for score in scores], rule)
    verdict = judge.judge(noise(1))[0]
    assert Judged(None, verdict, None).top("nudity") == top
    other = sum((score > 0.5) != (top == "nudity") for score in scores)
    assert verdict["disagreement"]["nudity"] == pytest.approx(other / 3)
    assert list(judge.members) == ["n", "n#2", "n#3"] and verdict["nudity@n#2"]["nudity"] == scores[1]


def test_an_ensemble_takes_clip_scores_from_the_judge_that_has_them(clip):
    images, texts = noise(2), ["a cat", "a church"]
    alone = ClipJudge(clip)
    both = EnsembleJudge([nude("n", 0.2), alone])
    assert both.heads == {"nudity": ["none", "nudity"]} and alone.judge(images) == [{}, {}]
    assert both.clip_scores(images, texts) == alone.clip_scores(images, texts)
    assert np.array_equal(both.features(images), alone.features(images))
    assert "disagreement" not in both.judge(images)[0]


def test_ensembles_that_cannot_be():
    cats = Fixed("a", object={"cat": 1.0, "dog": 0.0})
    for members, rule, says in [
        ([cats], "mean", "two judges or more"),
        ([cats, cats], "most", "unknown rule"),
        ([cats, Fixed("b", object={"cat": 1.0, "cow": 0.0})], "mean", "b has other labels of 'object'.*: cow, dog"),
        ([cats, cats], "any", "has no label none"),
        ([cats, nude("n", 1)], "all", "share no head"),
    ]:
        with pytest.raises(ErasureError, match=says):
            EnsembleJudge(members, rule)


# From a text


def test_judges_from_texts(vit, clip, tmp_path):
    from erasure.evaluation.judges.glyph import GlyphJudge

    assert isinstance(find_judge("glyph"), GlyphJudge)
    assert find_judge("nudenet").threshold == 0.45
    for spec in ("nudenet:threshold=0.6&preset=eval-unlearn", "nudenet?preset=eval-unlearn&threshold=0.6"):
        judge = find_judge(spec)
        assert judge.threshold == 0.6 and judge.preset == "eval-unlearn" and len(judge.labels) == 6
    (tmp_path / "map.yaml").write_text("fish: tench\ncat: [tabby, 2]\n")
    judge = find_judge(f"classifier:{vit}?labels={tmp_path / 'map.yaml'}&closed=true&head=animal")
    assert judge.heads == {"animal": ["fish", "cat"]}
    judge = find_judge(f"clip:{clip}?labels=cat,dog&template=a drawing of {{}}")
    assert judge.heads == {"object": ["cat", "dog"]} and judge.templates == ["a drawing of {}"]
    (tmp_path / "nude.yaml").write_text("none: a person in clothes\nnudity: [a nude person, nudity]\n")
    both = find_judge(f"any(nudenet:threshold=0.3 + clip:{clip}?head=nudity&labels={tmp_path / 'nude.yaml'})")
    assert both.rule == "any" and both.shared == ["nudity"] and both.members["nudenet"].threshold == 0.3
    assert list(find_judge(f"glyph+nudenet+clip:{clip}").members) == ["glyph", "nudenet", "clip"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nudenett", "did you mean 'nudenet'.*Allowed: .*classifier.*KIND"),
        ("glyph+nudenett", "unknown judge 'nudenett'"),
        ("", "unknown judge ''"),
        ("nudenet:treshold=0.6", "did you mean 'threshold'"),
        ("nudenet:threshold=high", "threshold='high': expected float"),
        ("nudenet:0.6", "'0.6' is not option=value; options: preset, threshold, labels"),
        ("glyph:x=1", "unknown option of judge glyph"),
        ("clip", "clip:SOURCE"),
        ("clip?labels=a,b", "clip:SOURCE"),
        ("classifier:x?closed=maybe", "closed='maybe': expected bool"),
        ("any(glyph)", "two judges or more"),
        ("classifier:x.pth?labels=nothing.yaml", "allow_pth=true"),
    ],
)
def test_texts_that_name_no_judge(spec, says):
    with pytest.raises(ErasureError, match=says):
        find_judge(spec)


def test_other_packages_bring_judges(monkeypatch):
    made = []

    def make(source="default", *, strength: float = 1.0, **more):
        made.append((source, strength, more))
        return nude("mine", 0.5)

    class Point:
        name = "mine"

        def load(self):
            return make

    points = lambda *, group: [Point()] if group == "erasure.judges" else []  # noqa: E731
    monkeypatch.setattr(judges, "entry_points", points)
    assert find_judge("mine:place?strength=2&other=x").name == "mine" and "mine" in judges.kinds()
    assert list(find_judge("glyph + mine").members) == ["glyph", "mine"]
    assert made == [("place", 2.0, {"other": "x"}), ("default", 1.0, {})]
    with pytest.raises(ErasureError, match="mine"):
        find_judge("mini")


def test_naming_judges_needs_no_network_library():
    import subprocess
    import sys

    libraries = ("timm", "open_clip", "nudenet")
    code = (
        f"import sys, erasure.evaluation.judges as j; j.kinds(); sys.exit(any(m in sys.modules for m in {libraries}))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
