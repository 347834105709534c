"""A conversation as the page shows it: values for the components of page."""

from html import escape
from typing import Any

from qwen2audio_core.errors import InputError
from qwen2audio_core.web import pictures
from qwen2audio_core.web.page import Page
from qwen2audio_core.web.sessions import Clip, Session, Turn
from qwen2audio_core.web.words import LANGUAGES

EXAMPLES = (  # name of its title, name of its text, clips
    ("answer it", "", ("en_snow.flac",)),
    ("transcribe it", "ask transcribe", ("en_train.flac",)),
    ("translate it", "ask translate", ("zh_weather.flac",)),
    ("what sound", "ask sound", ("sound_siren.flac",)),
    ("what language", "ask language", ("it_sea.flac",)),
    ("compare them", "ask compare", ("sound_rain.flac", "fr_book.flac")),
)

NO_MICROPHONE = {
    "insecure": "no microphone insecure",
    "refused": "no microphone refused",
    "missing": "no microphone missing",
}

View = dict[Any, Any]  # component -> its new value, or an update of its properties


class Views:
    """What is to be shown.

    title   name of the model and where it runs
    warning  which words of words.py say what not to take it for, "" for none
    """

    def __init__(self, at: Page, title: str, warning: str):
        self.at = at
        self.title = title
        self.warning = warning
        self.changing = [  # by `conversation`
            *(at.chatbot, at.waiting, at.status, at.send, at.stop),
            *(at.retry, at.edit, at.clear, at.text),
        ]
        self.labelled = [  # by `labels`
            *(at.heading, at.language, at.chatbot, at.text, at.send, at.stop, at.retry, at.edit),
            *(at.clear, at.microphone, at.trouble, at.upload, at.voice, at.accordion, at.system),
            *(at.temperature, at.tokens, at.seed, at.conversation_tab, at.inside_tab),
            *(at.inside_hint, at.look),
        ]

    def conversation(self, session: Session, status: str = "", text: str | None = None) -> View:
        """Everything that changes while one talks. text: for the box, None leaves it alone."""
        from gradio import update

        at, busy, turns = self.at, session.busy, bool(session.turns)
        shown: View = {
            at.chatbot: history(session),
            at.waiting: "".join(card(session, clip, remove=True) for clip in session.clips),
            at.status: status,
            at.send: update(visible=not busy),
            at.stop: update(visible=busy),
            at.retry: update(interactive=turns and not busy),
            at.edit: update(interactive=turns and not busy),
            at.clear: update(interactive=bool(turns or session.clips)),
        }
        return shown if text is None else {**shown, at.text: text}

    def labels(self, session: Session) -> View:
        """Every text of the page in the conversation's language."""
        from gradio import update

        at, w = self.at, session.words
        warning = f'<p class="q2a-warning">{escape(w[self.warning])}</p>' if self.warning else ""
        examples = [
            {"display_text": w[title], "text": w[text] if text else ""}
            for title, text, _ in EXAMPLES
        ]
        return {
            at.heading: f'<h1 lang="{session.language}">Qwen2-Audio</h1>'
            f'<p class="q2a-tagline">{escape(w["tagline"])}</p>'
            f'<span class="q2a-badge">{escape(self.title)}</span>{warning}',
            at.language: next(n for code, n in LANGUAGES.items() if code != session.language),
            at.chatbot: update(value=history(session), placeholder=w["empty"], examples=examples),
            at.text: update(label=w["text"], placeholder=w["text hint"]),
            at.trouble: "".join(
                f'<p role="alert" data-why="{why}">{escape(w[line])}</p>'
                for why, line in NO_MICROPHONE.items()
            ),
            at.send: update(value=w["send"]),
            at.stop: update(value=w["stop"]),
            at.retry: update(value=w["retry"]),
            at.edit: update(value=w["edit"]),
            at.clear: update(value=w["clear"]),
            at.microphone: update(label=w["record"]),
            at.upload: update(label=w["upload"]),
            at.voice: update(label=w["voice"]),
            at.accordion: update(label=w["settings"]),
            at.system: update(label=w["system"], info=w["system hint"]),
            at.temperature: update(label=w["temperature"], info=w["temperature hint"]),
            at.tokens: update(label=w["tokens"]),
            at.seed: update(label=w["seed"], info=w["seed hint"], placeholder=w["by chance"]),
            at.conversation_tab: update(label=w["conversation"]),
            at.inside_tab: update(label=w["inside"]),
            at.look: update(value=w["look"]),
            at.inside_hint: f"<p>{escape(w['inside hint'])}</p>",
        }


def history(session: Session) -> list[dict[str, Any]]:
    """The turns as gradio.Chatbot takes them."""
    from gradio import HTML

    messages: list[dict[str, Any]] = []
    for turn in session.turns:
        cards = [HTML(card(session, clip), render=False) for clip in turn.clips]
        asked = [*cards, escape(turn.text)] if turn.text else cards
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answer(session, turn)})
    return messages


def answer(session: Session, turn: Turn) -> str:
    """What was answered so far, or why there is nothing yet, as HTML."""
    w = session.words
    if turn.answer:
        return escape(turn.answer)  # the page takes it for HTML
    if turn.stopped or session.job is None or not session.busy:
        return f"<em>({w['stopped'] if turn.stopped else w['silent']})</em>"
    place = session.worker.place(session.job)
    return f"<em>{w['in line'].format(place) if place else w['thinking']} …</em>"


def card(session: Session, clip: Clip, remove: bool = False) -> str:
    """One clip, with a button to take it away where it waits to be sent."""
    w = session.words
    facts = w["facts"].format(clip.seconds, clip.audio_tokens)
    button = w["remove"] if remove else ""
    return pictures.clip_card(clip.name, facts, clip.wav, clip.picture, button)


def over(session: Session) -> str:
    """What is worth knowing of the answer that just ended, as HTML."""
    w = session.words
    turn = session.turns[-1] if session.turns else None
    if turn is None or turn.reply is None:
        return ""
    tokens = len(turn.reply.ids)
    parts = [w["took"].format(tokens, sum(turn.reply.seconds.values()))]
    if turn.stopped:
        parts.append(w["stopped"])
    elif turn.reply.finish_reason == "length":
        parts.append(w["cut"].format(tokens))
    return note(" · ".join(parts))


def note(text: str) -> str:
    """A line below the conversation, as HTML."""
    return f'<p class="q2a-note" role="status">{escape(text)}</p>'


def failure(session: Session, error: InputError | str) -> str:
    """What went wrong, as HTML."""
    text = session.words["error"].format(error)
    return f'<p class="q2a-error" role="alert">{escape(text)}</p>'
