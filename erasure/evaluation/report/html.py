"""Parts that every page shares: its head and style, images, and the tables that several pages show.

Pages are self-contained HTML, without scripts or external references.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from erasure.evaluation.metrics.gate_activity import GateActivity

STYLE = """
:root{--ink:#1c1c22;--soft:#6a6a76;--line:#dcdce2;--page:#fcfcfd;--bar:#4a6fd4;--before:#b9bfcc;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e9e9ee;--soft:#9a9aa6;--line:#34343c;--page:#16161a;--bar:#7d9bf0;
--before:#565b68;--bad:#f2857d}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:66rem;margin:0 auto;
padding:1.2rem}
h1{font-size:1.5rem;line-height:1.25;margin:.6rem 0}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}
p,td,th,figcaption{overflow-wrap:anywhere}.soft{color:var(--soft)}.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%}
th,td{padding:.4rem .6rem;border-bottom:1px solid var(--line);text-align:right}
th:first-child,td:first-child{text-align:left}td b{font-weight:650}
td small,th small{display:block;color:var(--soft);font-weight:400}
.figures th,.figures td:not(:first-child){white-space:nowrap;overflow-wrap:normal}
.figures td:first-child{min-width:6.5rem}
.prompts th,.prompts td{text-align:left;vertical-align:top;white-space:nowrap;overflow-wrap:normal}
.prompts td:first-child{white-space:normal}
.prompts td:nth-child(2){white-space:normal;min-width:8rem}
.prompts td:last-child{min-width:14rem;white-space:normal;overflow-wrap:anywhere}
@media(max-width:30rem){th,td{padding:.35rem .25rem}}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1rem}
figure{margin:0}figure div{display:flex;gap:.4rem}
figure img,.none{width:calc(50% - .2rem);aspect-ratio:1;image-rendering:pixelated;border-radius:4px}
.none{background:var(--line);display:flex;align-items:center;justify-content:center;color:var(--soft)}
figcaption{font-size:.85rem;color:var(--soft)}figcaption small{display:block}.target figcaption{color:var(--bad)}
.bars{columns:18rem;column-gap:2rem}
.row{break-inside:avoid;display:grid;grid-template-columns:8rem 1fr 6.5rem;gap:.5rem;
align-items:center;font-size:.85rem;padding:.15rem 0}.row.target span:first-child{color:var(--bad)}
.track i{display:block;height:.4rem;border-radius:.2rem;min-width:1px;margin:.1rem 0}
.was{background:var(--before)}.now{background:var(--bar)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.8rem;background:none;
border:1px solid var(--line);padding:.8rem;border-radius:6px}
"""


INTERFERENCE = (
    '<p class="soft">Rows: the erased concept. Columns: what the prompts ask for. Cells: change of the share of '
    "correct images from the base in percentage points, red for a loss and blue for a gain; below it, the number of "
    "images (with one image, the change is 0 or 100). Framed: what the row is meant to erase. Blank: no prompt asks "
    "for it.</p>"
)


def page_head(title: str, summary: str, style: str = "") -> str:
    """Return the beginning of a page: its head with the style, its title, and its first sentence.

    Args:
        title: title of the page.
        summary: the first sentence, without a full stop.
        style: CSS to add to the common style.
    """
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style><h1>{escape(title)}</h1><p>{escape(summary)}.</p>"
    )


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
        f'<h2>Gate log</h2><div class="wide"><table class="figures">{"".join(lines)}</table></div>'
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
