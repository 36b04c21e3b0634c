"""Modules by role, on the true configurations of published models without weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import erasure
from erasure.errors import ErasureError
from erasure.model.architectures import ARCHITECTURES, of_network
from erasure.model.meta import counts, load_meta, networks

# Published sizes in millions, and what each variant of the configuration trains: computed by hand from the blocks.
# SD3: 24 dual blocks of 8 projections, the last without to_add_out. FLUX: 19 dual blocks of 8, 38 single ones of 3.
MILLIONS = {
    "sd3-medium": 2028.3,
    "sd3.5-medium": 2243.2,
    "sd3.5-large": 8056.6,
    "flux-dev": 11901.4,
    "flux-schnell": 11891.2,
    "pixart-sigma": 610.9,
    "sana-1.6b": 1604.5,
    "qwen-image": 20430.4,
    "flux2-dev": 32223.3,
    "z-image-turbo": 6154.9,
}
X = {"sd3-medium": 24 * 8 - 1, "sd3.5-medium": 24 * 8 - 1 + 13 * 4, "flux-dev": 19 * 8 + 38 * 3, "pixart-sigma": 28 * 4}
X |= {"flux2-dev": 8 * 8 + 48 * 2, "z-image-turbo": (30 + 2 + 2) * 4}
KEYS_AND_VALUES = {"sd3-medium": 24 * 4, "flux-dev": 19 * 4 + 38 * 2, "qwen-image": 60 * 4, "sana-1.6b": 20 * 2}
KEYS_AND_VALUES |= {"flux2-dev": 8 * 4, "z-image-turbo": (30 + 2 + 2) * 2}


@pytest.fixture(scope="module")
def bases():
    return {name: load_meta(name) for name in networks()}


def test_every_true_configuration_has_its_size_and_a_module_of_every_role(bases):
    assert bases.keys() == MILLIONS.keys()
    for name, base in bases.items():
        assert round(sum(p.numel() for p in base.network.parameters()) / 1e6, 1) == MILLIONS[name]
        roles = base.architecture.count(base.pipe)
        assert all(number for role, number in roles.items() if role not in base.architecture.optional)
        assert all(row["modules"] for row in counts(base).values()) and set(counts(base)) == set(
            base.architecture.variants
        )


def test_attention_is_whole(bases):
    for name, number in X.items():
        assert len(bases[name].targets("x")) == number, name
    for name, number in KEYS_AND_VALUES.items():
        assert len(bases[name].targets("x-strict")) == number, name
    flux = bases["flux-dev"].targets("x-strict")
    assert {path.rpartition(".")[2] for path in flux} == {"to_k", "to_v", "add_k_proj", "add_v_proj"}
    assert any(path.startswith("single_") for path in flux)


def test_attention_and_the_rest_are_the_whole_network(bases):
    for name, base in bases.items():
        both = base.targets("x") | base.targets("u")
        assert both.keys() == base.targets("full").keys(), name
        assert not base.targets("x").keys() & base.targets("u").keys(), name


def test_a_role_without_a_module_is_an_error():
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer_blocks = nn.ModuleList([nn.ModuleDict({"attention": nn.Linear(2, 2)})])

    pipe = SimpleNamespace(transformer=Renamed())
    with pytest.raises(ErasureError, match="joint attention, text stream"):
        of_network("FluxTransformer2DModel").count(pipe)


def test_the_table_of_the_docs_is_what_the_command_counts(bases):
    page = (Path(erasure.__file__).resolve().parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split("|") for line in page.splitlines() if line.startswith("|")]
    start = next(i for i, line in enumerate(lines) if line[0].strip() == "modules by role")
    names = [cell.strip(" `") for cell in lines[start][1:]]
    table: dict[str, dict[str, int]] = {name: {} for name in names}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
        if len(cells) == len(names) + 1:
            role = cells[0].removeprefix("of these, ")
            table = {name: {**row, role: cell} for (name, row), cell in zip(table.items(), cells[1:], strict=True)}
    for name in names:
        roles = bases[name].architecture.count(bases[name].pipe)
        shown = {role: int(cell) for role, cell in table[name].items() if cell.isdecimal()}
        assert shown == {role: number for role, number in roles.items() if number}, name


def test_unknown_networks_are_refused_with_the_known_ones():
    from erasure.model.architectures import architecture_of

    with pytest.raises(ErasureError, match=r"Linear, which is not supported.*FluxTransformer2DModel"):
        architecture_of(SimpleNamespace(transformer=nn.Linear(1, 1)))
    assert len({architecture.name for architecture in ARCHITECTURES}) == len(ARCHITECTURES)


def test_the_unets_roles_are_counted_too():
    base = load_meta("sd1")
    roles = base.architecture.count(base.pipe)
    assert roles["cross-attention"] == roles["self-attention"] == 64 and roles["text entry"] == 32
    assert base.device == torch.device("meta")


@pytest.mark.parametrize("name", ["flux2-dev", "z-image-turbo"])
def test_what_is_only_counted_says_so(bases, name):
    from erasure.model.base import Base

    for ask in (lambda: Base.of(bases[name].pipe), bases[name].latent_shape, bases[name].sampler):
        with pytest.raises(ErasureError, match="can be counted, but concepts cannot be erased from it yet"):
            ask()
