"""`attack`: prompts that show the concept on the base, asked before and after each attack, and a control."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from erasure.errors import ErasureError
from erasure.evaluation import generate
from erasure.evaluation.attacks.attack import LEAST, Attack, Attempt, Case, Victim, enough, make, names
from erasure.evaluation.attacks.caveats import gating, idle
from erasure.evaluation.attacks.report import AttackReport, Outcome
from erasure.evaluation.judges.judge import verdicts
from erasure.evaluation.judges.registry import find_judge
from erasure.evaluation.report.writer import check_writable, write_attack_report
from erasure.evaluation.select import find_target
from erasure.evaluation.text_files import write_lines
from erasure.model.conditioning import Conditions, unconditional
from erasure.model.diffusion import Counts, counting, wide
from erasure.pipelines.strengths import switched_off
from erasure.prompts.prompt_set import PromptSet, order_by_hash, reseed
from erasure.prompts.row import Prompt

if TYPE_CHECKING:
    from erasure.concepts.concept import Concept
    from erasure.evaluation.judges.judge import Judge
    from erasure.evaluation.metrics.target import Target


@dataclass
class Asking:
    """Draws attempts and says which show the target."""

    victim: Victim
    judge: Judge
    target: Target
    steps: int
    guidance: float
    batch_size: int
    faults: list[str] = field(default_factory=list)
    scales: dict[str, float] = field(default_factory=dict)  # case -> guidance, where its row names one
    said: list[dict[str, Any]] = field(default_factory=list)  # all that the judge said, by case and what was asked

    def draw(self, cases: Sequence[Case], attempts: dict[int, Attempt]) -> dict[int, Image.Image]:
        """A picture an attempt, from its case's own noise; attempts of one kind share a batch."""
        groups: dict[Any, list[int]] = {}
        for i, attempt in attempts.items():
            kind = attempt.embeds is None, attempt.strength, self.scales.get(cases[i].id)
            groups.setdefault(kind, []).append(i)
        found: dict[int, Image.Image] = {}
        for rows in groups.values():
            for at in range(0, len(rows), self.batch_size):
                part = rows[at : at + self.batch_size]
                images = self._call([cases[i] for i in part], [attempts[i] for i in part])
                found |= dict(zip(part, images, strict=True))
        return found

    def _call(self, cases: list[Case], attempts: list[Attempt]) -> list[Image.Image]:
        pipe = self.victim.pipe
        options: dict[str, Any] = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.scales.get(cases[0].id, self.guidance),
            "generator": [torch.Generator().manual_seed(case.seed) for case in cases],
        }
        embeds = [attempt.embeds for attempt in attempts if attempt.embeds is not None]
        if embeds:
            with self.victim.folded():
                given, empty = Conditions.cat(embeds), unconditional(pipe, self.victim.conditions([""]))
                against = empty.expand(len(given))
                options["prompt_embeds"] = given.states.to(empty.states)
                options["negative_prompt_embeds"] = against.states
                if given.pooled is not None and empty.pooled is not None:
                    options["pooled_prompt_embeds"] = given.pooled.to(empty.pooled)
                    options["negative_pooled_prompt_embeds"] = against.pooled
                return pipe(**options).images
        texts = [attempt.prompt for attempt in attempts]
        if attempts[0].strength is None:
            return pipe(texts, **options).images
        from erasure import pipelines

        large = len(self.victim.encoders) > 1
        other = pipelines.sibling(
            pipe,
            pipelines.ErasedStableDiffusionXLImg2ImgPipeline
            if large
            else pipelines.ErasedStableDiffusionImg2ImgPipeline,
        )
        latents = torch.stack([case.latents for case in cases]).to(self.victim.device, pipe.unet.dtype)
        return other(texts, image=latents, strength=attempts[0].strength, **options).images

    def shows(self, images: dict[int, Image.Image], cases: Sequence[Case], asked: str | int) -> set[int]:
        """The pictures with the target; one that cannot be judged counts as one. `asked` names the try in `said`."""
        found = set()
        for i, image in images.items():
            try:
                verdict = verdicts(self.judge, [image])[0]
                scores = verdict[self.target.domain]
            except Exception as fault:
                self.faults.append(f"{cases[i].id}: {self.judge.name} failed: {type(fault).__name__}: {fault}")
                found.add(i)
                self.said.append({"id": cases[i].id, "asked": asked, "verdict": None})
                continue
            self.said.append({"id": cases[i].id, "asked": asked, "verdict": verdict})
            if max(scores, key=lambda label: scores[label]) in self.target.labels:
                found.add(i)
        return found

    def cases(self, rows: PromptSet, concept: Any, count: int) -> tuple[list[Case], int, list[Image.Image]]:
        """The first `count` target prompts that the base answers with the target, of at most three times as many.

        Returns:
            The cases, how many prompts were asked, the base's pictures.
        """
        enough(count)
        labels, domain = self.target.labels, self.target.domain
        hits = [row for row in rows.rows if row.labels.get(domain) in labels and not row.labels.get("role")]
        if not hits:
            raise ErasureError(f"prompt set {rows.name!r} has no prompt that asks for {', '.join(labels)}")
        copies = range(1 + 3 * count // len(hits))
        wanted = [reseed(row, copy) for copy in copies for row in order_by_hash(hits)][: 3 * count]
        words = [*labels, *([concept] if isinstance(concept, str) else getattr(concept, "names", concept))]
        found: list[Case] = []
        shown: list[Image.Image] = []
        tried = 0
        while len(found) < count and tried < len(wanted):
            part = wanted[tried : tried + max(LEAST, count - len(found))]
            self.scales |= {row.id: row.guidance for row in part if row.guidance is not None}
            latents = self._base(part)
            images = self.decoded(latents)
            drawn = [
                Case(row.id, row.prompt, row.seed, row.labels[domain], x, *around(row.prompt, words))
                for row, x in zip(part, latents, strict=True)
            ]
            seen = self.shows(dict(enumerate(images)), drawn, "base")
            found += [drawn[i] for i in sorted(seen)]
            shown += [images[i] for i in sorted(seen)]
            tried += len(part)
        if len(found) < LEAST:
            raise ErasureError(
                f"the base shows {', '.join(labels)} in {len(found)} of {tried} pictures: there is nothing to attack"
            )
        return found[:count], tried, shown[:count]

    def _base(self, rows: Sequence[Prompt]) -> torch.Tensor:
        """Latents of the base's pictures [n, c, h, w], each row's with its own guidance."""
        found: dict[str, torch.Tensor] = {}
        for scale in dict.fromkeys(self.scales.get(row.id, self.guidance) for row in rows):
            few = [row for row in rows if self.scales.get(row.id, self.guidance) == scale]
            prompts, seeds = [row.prompt for row in few], [row.seed for row in few]
            made = self.victim.base_latents(prompts, seeds, self.batch_size, self.steps, scale)
            found |= {row.id: x for row, x in zip(few, made, strict=True)}
        return torch.stack([found[row.id] for row in rows])

    def conditions(self, cases: Sequence[Case], seed: int) -> dict[str, Any]:
        """What a result depends on."""
        own = {case.id: self.scales[case.id] for case in cases if case.id in self.scales}
        return {
            **generate.image_settings(self.victim.pipe, self.steps, self.guidance),
            **({"guidances": own} if own else {}),
            "cases": [case.id for case in cases],
            "judge": {"name": self.judge.name, **self.judge.versions()},
            "seed": seed,
        }

    def decoded(self, latents: torch.Tensor) -> list[Image.Image]:
        """The pictures of latents [n, c, h, w]."""
        pipe = self.victim.pipe
        with torch.no_grad(), wide(pipe.vae):
            made = latents.to(self.victim.device, pipe.vae.dtype) / pipe.vae.config.scaling_factor
            return pipe.image_processor.postprocess(pipe.vae.decode(made).sample)


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
) -> AttackReport:
    """Attack the patches on a pipeline: what share of prompts shows the concept before and after.

    The cases are prompts that the base answers with the concept. Those that the erased model answers so too count
    as hits of the plain prompt; the others are attacked, round by round, until a picture shows the concept. The
    control has as many tries without the search. Writes report.json, report.html and grid.png, and all that the judge
    said into scores.jsonl, an attack's own beside its pictures; an attack that is there is not run again.

    Args:
        pipe: an erased pipeline with patches loaded.
        concept: what was erased: labels of the prompt set, or names that the judge knows them by.
        attacks: names of attacks; "all" for all but the bare control.
        prompts: a prompt set with labels; None: glyph's prompts about the concept.
        cases: how many prompts to attack.
        budget: lite (for a CPU) or full (as published).
        settings: of the one attack that is named.
        judge: default: glyph's.

    Raises:
        ErasureError: an unknown attack, setting or concept; too few prompts that the base answers with the concept;
            a folder with results of other settings.
    """
    listed = [attacks] if isinstance(attacks, str) else list(attacks)
    chosen = [name for name in names() if name != "random"] if listed == ["all"] else listed
    if settings and len(chosen) != 1:
        raise ErasureError(f"settings belong to one attack; {len(chosen)} are named: {', '.join(chosen)}")
    made = [make(name, budget, **(settings or {})) for name in chosen]
    asking, rows = begin(pipe, concept, prompts, judge, steps, guidance, batch_size)
    out = check_writable(folder)
    found, tried, pictures = asking.cases(rows, concept, cases)
    plain = asking.draw(found, {i: Attempt(case.prompt) for i, case in enumerate(found)})
    hit = asking.shows(plain, found, "plain")
    said = asking.said[:]
    shared = asking.conditions(found, seed)
    outcomes = []
    for one in made:
        done = _kept(out, one, shared) or _run(asking, found, one, hit, out, shared, seed, progress)
        outcomes.append(done)
        if progress and not sys.stderr.isatty():  # a terminal has the bar
            tries = f"{done.rounds} {'try' if done.rounds == 1 else 'tries'}"
            sys.stderr.write(f"{done.name}: shown for {done.plain + len(done.won)} of {done.n} after {tries}\n")
            sys.stderr.flush()
    target = asking.target
    report = AttackReport(target.labels, target.domain, len(found), tried, len(hit), outcomes, shared, asking.faults)
    report.prompts.update({case.id: case.prompt for case in found})
    report.notes.extend([*gating(pipe), *idle(pipe, chosen)])
    write_attack_report(report, out, {"base": pictures, "erased": [plain[i] for i in range(len(found))]})
    write_lines(out / "scores.jsonl", map(json.dumps, said))
    return report


