"""JSON bodies and forms to what is wanted. Every field is used, refused, or named as ignored here.

A field that this server cannot honour is an error where it asks for something, and nothing where it
asks for what happens anyway: `"tools": []`, `"frequency_penalty": 0`. Fields that only inform the
server (IGNORED) are not looked at. null is the same as no field.
"""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen2audio_core.serving.policy import Policy
from qwen2audio_core.serving.problems import ApiError
from qwen2audio_core.slots import MAX_TOP

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
IGNORED = (
    *("user", "safety_identifier", "metadata", "service_tier", "prompt_cache_key"),
    *("prompt_cache_retention", "parallel_tool_calls", "prediction"),
)
IGNORED_IN_PARTS = ("cache_control",)
# Field -> the values that ask for nothing.
IDLE: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "min_p": (0,),
}
MAX_STOPS = 16
MAX_STOP = 1000  # characters of one; whether one begins is looked for at every token
MAX_PARTS = 10_000  # of all messages
FORMATS = ("json", "text", "srt", "vtt", "verbose_json")


@dataclass(frozen=True)
class Clip:
    """Sound in a request."""

    source: bytes | str  # the file itself, or a URL
    where: str  # its field


@dataclass(frozen=True)
class ChatRequest:
    """A body of /v1/chat/completions.

    messages      as chat.encode takes them, {"type": "audio", "audio": Clip} for sound
    changes       to the checkpoint's settings
    tokens        most of each answer, where it says
    logprobs      alternatives to each token, None for no log-probabilities
    usage         whether a stream ends with the count of tokens
    """

    model: str
    messages: list[dict[str, Any]]
    changes: dict[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    answers: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    stream: bool = False
    usage: bool = False

    @property
    def clips(self) -> list[Clip]:
        """All sound, in order."""
        return [item["audio"] for item in self._items if item["type"] == "audio"]

    @property
    def texts(self) -> list[str]:
        """All text."""
        whole = [message["content"] for message in self.messages]
        parts = [item["text"] for item in self._items if item["type"] == "text"]
        return [content for content in whole if isinstance(content, str)] + parts

    @property
    def _items(self) -> list[dict[str, Any]]:
        contents = [message["content"] for message in self.messages]
        return [item for content in contents if isinstance(content, list) for item in content]


@dataclass(frozen=True)
class SpeechRequest:
    """A form of /v1/audio/transcriptions or /v1/audio/translations, but for its file."""

    model: str
    format: str = "json"
    language: str | None = None
    prompt: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None


class _Fields:
    """An object read field by field."""

    def __init__(self, content: Mapping[str, Any], prefix: str = ""):
        self._left = {key: value for key, value in content.items() if value is not None}
        self._prefix = prefix

    def wrong(self, name: str, expected: str, value: Any) -> ApiError:
        shown = json.dumps(value, ensure_ascii=False, default=str)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return bad(self._prefix + name, f"is {shown}, expected {expected}")

    def take(self, name: str) -> Any:
        return self._left.pop(name, None)

    def text(self, name: str, required: bool = False) -> str | None:
        value = self.take(name)
        if value is None and required:
            raise bad(self._prefix + name, "is missing")
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a text", value)
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return bool(value)

    def whole(self, name: str, least: int, most: int) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"a whole number from {least:,} to {most:,}", value)
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not least <= value <= most:
            raise self.wrong(name, f"a number from {least:g} to {most:g}", value)
        return float(value)

    def end(self, ignored: Sequence[str] = ()) -> None:
        """Refuse what is left."""
        for name in self._left:
            if name not in ignored:
                raise bad(self._prefix + name, "is not a field that this server knows")


def bad(param: str, message: str, code: str | None = None) -> ApiError:
    return ApiError(400, f"{param} {message}", param=param, code=code)


