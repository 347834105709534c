"""The server through OpenAI's own client, against the same model asked directly."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

openai = pytest.importorskip("openai")

from live_server import CLIPS, NAME, linked, live, small, spoken, wav  # noqa: E402
from openai.types.audio import TranscriptionVerbose  # noqa: E402

from qwen2audio_core import transcribe  # noqa: E402
from qwen2audio_core.assistant import change  # noqa: E402
from qwen2audio_core.chat import collate  # noqa: E402
from qwen2audio_core.generate import Generation  # noqa: E402


@pytest.fixture(scope="module")
def assistant(one_thread, tmp_path_factory):
    return small(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def server(assistant):
    with live(assistant, allow_files=CLIPS) as running:
        yield running


def direct(assistant, content, tokens=8, **options):
    """What the model answers without a server."""
    stream = assistant.stream_messages(
        [{"role": "user", "content": content}], greedy=True, max_new_tokens=tokens, **options
    )
    return stream.finished()[0]


# --- chat -----------------------------------------------------------------------------------------


def test_models(server):
    assert [model.id for model in server.client.models.list()] == [NAME]
    assert server.client.models.retrieve(NAME).owned_by == "qwen2audio"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4o'"):
        server.client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.chat.completions.create(model="a/b", messages=[])
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    assert server.http.get("/health").json() == {"status": "ok", "model": NAME}
    for path in ("/health", "/v1/models", f"/v1/models/{NAME}", "/metrics"):
        head = server.http.head(path)
        assert head.status_code == 200 and not head.content


def test_a_text_is_answered_as_without_a_server(assistant, server):
    answer = server.chat("Hello there")
    expected = direct(assistant, "Hello there")
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert choice.message.role == "assistant" and choice.logprobs is None
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    usage = answer.usage
    assert usage.prompt_tokens == len(expected.prompt.ids)
    assert usage.completion_tokens == len(expected.ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.audio_tokens == 0


def test_the_same_clip_in_every_way(assistant, server):
    path = CLIPS / "en_capital.flac"
    data = path.read_bytes()
    coded = base64.b64encode(data).decode()
    ways = [
        spoken(data, "flac"),
        spoken(data, "mp3"),  # a wrong hint: the bytes tell
        {"type": "input_audio", "input_audio": {"data": "data:audio/flac;base64," + coded}},
        linked("data:audio/flac;base64," + coded),
        linked("DATA:;base64," + coded),
        linked(path.as_uri()),
        {"type": "audio_url", "audio_url": path.as_uri()},
    ]
    question = {"type": "text", "text": "What?"}
    expected = direct(assistant, [{"type": "audio", "path": str(path)}, question])
    for way in ways:
        answer = server.chat([way, question])
        assert answer.choices[0].message.content == expected.text
        assert answer.usage.prompt_tokens == len(expected.prompt.ids)
        assert answer.usage.prompt_tokens_details.audio_tokens == expected.prompt.audio_tokens[0]
    assert answer.usage.prompt_tokens_details.cached_tokens == len(expected.prompt.ids) - 1


def test_every_clip_is_heard(assistant, server):
    """Clips, turns and texts in their order: one that got lost would change the probabilities."""
    first, second = (spoken(wav(0.5, seed)) for seed in (1, 2))
    sources = [{"type": "audio", "audio": wav(0.5, seed)} for seed in (1, 2)]
    seen = set()
    for order in ((0, 1), (1, 0), (0,), (1,), ()):
        parts = [*((first, second)[i] for i in order), {"type": "text", "text": "Which?"}]
        plain = [*(sources[i] for i in order), {"type": "text", "text": "Which?"}]
        answer = server.chat(parts, logprobs=True, max_tokens=2)
        expected = direct(assistant, plain, 2, logprobs=0)
        found = [token.logprob for token in answer.choices[0].logprobs.content]
        assert found == pytest.approx([one.logprob for one in expected.logprobs], abs=2e-3)
        seen.add(round(found[0], 5))
    assert len(seen) == 5
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "ann", "content": [first]},
        {"role": "assistant", "content": "A hiss.", "refusal": None, "tool_calls": None},
        {"role": "user", "content": [{"type": "text", "text": "And"}, second]},
    ]
    answer = server.client.chat.completions.create(
        model=NAME, messages=turns, temperature=0, max_tokens=8
    )
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [sources[0]]},
        {"role": "assistant", "content": "A hiss."},
        {"role": "user", "content": ["And", sources[1]]},
    ]
    expected = assistant.stream_messages(plain, greedy=True, max_new_tokens=8).finished()[0]
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == len(expected.prompt.ids)


def test_a_long_clip_is_split_and_the_caller_is_told(server):
    answer = server.chat([spoken(wav(31.0))], max_tokens=1)
    assert answer.usage.prompt_tokens_details.audio_tokens == pytest.approx(775, abs=2)
    (notice,) = answer.model_extra["notices"]
    assert "31.0 s long: split into 2 pieces" in notice
    chunks = list(server.chat([spoken(wav(31.0))], max_tokens=1, stream=True))
    assert chunks[0].model_extra["notices"] == [notice]


def collect(stream):
    """A stream's texts, reasons and log-probabilities by choice, and its usage."""
    texts, reasons, logprobs, usage = {}, {}, {}, None
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            i = choice.index
            if i not in texts:
                assert choice.delta.role == "assistant"
            assert i not in reasons
            texts[i] = texts.get(i, "") + (choice.delta.content or "")
            if choice.logprobs is not None:
                logprobs.setdefault(i, []).extend(choice.logprobs.content)
            if choice.finish_reason is not None:
                reasons[i] = choice.finish_reason
    return texts, reasons, logprobs, usage


