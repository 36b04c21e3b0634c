"""Layers of configuration: order, types, and errors that name every fault."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest

from erasure import config, methods
from erasure.concepts.concept import KINDS, Concept
from erasure.errors import ErasureError
from erasure.methods import configured


@dataclasses.dataclass(frozen=True)
class Sample:
    steps: int = 3
    rate: float = 0.1
    name: str | None = None
    fast: bool = False


def test_later_layers_win_and_strings_become_numbers():
    sample = config.build(Sample, {"steps": 4, "rate": "1e-4"}, {"steps": 5}, {"name": None, "fast": True})
    assert sample == Sample(steps=5, rate=1e-4, name=None, fast=True)


def test_all_faults_are_told_at_once():
    with pytest.raises(ErasureError) as caught:
        config.build(Sample, {"stepz": 1, "rate": "fast", "fast": 3, "steps": 2.5})
    for part in ("did you mean 'steps'", "rate='fast'", "fast=3", "steps=2.5"):
        assert part in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Ranged:
    count: int = config.setting(2, at_least=1)
    share: float | None = config.setting(None, above=0, at_most=1)
    rate: float = config.setting(0.1, above=0, below=1)
    kind: Literal["plain", "fancy"] | None = "plain"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"count": 0}, "count=0: must be at least 1"),
        ({"share": 0.0}, "share=0.0: must be above 0 and at most 1"),
        ({"share": 1.5}, "at most 1"),
        ({"rate": 1.0}, "rate=1.0: must be above 0 and below 1"),
        ({"rate": float("nan")}, "rate=nan: must be a finite number"),
        ({"kind": "fancie"}, "did you mean 'fancy'.*Allowed: fancy, plain"),
        ({"count": 0, "kind": "x", "share": 2}, "count=0: .*share=2.0: .*unknown kind 'x'"),
    ],
)
def test_ranges_and_choices_are_declared_with_the_field(given, says):
    for right in ({}, {"count": 1, "share": 1.0, "rate": 0.5, "kind": "fancy"}, {"kind": None}):
        config.check_settings(config.build(Ranged, right))
    with pytest.raises(ErasureError, match=says):
        config.check_settings(config.build(Ranged, given))


def test_every_range_stops_at_its_end():
    """Both ends of every declared limit: a limit that is off by one must turn this red."""
    for name in methods.names():
        cls = methods.find(name)
        for field in dataclasses.fields(cls):
            limits = field.metadata
            for key, step in (("at_least", -1), ("at_most", 1), ("above", 0), ("below", 0)):
                if key in limits:
                    with pytest.raises(ErasureError, match=f"{field.name}="):
                        cls(**{field.name: type(field.default or 1)(limits[key] + step)})


def test_overrides_are_yaml():
    assert config.parse_overrides(["a=1", "b = 2e-3", "c=null", "d=text"]) == {
        "a": 1,
        "b ".strip(): "2e-3",
        "c": None,
        "d": "text",
    }
    with pytest.raises(ErasureError, match="key=value"):
        config.parse_overrides(["lonely"])
    with pytest.raises(ErasureError, match=r"'a=\[1': the value cannot be read as YAML"):
        config.parse_overrides(["a=[1"])


@pytest.mark.parametrize(
    ("value", "says"), [("inf", "steps='inf'"), (float("inf"), "steps=inf"), (float("nan"), "nan")]
)
def test_what_is_no_whole_number_is_named(value, says):
    with pytest.raises(ErasureError, match=f"{says}: expected int"):
        config.build(Sample, {"steps": value})


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "\x00"])
def test_broken_files_are_errors(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ErasureError, match="c.yaml"):
        config.read_yaml(tmp_path / "c.yaml")
    with pytest.raises(ErasureError, match="missing.yaml"):
        config.read_yaml(tmp_path / "missing.yaml")


def test_concepts_erased_together_get_as_much_each():
    one, weapon = Concept("cat"), Concept("weapon", aliases=("bomb", "gun"), kind="content")
    alone, both = configured("spm", [one]), configured("spm", [one, Concept("dog")])
    assert (both.iterations, both.trajectories, both.rank) == (2 * alone.iterations, 2 * alone.trajectories, 2)
    assert configured("spm", [weapon]).iterations == 3 * alone.iterations
    assert configured("spm", [one, Concept("dog")], {"iterations": 7}).iterations == 7
    parity = [configured("spm", concepts, {"parity": True}) for concepts in ([one], [one, Concept("dog")])]
    assert parity[0] == parity[1]


def test_parity_settings_are_real_and_differ_from_the_defaults():
    for name in methods.names():
        cls = methods.find(name)
        published = config.build(cls, cls.PARITY)
        assert all(getattr(published, key) != getattr(cls(), key) for key in cls.PARITY)
        for kind, more in cls.PARITY_KINDS.items():
            own = config.build(cls, cls.PARITY, more)
            assert kind in KINDS and all(getattr(own, key) != getattr(published, key) for key in more)
            assert configured(name, [Concept("x", kind=kind)], {"parity": True}) == dataclasses.replace(
                own, parity=True
            )