def begin(
    pipe: Any,
    concept: Any,
    prompts: str | PromptSet | None,
    judge: Judge | None,
    steps: int | None,
    guidance: float | None,
    batch_size: int,
) -> tuple[Asking, PromptSet]:
    """The judge, the target and the prompts of an attack, and who asks."""
    if judge is None:
        judge = find_judge("glyph")
    rows = _rows(concept, prompts)
    target = find_target(concept, rows, judge)
    steps = generate.STEPS if steps is None else steps
    guidance = generate.GUIDANCE if guidance is None else guidance
    return Asking(Victim(pipe, switched_off), judge, target, steps, guidance, batch_size), rows


def keep(place: Path, cases: Sequence[Case], images: dict[int, Image.Image]) -> None:
    """Write pictures under their cases' ids."""
    place.mkdir(parents=True, exist_ok=True)
    for i, image in images.items():
        image.save(place / f"{cases[i].id}.tmp", format="PNG")
        os.replace(place / f"{cases[i].id}.tmp", place / f"{cases[i].id}.png")


def _rows(concept: Any, prompts: str | PromptSet | None) -> PromptSet:
    if isinstance(prompts, PromptSet):
        return prompts
    if prompts is not None:
        return PromptSet.read(prompts)
    from erasure.prompts.concept_prompts import concept_prompts

    return concept_prompts([concept] if isinstance(concept, str) else list(getattr(concept, "names", concept)))


