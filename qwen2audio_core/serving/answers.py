"""Prompts into the engine, pieces of text out of it: from the event loop and back to it.

The engine calls `_Writing` in its own thread, where ids become text and a stop string ends an
answer before another token is written. What comes of it travels to the event loop as `News`.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qwen2audio_core.assistant import StopWriter, change
from qwen2audio_core.chat import Prompt
from qwen2audio_core.engine import Request
from qwen2audio_core.errors import InputError
from qwen2audio_core.sampling import Settings
from qwen2audio_core.serving.problems import ApiError, caller_left
from qwen2audio_core.serving.service import Service
from qwen2audio_core.tokenizer import Tokenizer


@dataclass(frozen=True)
class News:
    """Something was written, or an answer has ended.

    tokens         places among the answer's ids of those that the text, with what came before,
                   now covers; not of an end token, nor of a stop string
    finish_reason  "" until the answer has ended; then as in Request
    """

    answer: int
    text: str
    tokens: list[int]
    finish_reason: str = ""


class _Writing:
    """One answer, in the engine's thread."""

    def __init__(
        self,
        answer: int,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        ends: tuple[int, ...],
        live: bool,
        post: Callable[[News], None],
    ):
        self._answer, self._ends, self._live, self._post = answer, ends, live, post
        self._writer = StopWriter(tokenizer, stop)
        self._shown = 0  # characters
        self._count = 0  # ids
        self._waiting: list[tuple[int, int, int]] = []  # place, characters before it and with it
        self._text, self._tokens = "", list[int]()  # not posted yet

    def on_token(self, token: int) -> bool:
        before = self._writer.reach
        self._show(self._writer.push(token))
        if token not in self._ends:
            self._waiting.append((self._count, before, self._writer.reach))
        self._count += 1
        self._cover(lambda before, after: after <= self._shown)
        if self._live and self._text:
            self._send()
        return self._writer.stopped

    def on_end(self, request: Request) -> None:
        self._show(self._writer.finish())
        stopped = self._writer.stopped
        self._cover(lambda before, after: before < self._shown or not stopped)
        # A stop string may have come with what the last id left unfinished.
        late = stopped and request.finish_reason == "length"
        self._send("stop" if late else request.finish_reason)

    def _show(self, piece: str) -> None:
        self._text += piece
        self._shown += len(piece)

    def _cover(self, covered: Callable[[int, int], bool]) -> None:
        while self._waiting and covered(*self._waiting[0][1:]):
            self._tokens.append(self._waiting.pop(0)[0])

    def _send(self, reason: str = "") -> None:
        self._post(News(self._answer, self._text, self._tokens, reason))
        self._text, self._tokens = "", []


