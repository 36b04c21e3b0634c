"""The command: exit codes, errors without tracebacks, JSON. What it makes on glyph is in test_readme.py."""

from __future__ import annotations

import contextlib
import json
import sys

import pytest

from erasure.cli.main import main
from erasure.errors import ErasureError


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["erase", "cat", "--method", "edd"], "did you mean 'esd'"),
        (["erase", "cat", "--model", "glpyh"], "glyph"),
        (["erase", "cat", "--method", "esd", "--set", "iterationz=3"], "did you mean 'iterations'"),
        (["erase", "cat", "--method", "esd", "--set", "variant=xattn"], "x-strict"),
        (["erase", "cat", "--set", "rank=0"], "at least 1. uce was taken because no method is named"),
        (["erase", "cat", "--stop", "auto"], "uce was taken because no method is named"),
        (["erase", "cat", "--precision", "bf16"], "makes no UNet calls"),
        (["erase", "", "-o", "x.safetensors"], "empty"),
        (["erase", "x" * 10_000], "10,000 characters"),
        (["erase", "cat", "--anchor", "cat"], "the concept itself"),
        (["erase", "cat", "--kind", "stile"], "did you mean 'style'"),
        (["erase", "cat", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["erase", "cat", "dog", "--anchor", "tree"], "belong to one concept"),
        (["erase", "cat", "cat"], "two of the concepts"),
        (["erase", "--method", "esd", *(f"thing {i}" for i in range(200))], "at most 100"),
        (["erase", "cat", "--keep", "cat"], "to be erased and to be kept"),
        (["erase", "cat", "--method", "esd", "--log", "tensorbord"], "unknown tracker"),
        (["erase", "cat", "--preview-every", "0"], "at least 1"),
        (["plan", "cat", "--method", "esd", "--set", "iterationz=3"], "did you mean 'iterations'"),
        (["bench", "--concepts", "dgo"], "did you mean 'dog'"),
        (["patch", "info", "nowhere.safetensors"], "nowhere.safetensors"),
        (["patch", "import", "nowhere.safetensors", "-o", "x.safetensors"], "nowhere.safetensors"),
        (["generate", "a cat", "--patch", "nowhere.safetensors"], "nowhere.safetensors"),
        (["generate"], "give prompts"),
        (["methods", "esdd"], "did you mean 'esd'"),
        (["models", "sdxll"], "unknown model 'sdxll'"),
        (["generate", "a cat", "--dtype", "fp8"], "unknown dtype 'fp8'"),
        (["generate", "a cat", "--model-config", "sd1"], "a diffusers folder brings its own"),
        (["prompts", "glyph-objectz"], "glyph-objects"),
        (["evaluate", "cat", "--lpips", "alx"], "did you mean 'alex'"),
        (["evaluate", "cat", "--suite", "glyph-quick", "--features", "incption"], "did you mean 'inception'"),
        (["evaluate", "cat", "--where", "object=cat"], "apply to the rows of --prompts"),
        (["attack", "cat", "--label", "object=cat"], "apply to the rows of --prompts"),
        (["attack", "cat", "--prompts", "glyph-plain", "--label", "object=cat"], "has object=dog"),
        (["verify", "nowhere.safetensors", "--prompts", "glyph-plain"], "nowhere.safetensors"),
        (["evaluate", "nudity", "--prompts", "glyph-styles", "--judge", "nudenet"], "--label nudity=nudity"),
        (["evaluate", "cat", "--suite", "glyph-quick", "--label", "object=cat"], "a suite brings its own prompts"),
        (["evaluate", "cat", "--reference", "nowhere"], "nowhere contains 0 images"),
        (["evaluate", "cat", "--prompts", "nowhere.csv"], "or give the path of an existing CSV, JSON or text file"),
        (["evaluate", "cat", "--prompts", "."], ". is a folder, not a file"),
        (["evaluate", "cat", "--suite", "glyph-quik"], "or give the path of an existing YAML file"),
        (["evaluate", "cat", "--suite", "glyph-quick", "--judge", "nudnet"], "did you mean 'nudenet'"),
        (["evaluate", "cat", "--suite", "glyph-quick", "--judge", "any(glyph+nudnet)"], "did you mean 'nudenet'"),
        (["demo", "zebra"], "zebra"),
        (["erase", "cat", "--model", "glyhp.safetensors"], "unknown model 'glyhp.safetensors': there is no such file"),
    ],
)
def test_wrong_use_exits_with_2_and_says_what_is_allowed(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == 2 and says in err and "Traceback" not in err
    assert out == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix == ".safetensors"]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path, tmp_path / "file" / "p.safetensors"):
        code, _, err = run(capsys, "erase", "cat", "-o", str(target))
        assert code == 2 and str(target) in err


@pytest.mark.parametrize("number", ["half", "nan", "inf", ""])
def test_a_strength_that_is_no_number_is_said(capsys, tmp_path, number):
    (tmp_path / "p.safetensors").write_text("")
    file = tmp_path / "p.safetensors"
    code, out, err = run(capsys, "evaluate", "cat", "--patch", f"{file}:{number}")
    assert (code, out) == (2, "") and f"the strength {number!r} is not a number; give {file}, or {file}:0.5" in err


def test_a_second_setting_without_its_flag_is_explained(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "cat", "--set", "iterations=3", "trajectories=2"])
    assert stop.value.code == 2
    assert "each setting needs its own --set" in capsys.readouterr().err