def around(prompt: str, words: Sequence[str]) -> tuple[str, str]:
    """What stands before and behind the first of `words` in a prompt; ("", prompt) where none does."""
    for word in sorted(words, key=len, reverse=True):
        match = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)
        if match:
            return prompt[: match.start()].strip(), prompt[match.end() :].strip()
    return "", prompt


def _run(
    asking: Asking,
    cases: list[Case],
    one: Attack,
    hit: set[int],
    folder: Path,
    shared: dict[str, Any],
    seed: int,
    progress: bool,
) -> Outcome:
    from tqdm import tqdm

    counts = Counts()
    asking.said.clear()
    with tqdm(desc=one.name, unit="picture", disable=None if progress else True, leave=False) as bar:
        won, curve, asked, last = _play(asking, cases, one, hit, seed, counts, bar.update)
        split = len(asking.said)
        control = one.control(len(curve))
        theirs = None if control is None else _play(asking, cases, control, hit, seed + 1, Counts(), bar.update)
    ceiling = None
    if one.BLIND:
        with asking.victim.unpatched():
            ceiling = len(asking.shows(asking.draw(cases, asked), cases, "base"))
    outcome = Outcome(
        name=one.name,
        access=one.access,
        source=one.source,
        settings=asdict(one),
        n=len(cases),
        plain=len(hit),
        won={cases[i].id: tries for i, tries in won.items()},
        rounds=len(curve),
        curve=curve if one.CURVE else None,
        control=None if theirs is None else {cases[i].id: tries for i, tries in theirs[0].items()},
        control_curve=theirs[1] if theirs is not None and one.CURVE else None,
        asked={cases[i].id: attempt.prompt or attempt.note for i, attempt in asked.items()},
        costs={"F": counts.forward, "B": counts.backward, "seconds": round(counts.seconds, 1)},
        ceiling=ceiling,
    )
    place = folder / one.name
    keep(place, cases, last)
    lines = ({"of": "attack" if at < split else "control", **entry} for at, entry in enumerate(asking.said))
    write_lines(place / "scores.jsonl", map(json.dumps, lines))
    note = {"shared": shared, "outcome": asdict(outcome)}
    (place / "outcome.tmp").write_text(json.dumps(note, indent=1), encoding="utf-8")
    os.replace(place / "outcome.tmp", place / "outcome.json")
    return outcome


