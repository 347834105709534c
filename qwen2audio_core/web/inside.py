"""The tab that opens the last answer: what was written, how surely, and what else was likely."""

import math
from html import escape

from qwen2audio_core.tokenizer import Tokenizer
from qwen2audio_core.web.sessions import Session


def tokens(session: Session) -> str:
    """The tokens of the last answer with their probabilities and alternatives, as HTML."""
    turn = session.turns[-1] if session.turns else None
    if turn is None or turn.reply is None or not turn.reply.logprobs:
        return f"<p>{escape(session.words['no answer'])}</p>"
    tokenizer, reply = session.assistant.tokenizer, turn.reply
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
    return f'<div class="q2a-tokens">{"".join(shown)}</div>'


def piece(tokenizer: Tokenizer, token: int) -> str:
    """A token's text as HTML, with spaces and line ends that can be seen."""
    text = tokenizer.bytes_of(token, skip_special=False).decode("utf-8", "replace")
    return "<b>" + escape(text.replace(" ", "␣").replace("\n", "⏎")) + "</b>"