class Run:
    """Answers to one prompt. On the event loop:

        run = Run(service, changes, ...)
        try:
            await run.begin(make_prompt)
            async for news in run: ...
        finally:
            run.cancel()

    changes   to the checkpoint's settings
    tokens    most of each answer; None for what there is room for, within the server's limit
    fit       take what there is room for also where that is less than `tokens`
    answers   how many, the seeds of the later ones following the first one's
    logprobs  alternatives to each token, None for no log-probabilities
    live      News of every piece, and not only one of each whole answer
    param     the field that a prompt which does not fit came from
    """

    def __init__(
        self,
        service: Service,
        changes: dict[str, Any],
        *,
        tokens: int | None = None,
        fit: bool = False,
        answers: int = 1,
        seed: int | None = None,
        stop: tuple[str, ...] = (),
        logprobs: int | None = None,
        live: bool = False,
        param: str = "messages",
    ):
        self.requests: list[Request] = []
        self.prompt: Prompt
        self._service = service
        self._settings = change(service.assistant.settings, **changes)
        self._tokens, self._fit, self._answers, self._seed = tokens, fit, answers, seed
        self._stop, self._logprobs, self._live, self._param = stop, logprobs, live, param
        self._over = threading.Event()  # nobody waits any more
        self._news: asyncio.Queue[News] = asyncio.Queue()

    async def begin(self, make_prompt: Callable[[], Prompt]) -> None:
        """Encode the prompt and queue the answers, in a thread. Raises ApiError, InputError."""
        loop = asyncio.get_running_loop()
        await self._service.threads(self._begin, make_prompt, loop)

    def _begin(self, make_prompt: Callable[[], Prompt], loop: asyncio.AbstractEventLoop) -> None:
        if self._over.is_set():
            return
        if not self._service.engine.open:
            raise self._service.ended()
        prompt = self.prompt = make_prompt()
        settings = self._fitting(len(prompt.ids), sum(prompt.audio_tokens))
        self._service.metrics.prompt(len(prompt.ids), sum(prompt.audio_tokens))

        def post(news: News) -> None:
            with suppress(RuntimeError):  # the loop has ended, and everybody on it
                loop.call_soon_threadsafe(self._news.put_nowait, news)

        for i in range(self._answers):
            writing = _Writing(
                i,
                self._service.assistant.tokenizer,
                self._stop,
                settings.eos_token_ids,
                self._live,
                post,
            )

            def on_end(request: Request, writing: _Writing = writing) -> None:
                self._service.metrics.answer(request)
                writing.on_end(request)

            try:
                request = self._service.engine.submit(
                    prompt,
                    settings,
                    seed=None if self._seed is None else self._seed + i,
                    on_token=writing.on_token,
                    on_end=on_end,
                    logprobs=self._logprobs,
                )
            except InputError as error:
                if self._service.engine.open:
                    raise
                raise self._service.ended() from error  # meanwhile
            self.requests.append(request)
            if self._over.is_set():  # meanwhile
                self.cancel()
                return

    def _fitting(self, prompt: int, audio: int) -> Settings:
        """The settings, with as many tokens for an answer as there is room for behind a prompt."""
        policy, engine = self._service.policy, self._service.engine
        room = engine.max_tokens - prompt
        wanted = None if self._fit else self._tokens
        if room < (wanted or 1):
            end = ": send less"
            if wanted:
                end = f" and {wanted:,} for the answer: send less, or ask for fewer"
            raise self.too_long(f"the prompt has {prompt:,}, {audio:,} of them for audio{end}")
        tokens = min(room, self._tokens or policy.answer_tokens)
        least = min(self._settings.min_new_tokens, tokens)
        return change(self._settings, max_new_tokens=tokens, min_new_tokens=least)

    def too_long(self, found: str) -> ApiError:
        """The error for what does not fit."""
        return ApiError(
            400,
            f"the context holds {self._service.engine.max_tokens:,} tokens, {found}",
            param=self._param,
            code="context_length_exceeded",
        )

    def check(self) -> None:
        """Go no further for a caller who no longer waits. For the thread that makes the prompt."""
        if self._over.is_set():
            raise caller_left()

    async def __aiter__(self) -> AsyncIterator[News]:
        """News until all answers have ended. Raises what ended one of them."""
        running = len(self.requests)
        while running:
            news = await self._news.get()
            if news.finish_reason == "error":
                error = self.requests[news.answer].error
                assert error is not None
                raise error
            if news.finish_reason == "cancelled":  # by the engine, which has been closed
                raise self._service.ended()
            running -= bool(news.finish_reason)
            yield news

    def cancel(self) -> None:
        """Free the slots of what is not finished yet. Any number of times, at any moment."""
        self._over.set()
        for request in list(self.requests):
            if not request.finish_reason:
                request.cancel()

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens so far, in OpenAI's form."""
        prompt, audio = len(self.prompt.ids), sum(self.prompt.audio_tokens)
        written = sum(len(request.ids) for request in self.requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {
                "audio_tokens": audio,
                "cached_tokens": self.requests[0].reused,
            },
            "completion_tokens_details": {"audio_tokens": 0, "reasoning_tokens": 0},
        }