def same(ours, theirs):
    """Two lists of tokens with their log-probabilities, up to rounding: their company differs."""
    assert [token.token for token in ours] == [token.token for token in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=2e-3)
        assert [top.token for top in one.top_logprobs] == [top.token for top in other.top_logprobs]


def test_a_stream_is_the_whole_answer_in_pieces(server):
    content = [spoken(wav(0.5)), {"type": "text", "text": "What?"}]
    fields = {"max_tokens": 20, "n": 3, "temperature": 1.5, "seed": 5}
    fields |= {"logprobs": True, "top_logprobs": 2}
    whole = server.chat(content, **fields)
    stream = server.chat(content, stream=True, stream_options={"include_usage": True}, **fields)
    texts, reasons, logprobs, usage = collect(stream)
    assert len(whole.choices) == 3
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert reasons[choice.index] == choice.finish_reason
        same(logprobs[choice.index], choice.logprobs.content)
    details = {"prompt_tokens_details"}  # the second time all of it was cached
    assert usage.model_dump(exclude=details) == whole.usage.model_dump(exclude=details)
    assert collect(server.chat(content, stream=True))[3] is None


def test_pieces_come_while_others_are_written(server):
    """The first piece is here before the last token exists."""
    step = server.service.engine.slots.step
    written = []
    server.service.engine.slots.step = lambda count: written.append(0) or step(count)
    try:
        stream = server.chat("Hi", stream=True, max_tokens=100, extra_body={"min_tokens": 100})
        chunks = iter(stream)
        while not next(chunks).choices[0].delta.content:
            pass
        early = len(written)
        for _ in chunks:
            pass
    finally:
        server.service.engine.slots.step = step
    assert early < len(written) == 99


def test_seeds_and_temperatures(server):
    def texts(**fields):
        answer = server.chat("Say", max_tokens=12, **fields)
        return [choice.message.content for choice in answer.choices]

    drawn = {"temperature": 2, "extra_body": {"top_k": 0}, "top_p": 1}
    several = texts(n=3, seed=7, **drawn)
    assert several == texts(n=3, seed=7, **drawn) and len(set(several)) == 3
    assert texts(seed=8, **drawn) == several[1:2]  # each answer has a seed of its own
    assert texts(seed=-7, **drawn) == texts(seed=-7, **drawn) != several[:1]
    assert texts(temperature=0) == texts(temperature=0, top_p=0.5, seed=3)
    assert texts(temperature=1, top_p=0, seed=1) == texts(temperature=1, top_p=0, seed=2)


def test_repetition_penalty(assistant, server):
    for penalty in (1.0, 3.0):
        answer = server.chat("Say", max_tokens=16, extra_body={"repetition_penalty": penalty})
        expected = direct(assistant, "Say", 16, repetition_penalty=penalty)
        assert answer.choices[0].message.content == expected.text


def test_stop_strings(assistant, server):
    fields = {"max_tokens": 30, "extra_body": {"repetition_penalty": 1.5, "min_tokens": 30}}
    free = server.chat("Say", **fields).choices[0].message.content
    stop = free[6:8]
    expected = free[: free.index(stop)]
    for given in (stop, [stop, "never"]):
        answer = server.chat("Say", stop=given, logprobs=True, **fields)
        (choice,) = answer.choices
        assert choice.message.content == expected and choice.finish_reason == "stop"
        # It ended there: no token behind the stop string was written.
        assert answer.usage.completion_tokens < 30
        shown = b"".join(
            bytes(token.bytes)
            for token in choice.logprobs.content
            if not token.token.startswith("<|")
        )
        assert shown.decode() == expected
        texts, reasons, logprobs, _ = collect(
            server.chat("Say", stop=given, logprobs=True, stream=True, **fields)
        )
        assert (texts[0], reasons[0]) == (expected, "stop")
        same(logprobs[0], choice.logprobs.content)


