"""Suites: named protocols of prompts, judge, sampling and attacks (`configs/suites/*.yaml`, or a file of the user).

A suite consists of parts, each a prompt set or a template. Together they form one prompt set, which `evaluate` runs.
Whatever is not available (a file, the network, a judge's model) is reported as missing, and the rest still runs; the
command then ends with exit code 1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasure.config import CONFIGS, build, read_yaml
from erasure.errors import ErasureError, unknown
from erasure.evaluation.suite_part import HEADS, ROLES, Part, substitute
from erasure.evaluation.text_files import write_text
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt

if TYPE_CHECKING:
    from erasure.evaluation.attacks.report import AttackReport
    from erasure.evaluation.judges.judge import Judge
    from erasure.evaluation.report.report import Report

FOLDER = CONFIGS / "suites"


@dataclass(frozen=True)
class Peers:
    """Concepts of one kind, from which the judge of a suite chooses when it looks for one of them.

    The list does not depend on the target. Labels chosen for their nearness to the target would take its images for
    theirs, and so flatter the erasure.

    Args:
        concepts: names of the concepts.
        otherwise: label of an image that shows none of them.
        template: text with {} for the judge to compare images with.
    """

    concepts: tuple[str, ...]
    otherwise: str
    template: str = "a photo of {}"


@dataclass(frozen=True)
class Suite:
    """An evaluation protocol: which prompts are drawn, how they are sampled, who judges them, and which attacks follow.

    Args:
        about: one line on what the suite measures.
        source: the paper or project that it follows.
        parts: name -> part.
        judge: a judge as `find_judge` takes it; {data} stands for the user's data folder, and {objects}, {styles} and
            {identities} for comma-separated lists of the labels of all rows, regardless of any limit; {peers} and
            {peers_template} for the labels and the template of the concept's `peers`.
        base: the checkpoint for which results are published.
        steps: sampling steps; None: the default.
        guidance: guidance scale; None: the default.
        lpips: backbone for LPIPS to the base's images; None: no LPIPS.
        attacks: names of the attacks that follow.
        cases: number of prompts to attack.
        differs: how the suite differs from the published protocol.
        peers: kind of concept -> the concepts of that kind.
        name: name of the suite.
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
    peers: dict[str, Peers] = field(default_factory=dict)
    name: str = ""

    @classmethod
    def read(cls, source: str | os.PathLike[str]) -> Suite:
        """Read a suite of the package, or one from a YAML file.

        Args:
            source: the name of a suite in the package, or the path of a YAML file.

        Raises:
            ErasureError: there is no such suite, a key is unknown or missing, or a part has no prompts.
        """
        text = os.fspath(source)
        path = FOLDER / f"{text}.yaml" if text in names() else Path(text)
        if not path.is_file():
            raise ErasureError(f"{unknown('suite', text, names())}; or give the path of an existing YAML file")
        content = read_yaml(path)
        missing = [key for key in ("about", "source", "parts") if not content.get(key)]
        if missing:
            raise ErasureError(f"{path}: a suite needs the keys about, source and parts; missing: {', '.join(missing)}")
        entries = content.pop("parts")
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise ErasureError(f"{path}: expected `parts` to map the name of each part to its settings")
        parts: dict[str, Part] = {}
        try:
            for name, entry in entries.items():
                parts[name] = part = build(Part, entry)
                if (part.prompts is None) == (part.template is None):
                    raise ErasureError(f"part {name!r} needs either prompts or a template")
                if part.role not in ROLES:
                    raise unknown("role", part.role, ROLES)
            peers = {kind: build(Peers, entry) for kind, entry in content.pop("peers", {}).items()}
            suite = build(cls, {"about": "", "source": "", "parts": {}, **content})
        except ErasureError as fault:
            raise ErasureError(f"{path}: {fault}") from None
        return replace(suite, parts=parts, peers=peers, name=path.stem)

    def rows(self, concepts: Sequence[str], data: Path | None = None) -> tuple[PromptSet, list[str]]:
        """Return one prompt set of all parts that are available, and a message for each part that is not.

        Args:
            concepts: names of the concepts.
            data: the user's data folder, or None.

        Raises:
            ErasureError: no part is available.
        """
        rows: list[Prompt] = []
        missing = []
        for name, part in self.parts.items():
            try:
                rows += part.rows(name, concepts, data)
            except ErasureError as fault:
                missing.append(f"part {name}: {fault}" + (f"; {part.get}" if part.get else ""))
        if not rows:
            raise ErasureError(f"suite {self.name}: there are no prompts. " + ". ".join(missing))
        return PromptSet(f"suite-{self.name}", rows), missing

    def judge_fields(self, concept: str, rows: PromptSet) -> dict[str, str]:
        """Return the fields of the judge's text besides {data}, by name.

        Args:
            concept: name of the first concept.
            rows: all rows of the suite.

        Raises:
            ErasureError: the suite has `peers`, and the concept is none of them.
        """
        fields = {f"{head}s".replace("ys", "ies"): ",".join(rows.label_values(head)) for head in HEADS}
        if not self.peers:
            return fields
        group = next((peers for peers in self.peers.values() if concept in peers.concepts), None)
        if group is None:
            known = [name for peers in self.peers.values() for name in peers.concepts]
            raise unknown(f"concept of suite {self.name}", concept, known)
        return {**fields, "peers": ",".join([*group.concepts, group.otherwise]), "peers_template": group.template}


