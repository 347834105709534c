"""/v1/audio/transcriptions and /v1/audio/translations: a recording of any length to text."""

import asyncio
from typing import Any, BinaryIO

from torch import Tensor

from qwen2audio_core import audio, transcribe
from qwen2audio_core.assistant import Reply, change
from qwen2audio_core.errors import AudioError, InputError
from qwen2audio_core.frontend import SAMPLE_RATE
from qwen2audio_core.serving import sources
from qwen2audio_core.serving.answers import Run
from qwen2audio_core.serving.problems import ApiError
from qwen2audio_core.serving.requests import SpeechRequest
from qwen2audio_core.serving.service import Service, Ticket
from qwen2audio_core.transcribe import Scribe, Segment, Transcript

KINDS = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}


class Recording:
    """One request: `await recording.answer(file, name)`.

    translate  into English, instead of writing down what is said
    """

    def __init__(self, service: Service, request: SpeechRequest, ticket: Ticket, translate: bool):
        self._service, self._request, self._ticket = service, request, ticket
        self._translate = translate
        tokenizer = service.assistant.tokenizer
        try:
            self._scribe = Scribe(tokenizer, request.language, request.prompt, translate)
        except InputError as error:
            raise ApiError(400, str(error), param="language") from error
        settings = change(service.assistant.settings, **request.changes)
        self._temperature = settings.temperature if settings.do_sample else 0.0
        self._tokens = min(settings.max_new_tokens, service.policy.answer_tokens)
        self.notices: list[str] = []  # where words may be missing

    async def answer(self, file: BinaryIO, name: str) -> dict[str, Any] | str:
        """The transcript in the form that was asked for. Raises ApiError or InputError.

        name  of the file, for messages
        """
        windows = await self._service.threads(self._decode, file, name)
        # Of many windows some at a time: a long recording leaves slots to others.
        places = asyncio.Semaphore(max(1, self._service.engine.max_batch // 2))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._window(window, places)) for window in windows]
        segments = [task.result() for task in tasks]
        self.notices = [
            transcribe.cut_notice(segment, name)
            for segment in segments
            if segment.finish_reason == "length"
        ]
        return self._format(transcribe.joined(segments))

    def _decode(self, file: BinaryIO, name: str) -> list[audio.Piece]:
        policy = self._service.policy
        waveform: Tensor = sources.waveform(file, "file", policy, policy.audio_seconds, name)
        self._ticket.take(waveform.nbytes)
        self._service.metrics.sound(len(waveform) / SAMPLE_RATE)
        try:
            return transcribe.windows(waveform, name)
        except AudioError as error:
            raise ApiError(400, str(error), param="file", code="invalid_audio") from error

    async def _window(self, window: audio.Piece, places: asyncio.Semaphore) -> Segment:
        async with places:
            run = Run(
                self._service,
                self._request.changes,
                tokens=self._tokens,
                fit=True,  # a window that is cut is told of
                param="file",
                seed=self._request.seed,
                logprobs=0 if self._request.format == "verbose_json" else None,
            )
            try:
                await run.begin(lambda: self._scribe.prompt(window))
                text = "".join([news.text async for news in run])
            finally:
                run.cancel()
        request = run.requests[0]
        reply = Reply(
            run.prompt, text, request.ids, request.finish_reason, logprobs=request.logprobs
        )
        return self._scribe.segment(window, reply)

    def _format(self, transcript: Transcript) -> dict[str, Any] | str:
        shape = self._request.format
        if shape == "text":
            return transcript.text + "\n"
        if shape in ("srt", "vtt"):
            return transcribe.FORMATS[shape](transcript)
        body: dict[str, Any] = {"text": transcript.text}
        if shape == "verbose_json":
            body |= {
                "task": "translate" if self._translate else "transcribe",
                "language": transcript.language or "",
                "duration": transcript.duration,
                "segments": [
                    self._segment(i, segment) for i, segment in enumerate(transcript.segments)
                ],
            }
        body["usage"] = {"type": "duration", "seconds": round(transcript.duration, 3)}
        return body | ({"notices": self.notices} if self.notices else {})

    def _segment(self, number: int, segment: Segment) -> dict[str, Any]:
        return {
            "id": number,
            "seek": round(segment.start * 100),  # frames of 10 ms, as Whisper's
            "start": round(segment.start, 3),
            "end": round(segment.end, 3),
            "text": segment.text,
            "tokens": segment.ids,
            "temperature": self._temperature,
            "avg_logprob": segment.avg_logprob or 0.0,
            "compression_ratio": segment.compression_ratio,
            "no_speech_prob": 0.0,  # this model gives none, and clients want a number
            "language": segment.language,
            "finish_reason": segment.finish_reason,
        }
