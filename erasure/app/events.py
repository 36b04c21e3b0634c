"""What happens when something on the page is pressed: a job is run, and its progress and result are shown."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any

from erasure.app import comparison, markup, measuring, tasks
from erasure.app.given import Given
from erasure.app.jobs import Job, Line, Stopped
from erasure.app.models import Models, label, method_label, suited
from erasure.app.parts import Parts
from erasure.app.samples import Sample
from erasure.app.visits import Visit, Visits
from erasure.errors import ErasureError
from erasure.model.base import Base

Updates = dict[Any, Any]
Steps = Generator[Updates, None, Any]  # what changes, step by step
STOPPED = "Stopped. Nothing was changed; press Erase again to go on from where it was."
FIRST = "cat"
UNDRAWN = "Choose what to forget, or type a prompt, to see what this model draws."
# On a narrow window the pictures are below the button.
SCROLL = "() => { if (innerWidth < 640) document.querySelector('#pair').scrollIntoView({behavior: 'smooth'}); }"


class Events:
    """The handlers of the page. Each is a generator that yields what changes on it.

    Args:
        gr: the module gradio.
        parts: the components.
        models: the models that the page offers.
        visits: where it remembers its visitors.
        shown: the concepts that are shown as pictures.
    """

    def __init__(self, gr: Any, parts: Parts, models: Models, visits: Visits, shown: list[Sample]) -> None:
        self.gr, self.parts, self.models, self.visits, self.shown = gr, parts, models, visits, shown
        self.line, self.pictures = Line(), comparison.Pictures()

    def connect(self, page: Any) -> None:
        """Connect the handlers to the components of a page."""
        p = self.parts
        wish = [p.concept, p.method, p.kind, p.anchor]
        seen = [p.forecast, p.prompt, *p.chips, p.pair, p.readings, p.status, p.live, p.erase, p.stop]
        stack = [*p.rows, *p.sliders, p.which, p.later, *p.files, p.leaves_out]
        request = self._with_visit

        def on(trigger: Any, handler: Any, inputs: Any, outputs: list[Any], **options: Any) -> Any:
            chosen = {"show_progress": "hidden", "api_visibility": "private", **options}
            return trigger(request(handler), inputs, list(dict.fromkeys(outputs)), **chosen)

        judging = [p.given, p.given_note, p.no_attack, p.try_attack]
        chosen = [p.model, p.concept, p.method, p.picker, *judging, *seen, *stack]
        on(page.load, self.choose_model, [p.model], chosen)
        on(p.model.input, self.choose_model, [p.model], chosen)
        on(p.path.submit, self.choose_model, [p.path], chosen)
        on(p.concept.input, self.choose_concept, wish, seen, trigger_mode="always_last")
        on(p.method.input, self.choose_method, wish, seen)
        on(p.kind.input, self.choose_method, wish, seen)
        self._connect_picker(p, wish, seen)
        erased = on(p.erase.click, self.erase, wish, [*seen, *stack])
        erased.then(None, None, None, js=SCROLL, api_visibility="private")
        left = self._with_key(self.visits.left)
        p.stop.click(left, None, None, queue=False, api_visibility="private")
        page.unload(left)
        drawn = [p.prompt, *seen, *stack]
        for trigger in (p.draw.click, p.prompt.submit):
            on(trigger, self.draw, [p.prompt], drawn)
        for chip in p.chips:
            on(chip.click, self.draw, [chip], drawn)
        for number, (slider, remove) in enumerate(zip(p.sliders, p.removes, strict=True)):
            strength = partial(self.strength, number)
            on(slider.release, strength, [slider, p.prompt], drawn, trigger_mode="always_last")
            on(remove.click, partial(self.remove, number), [p.prompt], drawn)
        on(p.upload.upload, self.add, [p.upload, p.prompt], [*drawn, p.upload])
        on(p.which.input, self.choose_patch, [p.which], [*p.files, p.leaves_out])
        work = [p.status, p.live, p.erase, p.stop]
        given = [p.prompts, p.prompt_file, p.label, p.judge]
        on(p.measure.click, self.measure, [p.which, p.images, *given], [p.measured, *work])
        on(p.try_attack.click, self.attack, [p.which, p.attack, p.cases, *given], [p.attacked, *work])

    def _connect_picker(self, p: Parts, wish: list[Any], seen: list[Any]) -> None:
        gr = self.gr

        def pick(event: Any, request: Any, method: str, kind: str, anchor: str) -> Steps:
            name = self.shown[event.index].name
            visit = self.visits.of(request.session_hash)
            yield {p.concept: name}
            yield from self.choose_concept(visit, name, method, kind, anchor)

        pick.__annotations__ |= {"event": gr.SelectData, "request": gr.Request}
        outputs = list(dict.fromkeys([p.concept, *seen]))
        p.picker.select(pick, wish[1:], outputs, show_progress="hidden", api_visibility="private")

    def _with_visit(self, handler: Callable[..., Steps]) -> Callable[..., Steps]:
        """Return a handler as Gradio calls it: with the request instead of the visit."""

        def handled(request: Any, *values: Any) -> Steps:
            yield from handler(self.visits.of(request.session_hash), *values)

        handled.__annotations__["request"] = self.gr.Request  # by which Gradio knows what to pass
        return handled

    def _with_key(self, handler: Callable[[str], None]) -> Callable[..., None]:
        """Return a handler that takes no more than the key of a tab as Gradio calls it."""

        def handled(request: Any) -> None:
            handler(request.session_hash)

        handled.__annotations__["request"] = self.gr.Request
        return handled

    def follow(self, visit: Visit, work: Callable[[Job], Any], place: Any = None) -> Steps:
        """Run a job and show its progress; return its result.

        Args:
            visit: the visit.
            work: takes the job.
            place: shows the progress and the job's pictures while it runs; None: what is below the button does.

        Raises:
            Stopped: the job was stopped.
            ErasureError: as the job raised it.
        """
        p, gr = self.parts, self.gr
        job, latest = Job(self.line), ""
        visit.jobs.append(job)
        try:
            for _ in job.run(work):
                updates: Updates = {p.status: markup.progress(job), p.stop: gr.update(visible=True)}
                updates[p.erase] = gr.update(interactive=False)
                picture = markup.gallery(job.pictures) if job.pictures else markup.preview(tasks.newest_preview(job))
                if place is not None:
                    updates[place] = markup.progress(job) + picture
                elif picture != latest:
                    updates[p.live] = latest = picture
                yield updates
        finally:
            visit.jobs.remove(job)
        yield {p.status: "", p.stop: gr.update(visible=False), p.erase: gr.update(interactive=True)}
        if job.stopped:
            raise Stopped
        return job.result

    def guarded(self, steps: Steps, place: Any = None) -> Steps:
        """Pass on what changes, and show a fault or a stop on the page instead of raising it.

        Args:
            steps: what changes.
            place: near the button that was pressed; None: below the button “Erase”.
        """
        p, gr = self.parts, self.gr
        idle = {p.stop: gr.update(visible=False), p.erase: gr.update(interactive=True), p.live: ""}
        try:
            yield from steps
        except Stopped:
            told = markup.note(STOPPED if place is None else "Stopped.")
        except ErasureError as fault:
            told = markup.fault(str(fault))
        else:
            return
        yield {p.status: "", **idle, p.status if place is None else place: told}

    def choose_model(self, visit: Visit, name: str) -> Steps:
        """Open a model, and show what it draws."""
        yield from self.guarded(self._choose_model(visit, name.strip()))

    def _choose_model(self, visit: Visit, name: str) -> Steps:
        p, gr = self.parts, self.gr

        def opened(job: Job) -> tuple[list[str], list[str], measuring.Readiness]:
            job.enter(f"Opening {label(name)}")
            pipe = self.models.open(name)
            vocabulary = Base.of(pipe).vocabulary
            words = [] if vocabulary is None else [*vocabulary.objects, *vocabulary.styles]
            return suited(pipe), words, measuring.readiness(pipe)

        methods, words, ready = yield from self.follow(visit, opened)
        visit.model = name
        choices = self.models.choices()
        if name not in self.models.offered:
            choices.append((label(name), name))
        first = FIRST if FIRST in words else ""
        yield {
            p.model: gr.update(choices=choices, value=name),
            p.method: gr.update(choices=[(method_label(one), one) for one in methods], value=methods[0]),
            p.concept: gr.update(choices=words, value=first or None),
            p.picker: gr.update(visible=bool(words) and bool(self.shown)),
            p.given: gr.update(open=not ready.complete),
            p.given_note: markup.note(ready.text),
            p.no_attack: markup.note(ready.attacks),
            p.try_attack: gr.update(interactive=not ready.attacks),
            **self._stacked(visit),
        }
        if first:
            yield from self._choose_concept(visit, tasks.Wish(first, methods[0]), draw=True)
        else:  # nothing of the model before may stay
            yield {p.erase: gr.update(value="Erase"), p.forecast: "", p.prompt: "", p.readings: "", **self._chips([])}
            yield {p.pair: markup.note(UNDRAWN)}

    def choose_concept(self, visit: Visit, *wish: str | None) -> Steps:
        """Forecast what erasing a concept costs, and show what the model draws for it."""
        yield from self.guarded(self._choose_concept(visit, _wish(wish), draw=True))

    def choose_method(self, visit: Visit, *wish: str | None) -> Steps:
        """Forecast what erasing a concept costs."""
        yield from self.guarded(self._choose_concept(visit, _wish(wish), draw=False))

    def _choose_concept(self, visit: Visit, wish: tasks.Wish, draw: bool) -> Steps:
        p, gr = self.parts, self.gr
        yield {p.erase: gr.update(value=f"Erase “{wish.names}”"), p.status: ""}
        outlook = yield from self.follow(visit, lambda job: tasks.outlook(self.models, visit, job, wish))
        updates: Updates = {p.forecast: markup.forecast(outlook), **self._chips(outlook.prompts)}
        yield {**updates, **({p.prompt: outlook.prompts[0]} if draw else {})}
        if draw:
            yield from self._draw(visit, outlook.prompts[0])

    def _chips(self, prompts: list[str]) -> Updates:
        pairs = zip(self.parts.chips, [*prompts, "", "", ""], strict=False)
        return {chip: self.gr.update(value=text, visible=bool(text)) for chip, text in pairs}

    def draw(self, visit: Visit, prompt: str) -> Steps:
        """Draw a prompt before and after."""
        yield from self.guarded(self._draw(visit, prompt), self.parts.readings)

    def _draw(self, visit: Visit, prompt: str) -> Steps:
        p = self.parts
        work = partial(comparison.compare, self.models, visit, prompt=prompt, pictures=self.pictures)
        compared = yield from self.follow(visit, lambda job: work(job=job))
        yield {
            p.prompt: compared.prompt,
            p.pair: markup.pair(compared),
            p.readings: markup.readings(compared.readings, compared.prompt),
        }

    def erase(self, visit: Visit, *wish: str | None) -> Steps:
        """Erase what is chosen, and show it before and after."""
        yield from self.guarded(self._erase(visit, _wish(wish)))

    def _erase(self, visit: Visit, wish: tasks.Wish) -> Steps:
        p = self.parts
        outlook = yield from self.follow(visit, lambda job: tasks.outlook(self.models, visit, job, wish))
        yield {p.forecast: markup.forecast(outlook), p.prompt: outlook.prompts[0], **self._chips(outlook.prompts)}
        work = partial(tasks.erase_concept, self.models, visit, wish=wish, forecast=outlook.forecast)
        name = yield from self.follow(visit, lambda job: work(job=job))
        yield self._stacked(visit, name)
        yield from self._draw(visit, outlook.prompts[0])
        text = f"Done: {name}. Move the strength, try another prompt, or erase more."
        yield {p.status: markup.note(text), p.live: ""}

    def strength(self, number: int, visit: Visit, value: float, prompt: str) -> Steps:
        """Set the strength of a patch, and draw the prompt again."""
        held = list(visit.patches().values())
        if number < len(held):
            held[number].strength = float(value)
        yield from self.draw(visit, prompt)

    def remove(self, number: int, visit: Visit, prompt: str) -> Steps:
        """Take a patch off the stack, and draw the prompt again."""
        names = list(visit.patches())
        if number < len(names):
            del visit.held[names[number]]
        yield self._stacked(visit)
        yield from self.draw(visit, prompt)

    def add(self, visit: Visit, path: str | None, prompt: str) -> Steps:
        """Add a patch file that was uploaded, and draw the prompt with it."""
        yield {self.parts.upload: None}
        if path is not None:
            yield from self.guarded(self._add(visit, path, prompt), self.parts.readings)

    def _add(self, visit: Visit, path: str, prompt: str) -> Steps:
        name = tasks.add_file(visit, path)
        try:
            yield from self._draw(visit, prompt)
        except BaseException:
            visit.held.pop(name, None)  # it does not fit this model
            raise
        yield self._stacked(visit, name)

    def _stacked(self, visit: Visit, chosen: str | None = None) -> Updates:
        """Return what changes on the page with the stack of patches."""
        p, gr = self.parts, self.gr
        held = list(visit.patches().items())
        updates: Updates = {}
        for number, (row, slider) in enumerate(zip(p.rows, p.sliders, strict=True)):
            updates[row] = gr.update(visible=number < len(held))
            if number < len(held):
                name, one = held[number]
                updates[slider] = gr.update(label=f"Strength of {name}", value=one.strength)
        names = [name for name, _ in held]
        chosen = chosen or (names[-1] if names else None)
        updates |= {p.which: gr.update(choices=names, value=chosen), p.later: gr.update(visible=bool(names))}
        return updates | (self._files(visit, chosen) if chosen else {})

    def choose_patch(self, visit: Visit, name: str) -> Steps:
        """Offer the files of another patch."""
        yield self._files(visit, name)

    def _files(self, visit: Visit, name: str) -> Updates:
        p, gr = self.parts, self.gr
        patch, card, lora, text = tasks.downloads(visit, name)
        paths = zip(p.files, (patch, card, lora), strict=True)
        updates = {
            part: gr.update(value=None if path is None else str(path), visible=path is not None) for part, path in paths
        }
        return updates | {p.leaves_out: markup.note(text)}

    def measure(self, visit: Visit, name: str, images: float, *given: str | None) -> Steps:
        """Measure what is gone and what is kept, and open the report."""
        work = partial(measuring.measure, self.models, visit, name=name, images=int(images), given=_given(given))
        place = self.parts.measured
        yield from self.guarded(self._reported(visit, work, place, markup.measured), place)

    def attack(self, visit: Visit, name: str, attack: str, cases: float, *given: str | None) -> Steps:
        """Try to bring the concept back, show what comes back, and open the report."""
        found = partial(measuring.attack_patch, self.models, visit, name=name, attack_name=attack, cases=int(cases))
        work = partial(found, given=_given(given))
        place = self.parts.attacked
        yield from self.guarded(self._reported(visit, work, place, markup.attacked), place)

    def _reported(self, visit: Visit, work: Callable[..., Any], place: Any, figures: Callable[[Any], str]) -> Steps:
        yield {place: ""}
        report, page = yield from self.follow(visit, lambda job: work(job=job), place)
        yield {place: figures(report) + markup.report(page)}


def _wish(values: Iterable[str | None]) -> tasks.Wish:
    """Return the wish of the fields on the page, of which an empty one may be None."""
    return tasks.Wish(*(value or "" for value in values))


def _given(values: Iterable[str | None]) -> Given:
    """Return the prompts and the judge of the fields on the page, of which an empty one may be None."""
    return Given(*(value or "" for value in values))