def test_logprobs_are_the_models_own(assistant, server):
    fields = {"logprobs": True, "top_logprobs": 4, "max_tokens": 6}
    (choice,) = server.chat("Say", temperature=2, seed=3, **fields).choices
    prompt = assistant.encode([{"role": "user", "content": "Say"}])
    settings = change(assistant.settings, temperature=2.0, max_new_tokens=6)
    run = Generation(assistant.model, collate([prompt], 0), settings, seed=3, logprobs=4)
    while run.running:
        run.step()
    (answer,) = run.answers
    ends = [token in settings.eos_token_ids for token in answer.ids]
    wanted = [one for one, end in zip(answer.logprobs, ends, strict=True) if not end]
    assert len(choice.logprobs.content) == len(wanted) > 0
    name = assistant.tokenizer.bytes_of
    for found, token, expected in zip(choice.logprobs.content, answer.ids, wanted, strict=False):
        assert bytes(found.bytes) == name(token, False)
        assert found.token == name(token, False).decode("utf-8", "replace")
        assert found.logprob == pytest.approx(expected.logprob, abs=2e-3)
        assert [bytes(top.bytes) for top in found.top_logprobs] == [
            name(i, False) for i, _ in expected.top
        ]
    assert server.chat("Say", logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_many_at_once_are_answered_as_alone(server):
    contents = [[spoken(wav(0.3 + 0.1 * i, i)), {"type": "text", "text": "x" * i or "y"}]
                for i in range(12)]  # fmt: skip

    def ask(content):
        return server.chat(content, max_tokens=12).choices[0].message.content

    alone = [ask(content) for content in contents]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, contents)) == alone
    assert server.service.engine.active == server.service.engine.waiting == 0


# --- transcriptions -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """70 s in three windows."""
    path = tmp_path_factory.mktemp("talk") / "talk.wav"
    path.write_bytes(wav(70.0, 3, 8000))
    return path


@pytest.fixture(scope="module")
def written(assistant, recording):
    """The same without a server, in few tokens."""
    return {
        translate: transcribe.transcribe(assistant, recording, language="en", translate=translate)
        for translate in (False, True)
    }


@pytest.fixture(scope="module", autouse=True)
def short_answers(assistant):
    """Random words would go on to the limit of 256 tokens."""
    before = assistant.settings
    assistant.settings = change(before, max_new_tokens=12)
    yield
    assistant.settings = before


def test_transcripts_in_every_format(server, recording, written):
    expected = written[False]
    assert len(expected.segments) == 3

    def ask(form, **fields):
        return server.client.audio.transcriptions.create(
            model=NAME, file=recording, response_format=form, language="en", **fields
        )

    found = ask("json")
    assert found.text == expected.text
    assert found.usage.type == "duration" and found.usage.seconds == 70.0
    assert len(found.model_extra["notices"]) == sum(
        segment.finish_reason == "length" for segment in expected.segments
    )
    assert ask("text") == expected.text + "\n"
    raw = server.client.audio.transcriptions.with_raw_response.create(
        model=NAME, file=recording, response_format="text", language="en"
    )
    assert raw.headers["qwen2audio-notices"] == "; ".join(found.model_extra["notices"])
    assert ask("srt") == transcribe.to_srt(expected)
    assert ask("vtt") == transcribe.to_vtt(expected)
    verbose = ask("verbose_json", timestamp_granularities=["segment"])
    assert (verbose.text, verbose.language, verbose.duration) == (expected.text, "en", 70.0)
    for i, (ours, theirs) in enumerate(zip(verbose.segments, expected.segments, strict=True)):
        assert (ours.id, ours.text, ours.tokens) == (i, theirs.text, theirs.ids)
        assert ours.start == pytest.approx(theirs.start, abs=1e-3)
        assert ours.end == pytest.approx(theirs.end, abs=1e-3)
        assert ours.avg_logprob < 0 and ours.temperature == 0 and ours.compression_ratio > 0
        assert ours.no_speech_prob == 0.0
    raw = server.client.audio.transcriptions.with_raw_response.create(
        model=NAME, file=recording, response_format="verbose_json", language="en"
    )
    assert "qwen2audio-notices" not in raw.headers  # they are in the body
    TranscriptionVerbose.model_validate_json(raw.text)


def test_translations(server, recording, written):
    found = server.client.audio.translations.create(
        model=NAME, file=recording, response_format="verbose_json", extra_body={"language": "en"}
    )
    assert found.text == written[True].text
    assert found.language == "en"
    assert found.model_extra["task"] == "translate"
    other = server.client.audio.transcriptions.create(
        model=NAME, file=recording, response_format="verbose_json", language="en"
    )
    for ours, theirs in zip(found.segments, other.segments, strict=True):
        assert abs(ours.avg_logprob - theirs.avg_logprob) > 1e-3  # it was asked for something else


