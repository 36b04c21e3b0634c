"""What an evaluation or attack takes where no prompts and no judge are given: they depend on the checkpoint.

Glyph has prompt sets and a judge of its own, which mean nothing on another checkpoint. There the bundled prompt set
that asks for the concept is taken, and CLIP zero-shot as the judge if its weights are on this machine. Otherwise the
user is asked for both.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from erasure.errors import ErasureError
from erasure.evaluation.judges.judge import Judge
from erasure.evaluation.judges.registry import find_judge
from erasure.evaluation.select import concept_names
from erasure.model.loading import family_of, name_of
from erasure.prompts.concept_prompts import concept_prompts
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.subjects import load_subjects

LOG = logging.getLogger("erasure")
GLYPH = "glyph"
# CLIPs of transformers that published evaluations judge with, the first one on this machine is taken.
CLIPS = ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
HEADS = ("object", "style", "identity")  # labels of prompt sets that CLIP can judge
TEMPLATES = {"style": "a painting in the style of {}"}


def is_glyph(pipe: Any) -> bool:
    """Tell whether a pipeline holds glyph, one of its siblings, or a checkpoint of their architectures."""
    preset = family_of(pipe).preset
    return preset is not None and (preset.name == GLYPH or preset.name.startswith(f"{GLYPH}-"))


def prompts_and_judge(
    pipe: Any, concept: Any, prompts: str | PromptSet | None, judge: Judge | None, *, about: bool = False
) -> tuple[PromptSet, Judge]:
    """Return prompts and judge: those given, else the default ones; see `default_prompts` and `default_judge`.

    Raises:
        ErasureError: one of them is not given, and the checkpoint has no default.
    """
    rows = default_prompts(pipe, concept, judge is not None, prompts, about=about)
    return rows, judge if judge is not None else default_judge(pipe, rows)


def default_prompts(
    pipe: Any, concept: Any, judged: bool, prompts: str | PromptSet | None, *, about: bool = False
) -> PromptSet:
    """Return the prompt set that is given, or else the one that suits the checkpoint and the concept.

    Args:
        pipe: the pipeline.
        concept: what should be erased, as `evaluate` takes it.
        judged: whether a judge is given.
        prompts: a prompt set, or the name or file of one; None: none is given.
        about: on glyph, take prompts about the concept instead of the whole set of objects.

    Raises:
        ErasureError: no prompt set is given, and the checkpoint is not glyph and no bundled set asks for the concept.
    """
    if isinstance(prompts, PromptSet):
        return prompts
    if prompts is not None:
        return PromptSet.read(prompts)
    names = concept_names(concept)
    if is_glyph(pipe):
        return concept_prompts(names) if about else PromptSet.read("glyph-objects")
    for name, entry in load_subjects()["sets"].items():
        if {text.lower() for text in names} & {text.lower() for text in entry["names"]}:
            return PromptSet.read(name)
    raise ErasureError(_missing(pipe, names, prompts=True, judge=not judged and local_clip() is None))


def default_judge(pipe: Any, rows: PromptSet) -> Judge:
    """Return glyph's judge on glyph, and elsewhere CLIP zero-shot with the labels of the prompts, if it is here.

    Args:
        pipe: the pipeline.
        rows: the prompts whose images are judged.

    Raises:
        ErasureError: the checkpoint is not glyph, and there is no CLIP on this machine or no label that it can judge.
    """
    if is_glyph(pipe):
        return find_judge(GLYPH)
    labels = {head: rows.label_values(head) for head in HEADS}
    heads = {head: values for head, values in labels.items() if len(values) > 1}
    source = local_clip()
    if source is None or not heads:
        raise ErasureError(_missing(pipe, [], prompts=False, judge=True))
    from erasure.evaluation.judges.clip import ClipJudge

    LOG.warning("no judge is given: the images are judged by CLIP zero-shot (%s), among the prompts' labels", source[0])
    template = TEMPLATES.get(next(iter(heads)), "a photo of {}") if len(heads) == 1 else "a photo of {}"
    return ClipJudge(source[1], heads=heads, template=template)


def local_clip() -> tuple[str, str] | None:
    """Return name and folder of a CLIP in the hub's cache; None if there is none. Nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    for name in CLIPS:
        config = try_to_load_from_cache(name, "config.json")
        if isinstance(config, str) and any(isinstance(try_to_load_from_cache(name, file), str) for file in WEIGHTS):
            return name, str(Path(config).parent)
    return None


def _missing(pipe: Any, names: list[str], *, prompts: bool, judge: bool) -> str:
    """Return the message that says what to give."""
    needs = []
    if prompts:
        sets = ", ".join(load_subjects()["sets"])
        needs.append(
            f"--prompts (prompts=) with prompts for {', '.join(names)}: a file with labels, or hub:owner/name; the "
            f"bundled sets {sets} have none"
        )
    if judge:
        needs.append(
            "--judge (judge=) that knows what the prompts ask for, such as "
            f"'clip:FOLDER?labels=church,castle,house', classifier:FOLDER or nudenet; {CLIPS[0]} in the hub's cache "
            "would be taken by itself"
        )
    return (
        f"{name_of(pipe)} is not glyph, whose prompts and judge mean nothing here. Give {', and '.join(needs)}. "
        "Nothing was drawn"
    )