@dataclass(frozen=True)
class SuiteResult:
    """The reports of a suite, with a list of everything that was not available.

    Args:
        suite: the suite.
        report: the evaluation, or None without a judge.
        attacks: the attacks, or None if the suite has none.
        missing: parts, judges, measurements and attacks that are missing from the results, and why. A suite with such
            a list is incomplete, and the command ends with exit code 1.
    """

    suite: Suite
    report: Report | None
    attacks: AttackReport | None
    missing: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return {
            "suite": self.suite.name,
            "source": self.suite.source,
            "differs": self.suite.differs,
            "missing": self.missing,
            "report": None if self.report is None else self.report.to_json(),
            "attacks": None if self.attacks is None else self.attacks.to_json(),
        }

    def text(self) -> str:
        """Return the result as plain text for a terminal."""
        lines = [f"suite {self.suite.name}: {self.suite.about} ({self.suite.source})"]
        lines += [report.text() for report in (self.report, self.attacks) if report is not None]
        if self.suite.differs:
            lines.append(f"differs from the published protocol: {self.suite.differs}")
        lines += [f"missing: {text}" for text in self.missing]
        return "\n".join(lines)


def names() -> list[str]:
    """List the names of the suites that come with the package."""
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
    base_folder: str | os.PathLike[str] | None = None,
    **sampling: Any,
) -> SuiteResult:
    """Run a suite on a pipeline with patches, and write its reports and suite.json.

    If the judge is not available, the images are drawn nevertheless, and a later run judges them.

    Args:
        pipe: an erased pipeline with patches.
        concept: what should be erased.
        suite: a suite, or the name or file of one.
        folder: folder for everything that is written.
        data: folder that {data} stands for in the suite.
        judge: replaces the suite's judge.
        limit: largest number of rows of each part.
        measures: `features`, `lpips`, `reference` and `scorer` for `evaluate`; None values leave the suite's setting.
        progress: show the progress.
        base_folder: folder of the base's images, which runs over the same model can share; default: `folder`/base.
        sampling: `steps`, `guidance` and `batch_size`; None values leave the suite's setting.

    Raises:
        ErasureError: the suite is unknown, none of its parts is available, or `evaluate` refuses to run.
    """
    from erasure.evaluation.generate import generate
    from erasure.evaluation.judges.registry import find_judge
    from erasure.pipelines.strengths import switched_off

    protocol = suite if isinstance(suite, Suite) else Suite.read(suite)
    concepts = [concept] if isinstance(concept, str) else list(concept)
    data_folder = None if data is None else Path(data)
    rows, missing = protocol.rows(concepts, data_folder)
    # The judge knows the labels of the whole suite. Among fewer labels it would be right more often.
    labels = protocol.judge_fields(concepts[0], rows)
    if limit is not None:
        protocol = replace(protocol, parts={name: replace(part, limit=limit) for name, part in protocol.parts.items()})
        rows, missing = protocol.rows(concepts, data_folder)
    _check_own(pipe, protocol, judge)
    out = Path(folder)
    settings: dict[str, Any] = {"steps": protocol.steps, "guidance": protocol.guidance}
    settings |= {key: value for key, value in sampling.items() if value is not None}
    report = attacks = None
    spec = substitute(judge or protocol.judge, {"data": os.fspath(data or "data"), **labels})
    try:
        suite_judge: Judge = find_judge(spec)
    except ErasureError as fault:
        missing.append(f"judge {spec[:120]}: {fault}. The images were drawn; judge them by a run with another --judge")
        if protocol.attacks:
            missing.append(f"attacks {', '.join(protocol.attacks)}: not run, for they need the judge")
        generate(pipe, rows, out / "patched", progress=progress, **settings)
        with switched_off(pipe):
            generate(pipe, rows, Path(base_folder or out / "base"), progress=progress, **settings)
    else:
        extra = {"base_folder": base_folder, "lpips": protocol.lpips} | {
            key: value for key, value in (measures or {}).items() if value is not None
        }
        options: dict[str, Any] = {"prompts": rows, "judge": suite_judge, "progress": progress, **settings}
        report, attacks = _measure(pipe, concepts, protocol, out, options, extra, missing)
    result = SuiteResult(protocol, report, attacks, missing)
    try:
        write_text(out / "suite.json", json.dumps(result.to_json(), indent=1))
    except OSError as fault:
        raise ErasureError(f"{out}: cannot be written: {fault.strerror or fault}") from None
    return result