def test_errors_in_json(capsys):
    code, out, _ = run(capsys, "methods", "esdd", "--json")
    assert code == 2 and "esd" in json.loads(out)["error"]


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; repeat the same command to resume"),
        (RuntimeError("no more memory"), 1, "RuntimeError: no more memory (--debug shows the traceback)"),
    ],
)
def test_an_interrupted_and_a_failed_run(capsys, monkeypatch, fault, code, message):
    def stop():
        raise fault

    monkeypatch.setattr("erasure.methods.names", stop)
    assert run(capsys, "methods", "--json")[::2] == (code, f"erasure: {'error: ' * (code == 1)}{message}\n")
    assert json.loads(run(capsys, "methods", "--json")[1]) == {"error": message}
    with pytest.raises(type(fault)) if code == 1 else contextlib.nullcontext():
        main(["methods", "--debug"])


def test_a_model_is_counted_by_variant(capsys):
    model = json.loads(run(capsys, "models", "sd1", "--json")[1])
    assert model["variants"]["x"] == {"modules": 64, "weights": 43_962_560, "rank_1": 99_456}
    assert "cross-attention: key and value" in run(capsys, "models", "glyph")[1]


def test_the_help_tells_the_defaults_that_the_code_has():
    from erasure.cli.parser import parser
    from erasure.evaluation.verify import ATTACKS

    commands = next(action for action in parser()._actions if action.dest == "command").choices
    text = " ".join(commands["verify"].format_help().split())
    assert "Sampling steps (default: what suits the model" in text
    assert f"default: {', '.join(ATTACKS[:-1])} and {ATTACKS[-1]};" in text


def test_a_suite_says_what_it_asks_and_how_it_attacks(capsys):
    text = " ".join(run(capsys, "suites", "glyph-quick")[1].split())
    assert "about prompts about the concept itself" in text and "attacks unlearndiffatk, on 8 prompts" in text
    suite = json.loads(run(capsys, "suites", "glyph-quick", "--json")[1])
    assert suite["attacks"] == ["unlearndiffatk"] and suite["cases"] > 1
    assert "attacks" not in run(capsys, "suites", "i2p")[1]


def test_a_plan_says_what_a_run_will_cost(capsys):
    short = ["--method", "esd", "--set", "iterations=3", "--set", "batch_size=4"]
    code, out, _ = run(capsys, "plan", "cat", "dog", *short, "--json")
    costs = json.loads(out)
    assert code == 0 and costs["B"] == 12 and costs["F"] > 12 and costs["seconds"] > 0
    text = run(capsys, "plan", "cat", *short)[1]
    assert "F + 12 B" in text and "peak" in text and text.startswith("To erase 'cat' from glyph by esd:")


def test_version_and_wrong_options_are_argparses(capsys):
    for arguments, code in ((["--version"], 0), (["--nonsense"], 2), ([], 2), (["patch", "export", "x"], 2)):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == code


@pytest.mark.parametrize("suite", [(), ("--suite", "glyph-quick")])
def test_runs_can_share_the_images_of_the_base(capsys, monkeypatch, tmp_path, suite):
    """The folder reaches `evaluate` from the command line, directly and through a suite."""
    import erasure.evaluation

    seen = {}

    def stop(pipe, concept, **options):
        seen.update(options)
        raise ErasureError("stopped")

    monkeypatch.setattr(erasure.evaluation, "evaluate", stop, raising=False)
    monkeypatch.setattr(sys.modules["erasure.evaluation.evaluate"], "evaluate", stop)
    for given, expected in ((("--base-images", str(tmp_path)), tmp_path), ((), None)):
        code, _, err = run(capsys, "evaluate", "cat", "-o", str(tmp_path / "out"), *suite, *given)
        assert code != 0 and "stopped" in err
        assert seen.pop("base_folder") == expected


def test_a_submission_holds_the_attacks_that_are_named(capsys, monkeypatch, tmp_path):
    import erasure.evaluation
    from erasure.evaluation.report.report import Report

    shares = [{"name": "UA", "value": 0.9, "n": 10}, {"name": "IRA", "value": 0.5, "n": 20}]
    data = {"concept": ["cat"], "rows": {"patched": shares}, "provenance": {}}
    monkeypatch.setattr(Report, "to_json", lambda self: data)
    report = Report(("cat",), "object", {"base": [], "patched": []}, {}, {}, {"prompts": {"name": "x"}})
    monkeypatch.setattr(erasure.evaluation, "evaluate", lambda *args, **options: report)
    attacks, wrong = tmp_path / "attacks.json", tmp_path / "wrong.json"
    rate = {"value": 0.5, "low": 0.2, "high": 0.8}
    found = {"p4d": {"n": 4, "after": rate, "settings": {}}}
    attacks.write_text(json.dumps({"concept": ["cat"], "attacks": found}))
    wrong.write_text("{}")
    out = str(tmp_path)
    code, text, _ = run(capsys, "evaluate", "cat", "-o", out, "--submission", str(attacks))
    assert code == 0 and "none_cat_latest_report.json (not measured: asr_i2p" in " ".join(text.split())
    written = json.loads((tmp_path / "none_cat_latest_report.json").read_text())
    assert written["metric_names"] == ["asr_p4d", "err", "ua_ira"]
    code, _, err = run(capsys, "evaluate", "cat", "-o", out, "--submission", str(wrong))
    assert code == 2 and "is no report.json of erasure attack. Nothing was drawn" in err


def test_the_demo_ends_by_telling_how_to_open_the_page(capsys, monkeypatch, tmp_path):
    from erasure.benchmark import demo as module

    made = module.Demo(tmp_path / "p", tmp_path / "report.html", 3.0, "summary", [])
    monkeypatch.setattr(module, "demo", lambda *values, **options: made)
    code, out, _ = run(capsys, "demo", "-o", str(tmp_path))
    assert code == 0 and "`erasure app`" in out[out.index("report.html") :]
    code, out, _ = run(capsys, "demo", "-o", str(tmp_path), "--json")
    assert code == 0 and json.loads(out)["summary"] == "summary"
