"""Erase a list of names from a checkpoint of the true size: `python bench/closed_form.py sd1 --names 100 --keep 1000`.

The checkpoint is one .safetensors file in fp16 with the true configuration of Stable Diffusion 1, 2 or XL and random
weights, which this script writes and removes. So the figures are those of the real architecture, and say nothing about
how well it erases. Each run has its own process: its peak memory, CPU seconds and seconds are those of the whole
command, from the start of Python to the patch. The first run begins without a cache, the second with what the first
left, the third erases one name more. Rows are added to `--out` (bench/results/closed_form.json and .md).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

FIRST = """Ada Bela Cora Dion Edda Fabio Gerda Hugo Ines Jorge Karin Leif Mira Nuno Olga Piet Quim Rosa Sven Tilda Udo
Vera Wim Xenia Yves Zora Anton Bruna Carlo Dora""".split()
LAST = """Abel Brandt Castro Duarte Eklund Farkas Greco Hansen Ibsen Jansen Kovac Lindt Moreau Novak Olsen Pereira Quist
Romano Sorel Tamm Urban Vidal Weiss Xander Ybarra Zeman Arden Bellini Corvo Dahl Ekman Ferro Galli Holm Isak Jager Krug
Lorca Mancini Nadal Orsini Pavel Rana Silva""".split()
STEPS = {  # a step -> the function whose seconds it is, as module:object.attribute
    "load the model": "erasure.cli.name_list:_read",
    "hash the text encoder, read the cache": "erasure.takedown.cache:cache_file",
    "read the words' ends": "erasure.model.listed_base:ListedBase.end_states",
    "read the kept words": "erasure.model.listed_base:ListedBase.kept_states",
    "read the names": "erasure.model.listed_base:ListedBase.blocks",
    "write the patch": "erasure.patch:Patch.save",
    "write the cache": "erasure.takedown.cache:write_cache",
}


def people() -> Iterator[str]:
    """Yield names of people who do not exist."""
    for i in range(len(FIRST) * len(LAST)):
        yield f"{FIRST[i % len(FIRST)]} {LAST[(i // len(FIRST) + i) % len(LAST)]}"


def write_list(path: Path, names: int, keep: int) -> None:
    """Write a list of names to erase and words to keep."""
    everyone = [*people(), *(name.replace(" ", " M. ") for name in people())]
    erased, kept = everyone[:names], everyone[len(everyone) - keep :]
    text = "erase:\n" + "".join(f"  - {{name: {name}, kind: identity}}\n" for name in erased)
    text += "keep:\n" + "".join(f"  - {{name: {name}, kind: identity}}\n" for name in kept) + "defaults: []\n"
    path.write_text(text, encoding="utf-8")


def write_checkpoint(path: Path, kind: str) -> None:
    """Write a checkpoint with random weights, tensor by tensor.

    Args:
        path: the file.
        kind: a configuration that the package carries: sd1, sd2 or sdxl.
    """
    from erasure.formats.single_file import original_tensors
    from erasure.model.meta import parts_of

    tensors = original_tensors(parts_of(kind))
    table: dict[str, Any] = {}
    end = 0
    for name, value in tensors.items():
        start, end = end, end + 2 * value.numel()
        table[name] = {"dtype": "F16", "shape": list(value.shape), "data_offsets": [start, end]}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    draw = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, value in tensors.items():
            file.write(weights(name, value.shape, draw).half().numpy().tobytes())


def weights(name: str, shape: torch.Size, draw: torch.Generator) -> torch.Tensor:
    """Return random weights: ones and zeros for norms and biases, else normal ones that keep the scale of the input."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    deviation = 0.02 if "embedding" in name else 1 / math.sqrt(math.prod(shape[1:]))
    return torch.randn(shape, generator=draw) * deviation


