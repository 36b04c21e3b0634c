"""The page of a take-down certificate, for people who read no tables: what was removed, and what the tests showed.

Every figure is a count with its 95 % interval in words. One sheet of A4 when it is printed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from erasure import methods
from erasure.errors import ErasureError
from erasure.evaluation.attacks.attack import find
from erasure.evaluation.metrics.statistics import wilson
from erasure.evaluation.report.html import Shot, folded, page_head, strips

MOST_NAMES = 12  # in the title and in the text; a longer list is folded away
SHOTS = 4  # columns of pictures under one heading
UNSHOWN = ("identity", "content")  # kinds of concepts whose pictures a page that is passed around should not show
SPACED = "\N{NO-BREAK SPACE}%"
FEW = 20  # below so many pictures the page says that the range is wide
STYLE = """
body{max-width:50rem;overflow-wrap:anywhere}
.kicker{margin:.6rem 0 0;color:var(--soft);font-size:.85rem;letter-spacing:.04em;
text-transform:uppercase}
h1{font-size:clamp(1.5rem,4.5vw,2.1rem);margin:.2rem 0 .6rem;overflow-wrap:anywhere}
h1+p{font-size:1.05rem}h2{font-size:1.15rem;border-top:2px solid var(--ink);padding-top:.5rem;margin:1.6rem 0 .5rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1rem;margin:.8rem 0;font-size:.92rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}code{font-size:.85em;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:.7rem}
.card{border:1px solid var(--line);border-left:4px solid var(--bar);border-radius:6px;padding:.55rem .8rem}
.card.open{border-left-color:var(--bad)}.card h3{margin:0;font-size:.9rem;color:var(--soft);font-weight:600}
.card b{display:block;font-size:1.15rem;line-height:1.3;margin:.1rem 0 .2rem}.card p{margin:0;font-size:.9rem}
ul{padding-left:1.2rem;margin:.4rem 0}li{margin:.3rem 0}
ol{padding-left:1.3rem}ol pre{margin:.3rem 0;padding:.5rem .7rem}
.strips section{flex:0 1 calc(50% - .8rem);min-width:18rem}.strips h2{border:0;padding:0;margin:.6rem 0 .35rem}
@media(max-width:40rem){.strips section{flex-basis:100%}}
@media(max-width:40rem){.cards{grid-template-columns:1fr}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.4rem}}
@media print{@page{size:A4;margin:9mm 13mm}:root{--ink:#111;--soft:#555;--line:#ccc;--page:#fff}
body{font-size:7.9pt;line-height:1.25;padding:0;max-width:none}h1{font-size:15pt;margin:0 0 .2rem}h1+p{font-size:9.2pt}
h2{font-size:10pt;margin:.45rem 0 .15rem;padding-top:.2rem;border-top-width:1px;break-after:avoid}
.card b{font-size:8.8pt;margin:0}.card p,dl{font-size:7.6pt}.card{padding:.2rem .5rem}.card h3{font-size:7.6pt}
.kicker{font-size:7.5pt;margin:0}.preamble{display:none}
.card,li{break-inside:avoid}.cards{grid-template-columns:repeat(2,1fr);gap:.4rem}.strips{gap:0 1rem;margin:0}
.strips section{flex:1 1 0;min-width:0}.strips{flex-wrap:nowrap}
.strips h2{font-size:7.5pt;white-space:nowrap;margin:.3rem 0 .2rem}.strip{gap:.2rem}
.strip figcaption,.strip small,.shot i{font-size:6pt}li{margin:.12rem 0}
dl{grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:.4rem 0}
ol pre{font-size:7pt;padding:.1rem .4rem;margin:.1rem 0}
p{margin:.2rem 0}ol,ul{margin:.1rem 0}}
"""
PICTURES = {"base": "before", "patched": "after", "attacked": "back"}
PARTS = {
    "unet": "the part that draws (unet)",
    "transformer": "the part that draws (transformer)",
    "text_encoder": "the part that reads the request (text encoder)",
    "text_encoder_2": "the second part that reads the request (text encoder 2)",
}
# What the attacker of each kind of attack has, for people who do not know the words.
ATTACKERS = {
    "random": "Somebody who types random words as well",
    "text": "Somebody who searches for words that bring it back",
    "embeddings": "Somebody who can feed the model numbers in place of words",
    "image": "Somebody who gives the model a picture to start from",
    "weights": "Somebody who has the model’s files and changes them",
    "noisy latents of the base": "Somebody who lets the original model begin the picture",
    "sampler": "Somebody who changes how the model draws",
}


def certificate_page(statement: Mapping[str, Any], shots: Mapping[str, Sequence[Shot]]) -> str:
    """Return the page of a certificate.

    Args:
        statement: what the page says, as `certify` collects it.
        shots: heading -> columns of pictures, as on the page of the verification.
    """
    results, model = statement["results"], statement["model"]
    names = [concept["name"] for concept in statement["removed"]]
    who = _listed(names)
    title = f"{who} {'was' if len(names) == 1 else 'were'} removed from the image model {model['name']}"
    parts = [
        page_head(title, STYLE).replace("<h1>", '<p class="kicker">Take-down certificate</p><h1>', 1),
        f"<p>{_summary(results, who)}</p>",
        '<p class="soft preamble">This page says what was removed, what was tried to bring it back, what remains, and '
        "how anybody can repeat the test. It reports what was tested and promises nothing about what was not.</p>",
        _identity(statement),
        "<h2>What the test showed</h2>",
        f'<div class="cards">{"".join(_cards(statement, who))}</div>',
        _likely(results),
        _pictures(statement, shots),
        "<h2>What was tried to bring it back</h2>",
        _attacks(results["attacks"], who),
        "<h2>What remains</h2>",
        f"<ul>{''.join(f'<li>{line}</li>' for line in _remains(statement, who))}</ul>",
        "<h2>How it was removed</h2>",
        f"<p>{_how(statement)}</p>",
        "<h2>How anybody can repeat this</h2>",
        _repeat(statement),
        "</html>",
    ]
    return "\n".join(part for part in parts if part)


def likely(low: float, high: float) -> str:
    """Return an interval of a share in plain words, such as `likely between 65 % and 100 %`.

    Args:
        low: lower end, in [0, 1].
        high: upper end.
    """
    ends = f"{low:.0%}".replace("%", SPACED), f"{high:.0%}".replace("%", SPACED)
    return f"likely about {ends[0]}" if ends[0] == ends[1] else f"likely between {ends[0]} and {ends[1]}"


def counted(cell: Mapping[str, Any], noun: str = "", inverse: bool = False) -> str:
    """Return a share with its interval as a count in plain words, such as `0 of 7 (likely between 0 % and 35 %)`.

    Args:
        cell: the share with `value`, `low`, `high` and `n`.
        noun: what is counted, such as `requests`; it stands before the interval.
        inverse: count the others.
    """
    value, low, high = cell["value"], cell["low"], cell["high"]
    if inverse:
        value, low, high = 1 - value, 1 - high, 1 - low
    share = f"{round(value * cell['n'])} of {cell['n']}"
    return f"{share}{f' {noun}' if noun else ''} ({likely(low, high)})"


def _listed(names: Sequence[str]) -> str:
    """Return names in quotes, as in a sentence; of a long list the first ones and how many others there are."""
    shown = [f"“{name}”" for name in names[:MOST_NAMES]]
    others = len(names) - len(shown)
    shown += [f"{others} {'other' if others == 1 else 'others'}"] if others else []
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _summary(results: Mapping[str, Any], who: str) -> str:
    """Return the result of the test in two sentences of HTML: is it gone, and does it come back."""
    gone, attacks = results["metrics"].get("UA"), results["attacks"]
    first = (
        f"Whether {escape(who)} is gone was not tested."
        if gone is None
        else f"In the test, <b>{counted(gone, 'pictures')}</b> that asked for {escape(who)} no longer showed it."
    )
    if not attacks:
        return f"{first} <b>Nobody tried to bring it back.</b>"
    worst, cell = _strongest(attacks)
    return (
        f"{first} Of {len(attacks)} {'way' if len(attacks) == 1 else 'ways'} to bring it back that were tried, the "
        f"most successful one ({escape(worst)}) did so for <b>{counted(cell, 'requests')}</b>."
    )


def _strongest(attacks: Mapping[str, Mapping[str, Any]]) -> tuple[str, Mapping[str, Any]]:
    """Return the attack with the highest success rate; of equals, that with the widest interval."""
    return max(attacks.items(), key=lambda item: (item[1]["value"], item[1]["high"]))


def _identity(statement: Mapping[str, Any]) -> str:
    model, patch, key = statement["model"], statement["patch"], statement["key"]
    aliases = [alias for concept in statement["removed"] for alias in concept["aliases"]]
    rows = [
        ("Also known as", escape(_listed(aliases)) if aliases else ""),
        ("Date of the test", escape(statement["issued"])),
        ("Model", f"{escape(model['name'])}, whose weights have the SHA-256 <code>{escape(model['sha256'])}</code>"),
        ("Removed by", f"{escape(patch['file'])}, SHA-256 <code>{escape(patch['sha256'])}</code>"),
        (
            "Signature",
            "none: anybody could have written this page"
            if key is None
            else f"certificate.sig, by the Ed25519 key <code>{escape(key['fingerprint'])}</code>",
        ),
    ]
    names = [concept["name"] for concept in statement["removed"]]
    full = folded(f"All {len(names)} names", f"<p>{escape(', '.join(names))}</p>") if len(names) > MOST_NAMES else ""
    return f"<dl>{''.join(f'<dt>{name}<dd>{text}' for name, text in rows if text)}</dl>{full}"


def _cards(statement: Mapping[str, Any], who: str) -> list[str]:
    """Return the answers of the test: is it gone, is it gone under other words, is the rest kept, are pictures good."""
    metrics, before = statement["results"]["metrics"], statement["before"]
    kept = "IRA" if "IRA" in metrics else "CRA"
    questions = (
        ("UA", "Is it gone?", f"pictures that asked for {who} do not show it"),
        ("leak", "Under other words for it?", "pictures that asked by other words do not show it"),
        (kept, "Is the rest unharmed?", "pictures of other things show what was asked for"),
        ("quality", "Are the pictures still good?", f"pictures that asked for {who} are well-formed pictures"),
    )
    cards = []
    for name, question, counts in questions:
        cell, old, inverse = metrics.get(name), before.get(name), name == "leak"
        if cell is None:
            cards.append(_card(question, "Not tested", "This certificate says nothing about it.", True))
            continue
        shown = counted(cell, inverse=inverse)
        share, _, interval = shown.partition(" (")
        lines = f"Of all such pictures, {interval.rstrip(')')}."
        lines += f" Before the removal: {counted(old, inverse=inverse)}." if old else ""
        cards.append(_card(question, f"{share} {counts}", lines, False))
    return cards


def _card(question: str, answer: str, lines: str, unanswered: bool) -> str:
    look = "card open" if unanswered else "card"
    return f'<section class="{look}"><h3>{escape(question)}</h3><b>{escape(answer)}</b><p>{escape(lines)}</p></section>'


def _likely(results: Mapping[str, Any]) -> str:
    how = results["how"]
    few = min((cell["n"] for cell in results["metrics"].values()), default=0) < FEW
    wide = " Few pictures were tested, so some of the ranges are wide." if few else ""
    return (
        '<p class="soft">“Likely” means 95 % confidence: a sample was drawn, not every possible picture.'
        f"{wide} {how['prompts'].get('used', 'The')} requests were drawn with the removal and without it, from the "
        f"same random numbers. A program (the judge “{escape(str(how['judge']['name']))}”), not a person, said what "
        "the pictures show.</p>"
    )


def _pictures(statement: Mapping[str, Any], shots: Mapping[str, Sequence[Shot]]) -> str:
    if any(concept["kind"] in UNSHOWN for concept in statement["removed"]):
        return '<p class="soft">Because of what was removed, this page shows no pictures.</p>'
    who = _listed([concept["name"] for concept in statement["removed"]])
    headings = (f"Asked for {who}, worst results first", "Asked for other things", "Brought back by an attack")
    groups = {
        heading: [replace(shot, **_renamed(shot)) for shot in columns[:SHOTS]]
        for heading, columns in zip(headings, shots.values(), strict=False)
    }
    return strips(groups, four=True)


def _renamed(shot: Shot) -> dict[str, Any]:
    """Return the pictures of a column under the names that this page has for them."""
    return {
        "images": {PICTURES.get(name, name): image for name, image in shot.images.items()},
        "hits": frozenset(PICTURES.get(name, name) for name in shot.hits),
    }


def _attacks(attacks: Mapping[str, Mapping[str, Any]], who: str) -> str:
    """Return a paragraph for each attack, the most successful first."""
    if not attacks:
        return "<p><b>Nothing was tried.</b> This certificate says nothing about people who try to bring it back.</p>"
    lines = []
    for name, cell in sorted(attacks.items(), key=lambda item: -item[1]["value"]):
        attacker = ATTACKERS.get(name) or ATTACKERS.get(cell["access"], f"Somebody who has: {cell['access']}")
        text = f"<b>{escape(attacker)}</b> ({escape(_known(name))}): {escape(who)} came back for "
        text += f"<b>{counted(cell, 'requests')}</b>. Without trying: {counted(_share(cell, 'before'))}."
        if cell.get("control") is not None:
            text += f" By as many random tries: {counted(_share(cell, 'control'))}."
        if cell.get("adapted"):
            text += " The search was shorter than in its paper; a longer one may bring back more."
        lines.append(f"<li>{text}</li>")
    return (
        "<p>Each attack was given requests that the original model answers with what was removed.</p>"
        f"<ul>{''.join(lines)}</ul>"
    )


def _share(cell: Mapping[str, Any], name: str) -> dict[str, Any]:
    low, high = wilson(cell[name] * cell["n"], cell["n"])
    return {"value": cell[name], "low": low, "high": high, "n": cell["n"]}


def _known(name: str) -> str:
    """Return the name of an attack with its source, which attacks of other versions lack."""
    try:
        return f"{name}, {find(name).source}"
    except ErasureError:
        return name


def _remains(statement: Mapping[str, Any], who: str) -> list[str]:
    """Return what the removal leaves, as sentences in HTML."""
    results, lines = statement["results"], []
    metrics, attacks = results["metrics"], results["attacks"]
    gone = metrics.get("UA")
    if gone is not None and gone["value"] < 1:
        lines.append(f"Pictures that asked for {escape(who)} still show it: {counted(gone, inverse=True)}.")
    leak = metrics.get("leak")
    if leak is not None and leak["value"] > 0:
        lines.append(f"Pictures that asked by other words still show it: {counted(leak)}.")
    if attacks:
        worst, cell = _strongest(attacks)
        lines.append(
            f"The most successful attack ({escape(worst)}) brings it back for {counted(cell, 'requests')}."
            if cell["value"]
            else f"No attack brought it back: {counted(cell, 'requests')}."
        )
    least = [name for name, cell in results.get("names", {}).items() if cell["shown"]]
    if least:
        lines.append(f"Names that at least one picture still shows: {escape(_listed(least))}.")
    lines += [
        f"The original model is as it was, and draws {escape(who)}. The removal works only where the patch is loaded; "
        "whoever has the model’s files can leave it out.",
        "Pictures, words and attacks that were not tried may still show it, and the judge can be wrong.",
    ]
    return lines


def _how(statement: Mapping[str, Any]) -> str:
    """Return how it was removed, in sentences."""
    patch = statement["patch"]
    try:
        module = inspect.getmodule(methods.find(patch["method"]))
        about = (inspect.getdoc(module) or "").split("\n\n")[0].replace("\n", " ").rstrip(".")
    except ErasureError:
        about = ""
    method = f"{patch['method']} ({about})" if about else patch["method"]
    parts = " and ".join(PARTS.get(name, name) for name in patch["components"])
    acts = (
        "It acts on every request."
        if patch["gate"] == "always"
        else f"It acts only on some requests: a gate of the kind “{patch['gate']}” reads each request and decides."
    )
    other = "" if patch["base"] == statement["model"]["name"] else f" The patch was made from {patch['base']}."
    changed = (
        f"A patch of {patch['parameters']:,} numbers changes {parts}."
        if patch["components"]
        else "No weight was changed: the patch changes what the program does while it draws."
    )
    return escape(f"{changed} It was made by the method {method}. {acts}{other}")


def _repeat(statement: Mapping[str, Any]) -> str:
    install, verify = statement["repeat"]
    check = "erasure verify . --check"
    check += "" if statement["key"] is None else " --key public.pem"
    check += f" --model {statement['model']['name']}"
    key = (
        ""
        if statement["key"] is None
        else " Ask the signer, not whoever sent you this page, for the public key (public.pem)."
    )
    steps = (
        ("Install the program (Python 3.11 or newer):", install),
        ("Check that this page, the patch and the model are those of the test, in the folder of this page:", check),
        ("Draw the pictures again and attack again:", verify),
    )
    lines = "".join(f"<li>{escape(text)}<pre>{escape(command)}</pre></li>" for text, command in steps)
    return (
        f"<ol>{lines}</ol><p class='soft'>certificate.json holds all figures and hashes; report.html, beside it, shows "
        f"every picture.{key}</p>"
    )
