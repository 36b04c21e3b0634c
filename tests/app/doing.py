"""What several tests of the page do: erase, and look at weights and pixels."""

from __future__ import annotations

import torch

from erasure.app import tasks
from erasure.app.jobs import Job
from erasure.app.models import Models
from erasure.app.tasks import Wish
from tests.evaluation.judging import Fixed

CAT = Wish("cat", "uce")


def weights(models: Models) -> list[torch.Tensor]:
    pipe = models.open("glyph")
    return [value.clone() for part in (pipe.unet, pipe.text_encoder) for value in part.state_dict().values()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def erased(models, visit, wish=CAT) -> str:
    outlook = tasks.outlook(models, visit, Job(), wish)
    return tasks.erase_concept(models, visit, Job(), wish, outlook.forecast)


def pixels(images) -> list[bytes]:
    return [image.tobytes() for image in images]


class SeesCats(Fixed):
    """A judge that sees a cat in everything."""

    def __init__(self) -> None:
        super().__init__("sees-cats", object={"cat": 1.0, "dog": 0.0})
