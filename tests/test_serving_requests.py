"""Bodies and forms: every field used, refused, or ignored because the documents say so."""

import base64
import json
import math

import pytest

from qwen2audio_core.errors import CheckpointError, InputError
from qwen2audio_core.serving import requests
from qwen2audio_core.serving.policy import Policy
from qwen2audio_core.serving.problems import ApiError, problem
from qwen2audio_core.serving.requests import Clip, parse_chat, parse_speech

POLICY = Policy("tiny", clips=2, answers=4, answer_tokens=100)
TEXT = {"type": "text", "text": "x"}
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


def parse(**fields):
    return parse_chat(json.dumps(ASK | fields).encode(), POLICY)


def part(**fields):
    return parse(messages=[{"role": "user", "content": [fields]}])


def refused(message, param=..., call=parse, status=400, **fields):
    with pytest.raises(ApiError) as caught:
        call(**fields)
    error = caught.value
    assert message in str(error) and "\n" not in str(error) and len(str(error)) < 300
    assert error.status == status
    if param is not ...:
        assert error.body["error"]["param"] == param


def test_what_is_asked_for():
    plain = parse()
    assert plain.messages == ASK["messages"] and plain.clips == []
    assert (plain.answers, plain.tokens, plain.seed, plain.stop) == (1, None, None, ())
    assert (plain.logprobs, plain.stream, plain.usage) == (None, False, False)
    assert set(plain.changes.values()) == {None}
    full = parse(
        n=3,
        seed=7,
        stop=["a", "b"],
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
        logprobs=True,
        top_logprobs=5,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        max_completion_tokens=20,
        min_tokens=3,
        repetition_penalty=1.2,
    )
    assert (full.answers, full.tokens, full.seed, full.stop) == (3, 20, 7, ("a", "b"))
    assert (full.logprobs, full.stream, full.usage) == (5, True, True)
    assert full.changes == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "min_new_tokens": 3,
        "repetition_penalty": 1.2,
    }
    assert parse(max_tokens=9).tokens == parse(max_tokens=9, max_completion_tokens=9).tokens == 9
    assert parse(logprobs=True).logprobs == 0 and parse(logprobs=False).logprobs is None
    assert parse(stop="x").stop == ("x",) and parse(stop=None).stop == ()
    greedy = parse(temperature=0, top_p=0.3, top_k=5).changes
    assert greedy["greedy"] is True and not {"top_p", "top_k", "temperature"} & set(greedy)
    assert parse(top_p=0).changes["top_p"] > 0 and parse(top_k=-1).changes["top_k"] == 0
    assert 0 <= parse(seed=-5).seed < 2**62


@pytest.mark.parametrize("name", requests.IGNORED)
def test_fields_that_only_inform_are_ignored(name):
    assert parse(**{name: {"anything": 1}}) == parse()


@pytest.mark.parametrize("name", requests.IDLE)
def test_what_is_not_supported_is_refused_unless_it_asks_for_nothing(name):
    for idle in (None, *requests.IDLE[name]):
        assert parse(**{name: idle}) == parse()
    refused(f"{name} is not supported", name, **{name: ["something"]})


