"""Report of the size and the error that a patch would have at smaller ranks, as a table and as a chart."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erasure.dtypes import DTYPES
from erasure.errors import ErasureError, unknown
from erasure.patch.ops.resize import Spectrum, check_rank, full_rank, matrices
from erasure.patch.patch import Patch

WIDTH, HEIGHT, EDGE = 720, 400, 60  # width, height and margin of the chart, in pixels


@dataclass(frozen=True)
class Sizes:
    """The size and the error that a patch would have at each rank.

    Args:
        now: "kind" and "bytes" of the patch as it is; its tensors are counted in `dtype`.
        dtype: the type in which bytes are counted: fp32, bf16 or fp16.
        rows: for each rank, "rank", "bytes", the relative "error" in total, and the "worst" layer with its
            "worst_error".
    """

    now: dict[str, Any]
    dtype: str
    rows: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {"now": self.now, "dtype": self.dtype, "rows": self.rows}

    def text(self) -> str:
        """Return the report as a table in plain text."""
        lines = [f"now: {self.now['kind']}, {self.now['bytes']:,} bytes in {self.dtype}"]
        lines.append(f"{'rank':>6} {'bytes':>14} {'of now':>7} {'error':>8}  worst layer")
        for row in self.rows:
            share = row["bytes"] / self.now["bytes"]
            worst = f"{row['worst_error']:.1%} {row['worst']}"
            lines.append(f"{row['rank']:>6} {row['bytes']:>14,} {share:>7.1%} {row['error']:>8.2%}  {worst}")
        return "\n".join(lines)

    def chart(self, path: str | os.PathLike[str]) -> Path:
        """Draw a chart of the relative error against the size in bytes, with a mark for each rank.

        Args:
            path: the PNG file to write; missing folders are created.

        Returns:
            The path of the file.

        Raises:
            ErasureError: the suffix is not .png, or the path cannot be written.
        """
        from PIL import Image, ImageDraw

        target = Path(path)
        if target.suffix.lower() != ".png":
            raise ErasureError(f"{target}: the chart is a PNG image; give a name that ends in .png")
        image = Image.new("RGB", (WIDTH, HEIGHT), "white")
        draw = ImageDraw.Draw(image)
        wide, high = WIDTH - 4 * EDGE, HEIGHT - 2 * EDGE
        # Bytes have a logarithmic scale, because ranks double from one row to the next.
        logs = [math.log(row["bytes"]) for row in self.rows] + [math.log(self.now["bytes"])]
        least, span = min(logs), (max(logs) - min(logs)) or 1.0

        def place(count: int, error: float) -> tuple[float, float]:
            return 2 * EDGE + wide * (math.log(count) - least) / span, EDGE + high * (1 - min(error, 1.0))

        for tenth in range(0, 11, 2):
            _, y = place(self.now["bytes"], tenth / 10)
            draw.line([(EDGE, y), (WIDTH - EDGE, y)], "lightgrey")
            draw.text((EDGE - 6, y), f"{tenth * 10} %", "black", anchor="rm")
        marks = [place(row["bytes"], row["error"]) for row in self.rows]
        draw.line(marks, "steelblue", 2)
        labelled = -math.inf
        for row, (x, y) in zip(self.rows, marks, strict=True):
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], "steelblue")
            if x - labelled < EDGE:
                continue  # the labels would overlap
            labelled = x
            draw.text((x, y - 8), f"rank {row['rank']}", "black", anchor="mb")
            draw.text((x, HEIGHT - EDGE + 6), _short(row["bytes"]), "black", anchor="mt")
        x, _ = place(self.now["bytes"], 0)
        draw.line([(x, EDGE), (x, HEIGHT - EDGE)], "firebrick")
        draw.text((x - 4, EDGE), f"now {_short(self.now['bytes'])}", "firebrick", anchor="rt")
        draw.text(
            (EDGE, EDGE - 12), f"relative error of the change against bytes in {self.dtype}", "black", anchor="lb"
        )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.tmp.png")
            image.save(temporary)
            os.replace(temporary, target)
        except OSError as fault:
            raise ErasureError(f"{target} cannot be written: {fault.strerror or fault}") from None
        return target


def _short(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB"


def sizes(patch: Patch, ranks: Iterable[int] | None = None, *, dtype: str = "fp32", drop: bool = False) -> Sizes:
    """Report the size and the error that a patch would have at smaller ranks, without making these patches.

    Args:
        patch: a patch of low-rank factors or of weight differences.
        ranks: the ranks to report; None means 1, 2, 4 and so on up to the full rank.
        dtype: the type in which bytes are counted: fp32, bf16 or fp16.
        drop: as for `resize`.

    Raises:
        ErasureError: a rank is out of range, the dtype is unknown, or there are parameters that low-rank terms cannot
            change and `drop` is false.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    payload = patch.weights
    labels, dropped = matrices(patch, drop)
    limit = max(full_rank(payload, *label) for label in labels)
    chosen = sorted({2**n for n in range(limit.bit_length())} | {limit}) if ranks is None else sorted(set(ranks))
    if not chosen:
        raise ErasureError("give at least one rank")
    for rank in chosen:
        check_rank(rank, limit)
    width = DTYPES[dtype].itemsize
    lost = {rank: dict[str, float]() for rank in chosen}
    taken, size = dict.fromkeys(chosen, 0), dict[str, float]()
    for label in labels:
        spectrum, shape = Spectrum.of(payload, *label), payload.shape(*label)
        size[".".join(label)] = float(spectrum.values.square().sum())
        for rank in chosen:
            lost[rank][".".join(label)] = spectrum.lost(rank)
            taken[rank] += min(rank, len(spectrum.values)) * (shape[0] + math.prod(shape[1:])) * width
    omitted = sum(float(payload.change(*label).double().square().sum()) for label in dropped)
    total = sum(size.values()) + omitted
    rows = []
    for rank in chosen:
        shares = {name: math.sqrt(lost[rank][name] / size[name]) if size[name] else 0.0 for name in size}
        worst = max(shares, key=lambda name: shares[name])
        error = math.sqrt((sum(lost[rank].values()) + omitted) / total) if total else 0.0
        rows.append({"rank": rank, "bytes": taken[rank], "error": error, "worst": worst, "worst_error": shares[worst]})
    now = {"kind": payload.kind, "bytes": sum(tensor.numel() for tensor in payload.tensors()) * width}
    return Sizes(now, dtype, rows)