def _differences(suite: Suite) -> list[str]:
    return [f"Suite {suite.name} differs from the published protocol: {suite.differs}"] if suite.differs else []


def _check_own(pipe: Any, suite: Suite, judge: str | None) -> None:
    """Refuse a suite with the prompts or the judge of glyph on another checkpoint.

    Raises:
        ErasureError: the suite is glyph's, and the pipeline is not.
    """
    from erasure.evaluation.defaults import GLYPH, is_glyph

    prompts = [part.prompts or "" for part in suite.parts.values()]
    own = (judge or suite.judge) == GLYPH or any(name == "about" or name.startswith(f"{GLYPH}-") for name in prompts)
    if own and not is_glyph(pipe):
        others = [name for name in names() if Suite.read(name).base != GLYPH]
        raise ErasureError(
            f"suite {suite.name} has the prompts or the judge of glyph, which mean nothing on another checkpoint. "
            f"Suites for other checkpoints: {', '.join(others)}. Nothing was drawn"
        )


def _measure(
    pipe: Any,
    concepts: list[str],
    suite: Suite,
    folder: Path,
    options: dict[str, Any],
    extra: dict[str, Any],
    missing: list[str],
) -> tuple[Report, AttackReport | None]:
    """Evaluate the suite's prompts, then run its attacks."""
    from erasure.evaluation.evaluate import evaluate

    try:
        report = evaluate(pipe, concepts, folder=folder, whole=True, notes=_differences(suite), **options, **extra)
    except ErasureError as fault:  # possibly caused by the missing parts
        raise ErasureError(". Missing: ".join([str(fault), *missing])) from None
    missing += report.missing
    if not suite.attacks:
        return report, None
    from erasure.evaluation.attacks.run import attack

    try:
        attacks = attack(
            pipe, concepts, suite.attacks, folder=folder / "attacks", cases=suite.cases, leave_out=True, **options
        )
    except ErasureError as fault:  # such as a base that does not show the concept
        missing.append(f"attacks {', '.join(suite.attacks)}: {fault}")
        return report, None
    return report, attacks