def _kept(folder: Path, one: Attack, shared: dict[str, Any]) -> Outcome | None:
    path = folder / one.name / "outcome.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    outcome = Outcome(**found["outcome"])
    same = json.loads(json.dumps([shared, asdict(one)]))
    if [found["shared"], outcome.settings] != same:
        raise ErasureError(
            f"{path.parent} holds a result of other settings; it was left untouched: use another folder, or delete it"
        )
    return outcome


def _play(
    asking: Asking,
    cases: list[Case],
    one: Attack,
    hit: set[int],
    seed: int,
    counts: Counts,
    tick: Callable[[int], Any],
) -> tuple[dict[int, int], list[int], dict[int, Attempt], dict[int, Image.Image]]:
    """Case -> the try that won; hits a round; what was asked last, and its picture.

    The parameters' own switches are put back, for a search freezes them.
    """
    safe = set(range(len(cases))) - hit
    won: dict[int, int] = {}
    curve: list[int] = []
    asked: dict[int, Attempt] = {}
    last: dict[int, Image.Image] = {}
    pipe, encoders = asking.victim.pipe, asking.victim.encoders
    learning = [(p, p.requires_grad) for part in (pipe.unet, *encoders) for p in part.parameters()]
    for parameter, _ in learning:
        parameter.requires_grad_(False)
    rounds = one.rounds(asking.victim, cases, safe, seed)
    try:
        while safe or one.CURVE:
            with counting(pipe.unet, counts):
                attempts = next(rounds, None)
            if attempts is None:
                break
            images = asking.draw(cases, attempts)
            seen = asking.shows(images, cases, len(curve) + 1)
            curve.append(len(seen))
            tick(len(images))
            for i in attempts:
                if i not in won and i not in hit:
                    asked[i], last[i] = attempts[i], images[i]
            won |= {i: len(curve) for i in seen & safe}
            safe -= seen
    finally:
        rounds.close()  # type: ignore[attr-defined]
        for parameter, flag in learning:
            parameter.requires_grad_(flag)
    return won, curve, asked, last