def test_fields_that_nobody_knows():
    refused("maxtokens is not a field", "maxtokens", maxtokens=3)
    refused("stream_options.colour", "stream_options.colour", stream=True,
            stream_options={"colour": 1})  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": None}, "model is missing"),
        ({"model": 3}, "model is 3, expected a text"),
        ({"n": 0}, "n is 0, expected a whole number from 1 to 4"),
        ({"n": 5}, "n is 5"),
        ({"n": 1.0}, "n is 1.0"),
        ({"n": True}, "n is true"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 101}, "max_tokens is 101, expected a whole number from 1 to 100"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "differ"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens is 9, more than the 5"),
        ({"temperature": 2.1}, "temperature is 2.1, expected a number from 0 to 2"),
        ({"temperature": "1"}, 'temperature is "1"'),
        ({"temperature": float("nan")}, "temperature is NaN"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"seed": 2**63}, "seed is"),
        ({"seed": "x" * 500}, "seed is"),
        ({"stop": ["a", ""]}, "each of 1 to 1,000 characters"),
        ({"stop": "", "n": 1}, "each of 1 to 1,000 characters"),
        ({"stop": ["a", "b" * 1001]}, "each of 1 to 1,000 characters"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"top_p": -(10**400)}, "top_p is -1000"),
        ({"top_k": -2}, "top_k is -2"),
        ({"messages": [{"role": "user", "content": [TEXT] * 5001}] * 2}, "hold 10,002 parts"),
        ({"stop": ["a"] * 17}, "up to 16"),
        ({"stop": {"a": 1}}, "stop is"),
        ({"logprobs": 3}, "logprobs is 3, expected true or false"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21"),
        ({"stream": "yes"}, "stream is"),
        ({"stream_options": {"include_usage": True}}, "only for streams"),
        ({"stream": True, "stream_options": []}, "stream_options is []"),
        ({"messages": None}, "messages must be a list"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": ["Hello"]}, "messages[0] must be an object"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 'messages[0].role is "tool"'),
        ({"messages": [{"role": "user"}]}, "messages[0].content must be"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content must be"),
        ({"messages": [{"role": "user", "content": "x", "audio": {}}]}, "messages[0].audio is not"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls is not supported",
        ),
    ],
)  # fmt: skip
def test_wrong_fields(fields, message):
    refused(message, **fields)


def test_another_model():
    refused("no model 'gpt' here, this server has 'tiny'", "model", status=404, model="gpt")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"\xff" * 4, "not JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "a JSON list"),
        (b'"text"', "a JSON str"),
        (b"null", "a JSON NoneType"),
    ],
)
def test_bodies_that_are_no_objects(body, message):
    with pytest.raises(ApiError, match=message):
        parse_chat(body, POLICY)


def test_parts():
    data = base64.b64encode(b"RIFF").decode()
    url = "https://sound.test/a.wav"
    for fields, source in (
        ({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}, b"RIFF"),
        ({"type": "input_audio", "input_audio": {"data": data}}, b"RIFF"),
        ({"type": "input_audio", "input_audio": {"data": f"{data[:4]}\r\n{data[4:]}\n"}}, b"RIFF"),
        ({"type": "audio_url", "audio_url": url, "cache_control": {"type": "ephemeral"}}, url),
        ({"type": "input_audio", "input_audio": {"data": "data:,x"}}, "data:,x"),
        ({"type": "audio_url", "audio_url": {"url": url}}, url),
        ({"type": "audio_url", "audio_url": url}, url),
        ({"type": "audio_url", "audio_url": "FILE:///x"}, "FILE:///x"),
    ):
        kind = fields["type"]
        assert part(**fields).clips == [Clip(source, f"messages[0].content[0].{kind}")]
    assert part(type="text", text="x").messages[0]["content"] == [{"type": "text", "text": "x"}]
    both = [{"type": "audio_url", "audio_url": url}] * 2
    turns = [{"role": "user", "content": both[:1]}, {"role": "user", "content": both}]
    assert len(parse(messages=turns[1:]).clips) == 2
    refused("messages hold 3 clips, at most 2", "messages", messages=turns)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "x"}, "[0].type is missing"),
        (
            {"type": "image_url", "image_url": {"url": "x"}},
            '[0].type is "image_url", expected text',
        ),
        ({"type": "text"}, "[0].text is missing"),
        ({"type": "text", "text": 3}, "[0].text is 3"),
        ({"type": "text", "text": "x", "input_audio": {}}, "[0].input_audio is not a field"),
        ({"type": "input_audio"}, "[0].input_audio is missing or not an object"),
        ({"type": "input_audio", "input_audio": "x"}, "[0].input_audio is missing or not"),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, "input_audio.data is missing"),
        ({"type": "input_audio", "input_audio": {"data": "?" * 999}}, "expected base64"),
        ({"type": "input_audio", "input_audio": {"data": "AA\n="}}, "expected base64"),
        ({"type": "input_audio", "input_audio": {"data": "AAé="}}, "expected base64"),
        ({"type": "input_audio", "input_audio": {"data": "", "id": 1}}, "input_audio.id is not a"),
        ({"type": "audio_url", "audio_url": {}}, "audio_url.url is missing"),
        ({"type": "audio_url", "audio_url": {"url": "ftp://x"}}, "http, https, data or file URL"),
        ({"type": "audio_url", "audio_url": {"url": "/etc/passwd"}}, "http, https, data or file"),
        ({"type": "audio_url", "audio_url": {"url": ["x"]}}, "audio_url.url is"),
    ],
)
def test_wrong_parts(fields, message):
    refused(message, call=part, **fields)
    with pytest.raises(ApiError, match="must be an object with a type"):
        parse(messages=[{"role": "user", "content": ["text"]}])


