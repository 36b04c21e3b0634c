"""Parts that every page shares: its head and style, images, and the tables that several pages show.

Pages are self-contained HTML, without scripts or external references.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from erasure.evaluation.metrics.gate_activity import GateActivity
from erasure.evaluation.metrics.statistics import ALPHA, holm
from erasure.evaluation.report import charts

STYLE = """
:root{--ink:#1c1c22;--soft:#62626d;--line:#dcdce2;--page:#fcfcfd;--bar:#3d61c4;--before:#b9bfcc;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e9e9ee;--soft:#9a9aa6;--line:#34343c;--page:#16161a;--bar:#7d9bf0;
--before:#565b68;--bad:#f2857d}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:66rem;margin:0 auto;
padding:1rem 1.2rem}
h1{font-size:1.5rem;line-height:1.25;margin:.3rem 0 .7rem}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}
p,td,th,figcaption,summary{overflow-wrap:anywhere}.soft{color:var(--soft)}.wide{overflow-x:auto}
.better{color:var(--bar)}.worse{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:0 .5rem}
.tiles.of4{grid-template-columns:repeat(4,minmax(0,1fr))}
.tile{border:1px solid var(--line);border-radius:8px;padding:.5rem .8rem;display:grid;grid-row:span 3;
grid-template-rows:subgrid;align-content:start}
.tile h2{font-size:.95rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
.tile strong{display:block;font-size:clamp(1.6rem,5vw,2.4rem);line-height:1.25;font-variant-numeric:tabular-nums}
.tile small{display:block;font-size:.8rem;line-height:1.35;color:var(--soft);overflow-wrap:anywhere}
.strips{display:flex;flex-wrap:wrap;gap:0 1.6rem;margin-bottom:1rem}
.strips section{flex:1 1 19rem;min-width:0}.strips h2{font-size:.95rem;margin:.9rem 0 .35rem}
.strip{display:grid;grid-template-columns:repeat(auto-fit,minmax(4.6rem,1fr));gap:.45rem}
.strip.four{grid-template-columns:repeat(4,minmax(0,1fr))}
.shot{position:relative;margin-bottom:.2rem}.shot img,.shot .none{width:100%}
.shot i{position:absolute;left:0;bottom:0;font:600 .72rem/1.35 system-ui,sans-serif;padding:0 .3rem;
background:var(--page);border-radius:0 4px 0 4px}
.strip figcaption{font-size:.75rem;line-height:1.3;display:-webkit-box;-webkit-box-orient:vertical;
-webkit-line-clamp:4;overflow:hidden}
.strip small{font-size:.75rem;line-height:1.3;display:block;overflow-wrap:anywhere}
.hit img{outline:3px solid var(--bad);outline-offset:-1px}
details{border-top:1px solid var(--line);padding:.5rem 0}details+details{margin-top:0}
summary{cursor:pointer;font-weight:600}details[open]>summary{margin-bottom:.6rem}
table{border-collapse:collapse;width:100%}
th,td{padding:.4rem .6rem;border-bottom:1px solid var(--line);text-align:right}
th:first-child,td:first-child{text-align:left}td b{font-weight:650}
td small,th small{display:block;color:var(--soft);font-weight:400}
.figures th,.figures td:not(:first-child){white-space:nowrap;overflow-wrap:normal}
.figures td:first-child{min-width:6.5rem}
.prompts th,.prompts td{text-align:left;vertical-align:top}
@media(max-width:40rem){.tiles.of4{grid-template-columns:repeat(2,minmax(0,1fr));gap:.5rem}}
@media(max-width:40rem){.tile{padding:.4rem .5rem}.tile small{font-size:.75rem}th,td{padding:.35rem .25rem}
.figures td small{font-size:.78rem}.figures th{white-space:normal}.figures td:first-child{min-width:4.5rem}
.stack thead{display:none}.stack tr{display:block;border-bottom:1px solid var(--line);padding:.4rem 0}
.stack td,.stack td:first-child{display:block;border:0;padding:.1rem 0;text-align:left;min-width:0;white-space:normal}
.stack td[data-of]::before{content:attr(data-of) ": ";color:var(--soft)}}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1rem}
@media(max-width:40rem){.grid{grid-template-columns:repeat(2,minmax(0,1fr))}}
figure{margin:0;min-width:0}.grid figure div{display:flex;gap:.4rem}.grid img,.grid .none{width:calc(50% - .2rem)}
figure img,.none{aspect-ratio:1;image-rendering:pixelated;border-radius:4px;display:block}
.none{background:var(--line);display:flex;align-items:center;justify-content:center;color:var(--soft);font-size:.75rem}
figcaption{font-size:.85rem;color:var(--soft)}figcaption small{display:block}.target figcaption{color:var(--ink)}
.bars{columns:18rem;column-gap:2rem}
.row{break-inside:avoid;display:grid;grid-template-columns:8rem 1fr 6.5rem;gap:.5rem;
align-items:center;font-size:.85rem;padding:.15rem 0}.row.target span:first-child{font-weight:650}
.row span{overflow-wrap:anywhere}
.track i{display:block;height:.4rem;border-radius:.2rem;min-width:1px;margin:.1rem 0}
.was{background:var(--before)}.now{background:var(--ink)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.8rem;background:none;
border:1px solid var(--line);padding:.8rem;border-radius:6px}
"""
THUMBNAIL = 192  # longest side of an image in a strip, in pixels
FEW = 5  # below this number of images a figure is folded away
PAINTED = (
    "Coloured (blue better, red worse) is only what differs significantly: McNemar's exact test over the same prompts "
    f"and seeds, p &lt; {ALPHA:g} after Holm's correction for all tests of the table."
)


@dataclass(frozen=True)
class Tile:
    """One figure of a page's verdict.

    Args:
        title: what the figure answers, in a word or two.
        value: the figure, such as "94%"; an empty string if it was not measured.
        lines: its interval, the base's figure, and what was counted.
        look: "better" or "worse" if it differs significantly from what it is compared with, otherwise empty.
    """

    title: str
    value: str
    lines: Sequence[str] = ()
    look: str = ""


@dataclass(frozen=True)
class PairedTest:
    """A paired test over the same prompts and seeds.

    Args:
        key: identifies the test.
        name: what is compared.
        only_first: pairs that only the first of the two, such as the base, got right.
        only_second: pairs that only the second got right.
        p: p-value of McNemar's exact test.
    """

    key: str
    name: str
    only_first: int
    only_second: int
    p: float

    @classmethod
    def of(cls, key: str, name: str, pair: Mapping[str, float]) -> PairedTest:
        """Build a test of the base against the patch from an entry of `Report.paired`."""
        return cls(key, name, int(pair["only_base"]), int(pair["only_patched"]), pair["p"])


@dataclass(frozen=True)
class Shot:
    """One column of a strip of images.

    Args:
        images: name -> image, or None if it is missing; from top to bottom.
        caption: text below, such as the prompt.
        note: a second line of text, such as what the judge saw.
        hits: names of the images that show what should be gone; they are framed.
    """

    images: Mapping[str, Image.Image | None]
    caption: str
    note: str = ""
    hits: frozenset[str] = frozenset()


def page_head(title: str, style: str = "") -> str:
    """Return the beginning of a page: its head with the style, and its title.

    Args:
        title: title of the page.
        style: CSS to add to the common style.
    """
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{charts.STYLE}{style}</style><h1>{escape(title)}</h1>"
    )


def tiles(shown: Sequence[Tile]) -> str:
    """Return the verdict of a page: its most important figures, side by side."""
    parts = []
    for tile in shown:
        look = f' class="{tile.look}"' if tile.look else ""
        lines = "".join(f"<small>{escape(line)}</small>" for line in tile.lines)
        value = escape(tile.value) or "–"
        figure = f"<h2>{escape(tile.title)}</h2><strong{look}>{value}</strong><div>{lines}</div>"
        parts.append(f'<section class="tile">{figure}</section>')
    kind = "tiles of4" if len(parts) == 4 else "tiles"
    return f'<div class="{kind}">{"".join(parts)}</div>'


def strips(groups: Mapping[str, Sequence[Shot]], four: bool = False) -> str:
    """Return small images in columns; each name stands on the first image of its kind in each group.

    Args:
        groups: heading -> columns; groups without columns are left out.
        four: four columns for each group, whatever the width of the page; otherwise as many as fit.
    """
    sections = []
    for heading, shots in groups.items():
        if not shots:
            continue
        named: set[str] = set()
        figures = []
        for shot in shots:
            figures.append(_shot(shot, shot.images.keys() - named))
            named |= shot.images.keys()
        kind = "strip four" if four else "strip"
        sections.append(f'<section><h2>{escape(heading)}</h2><div class="{kind}">{"".join(figures)}</div></section>')
    return f'<div class="strips">{"".join(sections)}</div>' if sections else ""


def _shot(shot: Shot, tagged: Collection[str]) -> str:
    images = []
    for name, image in shot.images.items():
        small = image
        if image is not None and max(image.size) > THUMBNAIL:
            small = image.copy()
            small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        hit = " hit" if name in shot.hits else ""
        tag = f"<i>{escape(name)}</i>" if name and name in tagged else ""
        images.append(f'<div class="shot{hit}">{picture(small, f"{name}: {shot.caption or shot.note}")}{tag}</div>')
    caption = f'<figcaption title="{escape(shot.caption)}">{escape(shot.caption)}</figcaption>' if shot.caption else ""
    note = f"<small>{escape(shot.note)}</small>" if shot.note else ""
    return f"<figure>{''.join(images)}{caption}{note}</figure>"


def folded(title: str, content: str) -> str:
    """Return content behind its title, which a click opens, or nothing if there is no content.

    Args:
        title: the title, as text.
        content: HTML.
    """
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


def looks(tests: Sequence[PairedTest]) -> dict[str, str]:
    """Return key of a test -> "better", "worse", or an empty string if the second is not significantly different.

    The p-values are corrected for the number of tests (Holm 1979).
    """
    corrected = holm([test.p for test in tests])
    return {
        test.key: ("better" if test.only_second > test.only_first else "worse") if p < ALPHA else ""
        for test, p in zip(tests, corrected, strict=True)
    }


def p_text(p: float) -> str:
    """Return a p-value as text for a page; the JSON report has it in full."""
    return "&lt; 0.001" if p < 0.001 else f"{p:.2g}"


def paired_table(tests: Sequence[PairedTest], first: str, second: str, heading: str) -> str:
    """Return a table of paired tests with their p-values before and after Holm's correction.

    Args:
        tests: the tests, which are corrected together; without any, nothing is returned.
        first: name of the first of the two that are compared.
        second: name of the second.
        heading: heading of the first column.
    """
    if not tests:
        return ""
    painted, corrected = looks(tests), holm([test.p for test in tests])
    rows = []
    for test, p in zip(tests, corrected, strict=True):
        look = f' class="{painted[test.key]}"' if painted[test.key] else ""
        rows.append(
            f"<tr><td>{escape(test.name)}<td>{test.only_first}<td>{test.only_second}<td>{p_text(test.p)}"
            f"<td><b{look}>{p_text(p)}</b></tr>"
        )
    head = (
        f"<tr><th>{escape(heading)}<th>{escape(first)} only<th>{escape(second)} only<th>p<th>p<small>Holm</small></tr>"
    )
    return f'<table class="figures">{head}{"".join(rows)}</table><p class="soft">{PAINTED}</p>'


def faults(messages: Sequence[str]) -> str:
    """Return a sentence on the images that could not be judged, or nothing if there are none."""
    if not messages:
        return ""
    return (
        f'<p class="soft">{len(messages)} images could not be judged and count as failures of the erasure. The '
        f"first: {escape(messages[0])}</p>"
    )


def gate_log(gates: Sequence[GateActivity], first: str = "patch") -> str:
    """Return a table of how strongly each gated patch acted, or nothing if no patch has a gate.

    Args:
        gates: the activity of gated patches in one run, or in several runs under different names.
        first: heading of the first column.
    """
    if not gates:
        return ""
    rows: dict[tuple[str, str], dict[str, GateActivity]] = {}
    for activity in gates:
        rows.setdefault((activity.patch, activity.gate), {})[activity.prompts] = activity
    lines = [f"<tr><th>{first}<th>acts: target<th>strength<th>acts: kept<th>strength</tr>"]
    for (name, kind), activities in rows.items():
        cells = [f"<td>{escape(name)}<small>{escape(kind)} gate</small>"]
        for prompts in ("target", "kept"):
            if prompts not in activities:
                cells.append("<td><td>")
                continue
            log = activities[prompts]
            strength = f"{log.mean:.2f}<small>{log.least:.2f} to {log.most:.2f}</small>"
            cells.append(f"<td>{log.acts} of {log.n}<td>{strength}")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table class="figures">{"".join(lines)}</table></div>'
        '<p class="soft">Number of prompts on which the patch acted, its mean strength, and the range. The file '
        "patched/records.jsonl of the run contains the strength for each prompt.</p>"
    )


def picture(image: Image.Image | None, text: str) -> str:
    """Return an image that is embedded in the page, or the word "missing" if there is none.

    Args:
        image: the image, or None.
        text: alternative text.
    """
    if image is None:
        return '<span class="none">missing</span>'
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'
