"""Report the size and the error of a patch at each smaller rank, as figures and as a chart."""

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

WIDTH, HEIGHT, EDGE = 720, 400, 60  # of the chart, in pixels


@dataclass(frozen=True)
class Sizes:
    """The size and the error of a patch at each rank.

    Args:
        now: kind and bytes of the present patch (of its tensors, in `dtype`).
        dtype: data type of the tensors whose bytes are counted.
        rows: for each rank its bytes, its total relative error, and the layer with the largest error.
    """

    now: dict[str, Any]
    dtype: str
    rows: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {"now": self.now, "dtype": self.dtype, "rows": self.rows}

    def text(self) -> str:
        """Return the report as a table for people."""
        lines = [f"now: {self.now['kind']}, {self.now['bytes']:,} bytes in {self.dtype}"]
        lines.append(f"{'rank':>6} {'bytes':>14} {'of now':>7} {'error':>8}  worst layer")
        for row in self.rows:
            share = row["bytes"] / self.now["bytes"]
            worst = f"{row['worst_error']:.1%} {row['worst']}"
            lines.append(f"{row['rank']:>6} {row['bytes']:>14,} {share:>7.1%} {row['error']:>8.2%}  {worst}")
        return "\n".join(lines)

    def chart(self, path: str | os.PathLike[str]) -> Path:
        """Draw relative error against bytes as a PNG, each mark labelled with its rank, and return its path.

        Raises:
            ErasureError: a suffix other than .png, or a path that cannot be written.
        """
        from PIL import Image, ImageDraw

        target = Path(path)
        if target.suffix.lower() != ".png":
            raise ErasureError(f"{target}: the chart is a picture; give a name that ends in .png")
        image = Image.new("RGB", (WIDTH, HEIGHT), "white")
        draw = ImageDraw.Draw(image)
        wide, high = WIDTH - 4 * EDGE, HEIGHT - 2 * EDGE
        # Bytes on a logarithmic scale: ranks double.
        ends = [math.log(row["bytes"]) for row in self.rows] + [math.log(self.now["bytes"])]
        least, span = min(ends), (max(ends) - min(ends)) or 1.0

        def place(count: int, error: float) -> tuple[float, float]:
            return 2 * EDGE + wide * (math.log(count) - least) / span, EDGE + high * (1 - min(error, 1.0))

        for tenth in range(0, 11, 2):
            _, y = place(self.now["bytes"], tenth / 10)
            draw.line([(EDGE, y), (WIDTH - EDGE, y)], "lightgrey")
            draw.text((EDGE - 6, y), f"{tenth * 10} %", "black", anchor="rm")
        marks = [place(row["bytes"], row["error"]) for row in self.rows]
        draw.line(marks, "steelblue", 2)
        named = -math.inf
        for row, (x, y) in zip(self.rows, marks, strict=True):
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], "steelblue")
            if x - named < EDGE:
                continue  # names would lie on one another
            named = x
            draw.text((x, y - 8), f"rank {row['rank']}", "black", anchor="mb")
            draw.text((x, HEIGHT - EDGE + 6), _short(row["bytes"]), "black", anchor="mt")
        x, _ = place(self.now["bytes"], 0)
        draw.line([(x, EDGE), (x, HEIGHT - EDGE)], "firebrick")
        draw.text((x - 4, EDGE), f"now {_short(self.now['bytes'])}", "firebrick", anchor="rt")
        draw.text(
            (EDGE, EDGE - 12), f"relative error of the change, against bytes in {self.dtype}", "black", anchor="lb"
        )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.tmp.png")
            image.save(temporary)
            os.replace(temporary, target)
        except OSError as fault:
            raise ErasureError(f"{target}: cannot be written: {fault.strerror or fault}") from None
        return target


def _short(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB"


def sizes(patch: Patch, ranks: Iterable[int] | None = None, *, dtype: str = "fp32", drop: bool = False) -> Sizes:
    """Compute the size and the error at each rank, without making the patches.

    Args:
        patch: a low-rank patch or one of differences.
        ranks: the ranks to report; None means 1, 2, 4 .. up to the full rank.
        dtype: data type of the tensors whose bytes are counted.
        drop: as in `resize`.

    Raises:
        ErasureError: a rank out of range, an unknown dtype, or parameters that are not matrices.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    payload = patch.payload
    labels, dropped = matrices(patch, drop)
    limit = max(full_rank(payload, *label) for label in labels)
    wanted = sorted({2**n for n in range(limit.bit_length())} | {limit}) if ranks is None else sorted(set(ranks))
    if not wanted:
        raise ErasureError("give at least one rank")
    for rank in wanted:
        check_rank(rank, limit)
    width = DTYPES[dtype].itemsize
    lost = {rank: dict[str, float]() for rank in wanted}
    room, size = dict.fromkeys(wanted, 0), dict[str, float]()
    for label in labels:
        spectrum, shape = Spectrum.of(payload, *label), payload.shape(*label)
        size[".".join(label)] = float(spectrum.values.square().sum())
        for rank in wanted:
            lost[rank][".".join(label)] = spectrum.lost(rank)
            room[rank] += min(rank, len(spectrum.values)) * (shape[0] + math.prod(shape[1:])) * width
    left = sum(float(payload.change(*label).double().square().sum()) for label in dropped)
    total = sum(size.values()) + left
    rows = []
    for rank in wanted:
        shares = {name: math.sqrt(lost[rank][name] / size[name]) if size[name] else 0.0 for name in size}
        worst = max(shares, key=lambda name: shares[name])
        error = math.sqrt((sum(lost[rank].values()) + left) / total) if total else 0.0
        rows.append({"rank": rank, "bytes": room[rank], "error": error, "worst": worst, "worst_error": shares[worst]})
    now = {"kind": payload.kind, "bytes": sum(tensor.numel() for tensor in payload.tensors()) * width}
    return Sizes(now, dtype, rows)
