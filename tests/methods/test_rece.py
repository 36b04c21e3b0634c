"""RECE against least squares by numpy on the layers' own weights, round by round, and twins that must differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from erasure.erasing import erase
from erasure.model.base import Base
from erasure.model.closed_form import READERS
from tests.conformance.quick import ALONE
from tests.methods.encoding import states

CAT = {"name": "cat", "keep": ["dog"]}
SETTINGS = {**ALONE, "ridge": 0.5, "attack_ridge": 1e-2, "attack_weight": 1.0, "rank": None}


def weights(base: Base) -> dict[str, np.ndarray]:
    return {
        path: module.weight.detach().double().numpy()
        for path, module in base.unet.named_modules()
        if path.endswith(READERS)
    }


def solved(weight, edit, answers, keep, kept_answers, ridge=0.5, keep_weight=1.0, near=None) -> np.ndarray:
    """The weight that minimises the objective, as one stack of equations; `near`: what lambda holds it to."""
    near = weight if near is None else near
    rows = [edit, np.sqrt(keep_weight) * keep, np.sqrt(ridge) * np.eye(weight.shape[1])]
    wanted = [answers, np.sqrt(keep_weight) * kept_answers, np.sqrt(ridge) * near.T]
    return np.linalg.lstsq(np.vstack(rows), np.vstack(wanted), rcond=None)[0].T


def attacked(after: dict, before: dict, cat: np.ndarray, ridge: float) -> np.ndarray:
    """States for which the edited weights answer as the base does for the concept: least squares over all layers."""
    high, low = np.vstack(list(after.values())), np.vstack(list(before.values()))
    damp = np.sqrt(ridge * (high * high).sum() / high.shape[1])
    rows, wanted = np.vstack([high, damp * np.eye(high.shape[1])]), np.vstack([low @ cat.T, np.zeros_like(cat.T)])
    return np.linalg.lstsq(rows, wanted, rcond=None)[0].T


def by_hand(base: Base, rounds: int, **twin) -> dict[str, np.ndarray]:
    """Every layer's W after some rounds, each solved from the base's weights with all states found so far."""
    before = weights(base)
    cat, empty, dog = states(base, "cat")[1:], states(base, "")[1:], states(base, "dog")[1:]
    dog = dog[: twin.get("kept", len(dog))]
    edit, guide = cat, empty

    def all_layers():
        return {p: solved(w, edit, guide @ w.T, dog, dog @ w.T, twin.get("ridge", 0.5)) for p, w in before.items()}

    after = all_layers()
    for _ in range(rounds):
        found = attacked(after, before, cat, twin.get("attack_ridge", 1e-2))
        edit, guide = np.vstack([edit, twin.get("sign", 1) * found]), np.vstack([guide, empty])
        after = all_layers()
    return after


def changes(base: Base, **settings) -> dict[str, np.ndarray]:
    payload = erase(base, CAT, "rece", progress=False, **settings).payload
    return {path: payload.change("unet", f"{path}.weight").double().numpy() for path in weights(base)}


def distance(found: dict, base: Base, after: dict) -> float:
    return max(np.abs(found[path] - (after[path] - old)).max() for path, old in weights(base).items())


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_the_rounds_are_those_solved_by_hand(base, rounds):
    found = changes(base, **SETTINGS, rounds=rounds)
    assert distance(found, base, by_hand(base, rounds)) < 1e-5
    for other in {0, 1, 2} - {rounds}:
        assert distance(found, base, by_hand(base, other)) > 1e-4
    twins = [{"kept": 0}, {"kept": 5}, {"ridge": 0.6}] + [{"attack_ridge": 2e-2}, {"sign": -1}] * (rounds > 0)
    for twin in twins:
        assert distance(found, base, by_hand(base, rounds, **twin)) > 1e-4, twin


def test_no_rounds_are_uce(base):
    uce = erase(base, CAT, "uce", progress=False, **ALONE, rank=None).payload
    rece = erase(base, CAT, "rece", progress=False, **ALONE, rank=None, rounds=0).payload
    for name in uce.names("unet"):
        assert torch.equal(uce.change("unet", name), rece.change("unet", name))


def test_a_round_takes_from_the_attacker_what_he_finds(base):
    """How far the best state for each edited layer stays from the base's answer to the concept."""
    before, cat, errors = weights(base), states(base, "cat")[1:], []
    low = np.vstack(list(before.values())) @ cat.T
    for rounds in (0, 1, 3):
        found = changes(base, **SETTINGS, rounds=rounds)
        after = {path: old + found[path] for path, old in before.items()}
        errors.append(np.linalg.norm(np.vstack(list(after.values())) @ attacked(after, before, cat, 1e-2).T - low))
    assert errors[0] < errors[1] < errors[2]


def test_parity_is_the_published_script(base):
    """Each round edits the weights of the round before; UCE keeps "", the rounds keep " "."""
    settings = {"rounds": 2, "parity": True}
    before = weights(base)
    cat, empty, dog, space = (states(base, text) for text in ("cat", "", "dog", " "))
    keep = np.vstack([dog, empty])
    after = {
        path: solved(old, cat[1:], empty[:-1] @ old.T, keep, keep @ old.T, 0.1, 0.1) for path, old in before.items()
    }
    for _ in range(2):
        mean = sum((w * w).sum() for w in after.values()) / empty.shape[1]
        found = attacked(after, before, cat[1:], 0.1 / mean)
        after = {path: solved(w, found, empty[:-1] @ w.T, space, space @ w.T, 0.1, 0.1) for path, w in after.items()}
    found = changes(base, **settings)
    assert distance(found, base, after) < 1e-5
