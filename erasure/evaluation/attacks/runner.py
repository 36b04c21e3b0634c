"""Find the cases of an attack, generate the images of its attempts, and ask a judge which of them show the concept."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from erasure.errors import ErasureError
from erasure.evaluation import generate
from erasure.evaluation.attacks.attack import Attempt, Case, Victim, check_unet
from erasure.evaluation.attacks.case_count import LEAST, check_case_count
from erasure.evaluation.defaults import prompts_and_judge
from erasure.evaluation.judges.judge import verdicts
from erasure.evaluation.select import find_target
from erasure.model.conditioning import Conditions, unconditional
from erasure.model.loading import sampling_of
from erasure.pipelines.strengths import switched_off
from erasure.prompts.prompt_set import PromptSet, order_by_hash, reseed
from erasure.prompts.row import Prompt

if TYPE_CHECKING:
    from erasure.evaluation.judges.judge import Judge
    from erasure.evaluation.metrics.target import Target


@dataclass
class AttackRunner:
    """Generates the images of attempts and decides with a judge which of them show the target.

    Args:
        victim: the erased pipeline under attack.
        judge: judge of the images.
        target: domain and labels that count as the concept.
        steps: number of sampling steps.
        guidance: guidance scale of prompts that name none.
        batch_size: number of images per call of the pipeline.
        faults: one message for each image that the judge failed on.
        guidances: id of a case -> its own guidance scale, for prompts that name one.
        log: every verdict of the judge, as {"id", "asked", "verdict"}; `asked` names the attempt.
    """

    victim: Victim
    judge: Judge
    target: Target
    steps: int
    guidance: float
    batch_size: int
    faults: list[str] = field(default_factory=list)
    guidances: dict[str, float] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)

    def draw(self, cases: Sequence[Case], attempts: dict[int, Attempt]) -> dict[int, Image.Image]:
        """Generate one image per attempt, from the noise of its case; attempts of one kind share a batch.

        Args:
            cases: all cases.
            attempts: index of a case -> its attempt.

        Returns:
            Index of a case -> its image.
        """
        groups: dict[Any, list[int]] = {}
        for i, attempt in attempts.items():
            kind = attempt.embeds is None, attempt.sampling, self.guidances.get(cases[i].id)
            groups.setdefault(kind, []).append(i)
        images: dict[int, Image.Image] = {}
        for indices in groups.values():
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                drawn = self._call([cases[i] for i in batch], [attempts[i] for i in batch])
                images |= dict(zip(batch, drawn, strict=True))
        return images

    def _call(self, cases: list[Case], attempts: list[Attempt]) -> list[Image.Image]:
        pipe = self.victim.pipe
        options: dict[str, Any] = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidances.get(cases[0].id, self.guidance),
            "generator": [torch.Generator().manual_seed(case.seed) for case in cases],
        }
        embeds = [attempt.embeds for attempt in attempts if attempt.embeds is not None]
        if embeds:
            with self.victim.folded():
                positive, empty = Conditions.cat(embeds), unconditional(pipe, self.victim.conditions([""]))
                negative = empty.expand(len(positive))
                options["prompt_embeds"] = positive.states.to(empty.states)
                options["negative_prompt_embeds"] = negative.states
                if positive.pooled is not None and empty.pooled is not None:
                    options["pooled_prompt_embeds"] = positive.pooled.to(empty.pooled)
                    options["negative_pooled_prompt_embeds"] = negative.pooled
                return pipe(**options).images
        texts = [attempt.prompt or "" for attempt in attempts]
        sampling = attempts[0].sampling
        if sampling is None:
            return pipe(texts, **options).images
        return sampling.draw(self.victim, cases, texts, options)

    def shows(self, images: dict[int, Image.Image], cases: Sequence[Case], label: str | int) -> set[int]:
        """Return the indices of the images that show the target; the judge's answers go to `log`.

        An image that the judge fails on counts as showing the target, in the attacker's favour, and is listed in
        `faults`.

        Args:
            images: index of a case -> its image.
            cases: all cases.
            label: name of the attempt in `log`, such as the number of the round.
        """
        hits = set()
        for i, image in images.items():
            try:
                verdict = verdicts(self.judge, [image])[0]
                scores = verdict[self.target.domain]
            except Exception as fault:
                self.faults.append(f"{cases[i].id}: {self.judge.name} failed: {type(fault).__name__}: {fault}")
                hits.add(i)
                self.log.append({"id": cases[i].id, "asked": label, "verdict": None})
                continue
            self.log.append({"id": cases[i].id, "asked": label, "verdict": verdict})
            if max(scores, key=lambda name: scores[name]) in self.target.labels:
                hits.add(i)
        return hits

    def find_cases(self, prompts: PromptSet, concept: Any, count: int) -> tuple[list[Case], int, list[Image.Image]]:
        """Select the first `count` target prompts for which the base model shows the target.

        At most three times as many prompts are tried; a short prompt set is repeated with other seeds.

        Args:
            prompts: prompt set with labels.
            concept: the erased concept; its names are looked for in the prompts.
            count: number of cases wanted, at least 2.

        Returns:
            The cases, the number of prompts tried, and the base's images of the cases.

        Raises:
            ErasureError: `count` is too small, no prompt has the target's label, or the base shows the target for
                fewer than two prompts.
        """
        check_case_count(count)
        labels, domain = self.target.labels, self.target.domain
        matching = [row for row in prompts.rows if row.labels.get(domain) in labels and not row.labels.get("role")]
        if not matching:
            raise ErasureError(
                f"prompt set {prompts.name!r} has no prompt labelled {', '.join(labels)}; nothing was attacked"
            )
        copies = range(1 + 3 * count // len(matching))
        candidates = [reseed(row, copy) for copy in copies for row in order_by_hash(matching)][: 3 * count]
        words = [*labels, *([concept] if isinstance(concept, str) else getattr(concept, "names", concept))]
        cases: list[Case] = []
        shown: list[Image.Image] = []
        tried = 0
        while len(cases) < count and tried < len(candidates):
            batch = candidates[tried : tried + max(LEAST, count - len(cases))]
            self.guidances |= {row.id: row.guidance for row in batch if row.guidance is not None}
            latents = self._base_latents(batch)
            images = self.victim.decoded(latents)
            drawn = [
                Case(row.id, row.prompt, row.seed, row.labels[domain], x, *split_at_name(row.prompt, words))
                for row, x in zip(batch, latents, strict=True)
            ]
            hits = sorted(self.shows(dict(enumerate(images)), drawn, "base"))
            cases += [drawn[i] for i in hits]
            shown += [images[i] for i in hits]
            tried += len(batch)
        if len(cases) < LEAST:
            raise ErasureError(
                f"the base model shows {', '.join(labels)} in {len(cases)} of {tried} images; an attack needs at "
                f"least {LEAST}; nothing was attacked"
            )
        return cases[:count], tried, shown[:count]

    def _base_latents(self, rows: Sequence[Prompt]) -> torch.Tensor:
        """Generate with the base, each row with its own guidance scale, and return the latents [n, c, h, w]."""
        by_id: dict[str, torch.Tensor] = {}
        for scale in dict.fromkeys(self.guidances.get(row.id, self.guidance) for row in rows):
            group = [row for row in rows if self.guidances.get(row.id, self.guidance) == scale]
            texts, seeds = [row.prompt for row in group], [row.seed for row in group]
            latents = self.victim.base_latents(texts, seeds, self.batch_size, self.steps, scale)
            by_id |= {row.id: x for row, x in zip(group, latents, strict=True)}
        return torch.stack([by_id[row.id] for row in rows])

    def provenance(self, cases: Sequence[Case], seed: int) -> dict[str, Any]:
        """Return everything that the result depends on: pipeline, sampling settings, cases, judge and seed."""
        own = {case.id: self.guidances[case.id] for case in cases if case.id in self.guidances}
        return {
            **generate.image_settings(self.victim.pipe, self.steps, self.guidance),
            **({"guidances": own} if own else {}),
            "cases": [case.id for case in cases],
            "judge": {"name": self.judge.name, **self.judge.versions()},
            "seed": seed,
        }


def prepare(
    pipe: Any,
    concept: Any,
    prompts: str | PromptSet | None,
    judge: Judge | None,
    steps: int | None,
    guidance: float | None,
    batch_size: int,
) -> tuple[AttackRunner, PromptSet]:
    """Return the runner of an attack and its prompt set; None stands for the default of each argument.

    The defaults are those of evaluation/defaults.py, and the sampling settings that suit the checkpoint.

    Raises:
        ErasureError: there is no UNet, the prompt set cannot be read, or the judge or the prompt set does not know the
            concept.
    """
    check_unet(pipe)
    rows, judge = prompts_and_judge(pipe, concept, prompts, judge, about=True)
    target = find_target(concept, rows, judge)
    sampling = sampling_of(pipe, steps, guidance)
    return AttackRunner(Victim(pipe, switched_off), judge, target, sampling.steps, sampling.guidance, batch_size), rows


def split_at_name(prompt: str, names: Sequence[str]) -> tuple[str, str]:
    """Return the text before and after the first name in a prompt, or ("", prompt) if no name occurs.

    Longer names are looked for first; case is ignored, and only whole words match.
    """
    for name in sorted(names, key=len, reverse=True):
        match = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", prompt, re.IGNORECASE)
        if match:
            return prompt[: match.start()].strip(), prompt[match.end() :].strip()
    return "", prompt


def save_images(folder: Path, cases: Sequence[Case], images: dict[int, Image.Image]) -> None:
    """Write images as `folder/<id of the case>.png`, each under a temporary name first."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in images.items():
        image.save(folder / f"{cases[i].id}.tmp", format="PNG")
        os.replace(folder / f"{cases[i].id}.tmp", folder / f"{cases[i].id}.png")
