"""Low frequencies that a filtered prompt makes louder, against sums over the pixels written out."""

from __future__ import annotations

import cmath

import pytest
import torch
from diffusers import UNet2DConditionModel

from erasure.pipelines.guards.reattention import SkippedFeatures, decoder, quieter
from tests.tiny import tiny_unet


def transformed(image):
    side = len(image)
    place = range(side)
    return {
        (u, v): sum(image[y][x] * cmath.exp(-2j * cmath.pi * (u * y + v * x) / side) for y in place for x in place)
        for u in place
        for v in place
    }


def test_the_louder_low_frequencies_are_scaled_and_no_others():
    draw = torch.Generator().manual_seed(1)
    ours, theirs = (torch.randn(1, 1, 5, 5, generator=draw) for _ in range(2))
    spectrum, reference = transformed(ours[0, 0].tolist()), transformed(theirs[0, 0].tolist())
    low = {0, 1, 4}  # 4 is -1
    changed = {
        (u, v): value * (0.3 if {u, v} <= low and abs(value) > abs(reference[u, v]) else 1.0)
        for (u, v), value in spectrum.items()
    }
    assert 0 < sum(changed[at] != spectrum[at] for at in spectrum) < 9
    wanted = [
        [
            sum(value * cmath.exp(2j * cmath.pi * (u * y + v * x) / 5) for (u, v), value in changed.items()) / 25
            for x in range(5)
        ]
        for y in range(5)
    ]
    assert max(abs(value.imag) for row in wanted for value in row) < 1e-9  # the band is symmetric
    found = quieter(ours, theirs, 0.3)
    assert torch.allclose(found[0, 0], torch.tensor([[value.real for value in row] for row in wanted]), atol=1e-5)
    assert torch.allclose(quieter(ours, 2 * ours, 0.3), ours, atol=1e-6)  # nothing is louder
    assert torch.allclose(quieter(ours, theirs, 1.0), ours, atol=1e-6)


def test_the_decoder_s_widths_are_those_of_the_published_stages():
    with torch.device("meta"):
        sd1 = UNet2DConditionModel(cross_attention_dim=8)  # other values are those of Stable Diffusion 1
    assert [width for _, width in decoder(sd1)] == [1280] * 7 + [640] * 3 + [320] * 2
    scales = [scale for _, _, scale in SkippedFeatures(sd1, (0.9, 0.2))._blocks]
    assert scales == [0.9] * 7 + [0.2] * 3


def test_only_the_rows_that_are_named_change_and_only_in_a_pass_of_the_whole_batch():
    unet = tiny_unet().eval()
    draw = torch.Generator().manual_seed(2)
    x, states = torch.randn(3, 4, 8, 8, generator=draw), torch.randn(3, 12, 32, generator=draw)
    time = torch.tensor(500)
    features = SkippedFeatures(unet, (0.2, 0.2))
    with torch.no_grad():
        plain = unet(x, time, states).sample
        with features.keeping():
            unet(0.1 * x[1:2], time, states[1:2])
        with features.compared(3, torch.tensor([1]), torch.tensor([0])):
            changed = unet(x, time, states).sample
            again = unet(x, time, states).sample
        with features.compared(2, torch.tensor([1]), torch.tensor([0])):
            other = unet(x, time, states).sample
        assert torch.equal(unet(x, time, states).sample, plain)  # no hook is left
    assert torch.equal(changed[[0, 2]], plain[[0, 2]]) and not torch.allclose(changed[1], plain[1], atol=1e-4)
    assert torch.equal(again, plain) and torch.equal(other, plain)


@pytest.mark.parametrize("part", ["hidden", "skipped"])
def test_only_what_skips_the_middle_is_changed(part):
    unet, seen = tiny_unet().eval(), {}
    block, width = decoder(unet)[0]
    draw = torch.Generator().manual_seed(3)
    x, states = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 12, 32, generator=draw)
    features = SkippedFeatures(unet, (0.0, 0.0))

    def look(name):
        handle = block.register_forward_pre_hook(lambda module, args: seen.__setitem__(name, args[0].clone()))
        with torch.no_grad():
            unet(x, torch.tensor(500), states)
        handle.remove()

    look("before")
    with torch.no_grad(), features.keeping():
        unet(0.0 * x, torch.tensor(500), states)
    with features.compared(1, torch.tensor([0]), torch.tensor([0])):
        look("after")
    pick = slice(None, width) if part == "hidden" else slice(width, None)
    assert torch.equal(seen["before"][:, pick], seen["after"][:, pick]) == (part == "hidden")