def parse_chat(body: bytes, policy: Policy) -> ChatRequest:
    """Read a body of /v1/chat/completions. Raises ApiError."""
    fields = _Fields(_object(body))
    model = _model(fields, policy)
    messages = _messages(fields.take("messages"))
    answers = fields.whole("n", 1, policy.answers) or 1
    tokens = [
        fields.whole(name, 1, policy.answer_tokens)
        for name in ("max_completion_tokens", "max_tokens")
    ]
    if None not in tokens and tokens[0] != tokens[1]:
        raise bad("max_tokens", "and max_completion_tokens differ: give one of them")
    changes = _drawing(fields)
    changes["repetition_penalty"] = fields.number("repetition_penalty", 0.01, 100)
    changes["min_new_tokens"] = fields.whole("min_tokens", 0, policy.answer_tokens)
    most, least = tokens[0] or tokens[1], changes["min_new_tokens"]
    if most and least and least > most:
        raise bad("min_tokens", f"is {least:,}, more than the {most:,} an answer may have")
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MAX_TOP)
    if top and not wanted:
        raise bad("top_logprobs", "needs logprobs to be true")
    stream = fields.flag("stream")
    options = fields.take("stream_options")
    usage = False
    if options is not None:
        if not isinstance(options, dict):
            raise fields.wrong("stream_options", "an object", options)
        if not stream:
            raise bad("stream_options", "is only for streams: set stream to true")
        inner = _Fields(options, "stream_options.")
        usage = inner.flag("include_usage")
        inner.end(ignored=("include_obfuscation",))
    request = ChatRequest(
        model,
        messages,
        changes,
        most,
        answers,
        _seed(fields),
        _stop(fields),
        (top or 0) if wanted else None,
        stream,
        usage,
    )
    for name, idle in IDLE.items():
        value = fields.take(name)
        if value is not None and value not in idle:
            raise bad(name, "is not supported by this server", "unsupported_parameter")
    fields.end(IGNORED)
    if len(request.clips) > policy.clips:
        raise bad("messages", f"hold {len(request.clips)} clips, at most {policy.clips} are taken")
    return request


def parse_speech(form: Mapping[str, Sequence[str]], policy: Policy) -> SpeechRequest:
    """Read the text fields of a form, each a list of its values. Raises ApiError."""
    several = {"timestamp_granularities[]", "timestamp_granularities", "include[]", "include"}
    given: dict[str, Any] = {}
    for name, values in form.items():
        if name not in several and len(values) > 1:
            raise bad(name, "is given twice")
        given[name] = list(values) if name in several else (values[0] or None)
    for name, kind in (("temperature", float), ("top_p", float), ("repetition_penalty", float)):
        given[name] = _converted(given, name, kind)
    for name in ("seed", "top_k"):
        given[name] = _converted(given, name, int)
    fields = _Fields(given)
    model = _model(fields, policy)
    shape = fields.text("response_format") or "json"
    if shape not in FORMATS:
        raise fields.wrong("response_format", f"one of {', '.join(FORMATS)}", shape)
    for name in ("timestamp_granularities[]", "timestamp_granularities"):
        if set(fields.take(name) or ()) - {"segment"}:
            raise bad(name, "can only be segment, this server gives no times of words")
    for name in ("include[]", "include"):
        if fields.take(name):
            raise bad(name, "is not supported by this server", "unsupported_parameter")
    for name, idle in (("stream", "false"), ("chunking_strategy", "auto")):
        if fields.take(name) not in (None, idle):
            raise bad(name, f"can only be {idle} on this server", "unsupported_parameter")
    changes = _drawing(fields)
    changes["repetition_penalty"] = fields.number("repetition_penalty", 0.01, 100)
    if not {name for name, value in changes.items() if value is not None} & {
        *("greedy", "temperature", "top_k", "top_p")
    }:
        changes["greedy"] = True
    request = SpeechRequest(
        model,
        shape,
        fields.text("language"),
        fields.text("prompt"),
        changes,
        _seed(fields),
    )
    fields.end(IGNORED)
    return request


def _converted(given: Mapping[str, Any], name: str, kind: type) -> Any:
    """A number out of a form's text; the text itself where it is none, to be refused as such."""
    try:
        return None if given.get(name) is None else kind(given[name])
    except ValueError:
        return given[name]