def test_forms():
    plain = parse_speech({"model": ["tiny"]}, POLICY)
    assert (plain.format, plain.language, plain.prompt) == ("json", None, None)
    assert plain.changes["greedy"] is True
    full = parse_speech(
        {
            "model": ["tiny"],
            "response_format": ["srt"],
            "language": ["en"],
            "prompt": ["Write:"],
            "temperature": ["0.5"],
            "seed": ["3"],
            "repetition_penalty": ["1.1"],
            "timestamp_granularities[]": ["segment"],
            "chunking_strategy": ["auto"],
            "stream": ["false"],
            "user": ["me"],
        },
        POLICY,
    )
    assert (full.format, full.language, full.prompt, full.seed) == ("srt", "en", "Write:", 3)
    assert full.changes["temperature"] == 0.5 and full.changes["repetition_penalty"] == 1.1
    assert "greedy" not in full.changes
    assert parse_speech({"model": ["tiny"], "temperature": ["0"]}, POLICY).changes["greedy"]
    assert parse_speech({"model": ["tiny"], "language": [""]}, POLICY).language is None


# --- the policy -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        *({"clips": 0}, {"body_bytes": -1}, {"request_seconds": 0}, {"body_seconds": math.nan}),
        *({"api_key": ""}, {"api_key": "é"}, {"api_key": "two words"}, {"api_key": "line\n"}),
        *({"origins": ["page.test"]}, {"origins": ["https://"]}, {"origins": ["https://a.test/b"]}),
    ],
)
def test_policies_that_make_no_sense(wrong, tmp_path):
    with pytest.raises(InputError):
        Policy("tiny", **wrong)
    with pytest.raises(InputError, match="not a folder"):
        Policy("tiny", allow_files=tmp_path / "nowhere")


def test_files_are_those_of_the_allowed_folder(tmp_path):
    folder, outside = tmp_path / "open", tmp_path / "secret.wav"
    (folder / "deep").mkdir(parents=True)
    inside = folder / "deep" / "a.wav"
    inside.touch()
    outside.touch()
    (folder / "link.wav").symlink_to(outside)
    (folder / "good.wav").symlink_to(inside)
    (tmp_path / "open-too").mkdir()
    (tmp_path / "open-too" / "a.wav").touch()
    policy = Policy("tiny", allow_files=folder)
    assert policy.allowed_file(str(inside)) == policy.allowed_file(f"{folder}/good.wav") == inside
    for path in (
        str(outside),
        f"{folder}/link.wav",
        f"{folder}/../secret.wav",
        f"{folder}/deep/../../secret.wav",
        f"{tmp_path}/open-too/a.wav",
        str(folder),
        f"{folder}/nowhere.wav",
        "/etc/passwd",
        "/dev/zero",
        "a\0b",
        "",
    ):
        assert policy.allowed_file(path) is None, path
    assert Policy("tiny").allowed_file(str(inside)) is None


def test_what_a_caller_is_told_of_an_error():
    assert problem(InputError("yours")).body["error"] == {
        "message": "yours",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
    ours = problem(KeyError("/home/secret"))
    assert ours.status == 500 and "secret" not in json.dumps(ours.body)
    assert ours.body["error"]["type"] == "server_error"
    assert problem(CheckpointError("not finite")).status == 500  # InputError, and not the caller's
    full = problem(RuntimeError("CUDA out of memory. Tried to allocate"))
    assert full.status == 503 and full.headers["Retry-After"]
    assert problem(ExceptionGroup("", [InputError("inner")])).status == 400