def child(arguments: list[str]) -> None:
    """Run the command in this process with a clock around each step, and print the seconds as the last line."""
    import importlib

    spent: dict[str, float] = {}
    running: list[str] = []

    def timed(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **options: Any) -> Any:
            begun = time.process_time()
            running.append(step)
            try:
                return function(*args, **options)
            finally:
                running.pop()
                passed = time.process_time() - begun
                spent[step] = spent.get(step, 0.0) + passed
                if running:  # a step within another one is not counted twice
                    spent[running[-1]] = spent.get(running[-1], 0.0) - passed

        return inner

    from erasure.cli.main import main

    spent["start Python and torch"] = 0.0
    for step, path in STEPS.items():
        module, _, place = path.partition(":")
        owner = importlib.import_module(module)
        *outer, attribute = place.split(".")
        for name in outer:
            owner = getattr(owner, name)
        setattr(owner, attribute, timed(step, getattr(owner, attribute)))
    spent["start Python and torch"] = time.process_time()
    code = main(["erase", *arguments])
    spent["solve, and the rest"] = time.process_time() - sum(spent.values())
    print(json.dumps({"code": code, "steps": spent}))


def measure(arguments: list[str], cache: Path, threads: int) -> dict[str, Any]:
    """Run the command in a process of its own, and return its seconds, CPU seconds, peak memory and steps."""
    environment = {**os.environ, "ERASURE_CACHE": str(cache), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--child", *arguments]
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    output = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if output.returncode:
        raise SystemExit(output.stderr)
    result = json.loads(output.stdout.splitlines()[-1])
    if result["code"]:
        raise SystemExit(output.stderr)
    return {
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_gb": after.ru_maxrss / 1e6,  # of the largest child so far: in kilobytes on Linux
        "steps": result["steps"],
    }


def run(kind: str, names: int, keep: int, threads: int, folder: Path) -> list[dict[str, Any]]:
    """Write a checkpoint and measure the three runs."""
    model, listed, patch = folder / f"{kind}.safetensors", folder / "list.yaml", folder / "patch.safetensors"
    write_checkpoint(model, kind)
    rows = []
    for title, count in (("without a cache", names), ("again", names), ("one name more", names + 1)):
        write_list(listed, count, keep)
        arguments = ["--list", str(listed), "--model", str(model), "-o", str(patch)]
        row = {"model": kind, "names": count, "keep": keep, "run": title, "load": os.getloadavg()[0]}
        row |= {"model_gb": model.stat().st_size / 1e9, **measure(arguments, folder / "cache", threads)}
        rows.append({**row, "patch_mb": patch.stat().st_size / 1e6, "threads": threads})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown, and the share of each step below."""
    lines = [
        "| model | names | kept | run | CPU seconds | seconds | load before | peak GB | patch MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["model"], f"{row['names']:,}", f"{row['keep']:,}", row["run"], f"{row['cpu_seconds']:.0f}"]
        cells += [f"{row['seconds']:.0f}", f"{row['load']:.1f}", f"{row['peak_gb']:.1f}", f"{row['patch_mb']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    steps = list(dict.fromkeys(step for row in rows for step in row["steps"]))
    heads = [f"{row['model']} {row['names']:,}/{row['keep']:,} {row['run']}" for row in rows]
    lines += ["", f"| CPU seconds of a step | {' | '.join(heads)} |", "|---" * (len(rows) + 1) + "|"]
    for step in steps:
        seconds = [f"{max(0.0, row['steps'].get(step, 0.0)):.1f}" for row in rows]
        lines.append(f"| {step} | {' | '.join(seconds)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, measure, and write the results."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("sd1", "sd2", "sdxl"))
    parser.add_argument("--names", type=int, default=100)
    parser.add_argument("--keep", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "closed_form.json")
    args = parser.parse_args()
    earlier = json.loads(args.out.read_text()) if args.out.is_file() else []
    with tempfile.TemporaryDirectory(prefix="closed-form-") as folder:
        rows = run(args.kind, args.names, args.keep, args.threads, Path(folder))
    key = ("model", "keep", "run")
    new = {tuple(row[name] for name in key) + (row["names"] // 10,) for row in rows}
    kept = [row for row in earlier if tuple(row[name] for name in key) + (row["names"] // 10,) not in new]
    rows = sorted([*kept, *rows], key=lambda row: (row["model"], row["names"] // 10, row["keep"]))
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