def _object(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        known = {RecursionError: "it is nested too deeply", UnicodeDecodeError: "it is not UTF-8"}
        why = known.get(type(error), str(error))
        raise ApiError(400, f"the body is not JSON: {why}") from error
    if not isinstance(content, dict):
        raise ApiError(400, f"the body is a JSON {type(content).__name__}, expected an object")
    return content


def _model(fields: _Fields, policy: Policy) -> str:
    name = fields.text("model", required=True)
    if name != policy.name:
        raise ApiError(
            404,
            f"there is no model {name!r} here, this server has {policy.name!r}",
            param="model",
            code="model_not_found",
        )
    return policy.name


def _drawing(fields: _Fields) -> dict[str, Any]:
    """Temperature 0 is greedy, and then it does not matter what it would be drawn from."""
    drawing = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.whole("top_k", -1, 2**31),
    }
    if drawing["top_k"] == -1:  # what vLLM calls all of them
        drawing["top_k"] = 0
    if drawing["temperature"] is not None and drawing["temperature"] < 1e-4:
        return {"greedy": True}
    if drawing["top_p"] == 0:  # what is left of the likeliest is always one
        drawing["top_p"] = 1e-9
    return drawing


def _seed(fields: _Fields) -> int | None:
    seed = fields.whole("seed", -(2**63), 2**63 - 1)
    return None if seed is None else seed % 2**62  # room for the seeds of further answers


def _stop(fields: _Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    good = isinstance(stops, list) and all(isinstance(stop, str) and stop for stop in stops)
    if not good or len(stops) > MAX_STOPS or max(map(len, stops), default=0) > MAX_STOP:
        expected = f"a text or up to {MAX_STOPS} of them, each of 1 to {MAX_STOP:,} characters"
        raise fields.wrong("stop", expected, value)
    return tuple(stops)


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise bad("messages", 'must be a list such as [{"role": "user", "content": "Hello"}]')
    given = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = sum(len(content) if isinstance(content, list) else 1 for content in given)
    if parts > MAX_PARTS:
        raise bad("messages", f"hold {parts:,} parts, at most {MAX_PARTS:,} are taken")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise bad(where, "must be an object with role and content")
    fields = _Fields(message, where + ".")
    role = fields.text("role", required=True)
    if role not in ROLES:
        raise fields.wrong("role", f"one of {', '.join(ROLES)}", role)
    content = fields.take("content")
    # What an answer of a server carries along when it is sent back as it came.
    for name in ("tool_calls", "annotations"):
        if fields.take(name):
            raise bad(f"{where}.{name}", "is not supported by this server", "unsupported_parameter")
    fields.end(ignored=("name",))
    if isinstance(content, str):
        return {"role": ROLES[role], "content": content}
    if not isinstance(content, list) or not content:
        raise bad(f"{where}.content", "must be a text or a list of parts")
    parts = [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    return {"role": ROLES[role], "content": parts}


def _part(part: Any, where: str) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise bad(where, "must be an object with a type")
    fields = _Fields(part, where + ".")
    kind = fields.text("type", required=True)
    if kind == "text":
        text = fields.text("text", required=True)
        fields.end(IGNORED_IN_PARTS)
        return {"type": "text", "text": text}
    if kind not in ("input_audio", "audio_url"):
        raise fields.wrong("type", "text, input_audio or audio_url", kind)
    value = fields.take(kind)
    fields.end(IGNORED_IN_PARTS)
    inner = where + "." + kind
    if isinstance(value, str) and kind == "audio_url":
        value = {"url": value}
    if not isinstance(value, dict):
        raise bad(inner, "is missing or not an object")
    source = (_inline if kind == "input_audio" else _linked)(_Fields(value, inner + "."))
    return {"type": "audio", "audio": Clip(source, inner)}


def _inline(fields: _Fields) -> bytes | str:
    data = fields.text("data", required=True) or ""
    fields.text("format")  # only a hint: the bytes themselves tell what they are
    fields.end()
    if data[:5].lower() == "data:":
        return data
    try:
        letters = data.encode("ascii").translate(None, b" \t\r\n")
        return base64.b64decode(letters, validate=True)
    except (binascii.Error, ValueError) as error:
        raise fields.wrong("data", f"base64 ({error})", data) from error


def _linked(fields: _Fields) -> str:
    url = fields.text("url", required=True) or ""
    fields.end()
    if url.partition(":")[0].lower() not in ("http", "https", "data", "file"):
        raise fields.wrong("url", "an http, https, data or file URL", url)
    return url
