"""Suites: named recipes of what to ask, who judges and how it is drawn (`configs/suites/*.yaml`, or a file).

A suite is parts, each a prompt set or a template; together they are one prompt set that `evaluate` runs. What cannot
be had (a file, the network, a judge's model) is said and left out; the rest runs.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasure.config import CONFIGS, build, read_yaml
from erasure.errors import ErasureError, unknown
from erasure.evaluation.metrics.target import NEIGHBOUR_ROLES, TARGET_ROLES
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt

if TYPE_CHECKING:
    from erasure.evaluation.attacks.report import AttackReport
    from erasure.evaluation.report.report import Report

FOLDER = CONFIGS / "suites"
ROLES = ("", *TARGET_ROLES, *NEIGHBOUR_ROLES)
HEADS = ("object", "style", "identity")  # that a suite's judge may be told the labels of


@dataclass(frozen=True)
class Part:
    """Rows of a suite: from a prompt set (`prompts`), or from a template.

    In `prompts`, `template` and `where`, {concept} is the first concept's name and {data} the folder of the user.

    Args:
        prompts: name, file or hub set; "about": glyph's prompts about the concept, with their roles.
        where: conditions on the rows.
        labels: other name of a column -> the judge's head.
        put: labels for every row.
        only: concepts that the part is for; none: for all.
        role: why the rows are asked (metrics.py), one of ROLES.
        first: only the first so many rows; None: all.
        limit: at most so many of those, evenly spread; None: all.
        template: a text with the names of lists of `fill` in braces; every combination is a row.
        fill: name of a list -> its values, which become labels where the name is a head.
        seeds: every row of a template with each of them.
        get: where the file can be had, for the word about what is missing.
    """

    prompts: str | None = None
    where: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    put: dict[str, str] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    role: str = ""
    first: int | None = None
    limit: int | None = None
    template: str | None = None
    fill: dict[str, list[str]] = field(default_factory=dict)
    seeds: tuple[str, ...] = ("0",)
    get: str = ""

    def rows(self, name: str, concepts: Sequence[str], data: Path | None) -> list[Prompt]:
        """The part's rows, ids beginning with its name.

        Raises:
            ErasureError: what it needs is not there, or a malformed part.
        """
        if self.only and not set(self.only) & set(concepts):
            return []
        words = {"concept": concepts[0], "data": "" if data is None else os.fspath(data)}
        found: Sequence[Prompt]
        if self.template is not None:
            found = self._filled(words)
        elif self.prompts == "about":
            from erasure.prompts.concept_prompts import concept_prompts

            found = concept_prompts(concepts, self.limit).rows
        else:
            source = _put_in(self.prompts or "", words)
            if "{data}" in (self.prompts or "") and data is None:
                raise ErasureError(f"{self.prompts}: no --data folder was given")
            found = PromptSet.read(source).rows
        rows: Sequence[Prompt] = [
            replace(row, id=f"{name}-{row.id}", labels=self._labels(row.labels, words)) for row in found
        ]
        if self.where:
            rows = PromptSet(name, rows).where(*(_put_in(text, words) for text in self.where)).rows
        rows = rows[: self.first]
        if self.limit is not None and len(rows) > self.limit and self.prompts != "about":
            rows = [rows[i * len(rows) // self.limit] for i in range(self.limit)]
        return list(rows)

    def _labels(self, found: Mapping[str, str], words: dict[str, str]) -> dict[str, str]:
        made = {self.labels.get(key, key): value for key, value in found.items()}
        made |= {key: _put_in(value, words) for key, value in self.put.items()}
        return {**made, "role": self.role} if self.role else made

    def _filled(self, words: dict[str, str]) -> list[Prompt]:
        names = list(self.fill)
        rows: list[Prompt] = []
        for values in itertools.product(*self.fill.values()):
            chosen = {name: _put_in(value, words) for name, value in zip(names, values, strict=True)}
            text = _put_in(self.template or "", {**words, **chosen})
            for seed in self.seeds:
                rows.append(Prompt(f"{len(rows):05d}", text, int(seed), None, chosen))
        return rows


def _put_in(text: str, words: Mapping[str, str]) -> str:
    try:
        return text.format(**words)
    except (KeyError, IndexError, ValueError) as fault:
        raise ErasureError(f"{text!r}: {fault} cannot be filled in; known: {', '.join(words)}") from None


@dataclass(frozen=True)
class Suite:
    """A recipe.

    Args:
        about: a line on what it measures.
        source: the paper or project that it follows.
        base: the checkpoint that published figures are for.
        parts: name -> part.
        judge: as `find_judge` takes it; {data} is the folder of the user, {objects}, {styles} and {identities} are
            what the rows name, with commas, whatever the limit.
        steps: of sampling; None: the usual ones.
        guidance: of sampling; None: the usual one.
        lpips: LPIPS to the base's pictures too, with this backbone.
        attacks: that follow.
        cases: prompts to attack.
        differs: how its figures differ from the published protocol's.
    """

    about: str
    source: str
    parts: dict[str, Part]
    judge: str = "glyph"
    base: str = "glyph"
    steps: int | None = None
    guidance: float | None = None
    lpips: str | None = None
    attacks: tuple[str, ...] = ()
    cases: int = 12
    differs: str = ""
    name: str = ""

    @classmethod
    def read(cls, source: str | os.PathLike[str]) -> Suite:
        """A suite by its name in the package, or from a YAML file.

        Raises:
            ErasureError: no such suite, an unknown or missing key, a part without prompts.
        """
        text = os.fspath(source)
        path = FOLDER / f"{text}.yaml" if text in names() else Path(text)
        if not path.is_file():
            raise ErasureError(f"{unknown('suite', text, names())}, or the path of a YAML file (none lies there)")
        found = read_yaml(path)
        missing = [key for key in ("about", "source", "parts") if not found.get(key)]
        if missing:
            raise ErasureError(f"{path}: {', '.join(missing)} must be there")
        if not isinstance(found["parts"], dict) or not all(isinstance(one, dict) for one in found["parts"].values()):
            raise ErasureError(f"{path}: parts must be a mapping of names to mappings")
        parts: dict[str, Part] = {}
        try:
            for name, one in found.pop("parts").items():
                parts[name] = part = build(Part, one)
                if (part.prompts is None) == (part.template is None):
                    raise ErasureError(f"part {name!r} needs prompts or a template, and not both")
                if part.role not in ROLES:
                    raise unknown("role", part.role, ROLES)
            suite = build(cls, {"about": "", "source": "", "parts": {}, **found})
        except ErasureError as fault:
            raise ErasureError(f"{path}: {fault}") from None
        return replace(suite, parts=parts, name=path.stem)

    def rows(self, concepts: Sequence[str], data: Path | None = None) -> tuple[PromptSet, list[str]]:
        """One prompt set of all parts, and what is missing.

        Raises:
            ErasureError: no part can be had.
        """
        rows: list[Prompt] = []
        missing = []
        for name, part in self.parts.items():
            try:
                rows += part.rows(name, concepts, data)
            except ErasureError as fault:
                missing.append(f"part {name}: {fault}" + (f"; {part.get}" if part.get else ""))
        if not rows:
            raise ErasureError(f"suite {self.name}: nothing can be asked. " + ". ".join(missing))
        return PromptSet(f"suite-{self.name}", rows), missing


@dataclass(frozen=True)
class SuiteResult:
    """What a suite found; `missing` says what could not be had."""

    suite: Suite
    report: Report | None
    attacks: AttackReport | None
    missing: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "suite": self.suite.name,
            "source": self.suite.source,
            "differs": self.suite.differs,
            "missing": self.missing,
            "report": None if self.report is None else self.report.to_json(),
            "attacks": None if self.attacks is None else self.attacks.to_json(),
        }

    def text(self) -> str:
        """For people."""
        lines = [f"suite {self.suite.name}: {self.suite.about} ({self.suite.source})"]
        lines += [one.text() for one in (self.report, self.attacks) if one is not None]
        if self.suite.differs:
            lines.append(f"differs from the published protocol: {self.suite.differs}")
        lines += [f"missing: {text}" for text in self.missing]
        return "\n".join(lines)


def names() -> list[str]:
    """The suites that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def run_suite(
    pipe: Any,
    concept: str | Sequence[str],
    suite: str | Suite,
    *,
    folder: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    judge: str | None = None,
    limit: int | None = None,
    measures: Mapping[str, Any] | None = None,
    progress: bool = True,
    **sampling: Any,
) -> SuiteResult:
    """Run a suite on a pipeline with patches; reports and suite.json go to `folder`.

    Where the judge cannot be had, the pictures are drawn all the same, and a later run judges them.

    Args:
        pipe: an erased pipeline with patches.
        concept: what should be gone.
        suite: its name, a file or itself.
        data: the folder that {data} stands for in the suite's paths.
        judge: another judge than the suite's.
        limit: at most so many rows of each part.
        measures: features, lpips, reference, as `evaluate` takes them; None: the suite's.
        sampling: steps, guidance, batch_size; None: the suite's.

    Raises:
        ErasureError: an unknown suite, nothing to ask, or whatever `evaluate` refuses.
    """
    from erasure.evaluation.evaluate import evaluate
    from erasure.evaluation.generate import GUIDANCE, STEPS, generate
    from erasure.evaluation.judges.registry import find_judge
    from erasure.pipelines.strengths import switched_off

    recipe = suite if isinstance(suite, Suite) else Suite.read(suite)
    concepts = [concept] if isinstance(concept, str) else list(concept)
    rows, missing = recipe.rows(concepts, None if data is None else Path(data))
    # The judge knows the labels of the whole suite: among fewer it would be right more often.
    named = {f"{head}s".replace("ys", "ies"): ",".join(rows.label_values(head)) for head in HEADS}
    if limit is not None:
        recipe = replace(recipe, parts={name: replace(part, limit=limit) for name, part in recipe.parts.items()})
        rows, missing = recipe.rows(concepts, None if data is None else Path(data))
    out = Path(folder)
    given: dict[str, Any] = {"steps": recipe.steps, "guidance": recipe.guidance}
    given |= {key: value for key, value in sampling.items() if value is not None}
    report = attacked = None
    spec = _put_in(judge or recipe.judge, {"data": os.fspath(data or "data"), **named})
    try:
        who = find_judge(spec)
    except ErasureError as fault:
        missing.append(f"judge {spec[:120]}: {fault}. The pictures are drawn; a run with another --judge judges them")
        draw = {**given, "steps": given["steps"] or STEPS, "guidance": given["guidance"] or GUIDANCE}
        generate(pipe, rows, out / "patched", progress=progress, **draw)
        with switched_off(pipe):
            generate(pipe, rows, out / "base", progress=progress, **draw)
    else:
        more = {"lpips": recipe.lpips} | {key: value for key, value in (measures or {}).items() if value is not None}
        options: dict[str, Any] = {"prompts": rows, "judge": who, "progress": progress, **given}
        try:
            report = evaluate(pipe, concepts, folder=out, whole=True, **options, **more)
        except ErasureError as fault:  # perhaps because of what is missing
            raise ErasureError(". Missing: ".join([str(fault), *missing])) from None
        if recipe.attacks:
            from erasure.evaluation.attacks.run import attack

            place = out / "attacks"
            attacked = attack(pipe, concepts, recipe.attacks, folder=place, cases=recipe.cases, **options)
    found = SuiteResult(recipe, report, attacked, missing)
    try:
        (out / "suite.tmp").write_text(json.dumps(found.to_json(), indent=1), encoding="utf-8")
        os.replace(out / "suite.tmp", out / "suite.json")
    except OSError as fault:
        raise ErasureError(f"{out}: cannot be written: {fault.strerror or fault}") from None
    return found
