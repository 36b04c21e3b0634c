"""Drawing with several processes, batch sizes, killed runs, full disks, bounded memory, and progress."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import erasure
from erasure.distributed import ProcessGroup
from erasure.errors import ErasureError
from erasure.evaluation import generate as module
from erasure.evaluation import progress
from erasure.evaluation.generate import checksum, generate
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt
from tests.patch.making import low_rank_patch
from tests.tiny import WORDS, tiny_pipeline

GLYPH = PromptSet("ten", PromptSet.read("glyph-objects").rows[:10])
TINY = PromptSet("tiny", [Prompt(f"r{i}", "a cat", i, None, {"object": "cat"}) for i in range(8)])
STEPS = 3
# What every process of a run does. Of two, the second one "dies" in its second call, or meets "faults".
SCRIPT = """
import errno, os, signal, sys, time
from PIL import Image
from erasure.errors import ErasureError
from erasure.evaluation.generate import generate
from erasure.prompts.prompt_set import PromptSet
from erasure.distributed import speaks
from erasure.pipelines import ErasedStableDiffusionPipeline

folder, mode = sys.argv[1:]
rank = os.environ.get("RANK", "0")

class Pipeline(ErasedStableDiffusionPipeline):
    calls = 0
    def __call__(self, *args, **kwargs):
        self.calls += 1
        if mode == "dies" and rank == "1" and self.calls == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "slow" and self.calls == 2:
            time.sleep(600)
        return super().__call__(*args, **kwargs)

pipe = Pipeline.from_pretrained("glyph")
pipe.set_progress_bar_config(disable=True)

def draw():
    rows = PromptSet.read("glyph-objects").rows[:10]
    return generate(pipe, PromptSet("ten", rows), folder, steps=3, progress=False)

def told():
    try:
        draw()
    except ErasureError as fault:
        return str(fault)

def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")

if mode == "faults":
    save = Image.Image.save
    if rank == "1":
        Image.Image.save = full
    first = told()
    Image.Image.save = save
    if rank == "1":
        pipe.scheduler.register_to_config(clip_sample=True)
    sys.stdout.write(f"{first}\\n{told()}\\n")
else:
    made = draw()
    sys.stdout.write(f"{speaks()} {''.join(record.id for record in made)}\\n")
