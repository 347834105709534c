"""What the page's buttons do.

    the browser --> a handler below --> sessions: the conversation --> worker: the model
    the browser <-- views: the page as that conversation stands

Handlers hold nothing themselves. Those that answer are generators which look, many times a second,
at how far the worker has come; if the page goes away they simply are not asked again.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from qwen2audio_core.errors import InputError
from qwen2audio_core.web import inside
from qwen2audio_core.web.page import OPENED_JS, Page
from qwen2audio_core.web.sessions import Session, Sessions, Turn
from qwen2audio_core.web.views import EXAMPLES, View, Views, answer, failure, history, note, over
from qwen2audio_core.web.words import LANGUAGES, preferred

CLIPS = Path(__file__).parents[1] / "assets" / "clips"
LOOK_SECONDS = 0.05  # between two looks at an answer that is being written


def build(sessions: Sessions, title: str, warning: str = "") -> Any:
    """The page, as gradio.Blocks. Arguments as in Views."""
    import gradio as gr

    at = Page(sessions.assistant.settings)
    views = Views(at, title, warning)

    def of(request: gr.Request) -> Session:
        return sessions.of(request.session_hash)

    # --- answers ----------------------------------------------------------------------------------

    async def answered(
        session: Session, begin: Callable[..., Turn], *words: Any, typed: str | None = None
    ) -> AsyncIterator[View]:
        """Begin an answer and show it until it is over.

        words  of `begin`: what was typed, if it takes that, and the settings as the page has them
        typed  put back into the box should the model fail
        """
        *texts, system, temperature, tokens, seed = words
        seed = (seed or "").strip()
        try:
            if seed and not seed.isdecimal():
                raise InputError(session.words["bad seed"])
            turn = await asyncio.to_thread(
                begin,
                *texts,
                system=(system or "").strip() or None,
                **({"temperature": float(temperature)} if temperature else {"greedy": True}),
                max_new_tokens=int(tokens),
                seed=int(seed) if seed else None,
            )
        except InputError as error:
            yield views.conversation(session, failure(session, error))
            return
        job = session.job
        assert job is not None
        yield views.conversation(session, text=None if typed is None else "")
        before = ""
        while session.job is job and session.busy:
            now = answer(session, turn)
            if now != before:
                before = now
                yield {at.chatbot: history(session)}
            await asyncio.sleep(LOOK_SECONDS)
        if session.job is not job:  # asked anew meanwhile: that one's handler shows the page
            return
        if job.error:
            yield views.conversation(session, failure(session, job.error), text=typed)
        else:
            yield views.conversation(session, over(session))

    async def asked(typed: str | None, request: gr.Request, *knobs: Any) -> AsyncIterator[View]:
        session = of(request)
        typed = typed or ""
        async for shown in answered(session, session.ask, typed, *knobs, typed=typed):
            yield shown

    async def retried(request: gr.Request, *knobs: Any) -> AsyncIterator[View]:
        session = of(request)
        async for shown in answered(session, session.retry, *knobs):
            yield shown

    async def tried(event: gr.SelectData, request: gr.Request, *knobs: Any) -> AsyncIterator[View]:
        """An example was clicked. Its index is all that is taken from the browser."""
        session = of(request)
        index = event.index[0] if isinstance(event.index, list) else event.index
        _, text, clips = EXAMPLES[int(index)]
        for clip in clips:
            if wrong := await take(session, CLIPS / clip, clip):
                yield views.conversation(session, wrong)
                return
        words = session.words[text] if text else ""
        async for shown in answered(session, session.ask, words, *knobs):  # a draft stays
            yield shown

    # --- clips ------------------------------------------------------------------------------------

    async def take(session: Session, file: Path | str, name: str) -> str:
        """Add a clip to the next turn; returns what there is to say of it."""
        try:
            notices = await asyncio.to_thread(session.add, file, name)
        except InputError as error:
            return failure(session, error)
        return "".join(note(session.words["notice"].format(notice)) for notice in notices)

    async def added(files: list[str] | None, request: gr.Request) -> View:
        session = of(request)
        lines = [await take(session, file, Path(file).name) for file in files or ()]
        return {**views.conversation(session, "".join(lines)), at.upload: None}

    async def recorded(
        file: str | None, at_once: bool, typed: str | None, request: gr.Request, *knobs: Any
    ) -> AsyncIterator[View]:
        session = of(request)
        had, line = len(session.clips), ""
        if file is not None:
            session.recordings += 1
            name = session.words["recording"].format(session.recordings)
            line = await take(session, file, name)
        yield {**views.conversation(session, line), at.microphone: None}
        if at_once and len(session.clips) > had and not session.busy:
            async for shown in asked(typed, request, *knobs):
                yield shown

    def removed(event: gr.EventData, request: gr.Request) -> View:
        session = of(request)
        session.remove(str(event._data.get("clip")))
        return views.conversation(session)

    # --- the rest ---------------------------------------------------------------------------------

    def stopped(request: gr.Request) -> View:
        session = of(request)
        session.stop()
        return views.conversation(session, over(session))

    def edited(draft: str | None, request: gr.Request) -> View:
        session = of(request)
        try:
            texts = [text for text in (session.edit(), draft or "") if text.strip()]
            return views.conversation(session, text="\n".join(texts))
        except InputError as error:
            return views.conversation(session, failure(session, error))

    def cleared(request: gr.Request) -> View:
        session = of(request)
        session.clear()
        return views.conversation(session, text="")

    def opened(stored: str, request: gr.Request) -> View:
        session = of(request)
        chosen = request.query_params.get("lang", stored)
        heard = preferred(request.headers.get("accept-language", ""))
        session.language = chosen if chosen in LANGUAGES else heard
        return views.labels(session)

    def translated(request: gr.Request) -> View:
        session = of(request)
        session.language = next(code for code in LANGUAGES if code != session.language)
        return {**views.labels(session), at.chosen: session.language}

    def opened_inside(request: gr.Request) -> View:
        return {at.opened: inside.tokens(of(request)), at.progress: "", at.report: ""}

    async def looked(request: gr.Request) -> AsyncIterator[View]:
        session = of(request)
        try:
            look = inside.inspect(session)
        except InputError as error:
            yield {at.progress: failure(session, error), at.report: ""}
            return
        w, job = session.words, look.job
        assert job is not None
        while not (job.done or job.stopped):
            place = session.worker.place(job)
            line = (
                w["in line"].format(place) if place else w["looking"].format(look.stage, look.part)
            )
            yield {at.progress: note(line), at.report: ""}
            await asyncio.sleep(4 * LOOK_SECONDS)
        if look.page:
            yield {at.progress: "", at.report: inside.frame(look.page)}
        else:
            yield {at.progress: failure(session, job.error) if job.error else "", at.report: ""}

    def left(request: gr.Request) -> None:
        sessions.leave(request.session_hash)

    knobs = [at.system, at.temperature, at.tokens, at.seed]
    changing, labelled = views.changing, views.labelled
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    with at.blocks:
        at.blocks.load(opened, [at.chosen], labelled, **quiet)
        at.blocks.load(None, js=OPENED_JS, api_visibility="private")
        at.blocks.unload(left)
        at.language.click(translated, None, [*labelled, at.chosen], **quiet)
        sending = [at.send.click, at.text.submit]
        # Also while an answer is written: that it has to wait is told, and not kept silent.
        gr.on(sending, asked, [at.text, *knobs], changing, trigger_mode="multiple", **quiet)
        at.chatbot.example_select(tried, knobs, changing, **quiet)
        at.retry.click(retried, knobs, changing, **quiet)
        at.stop.click(stopped, None, changing, **quiet)
        at.edit.click(edited, [at.text], changing, **quiet)
        gr.on([at.clear.click, at.chatbot.clear], cleared, None, changing, **quiet)
        at.upload.upload(added, [at.upload], [*changing, at.upload], **quiet)
        recording = [at.microphone, at.voice, at.text, *knobs]
        at.microphone.stop_recording(recorded, recording, [*changing, at.microphone], **quiet)
        at.waiting.click(removed, None, changing, **quiet)
        inside_of = [at.opened, at.progress, at.report]
        at.inside_tab.select(opened_inside, None, inside_of, **quiet)
        at.look.click(looked, None, [at.progress, at.report], **quiet)
    at.blocks.queue(default_concurrency_limit=None, max_size=10 * sessions.limits.waiting)
    return at.blocks
