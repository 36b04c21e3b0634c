"""The pieces of HTML that the page shows; every text that comes from people is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from erasure.app.comparison import Comparison, Reading
from erasure.app.jobs import Job, Picture
from erasure.app.tasks import Outlook

SMALL = 128  # pixels: images up to this side are shown enlarged, as PNG
EMPTY = (
    '<p class="era-empty"><span>Nothing is erased yet. Press <b>Erase</b>, and the same seeds appear here without it.'
    "</span></p>"
)


def encoded(image: Image.Image) -> str:
    """Return an image as an address that holds its bytes."""
    small = max(image.size) <= SMALL
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG" if small else "JPEG", **({} if small else {"quality": 90}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def fault(message: str) -> str:
    """Show why something was not done."""
    return f'<div class="era-note era-fault" role="alert">{escape(message)}</div>'


def note(message: str) -> str:
    """Show a sentence that is no fault."""
    return f'<div class="era-note">{escape(message)}</div>' if message else ""


def progress(job: Job) -> str:
    """Show the stage of a job, how much of it is done, and for how long it has been running."""
    share = job.share
    width = "" if share is None else f' style="width:{share:.0%}"'
    kind = "era-bar" if share is not None else "era-bar era-unknown"
    amount = "" if share is None else f"{share:.0%} · "
    return (
        f'<div class="era-progress" role="status"><span>{escape(job.where)}</span><span>{amount}{job.seconds:.0f} s'
        f'</span><div class="{kind}"><i{width}></i></div></div>'
    )


def gallery(pictures: Sequence[Picture]) -> str:
    """Show pictures of a running job side by side, those in which the concept is seen set apart."""
    return "".join(
        [
            '<div class="era-live">',
            *(
                f'<figure class="{"era-marked" if one.marked else ""}"><img src="{encoded(one.image)}" '
                f'alt="{escape(one.caption)}"><figcaption>{escape(one.caption)}</figcaption></figure>'
                for one in pictures
            ),
            "</div>",
        ]
    )


def preview(path: Path | None) -> str:
    """Show the newest preview of a run that trains."""
    if path is None:
        return ""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except FileNotFoundError:  # the run has ended meanwhile
        return ""
    step = int(path.stem.removeprefix("step-"))
    return (
        f'<figure class="era-preview"><img src="{encoded(image)}" alt="preview after {step} steps">'
        f"<figcaption>Preview after {step} steps: the concept first, then neighbours that should stay</figcaption>"
        "</figure>"
    )


def forecast(outlook: Outlook) -> str:
    """Show in one line what erasing will cost, and below it what the model was never taught."""
    costs = outlook.forecast
    most = "at most " if costs.at_most else ""
    work = f"{most}{costs.F:,} forward and {costs.B:,} backward passes" if outlook.trains else "no training"
    facts = [
        ("time", f"{most}{duration(costs.seconds)}" if costs.seconds else "not known" if costs.F else "none"),
        ("work", work),
        ("changes", f"{costs.modules:,} layers" if costs.modules else "no weight"),
        ("memory", size(costs.peak_bytes)),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts)
    text = f'<dl class="era-facts" aria-label="forecast">{cells}</dl>'
    if outlook.unknown:
        names = ", ".join(f"“{name}”" for name in outlook.unknown)
        text += note(f"The model was never taught {names}: there may be nothing to erase.")
    return text


def duration(seconds: float) -> str:
    """Return a number of seconds in words: about 2 s, about 4 min, about 3 h."""
    if seconds < 100:
        return f"about {max(seconds, 1):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Return a number of bytes in words: 148 kB, 63 MB, 1.2 GB."""
    for unit, least in (("GB", 1e9), ("MB", 1e6)):
        if count >= least:
            return f"{count / least:,.{1 if unit == 'GB' else 0}f} {unit}"
    return f"{max(1, round(count / 1e3))} kB"


