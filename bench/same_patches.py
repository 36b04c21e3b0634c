"""Compare the patches of two versions of this project, method by method: `python bench/same_patches.py REVISION`.

Every method erases `cat` with its default settings twice, with the code at REVISION and with the working tree, each
time in a process of its own with one thread. Two patches are the same if all tensors and all header fields of the
earlier version are equal bit for bit, except for the measured costs (seconds and peak memory). Header fields that only
the later version writes are listed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("esd", "salun", "spm", "unguide", "advunlearn")
MEASURED = ("seconds", "peak_bytes", "peak")  # costs that differ from run to run
DIGEST = "erasure.digest"  # of the tensors and the header, measured costs included


def run(tree: Path, method: str, concept: str, target: Path, seed: int) -> None:
    """Erase `concept` with the code in `tree` and write the patch to `target`; skip a patch that is there already."""
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "erasure.cli", "erase", concept, "--method", method, "--seed", str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([*command, "-o", str(target)], cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a patch's tensors and header; JSON fields are parsed, and measured costs left out."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        header = {key: value for key, value in (file.metadata() or {}).items() if key != DIGEST}
    fields: dict[str, Any] = {}
    for key, value in header.items():
        try:
            fields[key] = json.loads(value)
        except ValueError:
            fields[key] = value
    for costs in (value for value in fields.values() if isinstance(value, dict)):
        for key in MEASURED:
            costs.pop(key, None)
    return tensors, fields


def differences(before: Path, after: Path) -> list[str]:
    """List the differences between two patch files: names of tensors, then header fields with both values."""
    (old, old_fields), (new, new_fields) = read(before), read(after)
    names = sorted(old.keys() | new.keys())
    wrong = [f"tensor {name}" for name in names if not _same(old.get(name), new.get(name))]
    for key in sorted(old_fields):
        if old_fields[key] != new_fields.get(key):
            wrong.append(f"{key}: {old_fields.get(key)!r} before, {new_fields.get(key)!r} now")
    return wrong


def _same(old: torch.Tensor | None, new: torch.Tensor | None) -> bool:
    if old is None or new is None or old.dtype != new.dtype or old.shape != new.shape:
        return False
    return torch.equal(old.reshape(-1).view(torch.uint8), new.reshape(-1).view(torch.uint8))


def main() -> int:
    """Run both versions and print the differences; return 1 if there are any, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", help="the commit to compare with")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="default: all five")
    parser.add_argument("--concept", default="cat", help="default: cat")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "-o", "--output", type=Path, default=ROOT / "build" / "same-patches", help="folder for both patches"
    )
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", args.revision], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(tree), commit], cwd=ROOT, check=True)
        try:
            for method in args.methods:
                before = args.output / commit / f"{method}.safetensors"
                after = args.output / "now" / f"{method}.safetensors"
                run(tree, method, args.concept, before, args.seed)
                after.unlink(missing_ok=True)
                run(ROOT, method, args.concept, after, args.seed)
                wrong = differences(before, after)
                failed += bool(wrong)
                new = sorted(read(after)[1].keys() - read(before)[1].keys())
                verdict = "; ".join(wrong) if wrong else "the same tensors and header"
                print(f"{method}: {verdict}" + (f"; new fields: {', '.join(new)}" if new else ""), flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
