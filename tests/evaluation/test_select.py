"""The anchors of a target: from the concept, or from the headers of patches that act."""

from __future__ import annotations

from dataclasses import replace

from erasure.concepts.concept import Concept
from erasure.errors import ErasureError
from erasure.evaluation.metrics.target import Target
from erasure.evaluation.select import with_anchors
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.patch.making import delta_patch
from tests.tiny import tiny_pipeline

TARGET = Target("object", ("cat", "lion"), None)


class Judge:
    """A judge that knows a family of two labels, a dog, and a style."""

    names = {"feline": ("object", ["cat", "lion"]), "cat": ("object", ["cat"]), "dog": ("object", ["dog"])}
    names |= {"lion": ("object", ["lion"]), "ink": ("style", ["ink"])}

    def find(self, name: str) -> tuple[str, list[str]]:
        if name not in self.names:
            raise ErasureError(f"no {name}")
        return self.names[name]


def anchors(concept, **loaded) -> dict:
    return dict(with_anchors(TARGET, concept, loaded, Judge()).anchors)


def test_the_concept_names_the_anchor_of_all_its_labels():
    assert anchors(Concept("feline", anchor="dog")) == {"cat": ("dog",), "lion": ("dog",)}
    assert anchors(Concept("cat", anchor="dog")) == {"cat": ("dog",)} and anchors(Concept("cat")) == {}
    # Another domain, or no label at all: only CLIP could say whether it is shown.
    assert anchors(Concept("cat", anchor="ink")) == anchors(Concept("cat", anchor="a painting")) == {}


def test_a_patch_names_it_only_while_it_acts():
    acts, off = ({"strength": strength, "anchors": {"cat": "dog", "rose": "dog"}} for strength in (0.5, 0.0))
    assert anchors("cat", p=acts) == {"cat": ("dog",)} and anchors("cat", p=off) == {}
    assert anchors("cat", p={"strength": 1.0}) == {}
    assert anchors(Concept("cat", anchor="lion"), p=acts) == {"cat": ("lion",)}  # the user's word counts


def test_the_header_of_a_patch_names_anchors_for_aliases_too():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    concepts = [Concept("cat", aliases=("kitten",), anchor="dog").to_json(), Concept("rose").to_json()]
    pipe.load_patch(replace(delta_patch(pipe), concepts=concepts), name="p")
    assert pipe.get_list_patches()["p"]["anchors"] == {"cat": "dog", "kitten": "dog"}
