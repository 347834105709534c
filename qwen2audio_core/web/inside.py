"""The tab that opens the last answer.

tokens   at once: what was read, what was written, how surely, and what else was likely
inspect  on request, for it takes a while: the report of `qwen2audio inspect`
"""

import math
from collections.abc import Sequence
from html import escape
from itertools import groupby

from qwen2audio_core.errors import InputError
from qwen2audio_core.inspection import collect, report
from qwen2audio_core.layout import Layout
from qwen2audio_core.tokenizer import Tokenizer
from qwen2audio_core.web.sessions import Session
from qwen2audio_core.web.worker import Job


class Look:
    """A report in the making."""

    def __init__(self) -> None:
        self.stage = ""
        self.part = 0.0  # of the whole
        self.page = ""  # once it is done: one HTML file that needs nothing else
        self.job: Job | None = None


class _Stopped(InputError):
    """Nobody waits for the report any more."""


def inspect(session: Session) -> Look:
    """Look closely at the last answer, in the worker's thread. InputError: there is none."""
    turn = session.turns[-1] if session.turns else None
    if session.busy:
        raise InputError(session.words["still answering"])
    if turn is None or turn.reply is None or not turn.reply.ids:
        raise InputError(session.words["no answer"])
    look, reply = Look(), turn.reply

    def work(job: Job) -> None:
        def progress(stage: str, part: float) -> None:
            if job.stopped:
                raise _Stopped
            look.stage, look.part = stage, part

        seen = collect.look(
            session.assistant,
            reply.prompt,
            reply.ids,
            question=turn.text,
            text=turn.answer,
            finish_reason=reply.finish_reason,
            on_progress=progress,
        )
        look.page = report.to_html(seen)

    look.job = session.look = session.worker.submit(work)
    return look


def frame(page: str) -> str:
    """The report within the page, as HTML. It may draw and play, and reaches nothing else."""
    return f'<iframe sandbox="allow-scripts" srcdoc="{escape(page)}" title="inspection"></iframe>'


def tokens(session: Session) -> str:
    """The tokens of the last answer with their probabilities and alternatives, as HTML."""
    w = session.words
    turn = session.turns[-1] if session.turns else None
    if turn is None or turn.reply is None or not turn.reply.logprobs:
        return f"<p>{escape(w['no answer'])}</p>"
    tokenizer, reply = session.assistant.tokenizer, turn.reply
    read = prompt(Layout.of(reply.prompt.ids, tokenizer))
    legend = "".join(
        f'<span class="q2a-{kind}">{escape(w[name])}</span>' for kind, name in KINDS.items()
    )
    shown, taken = [], ' class="q2a-taken"'
    for token, likelihood in zip(reply.ids, reply.logprobs, strict=False):  # one may be under way
        others = "".join(
            f"<li{taken if other == token else ''}>{piece(tokenizer, other)}"
            f"<span>{math.exp(logprob):.1%}</span></li>"
            for other, logprob in likelihood.top
        )
        sure = math.exp(likelihood.logprob)
        shown.append(
            f'<span class="q2a-token" tabindex="0" style="--sure:{sure:.3f}">'
            f"{piece(tokenizer, token)}<small>{sure:.0%}</small><ol>{others}</ol></span>"
        )
    return (
        f'<div class="q2a-legend">{legend}</div><div class="q2a-prompt">{read}</div>'
        f'<div class="q2a-tokens">{"".join(shown)}</div>'
    )


KINDS = {  # kind in a layout, and the name of its name
    "template": "kind template",
    "system": "kind system",
    "text": "kind text",
    "audio": "kind audio",
    "answer": "kind answer",
}


def prompt(layout: Layout) -> str:
    """What was read, coloured by kind; of a clip's tokens only the number."""
    parts: Sequence[tuple[str, str]] = list(zip(layout.kinds, layout.pieces, strict=True))
    shown = []
    for kind, run in groupby(parts, key=lambda part: part[0]):
        pieces = [text for _, text in run]
        sound = kind.startswith("audio")
        text = f"{kind}: {len(pieces)}" if sound else "".join(pieces).replace("\n", "⏎\n")
        shown.append(f'<span class="q2a-{"audio" if sound else kind}">{escape(text)}</span>')
    return "".join(shown)


def piece(tokenizer: Tokenizer, token: int) -> str:
    """A token's text as HTML, with spaces and line ends that can be seen."""
    text = tokenizer.bytes_of(token, skip_special=False).decode("utf-8", "replace")
    return "<b>" + escape(text.replace(" ", "␣").replace("\n", "⏎")) + "</b>"