"""


@pytest.fixture(scope="module")
def glyph():
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def whole(glyph, tmp_path_factory):
    """Return the images of an uninterrupted run in one process."""
    folder = tmp_path_factory.mktemp("whole")
    generate(glyph, GLYPH, folder, steps=STEPS, progress=False)
    return content(folder)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


def ids(folder: Path) -> list[str]:
    return sorted(json.loads(line)["id"] for line in (folder / "records.jsonl").read_text().splitlines())


def environment(**more: str) -> dict[str, str]:
    root = str(Path(erasure.__file__).resolve().parent.parent)
    # The number of threads moves the last bits: every process has this one's.
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": str(torch.get_num_threads()), **more}


def free_port() -> str:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return str(door.getsockname()[1])


def two_processes(script: Path, folder: Path, mode: str) -> list[subprocess.Popen[str]]:
    """Start two processes without a launcher, which would end one when the other dies."""
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, str(script), str(folder), mode]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(command, env=environment(**both, RANK=rank, LOCAL_RANK=rank), **pipes) for rank in ("0", "1")
    ]


def test_every_byte_is_the_same_for_any_batch_size_and_order(glyph, whole, tmp_path):
    for size in (1, 3):
        generate(glyph, GLYPH, tmp_path / str(size), steps=STEPS, batch_size=size, progress=False)
        assert content(tmp_path / str(size)) == whole
    few = PromptSet("few", GLYPH.rows[6:1:-1])
    generate(glyph, few, tmp_path / "few", steps=STEPS, progress=False)
    assert content(tmp_path / "few").items() < whole.items()


def test_a_text_gate_ignores_the_other_prompts_of_a_batch(tmp_path):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    pipe.load_patch(low_rank_patch(pipe, gate={"kind": "text", "texts": ["cat"]}))
    rows = [Prompt(word, f"a photo of {word}", i) for i, word in enumerate(WORDS)]
    together = generate(pipe, PromptSet("there", rows), tmp_path / "there", steps=2, progress=False)
    back = generate(pipe, PromptSet("back", rows[::-1]), tmp_path / "back", steps=2, progress=False)
    assert together == back[::-1] and len({str(record.gates) for record in together}) > 2


def test_on_an_accelerator_shapes_are_fixed_and_batch_sizes_agree_within_one_level(glyph, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "on_cpu", lambda pipe: False)
    rows = PromptSet("seven", GLYPH.rows[:7])
    for size in (1, 3, 5):
        generate(glyph, rows, tmp_path / str(size), steps=STEPS, batch_size=size, progress=False)
    by_size = {size: pixels(tmp_path / str(size)) for size in (1, 3, 5)}
    assert all(np.abs(by_size[1] - by_size[size]).max() <= 1 for size in (3, 5))
    for row in rows.rows[:2]:
        (tmp_path / "3" / "images" / f"{row.id}.png").unlink()
    generate(glyph, rows, tmp_path / "3", steps=STEPS, batch_size=3, progress=False)
    assert (pixels(tmp_path / "3") == by_size[3]).all()  # resumed, in another batch of the same size


def pixels(folder: Path) -> np.ndarray:
    arrays = []
    for path in sorted((folder / "images").glob("*.png")):
        with Image.open(path) as image:
            arrays.append(np.asarray(image).astype(int))
    return np.stack(arrays)


@pytest.mark.slow
def test_two_processes_draw_the_same_as_one(script, whole, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "two"), "plain"],
        env=environment(ACCELERATE_CONFIG_FILE=""),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "two") == whole
    every = "".join(row.id for row in GLYPH.rows)
    assert sorted(line for line in done.stdout.splitlines() if every in line) == [f"False {every}", f"True {every}"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["images", "records.jsonl", "settings.json"]
    assert ids(tmp_path / "two") == [row.id for row in GLYPH.rows]


@pytest.mark.slow
def test_a_dead_process_neither_hangs_the_others_nor_loses_their_work(script, whole, glyph, tmp_path):
    first, second = two_processes(script, tmp_path / "x", "dies")
    _, stderr = first.communicate(timeout=200)
    assert second.wait(timeout=20) == -signal.SIGKILL
    second.communicate()
    assert first.returncode == 1 and "another process of this run has died" in stderr
    kept = {key: value for key, value in content(tmp_path / "x").items() if key.endswith(".png")}
    assert len(kept) == 9 and kept.items() < whole.items()  # five, and the four of the other's first batch
    seen = counted(glyph)
    assert len(generate(seen, GLYPH, tmp_path / "x", steps=STEPS, progress=False)) == 10
    assert seen.calls == 1 and content(tmp_path / "x") == whole
    assert not list((tmp_path / "x").glob("records.part*")) and len(ids(tmp_path / "x")) == 10


def test_a_failure_in_one_process_is_reported_in_all(script, whole, tmp_path):
    for process in two_processes(script, tmp_path / "x", "faults"):
        stdout, _ = process.communicate(timeout=200)
        full, strange = stdout.splitlines()
        assert "x: cannot be written: No space left on device" in full
        assert strange == "the processes have different pipelines: they differ in scheduler"
    assert [content(tmp_path / "x")[f"{row.id}.png"] for row in GLYPH.rows[::2]] == list(whole.values())[::2]


def test_a_killed_run_continues_to_the_same_images(script, whole, glyph, tmp_path):
    run = subprocess.Popen([sys.executable, str(script), str(tmp_path / "x"), "slow"], env=environment())
    until = time.monotonic() + 200
    while len(list((tmp_path / "x").glob("images/*.png"))) < 4 and time.monotonic() < until and run.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert len(content(tmp_path / "x")) == 4
    # As if it had been killed in the middle of a record and of a picture.
    part = next((tmp_path / "x").glob("records.part*"))
    part.write_text(part.read_text()[:-20])
    (tmp_path / "x" / "images" / f"{GLYPH.rows[4].id}.tmp").write_bytes(b"half")
    seen = counted(glyph)
    generate(seen, GLYPH, tmp_path / "x", steps=STEPS, progress=False)
    assert seen.calls == 2 and content(tmp_path / "x") == whole


def counted(pipe):
    """Return a pipeline that counts its calls."""

    class Counting(ErasedStableDiffusionPipeline):
        calls = 0

        def __call__(self, *args, **kwargs):
            type(self).calls += 1
            return super().__call__(*args, **kwargs)

    counting = Counting(**pipe.components, requires_safety_checker=False)
    counting.set_progress_bar_config(disable=True)
    return counting


def test_a_full_disk_is_reported_and_images_are_kept(glyph, whole, tmp_path, monkeypatch):
    save, saved = Image.Image.save, []

    def full(self, path, **options):
        if len(saved) == 6:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        saved.append(path)
        save(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ErasureError, match="No space left on device.*Images already drawn are kept"):
        generate(glyph, GLYPH, tmp_path, steps=STEPS, progress=False)
    assert len(content(tmp_path)) == 6  # and no temporary file
    monkeypatch.setattr(Image.Image, "save", save)
    seen = counted(glyph)
    generate(seen, GLYPH, tmp_path, steps=STEPS, progress=False)
    assert seen.calls == 1 and content(tmp_path) == whole


SAMPLING = {"steps": 2, "guidance": 3.0}  # a pipeline without text encoders is of no family, which has its own


class Painter:
    """A fast substitute for a pipeline, with weak references to its images."""

    components: dict[str, object] = {}
    scheduler = SimpleNamespace(config={})

    def __init__(self) -> None:
        self.alive: list[weakref.ref[Image.Image]] = []
        self.most = 0

    def __call__(self, prompt, generator, **options):
        self.alive = [reference for reference in self.alive if reference() is not None]
        self.most = max(self.most, len(self.alive))
        images = [Image.new("RGB", (8, 8), (draw.initial_seed() % 256, 0, 0)) for draw in generator]
        self.alive += [weakref.ref(image) for image in images]
        return SimpleNamespace(images=images)


def test_pictures_are_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "on_cpu", lambda pipe: False)
    rows = PromptSet("many", [Prompt(f"{i:05d}", "a cat", i) for i in range(2000)])
    pipe = Painter()
    assert len(generate(pipe, rows, tmp_path, batch_size=16, progress=False, **SAMPLING)) == 2000
    assert pipe.most <= 16 and len(list((tmp_path / "images").glob("*.png"))) == 2000


def test_records_of_other_prompt_sets_are_kept(tmp_path):
    pipe = Painter()
    generate(pipe, TINY, tmp_path, progress=False, **SAMPLING)
    generate(pipe, PromptSet("other", [Prompt("o", "a dog", 1)]), tmp_path, progress=False, **SAMPLING)
    assert ids(tmp_path) == ["o", *(row.id for row in TINY.rows)]
    before = (tmp_path / "records.jsonl").stat()
    generate(pipe, TINY, tmp_path, progress=False, **SAMPLING)
    assert (tmp_path / "records.jsonl").stat() == before  # nothing new: nothing written


def test_shares_are_even_and_complete():
    rows = list(range(11))
    shares = [ProcessGroup(index, 3).share(rows) for index in range(3)]
    assert sorted(sum(shares, [])) == rows and [len(share) for share in shares] == [4, 4, 3]


@pytest.mark.parametrize("change", ["vae", "text_encoder", "unet", "scheduler", "guidance"])
def test_another_setting_is_noticed(change, tmp_path):
    pipe, options = tiny_pipeline(ErasedStableDiffusionPipeline), {"steps": 2, "progress": False}
    generate(pipe, TINY, tmp_path, **options)
    before = content(tmp_path)
    if change == "scheduler":
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    elif change == "guidance":
        options["guidance"] = 4.5
    else:
        weight = max(getattr(pipe, change).parameters(), key=torch.Tensor.numel)
        weight.data = weight.data.flip(0)  # the same numbers in other places
    with pytest.raises(ErasureError, match=rf"other settings \({change} differ\)"):
        generate(pipe, TINY, tmp_path, **options)
    assert content(tmp_path) == before


def test_an_added_or_removed_component_is_noticed(tmp_path):
    pipe = Painter()
    pipe.components = {"unet": torch.nn.Linear(2, 2), "text_encoder_2": torch.nn.Linear(2, 2)}
    generate(pipe, TINY, tmp_path, progress=False, **SAMPLING)
    pipe.components = {"unet": pipe.components["unet"]}
    with pytest.raises(ErasureError, match=r"\(text_encoder_2 differ\)"):
        generate(pipe, TINY, tmp_path, progress=False, **SAMPLING)


def test_a_checksum_depends_on_bits_and_not_on_memory_layout(monkeypatch):
    layer = torch.nn.Conv2d(3, 4, 3)
    plain = checksum(layer)
    assert re.fullmatch("[0-9a-f]{16}", plain)
    assert checksum(layer.to(memory_format=torch.channels_last)) == plain
    assert checksum(torch.nn.Conv2d(3, 4, 3).half()) != checksum(torch.nn.Conv2d(3, 4, 3).half())
    layer.weight.data[0, 0, 0, 0] = torch.nextafter(layer.weight.data[0, 0, 0, 0], torch.tensor(9.0))
    assert checksum(layer) != plain
    monkeypatch.setattr(module, "CHUNK", 7)  # in pieces, a swap of two whole pieces is noticed too
    row = torch.nn.Linear(14, 1)
    split = checksum(row)
    row.weight.data = row.weight.data.roll(7, 1)
    assert checksum(row) != split


@pytest.mark.parametrize("guidance", [math.nan, math.inf])
def test_guidance_that_is_not_a_number_is_refused(tmp_path, guidance):
    with pytest.raises(ErasureError, match=f"guidance={guidance}: must be a finite number"):
        generate(Painter(), TINY, tmp_path / "x", steps=2, guidance=guidance, progress=False)
    assert not (tmp_path / "x").exists()


def test_a_log_gets_a_line_at_every_tenth_unless_silent(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    class Slow(Painter):
        def __call__(self, **options):
            now[0] += 6.0 * len(options["prompt"])
            return super().__call__(**options)

    rows = PromptSet("many", [replace(TINY.rows[0], id=str(i)) for i in range(200)])
    generate(Slow(), rows, tmp_path / "a", progress=True, **SAMPLING)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "drawing a: 2 of 200 images (1 %), 6 s/image, 0:19:48 left"
    assert 10 <= len(lines) <= 12 and lines[-1].startswith("drawing a: 200 of 200 images (100 %)")
    generate(Slow(), rows, tmp_path / "b", progress=False, **SAMPLING)
    generate(Painter(), rows, tmp_path / "c", progress=True, **SAMPLING)  # done in a moment: no line
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    generate(Painter(), TINY, tmp_path / "base", progress=True, **SAMPLING)
    assert re.search(r"drawing base: .*0/8 \[.*image/s", capsys.readouterr().err)