def test_prompt_temperature_and_language(server, recording, assistant):
    def ask(**fields):
        return server.client.audio.transcriptions.create(
            model=NAME, file=("a.wav", wav(1.0)), **fields
        ).text

    drawn = {"temperature": 1.5, "extra_body": {"seed": 3}}
    assert ask(**drawn) == ask(**drawn)
    source = assistant.encode_raw("<|audio_bos|><|AUDIO|><|audio_eos|>Write:", wav(1.0))
    expected = assistant.stream_prompts([source], greedy=True).finished()[0]
    assert ask(prompt="Write:") == transcribe._clean(expected.text)
    for fields, message in (
        ({"language": "xx"}, "language 'xx' is not one"),
        ({"language": "en", "prompt": "Write:"}, "leave the language out"),
        ({"prompt": "<|AUDIO|>"}, "2 placeholders"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            ask(**fields)


def test_what_a_form_can_get_wrong(server):
    def refused(message, files=True, **form):
        data = {"model": NAME} | form
        answer = server.http.post(
            "/v1/audio/transcriptions",
            data={key: value for key, value in data.items() if value is not None},
            files={"file": ("a.wav", wav(0.5))} if files is True else files,
        )
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert message in error["message"] and error["type"] == "invalid_request_error"

        return error["param"]

    assert refused("language 'xx' is not one", language="xx") == "language"
    assert refused("too short", files={"file": ("a.wav", wav(0.01))}) == "file"
    refused("model is missing", model=None)
    refused("one of json, text, srt, vtt, verbose_json", response_format="docx")
    refused("can only be segment", **{"timestamp_granularities[]": ["word", "segment"]})
    refused("stream can only be false", stream="true")
    refused("include[] is not supported", **{"include[]": "logprobs"})
    refused('temperature is "warm", expected a number from 0 to 2', temperature="warm")
    refused("temperature is NaN", temperature="nan")
    refused('seed is "1.5", expected a whole number', seed="1.5")
    refused("colour is not a field", colour="red")
    refused("model is given twice", model=[NAME, NAME])
    refused("file must be one", files={"other": ("a.wav", wav(0.5))})
    refused("file must be one", files=[("file", ("a.wav", b"")), ("file", ("b.wav", b""))])
    answer = server.http.post("/v1/audio/transcriptions", data={"model": NAME, "file": "text"})
    assert answer.status_code == 415 and "multipart/form-data" in answer.json()["error"]["message"]
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = server.http.post("/v1/audio/transcriptions", content=b"rubbish", headers=broken)
    assert answer.status_code == 400 and "error" in answer.json()


# --- what is counted ------------------------------------------------------------------------------


def test_metrics_count_what_happened(server):
    names = {
        "answers": 'qwen2audio_answers_total{finish_reason="length"}',
        "prompt": "qwen2audio_prompt_tokens_total",
        "audio": "qwen2audio_audio_tokens_total",
        "written": "qwen2audio_completion_tokens_total",
        "cached": "qwen2audio_cached_prompt_tokens_total",
        "seconds": "qwen2audio_audio_seconds_total",
        "requests": 'qwen2audio_requests_total{endpoint="/v1/chat/completions",status="200"}',
        "took": 'qwen2audio_request_seconds_count{endpoint="/v1/chat/completions"}',
        "first": "qwen2audio_first_token_seconds_count",
    }
    before = SimpleNamespace(**{key: server.metric(name) for key, name in names.items()})
    answer = server.chat([spoken(wav(1.0, 77))], n=2, extra_body={"min_tokens": 8})
    after = SimpleNamespace(**{key: server.metric(name) for key, name in names.items()})
    usage = answer.usage
    assert after.answers - before.answers == 2 and after.first - before.first == 2
    assert after.prompt - before.prompt == usage.prompt_tokens
    assert after.audio - before.audio == usage.prompt_tokens_details.audio_tokens == 25
    assert after.written - before.written == usage.completion_tokens == 16
    assert after.cached > before.cached  # the second answer did not read the prompt again
    assert after.seconds - before.seconds == pytest.approx(1.0)
    assert after.requests - before.requests == after.took - before.took == 1
    assert server.metric("qwen2audio_slots ") == 4 and server.metric("qwen2audio_up ") == 1
    assert server.metric("qwen2audio_slots_busy") == server.metric("qwen2audio_queue ") == 0
    assert server.metric("qwen2audio_open_requests") == 0
    assert 0 < server.metric("qwen2audio_prefix_cache_bytes") <= 2**24
    assert server.metric("process_resident_memory_bytes") > 1e6


def test_answers_are_json_as_it_travels(server):
    """Not only what the client makes of it: the events of a stream, byte for byte."""
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": "é"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 3,
    }
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert "content-length" not in answer.headers
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1]["choices"] == []
