"""A release: version, changelog and citation agree, the metadata holds, and the code is that of Python 3.11."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import erasure

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
HEADS = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)


def test_the_version_is_one():
    assert str(Version(erasure.__version__)) == erasure.__version__ == str(CITATION["version"])
    assert "version" in PROJECT["dynamic"]


def test_the_changelog_begins_with_this_version_or_what_comes_after_it():
    """Releases are `## 1.2.3 - 2026-01-31`, newest first; before the first there is nothing but Unreleased."""
    released = [re.fullmatch(r"(\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)", head) for head in HEADS if head != "Unreleased"]
    assert HEADS and "Unreleased" not in HEADS[1:]
    assert all(released), "a heading of CHANGELOG.md is neither Unreleased nor `VERSION - DATE`"
    versions = [Version(match[1]) for match in released if match]
    assert versions == sorted(versions, reverse=True) and len(versions) == len(set(versions))
    assert not versions or versions[0] <= Version(erasure.__version__)
    if "Unreleased" not in HEADS:
        assert versions[0] == Version(erasure.__version__)


def test_the_citation_is_the_projects():
    assert CITATION["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= CITATION.keys()
    assert CITATION["license"] == PROJECT["license"] and CITATION["keywords"] == PROJECT["keywords"]
    assert CITATION["title"].split(": ")[0] == "Erasure"
    assert CITATION["title"].split(": ")[1].lower() + "." == PROJECT["description"].lower()


def test_extras_are_whole():
    """The dev extra holds what the tests need, and every requirement can be parsed."""
    extras = PROJECT["optional-dependencies"]
    for text in (*PROJECT["dependencies"], *(one for group in extras.values() for one in group)):
        requirement = Requirement(text)
        assert requirement.extras <= extras.keys() or requirement.name != "erasure-diffusion", text
    dev = [Requirement(text) for text in extras["dev"]]
    own = set().union(*(requirement.extras for requirement in dev if requirement.name == "erasure-diffusion"))
    assert {"docs", "sign"} <= own


def test_the_code_is_that_of_the_oldest_python():
    """Python 3.11 is the oldest that is allowed, and later ones read its grammar: nothing newer is used."""
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert "3.11" in allowed and "3.12" in allowed and "3.13" in allowed and "3.10" not in allowed
    for path in (ROOT / "erasure").rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 11))