def pair(compared: Comparison) -> str:
    """Show a prompt before and after, side by side, from the same seeds."""
    after = _grid(compared.after, f"{compared.prompt}, after") if compared.after else EMPTY
    return (
        '<div class="era-pair">'
        f"<figure><figcaption>Before</figcaption>{_grid(compared.before, f'{compared.prompt}, before')}</figure>"
        f"<figure><figcaption>After</figcaption>{after}</figure></div>"
    )


def _grid(images: Sequence[Image.Image], alt: str) -> str:
    small = " era-small" if images and max(images[0].size) <= SMALL else ""
    tags = (
        f'<img src="{encoded(image)}" alt="{escape(alt)}, seed {seed}" title="seed {seed}">'
        for seed, image in enumerate(images)
    )
    return f'<div class="era-grid{small}">{"".join(tags)}</div>'


def readings(found: Sequence[Reading], prompt: str) -> str:
    """Show what each patch's gate read from the prompt, and how strongly the patch acted."""
    if not found:
        return ""
    rows = []
    for one in found:
        gate = "acts on every prompt" if one.gate == "always" else f"{one.gate} gate read {_read(one)}"
        width = f"{min(abs(one.acted), 2) / 2:.0%}"
        rows.append(
            f'<div class="era-reading"><b>{escape(one.name)}</b><span>{gate}</span>'
            f'<span>acted at {one.acted:.2f} of {one.strength:.2f}</span><i class="era-meter"><i '
            f'style="width:{width}"></i></i></div>'
        )
    return f'<div class="era-readings" aria-label="gates"><h4>Gates on “{escape(prompt)}”</h4>{"".join(rows)}</div>'


def _read(one: Reading) -> str:
    return f"{one.acted / one.strength:.2f}" if one.strength else "nothing, because the strength is 0"


def report(page: Path) -> str:
    """Show a report's page in a frame of its own, in which no script runs, and offer it as a file."""
    whole = page.read_bytes()
    inner = escape(whole.decode(), quote=True)
    address = f"data:text/html;base64,{base64.b64encode(whole).decode()}"
    return (
        f'<p class="era-save"><a download="{escape(page.parent.name)}.html" href="{address}">Save the report</a></p>'
        f'<iframe class="era-report" title="report" sandbox="" srcdoc="{inner}"></iframe>'
    )


def measured(result: Any) -> str:
    """Show the first figures of a report: what is gone and what is kept, each with its interval and the base's."""
    titles = {"UA": "gone", "quality": "still a good picture", "IRA": "neighbours kept"}
    tiles = []
    for name, title in titles.items():
        metric, base = result.metric(name), result.metric(name, "base")
        if metric is None:
            continue
        before = "" if base is None else f"before {base.value:.0%}"
        between = "" if metric.low is None else f"95 % interval {metric.low:.0%} to {metric.high:.0%}"
        parts = " · ".join(filter(None, (between, before)))
        tiles.append(f"<div><dt>{title}</dt><dd>{metric.value:.0%}</dd><small>{parts}</small></div>")
    return f'<dl class="era-tiles">{"".join(tiles)}</dl>{note(result.summary())}'


def attacked(result: Any) -> str:
    """Show how often each attack brought the concept back, next to its control."""
    tiles = []
    for one in result.outcomes:
        after, control = one.share(), one.share(control=True)
        beside = "" if control is None else f"without the search {control['value']:.0%} · "
        back = one.plain + len(one.won)
        tiles.append(
            f"<div><dt>back under {escape(one.name)}</dt><dd>{back} of {one.n}</dd><small>{beside}95 % interval "
            f"{after['low']:.0%} to {after['high']:.0%}</small></div>"
        )
    tiles.append(f"<div><dt>back by the plain prompt</dt><dd>{result.plain} of {result.cases}</dd></div>")
    return f'<dl class="era-tiles">{"".join(tiles)}</dl>'
