"""`attack`: measure how often attacks recover an erased concept, next to a control without their search."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from erasure.errors import ErasureError
from erasure.evaluation.attacks.attack import Attack, Attempt, Case, make, names
from erasure.evaluation.attacks.caveats import gating, idle, unsuited
from erasure.evaluation.attacks.report import AttackReport, Outcome
from erasure.evaluation.attacks.runner import AttackRunner, prepare, save_images
from erasure.evaluation.report.writer import check_writable, write_attack_report
from erasure.evaluation.text_files import write_lines
from erasure.model.diffusion import Counts, counting
from erasure.prompts.prompt_set import PromptSet

if TYPE_CHECKING:
    from erasure.concepts.concept import Concept
    from erasure.evaluation.judges.judge import Judge


T = TypeVar("T")


def attack(
    pipe: Any,
    concept: str | list[str] | Concept,
    attacks: str | Sequence[str],
    *,
    folder: str | os.PathLike[str],
    prompts: str | PromptSet | None = None,
    cases: int = 12,
    budget: str = "lite",
    settings: dict[str, Any] | None = None,
    judge: Judge | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
    leave_out: bool = False,
) -> AttackReport:
    """Try to recover the erased concept and report the attack success rate.

    The cases are prompts for which the base model shows the concept. Those for which the erased model shows it too
    count as recovered by the plain prompt. The others are attacked round by round until an image shows the concept.
    Each attack has a control: equally many tries without the search.

    `folder` receives report.json, report.html, grid.png and scores.jsonl (the judge's verdicts on the base's and the
    plain prompts' images), and one folder per attack with its images and verdicts. An attack whose result is already
    in `folder` is not run again.

    Args:
        pipe: an erased pipeline with its patches loaded.
        concept: the erased concept: labels of the prompt set, or names that the judge maps to labels.
        attacks: names of attacks, or "all" for every attack except `random`, which is the control alone.
        folder: folder for the results.
        prompts: prompt set with labels, or its name or path; default: those of evaluation/defaults.py.
        cases: number of prompts to attack, at least 2.
        budget: `full` (the published settings) or `lite` (adapted to a CPU; the report says in what).
        settings: settings that override the budget's; only with a single attack.
        judge: judge of the images; default: that of evaluation/defaults.py.
        steps: number of sampling steps; None: what suits the checkpoint.
        guidance: guidance scale of prompts that name none; None: what suits the checkpoint.
        batch_size: number of images per call of the pipeline.
        seed: seed of the attacks; each control uses `seed + 1`.
        progress: show a progress bar, or one line per attack if standard error is not a terminal.
        leave_out: leave out attacks that have no meaning against the active patches, with a note; "all" does so too.

    Raises:
        ErasureError: an unknown attack, setting or concept; an attack that has no meaning against a guard; fewer than
            two prompts for which the base model shows the concept; a folder that cannot be written or holds results of
            other settings.
    """
    configured, left_out = _suited(pipe, _configured(attacks, budget, settings or {}), leave_out or attacks == "all")
    runner, rows = prepare(pipe, concept, prompts, judge, steps, guidance, batch_size)
    out = check_writable(folder)
    selected, tried, base_images = runner.find_cases(rows, concept, cases)
    plain_images = runner.draw(selected, {i: Attempt(case.prompt) for i, case in enumerate(selected)})
    plain_hits = runner.shows(plain_images, selected, "plain")
    log = runner.log[:]
    provenance = runner.provenance(selected, seed)
    comparison = _Comparison(runner, selected, plain_hits, provenance, seed, progress)
    outcomes = []
    for current in configured:
        outcomes.append(_stored(out, current, provenance) or comparison.run(current, out))
        if progress and not sys.stderr.isatty():  # on a terminal the progress bar shows it
            _print_progress(outcomes[-1])
    report = AttackReport(
        runner.target.labels,
        runner.target.domain,
        len(selected),
        tried,
        len(plain_hits),
        outcomes,
        provenance,
        runner.faults,
        prompts={case.id: case.prompt for case in selected},
        plain_ids=tuple(selected[i].id for i in sorted(plain_hits)),
    )
    report.notes.extend([*left_out, *gating(pipe), *idle(pipe, [current.name for current in configured])])
    erased_images = [plain_images[i] for i in range(len(selected))]
    write_attack_report(report, out, {"base": base_images, "erased": erased_images})
    write_lines(out / "scores.jsonl", map(json.dumps, log))
    return report


def _configured(attacks: str | Sequence[str], budget: str, settings: dict[str, Any]) -> list[Attack]:
    listed = [attacks] if isinstance(attacks, str) else list(attacks)
    chosen = [name for name in names() if name != "random"] if listed == ["all"] else listed
    if settings and len(chosen) != 1:
        raise ErasureError(
            f"settings apply to a single attack, but {len(chosen)} are named: {', '.join(chosen)}; nothing was attacked"
        )
    return [make(name, budget, **settings) for name in chosen]


def _suited(pipe: Any, attacks: list[Attack], leave_out: bool) -> tuple[list[Attack], list[str]]:
    """Return the attacks that have a meaning against the active patches, and a note on each other one.

    Args:
        pipe: the pipeline under attack.
        attacks: the attacks.
        leave_out: whether the others are left out and not refused.

    Raises:
        ErasureError: one is refused, or all would be left out.
    """
    reasons = [(current, unsuited(pipe, type(current))) for current in attacks]
    refused = [reason for _, reason in reasons if reason]
    if refused and (not leave_out or len(refused) == len(attacks)):
        raise ErasureError(f"{'; '.join(refused)}. Nothing was attacked")
    return [current for current, reason in reasons if not reason], [f"left out: {reason}" for reason in refused]


def _print_progress(outcome: Outcome) -> None:
    tries = f"{outcome.rounds} {'try' if outcome.rounds == 1 else 'tries'}"
    recovered = outcome.plain + len(outcome.won)
    sys.stderr.write(f"{outcome.name}: concept shown for {recovered} of {outcome.n} prompts after {tries}\n")
    sys.stderr.flush()


@dataclass(frozen=True)
class _Comparison:
    """Runs an attack and its control on the same cases.

    Args:
        plain_hits: indices of the cases that the plain prompt already recovers.
        provenance: what every result depends on, stored with it.
    """

    runner: AttackRunner
    cases: list[Case]
    plain_hits: set[int]
    provenance: dict[str, Any]
    seed: int
    progress: bool

    def run(self, attack: Attack, folder: Path) -> Outcome:
        """Run the attack and its comparisons, and write the outcome, images and verdicts to `folder/<attack>`."""
        from tqdm import tqdm

        cases = self.cases
        with tqdm(desc=attack.name, unit="image", disable=None if self.progress else True, leave=False) as bar:
            trials, log, ceiling = self._play_all(attack, bar.update)
        trial, control, base = trials["attack"], trials.get("control"), trials.get("base")
        outcome = Outcome(
            name=attack.name,
            access=attack.access,
            source=attack.source,
            settings=asdict(attack),
            n=len(cases),
            plain=len(self.plain_hits),
            won=_by_id(cases, trial.won),
            rounds=trial.rounds,
            curve=trial.curve if attack.CURVE else None,
            control=None if control is None else _by_id(cases, control.won),
            control_curve=control.curve if control is not None and attack.CURVE else None,
            asked=_by_id(cases, {i: attempt.described() for i, attempt in trial.attempts.items()}),
            costs={
                "F": trial.counts.forward,
                "B": trial.counts.backward,
                "seconds": round(trial.counts.seconds, 1),
            },
            ceiling=ceiling,
            base=None if base is None else _by_id(cases, base.won),
            adapted=attack.adapted(),
            tries={of: _by_id(cases, played.tries) for of, played in trials.items()},
        )
        own = folder / attack.name
        save_images(own, cases, trial.images)
        write_lines(own / "scores.jsonl", map(json.dumps, log))
        result = {"shared": self.provenance, "outcome": asdict(outcome)}
        (own / "outcome.tmp").write_text(json.dumps(result, indent=1), encoding="utf-8")
        os.replace(own / "outcome.tmp", own / "outcome.json")
        return outcome

    def _play_all(
        self, attack: Attack, tick: Callable[[int], Any]
    ) -> tuple[dict[str, _Trial], list[dict[str, Any]], int | None]:
        """Play the attack, its control, and the attack on the base if it asks for that, each with equally many tries.

        Returns:
            "attack", "control" or "base" -> trial; the judge's verdicts, each with the same name as `of`; and, for a
            blind attack, the number of last tries for which the base shows the concept.
        """
        runner, log, ceiling = self.runner, list[dict[str, Any]](), None

        def logged(of: str, trial: _Trial) -> _Trial:
            log.extend({"of": of, **entry} for entry in runner.log)
            runner.log.clear()
            return trial

        runner.log.clear()
        trial = logged("attack", self.play(attack, self.seed, tick))
        trials = {"attack": trial}
        if (control := attack.control(trial.rounds)) is not None:
            trials["control"] = logged("control", self.play(control, self.seed + 1, tick))
        if (on_base := attack.on_base(trial.rounds)) is not None:
            with runner.victim.unpatched():
                trials["base"] = logged("base", self.play(on_base, self.seed, tick))
        if attack.BLIND:
            with runner.victim.unpatched():
                ceiling = len(runner.shows(runner.draw(self.cases, trial.attempts), self.cases, "base"))
            logged("base", trial)
        return trials, log, ceiling

    def play(self, attack: Attack, seed: int, tick: Callable[[int], Any]) -> _Trial:
        """Run the rounds of one attack until no case is left or the attack ends.

        A search freezes the model's parameters; their `requires_grad` flags are restored.

        Args:
            attack: the attack, or the control of one.
            seed: seed of its random numbers.
            tick: called with the number of images after each round.
        """
        runner, cases, trial = self.runner, self.cases, _Trial()
        safe = set(range(len(cases))) - self.plain_hits
        pipe, encoders = runner.victim.pipe, runner.victim.encoders
        flags = [(p, p.requires_grad) for part in (pipe.unet, *encoders) for p in part.parameters()]
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        rounds = attack.rounds(runner.victim, cases, safe, seed)
        try:
            while safe or attack.CURVE:
                with counting(pipe.unet, trial.counts):
                    attempts = next(rounds, None)
                if attempts is None:
                    break
                images = runner.draw(cases, attempts)
                hits = runner.shows(images, cases, trial.rounds + 1)
                trial.curve.append(len(hits))
                tick(len(images))
                for i in attempts:
                    trial.tries.setdefault(i, []).append(i in hits)
                    if i not in trial.won and i not in self.plain_hits:
                        trial.attempts[i], trial.images[i] = attempts[i], images[i]
                trial.won |= {i: trial.rounds for i in hits & safe}
                safe -= hits
        finally:
            rounds.close()  # type: ignore[attr-defined]
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        return trial


@dataclass
class _Trial:
    """The record of one attack's rounds, with cases given by their index.

    Args:
        won: case -> the round that recovered the concept.
        curve: for each round, the number of images that show the concept.
        tries: case -> whether each of its tries showed the concept.
        attempts: case -> its last attempt.
        images: case -> the image of its last attempt.
        counts: forward and backward passes and time of the search, without generating the images.
    """

    won: dict[int, int] = field(default_factory=dict)
    curve: list[int] = field(default_factory=list)
    tries: dict[int, list[bool]] = field(default_factory=dict)
    attempts: dict[int, Attempt] = field(default_factory=dict)
    images: dict[int, Image.Image] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    @property
    def rounds(self) -> int:
        """Return the number of rounds played."""
        return len(self.curve)


def _by_id(cases: Sequence[Case], values: dict[int, T]) -> dict[str, T]:
    return {cases[i].id: value for i, value in values.items()}


def _stored(folder: Path, attack: Attack, provenance: dict[str, Any]) -> Outcome | None:
    """Return the outcome of an earlier run with the same settings, or None if there is none."""
    path = folder / attack.name / "outcome.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    outcome = Outcome(**result["outcome"])
    current = json.loads(json.dumps([provenance, asdict(attack)]))
    if [result["shared"], outcome.settings] != current:
        raise ErasureError(
            f"{path.parent} holds a result of other settings, which was left untouched: use another folder or delete it"
        )
    return outcome
