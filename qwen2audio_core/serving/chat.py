"""/v1/chat/completions: a conversation with clips in, answers out, whole or in pieces."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from qwen2audio_core import __version__
from qwen2audio_core.chat import Prompt, encode
from qwen2audio_core.frontend import SAMPLE_RATE
from qwen2audio_core.sampling import Likelihood
from qwen2audio_core.serving import sources
from qwen2audio_core.serving.answers import News, Run
from qwen2audio_core.serving.requests import ChatRequest, Clip
from qwen2audio_core.serving.service import Service, Ticket

LOWEST = -9999.0  # what OpenAI writes for a logarithm of 0, which JSON cannot


class Completion:
    """One request, from its parsed body to its answers.

    completion = Completion(service, request, ticket)
    try:
        await completion.begin()
        body = await completion.whole()            or
        async for chunk in completion.chunks(): ...
    finally:
        completion.run.cancel()
    """

    def __init__(self, service: Service, request: ChatRequest, ticket: Ticket):
        self.run = Run(
            service,
            request.changes,
            tokens=request.tokens,
            answers=request.answers,
            seed=request.seed,
            stop=request.stop,
            logprobs=request.logprobs,
            live=request.stream,
        )
        self._service = service
        self._request = request
        self._ticket = ticket
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": f"qwen2audio-{__version__}",
        }

    async def begin(self) -> None:
        """Fetch, decode, encode and queue. Raises ApiError or InputError."""
        clips = await sources.download(self._request.clips, self._service.policy)
        for clip in clips:
            self._ticket.take(len(clip.source))
        await self.run.begin(lambda: self._prompt(clips))

    def _prompt(self, clips: list[Clip]) -> Prompt:
        self._check_texts()
        waveforms = sources.decode(clips, self._service.policy)
        for waveform in waveforms:
            self._ticket.take(waveform.nbytes)
            self._service.metrics.sound(len(waveform) / SAMPLE_RATE)
        left = iter(waveforms)

        def item(one: dict[str, Any]) -> dict[str, Any]:
            if one["type"] != "audio":
                return one
            return {"type": "audio", "audio": next(left), "sampling_rate": SAMPLE_RATE}

        def content(given: Any) -> Any:
            return given if isinstance(given, str) else [item(one) for one in given]

        messages = [
            {"role": message["role"], "content": content(message["content"])}
            for message in self._request.messages
        ]
        self.run.check()
        return encode(messages, self._service.assistant.tokenizer)

    def _check_texts(self) -> None:
        size = sum(map(len, self._request.texts))
        if size > self._service.most_text:
            raise self.run.too_long(f"the prompt has {size:,} characters: send less")

    async def whole(self) -> dict[str, Any]:
        """All answers, in one object."""
        ended: dict[int, News] = {}
        async for news in self.run:
            ended[news.answer] = news  # a run that is not live has one for each answer
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(ended[i]) for i in range(self._request.answers)],
            "usage": self.run.usage,
            **self._notices(),
        }

    def _choice(self, news: News) -> dict[str, Any]:
        return {
            "index": news.answer,
            "message": {"role": "assistant", "content": news.text, "refusal": None},
            "logprobs": self._logprobs(news),
            "finish_reason": news.finish_reason,
        }

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The same in pieces: the role, texts, the reason of the end; then the usage, if wanted."""
        head = {**self._head, "object": "chat.completion.chunk"}
        usage = {"usage": None} if self._request.usage else {}

        def chunk(
            answer: int, delta: dict[str, str], logprobs: Any = None, reason: str | None = None
        ) -> dict[str, Any]:
            choice = {
                "index": answer,
                "delta": delta,
                "logprobs": logprobs,
                "finish_reason": reason,
            }
            return {**head, "choices": [choice], **usage}

        for i in range(self._request.answers):
            yield {**chunk(i, {"role": "assistant", "content": ""}), **self._notices()}
        async for news in self.run:
            if news.text or (news.tokens and self._request.logprobs is not None):
                yield chunk(news.answer, {"content": news.text}, self._logprobs(news))
            if news.finish_reason:
                yield chunk(news.answer, {}, None, news.finish_reason)
        if self._request.usage:
            yield {**head, "choices": [], "usage": self.run.usage}

    def _notices(self) -> dict[str, list[str]]:
        """What a person should know, such as where a long clip was split. OpenAI has no such."""
        notices = self.run.prompt.notices
        return {"notices": notices} if notices else {}

    def _logprobs(self, news: News) -> dict[str, Any] | None:
        if self._request.logprobs is None:
            return None
        request = self.run.requests[news.answer]
        content = [self._token(request.ids[i], request.logprobs[i]) for i in news.tokens]
        return {"content": content, "refusal": None}

    def _token(self, token: int, likelihood: Likelihood) -> dict[str, Any]:
        top = [self._named(other, logprob) for other, logprob in likelihood.top]
        return {**self._named(token, likelihood.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._service.assistant.tokenizer.bytes_of(token, skip_special=False)
        return {
            "token": text.decode("utf-8", "replace"),
            "logprob": max(logprob, LOWEST),
            "bytes": list(text),
        }
