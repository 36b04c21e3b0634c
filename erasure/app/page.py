"""The page: what stands where. `events` says what happens when something is pressed."""

from __future__ import annotations

from typing import Any

from erasure.app.events import Events
from erasure.app.given import LARGEST
from erasure.app.models import QUICKEST, Models, method_label
from erasure.app.parts import Parts
from erasure.app.samples import Sample, samples
from erasure.app.visits import MOST_PATCHES, Visits
from erasure.concepts.concept import KINDS
from erasure.prompts.hub_sets import SUFFIXES
from erasure.prompts.prompt_set import names

HEAD = """<h1>Erasure</h1>
<p>Make an image model forget something, and see what is left. Your model stays as it is: what you make is a small
patch file.</p>"""
EMPTY = "Pictures appear here in a moment."
SUITED = "as suits the model"
KIND_NAMES = {"as our lists say": "", **{kind: kind for kind in KINDS}}


def build(models: Models, visits: Visits) -> Any:
    """Return the page as Gradio blocks.

    Args:
        models: the models that it offers.
        visits: where it remembers its visitors.
    """
    import gradio as gr

    parts, shown = Parts(), samples()
    with gr.Blocks(title="Erasure", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(HEAD, elem_classes="era-head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320, elem_classes="era-card"):
                _choose(gr, parts, models, shown)
            with gr.Column(scale=6, min_width=320, elem_classes="era-card"):
                _look(gr, parts)
        with gr.Column(elem_classes="era-card", visible=False) as parts.later:
            _keep(gr, parts, models)
        Events(gr, parts, models, visits, shown).connect(page)
    page.queue(default_concurrency_limit=None, api_open=False)
    return page


def _step(gr: Any, number: int, title: str, text: str) -> None:
    gr.HTML(f"<h2><b>{number}</b>{title}</h2><p>{text}</p>", elem_classes="era-step")


def _choose(gr: Any, parts: Parts, models: Models, shown: list[Sample]) -> None:
    """Lay out what is erased, from what and how."""
    _step(gr, 1, "Choose what to forget", "Tap a picture, or type a word. Then press the button.")
    parts.picker = gr.Gallery(
        [(one.image, one.name) for one in shown],
        show_label=False,
        container=False,
        allow_preview=False,
        interactive=False,
        buttons=[],
        visible=bool(shown),
        format="png",
        elem_id="picker",
        elem_classes="era-picker",
    )
    parts.concept = gr.Dropdown(
        [], value=None, allow_custom_value=True, label="Concept", info="An object, a style, a person", elem_id="concept"
    )
    parts.erase = gr.Button("Erase", variant="primary", size="lg", elem_id="erase", elem_classes="era-erase")
    parts.stop = gr.Button("Stop", variant="stop", size="md", visible=False, elem_id="stop")
    parts.status = gr.HTML("", elem_id="status")
    parts.live = gr.HTML("", elem_id="live")
    parts.forecast = gr.HTML("", elem_id="forecast")
    with gr.Accordion("Model, method and more", open=False, elem_id="more"):
        with gr.Row():
            parts.model = gr.Dropdown(
                models.choices(), value=models.offered[0], label="Model", min_width=200, elem_id="model"
            )
            parts.method = gr.Dropdown(
                [(method_label(QUICKEST), QUICKEST)], value=QUICKEST, label="Method", min_width=200, elem_id="method"
            )
        with gr.Row():
            parts.kind = gr.Dropdown(list(KIND_NAMES.items()), value="", label="Kind of concept", min_width=200)
            parts.anchor = gr.Textbox(label="Draw instead", placeholder="left to the method", min_width=200)
        parts.path = gr.Textbox(
            label="A model of your own",
            info="A diffusers folder or a .safetensors file on this machine; press Enter to open it",
            placeholder="path",
            visible=models.any_path,
            elem_id="path",
        )


def _look(gr: Any, parts: Parts) -> None:
    """Lay out the pictures before and after, the strengths and the gates."""
    _step(gr, 2, "Before and after", "The same prompt and the same seeds, without your patches and with them.")
    parts.pair = gr.HTML(f'<p class="era-note">{EMPTY}</p>', elem_id="pair")
    for number in range(MOST_PATCHES):
        with gr.Row(visible=False, elem_classes="era-slot") as row:
            parts.sliders.append(
                gr.Slider(0, 2, value=1, step=0.05, label="Strength", buttons=[], elem_id=f"strength-{number}")
            )
            parts.removes.append(gr.Button("Remove", size="sm", elem_id=f"remove-{number}"))
        parts.rows.append(row)
    with gr.Row(elem_classes="era-ask"):
        parts.prompt = gr.Textbox(label="Prompt: try any", placeholder="a cat on a blue background", elem_id="prompt")
        parts.draw = gr.Button("Draw", size="md", elem_id="draw")
    with gr.Row(elem_classes="era-chips"):
        parts.chips = [gr.Button("", size="sm", visible=False, elem_id=f"chip-{number}") for number in range(3)]
    parts.readings = gr.HTML("", elem_id="readings")
    with gr.Accordion("Add a patch file", open=False):
        parts.upload = gr.File(
            label="A .safetensors patch for this model", file_types=[".safetensors"], height=120, elem_id="upload"
        )


def _keep(gr: Any, parts: Parts, models: Models) -> None:
    """Lay out downloads, the measurement and the attacks."""
    from erasure.evaluation.attacks.attack import names as attack_names

    _step(
        gr,
        3,
        "Keep it, measure it, attack it",
        "Erase something else as well, and both patches act above.",
    )
    parts.which = gr.Dropdown([], label="Patch", elem_id="which")
    _ask_for_judgement(gr, parts, models)
    with gr.Tabs():
        with gr.Tab("Download"):
            with gr.Row():
                titles = ("Patch (.safetensors)", "Card (.md)", "LoRA for ComfyUI")
                parts.files = [
                    gr.DownloadButton(title, size="md", min_width=140, elem_id=f"file-{number}")
                    for number, title in enumerate(titles)
                ]
            parts.leaves_out = gr.HTML("")
        with gr.Tab("Measure"):
            parts.images = gr.Slider(
                12, 120, value=24, step=12, buttons=[], label="How many prompts", info="Each is drawn before and after"
            )
            parts.measure = gr.Button(
                "Measure what is gone and what is kept", variant="primary", size="md", elem_id="measure"
            )
            parts.measured = gr.HTML("", elem_id="measured")
        with gr.Tab("Attack"):
            with gr.Row():
                parts.attack = gr.Dropdown(
                    attack_names(), value="rece", label="Attack", min_width=200, elem_id="attack"
                )
                parts.cases = gr.Slider(2, 12, value=4, step=1, buttons=[], label="How many prompts", min_width=200)
            parts.no_attack = gr.HTML("", elem_id="no-attack")
            parts.try_attack = gr.Button("Try to bring it back", variant="primary", size="md", elem_id="try-attack")
            parts.attacked = gr.HTML("", elem_id="attacked")


def _ask_for_judgement(gr: Any, parts: Parts, models: Models) -> None:
    """Lay out the prompts and the judge that a measurement or an attack may be given."""
    with gr.Accordion("Prompts and judge", open=False, elem_id="given") as parts.given:
        parts.given_note = gr.HTML("", elem_id="given-note")
        with gr.Row():
            parts.prompts = gr.Dropdown(
                [(SUITED, ""), *((name, name) for name in names())],
                value="",
                label="Prompts",
                info="A bundled set, unless you add a file below",
                min_width=200,
                elem_id="prompts",
            )
            parts.judge = gr.Dropdown(
                [(SUITED, ""), *((judge, judge) for judge in models.judges)],
                value="",
                allow_custom_value=models.any_path,
                label="Judge",
                info="Such as clip:FOLDER?labels=cat,dog" if models.any_path else "Who says what a picture shows",
                min_width=200,
                elem_id="judge",
            )
        parts.label = gr.Textbox(
            label="Label of every prompt",
            info="Where the prompts have no column that says what the judge should see",
            placeholder="object=church",
            elem_id="label",
        )
        parts.prompt_file = gr.File(
            label=f"Prompts of your own ({', '.join(SUFFIXES)}; at most {LARGEST / 1e6:.0f} MB)",
            file_types=list(SUFFIXES),
            height=120,
            elem_id="prompt-file",
        )
