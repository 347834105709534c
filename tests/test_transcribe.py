"""Transcripts: windows and prompts, formats, files, and what happens when something goes wrong."""

import json
import math
import struct
import wave
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwen2audio_core import audio, chat, tiny, transcribe
from qwen2audio_core.assistant import Assistant, Reply, load
from qwen2audio_core.errors import AudioError, CheckpointError, InputError, PromptError
from qwen2audio_core.generate import generate
from qwen2audio_core.sampling import Settings
from qwen2audio_core.tokenizer import Tokenizer
from qwen2audio_core.transcribe import Segment, Transcript

RATE = 16_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transcribe") / "checkpoint"
    tiny.write_random(folder, dtype=torch.float32, std=0.125)
    return folder


@pytest.fixture(scope="module")
def assistant(checkpoint: Path) -> Assistant:
    return load(str(checkpoint), device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_folder(checkpoint)


@pytest.fixture(scope="module")
def official(shared: Path) -> Tokenizer:
    return Tokenizer.from_folder(shared / "official")


class Fake:
    """Answers window after window with the given texts, and remembers what it was asked."""

    def __init__(self, tokenizer: Tokenizer, answers: list[str], finish_reason: str = "stop"):
        self.tokenizer = tokenizer
        self.answers = iter(answers)
        self.finish_reason = finish_reason
        self.prompts: list[chat.Prompt] = []
        self.batches: list[int] = []
        self.options: dict[str, object] = {}

    def stream_prompts(self, prompts, answers, **options):
        assert answers == 1
        self.prompts += prompts
        self.batches.append(len(prompts))
        self.options = options
        replies = []
        for prompt in prompts:
            text = next(self.answers)
            if text == "interrupt":
                raise KeyboardInterrupt
            ids = self.tokenizer.encode(text, special=True)
            spent = {"encode": 1.0, "prefill": 2.0, "decode": 4.0}
            replies.append(
                Reply(prompt, self.tokenizer.decode(ids), ids, self.finish_reason, spent)
            )
        return SimpleNamespace(finished=lambda: replies)


def clicks(seconds: float, quiet: tuple[float, ...] = ()) -> torch.Tensor:
    """A tone with rests of 0.1 s around the given times."""
    time = torch.arange(round(seconds * RATE)) / RATE
    tone = torch.sin(2 * math.pi * 440 * time) * (0.5 + 0.3 * torch.sin(time))
    for middle in quiet:
        tone[(time - middle).abs() < 0.05] = 0
    return tone


def write_wav(path: Path, seconds: float = 1.0) -> Path:
    pytest.importorskip("soundfile")
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = (clicks(seconds) * 32767).to(torch.int16).tolist()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(struct.pack(f"<{len(samples)}h", *samples))
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Windows and prompts


def test_windows_cover_a_long_recording_exactly(tokenizer):
    sound = clicks(64.8, quiet=(28.0, 55.5))
    fake = Fake(tokenizer, ["one", "two", "three"])
    transcript = transcribe.transcribe(fake, (sound.numpy(), RATE), language="en")
    assert torch.equal(torch.cat([prompt.clips[0] for prompt in fake.prompts]), sound)
    bounds = [(segment.start, segment.end) for segment in transcript.segments]
    assert bounds[0][0] == 0 and bounds[-1][1] == 64.8 == transcript.duration
    assert [end for _, end in bounds[:-1]] == [start for start, _ in bounds[1:]]
    assert bounds[0][1] == pytest.approx(28.0, abs=0.05)
    assert bounds[1][1] == pytest.approx(55.5, abs=0.05)


def test_windows_of_a_real_recording(tokenizer, shared):
    for name in ("soundfile", "soxr"):
        pytest.importorskip(name)
    path = shared / "audio" / "humpback_64s.ogg"
    fake = Fake(tokenizer, ["a", "b", "c"])
    transcript = transcribe.transcribe(fake, path, batch_size=2)
    assert fake.batches == [2, 1]
    clips = [prompt.clips[0] for prompt in fake.prompts]
    assert torch.equal(torch.cat(clips), audio.load(path))
    assert [round((s.end - s.start) * RATE) for s in transcript.segments] == [
        len(clip) for clip in clips
    ]
    assert max(map(len, clips)) <= 30 * RATE


def test_a_short_rest_joins_the_window_before_it(tokenizer):
    fake = Fake(tokenizer, ["a", "b"])
    transcribe.transcribe(fake, (clicks(30 + 1 / RATE).numpy(), RATE))
    assert all(len(prompt.clips[0]) > 320 for prompt in fake.prompts)
    with pytest.raises(AudioError, match="too short to be heard, 20 ms"):
        transcribe.transcribe(fake, (torch.zeros(320), RATE))


def test_silence_is_put_to_the_model_too(tokenizer):
    fake = Fake(tokenizer, ["", ""])
    transcript = transcribe.transcribe(fake, (torch.zeros(40 * RATE), RATE))
    assert len(fake.prompts) == 2
    assert transcript.text == "" and [s.text for s in transcript.segments] == ["", ""]


# What the published tokenizer makes of the published prompt.
CLIP_IDS = (151647, 151646, 151648)
RECOGNIZE_IDS = [57193, 279, 4128, 323, 15282, 279, 8806, 25, 220]


@pytest.mark.parametrize(
    "options, behind",
    [
        ({"language": "en"}, [*RECOGNIZE_IDS, 154917]),
        ({"language": "zh"}, [*RECOGNIZE_IDS, 154918]),
        ({"language": "EN"}, [*RECOGNIZE_IDS, 154917]),
        ({"language": "en-US"}, [*RECOGNIZE_IDS, 154917]),
        ({"language": "zh_CN"}, [*RECOGNIZE_IDS, 154918]),
        ({}, RECOGNIZE_IDS),
        (
            {"prompt": "Detect the language and recognize the speech: <|yue|>"},
            [*RECOGNIZE_IDS, 154928],
        ),
        ({"prompt": ""}, []),
    ],
)
def test_prompts_in_the_published_tokens(official, options, behind):
    fake = Fake(official, ["hello"])
    transcribe.transcribe(fake, (clicks(1.0).numpy(), RATE), **options)
    bos, clip, eos = CLIP_IDS
    assert fake.prompts[0].ids == [bos, *[clip] * 25, eos, *behind]


@pytest.mark.parametrize(("options", "tag"), [({}, ""), ({"language": "zh"}, "<|zh|>")])
def test_translation_asks_for_english_and_is_english(official, options, tag):
    fake = Fake(official, ["Hello.", "<|zh|>Goodbye."])
    sound = (torch.zeros(40 * RATE), RATE)
    transcript = transcribe.transcribe(fake, sound, translate=True, **options)
    asked = "Detect the language and translate the speech into English: " + tag
    for prompt in fake.prompts:
        assert prompt.ids[prompt.ids.index(CLIP_IDS[2]) + 1 :] == official.encode(asked, True)
    assert [segment.language for segment in transcript.segments] == ["en", "en"]
    assert (transcript.language, transcript.text) == ("en", "Hello. Goodbye.")


def test_a_region_with_a_tag_of_its_own_keeps_it(tokenizer):
    asked = [transcribe.Scribe(tokenizer, name)._text for name in ("zh_tw", "zh-TW", "zh")]
    assert [text.split()[-1] for text in asked] == ["<|zh_tw|>", "<|zh_tw|>", "<|zh|>"]
    for wrong in ("-", "xx-US", ""):
        with pytest.raises(InputError, match=f"language {wrong!r} is not one"):
            transcribe.Scribe(tokenizer, wrong)


def test_the_tag_is_the_only_difference_between_languages(tokenizer):
    ids = {}
    for language in (*transcribe.LANGUAGES, None):
        fake = Fake(tokenizer, ["x"])
        transcribe.transcribe(fake, (clicks(0.5).numpy(), RATE), language=language)
        ids[language] = fake.prompts[0].ids
    for language in transcribe.LANGUAGES:
        assert ids[language] == [*ids[None], tokenizer.id_of(f"<|{language}|>")]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"language": "xx"}, InputError, r"language 'xx' is not one .*: en, de, es, .*wuu, nan$"),
        ({"language": "sil"}, InputError, "language 'sil'"),
        ({"language": "en", "prompt": "Write:"}, InputError, "leave the language out"),
        ({"batch_size": 0}, InputError, "batch_size is 0"),
        ({"batch_size": "8"}, InputError, "batch_size is '8'"),
        ({"language": ["en"]}, InputError, r"language is \['en'\], it must be a string"),
        ({"prompt": 3}, InputError, "prompt is 3, it must be a string"),
        ({"answers": 2}, InputError, "no option 'answers'"),
        ({"prompt": "<|AUDIO|> again"}, PromptError, "2 placeholders"),
    ],
)
def test_wrong_options(tokenizer, options, error, message):
    fake = Fake(tokenizer, [])
    with pytest.raises(error, match=message) as caught:
        transcribe.transcribe(fake, (clicks(1.0).numpy(), RATE), **options)
    assert "\n" not in str(caught.value)


def test_only_tags_that_the_tokenizer_has(tokenizer):
    class English:
        def id_of(self, token):
            if token == "<|en|>":
                return tokenizer.id_of(token)
            raise CheckpointError(token)

    fake = SimpleNamespace(tokenizer=English())
    with pytest.raises(InputError, match=r"has a tag for: en$"):
        transcribe.transcribe(fake, (clicks(1.0).numpy(), RATE), language="fr")


# Answers


def test_language_comes_from_the_answer_or_else_from_the_prompt(tokenizer):
    sound = (torch.zeros(85 * RATE), RATE)
    fake = Fake(tokenizer, ["<|zh|>你好。", "<|en|> Hello.", "<|zh|>再见。"])
    transcript = transcribe.transcribe(fake, sound)
    assert [s.language for s in transcript.segments] == ["zh", "en", "zh"]
    assert [s.text for s in transcript.segments] == ["你好。", "Hello.", "再见。"]
    assert (transcript.language, transcript.text) == ("zh", "你好。 Hello.再见。")

    unnamed = transcribe.transcribe(Fake(tokenizer, ["a", "", "c"]), sound)
    assert (unnamed.language, unnamed.text) == (None, "a c")
    # A prompt of one's own may name the language that is heard, and be answered in another.
    prompt = "Translate into Mandarin: <|en|>"
    mandarin = transcribe.transcribe(Fake(tokenizer, ["一。", "二。", "x"]), sound, prompt=prompt)
    assert mandarin.text == "一。二。 x"
    prompt = "Translate: <|fr|>"
    prompted = transcribe.transcribe(Fake(tokenizer, ["a", "b", "<|de|>c"]), sound, prompt=prompt)
    assert [s.language for s in prompted.segments] == ["fr", "fr", "de"]


def test_text_is_one_line_without_tags_and_otherwise_as_written(tokenizer):
    answer = " <|en|> Well ,  20%\n\nof\tit <|0.40|>!<|im_end|>"
    transcript = transcribe.transcribe(Fake(tokenizer, [answer]), (torch.zeros(RATE), RATE))
    assert transcript.text == "Well , 20% of it !"
    assert transcript.segments[0].ids == tokenizer.encode(answer, special=True)


def test_greedy_unless_something_is_drawn(tokenizer):
    def options(**given):
        fake = Fake(tokenizer, ["x"])
        transcribe.transcribe(fake, (torch.zeros(RATE), RATE), **given)
        return fake.options

    assert options() == {"greedy": True}
    assert options(temperature=None, greedy=None, repetition_penalty=1.0) == {
        "temperature": None,
        "greedy": True,
        "repetition_penalty": 1.0,
    }
    assert options(temperature=0.5, seed=1) == {"temperature": 0.5, "seed": 1}
    assert options(greedy=False) == {"greedy": False}


def test_progress_times_and_the_notice_of_a_cut_answer(tokenizer):
    lines, progress = [], []
    transcript = transcribe.transcribe(
        Fake(tokenizer, ["a", "b", "c"], "length"),
        (torch.zeros(70 * RATE), RATE),
        batch_size=2,
        notice=lines.append,
        on_progress=lambda *pair: progress.append(pair),
    )
    middle = transcript.segments[1].end
    assert progress == [(0.0, 70.0), (middle, 70.0), (70.0, 70.0)]
    assert lines[0].startswith("the recording: the answer for 00:00:00.000 to 00:00:")
    assert len(lines) == 3 and "max_new_tokens" in lines[2]
    del transcript.seconds["audio"]
    assert transcript.seconds == {"encode": 2.0, "prefill": 4.0, "decode": 8.0}  # of two batches


# The model


RAW = "<|audio_bos|><|AUDIO|><|audio_eos|>Detect the language and recognize the speech: <|en|>"


def greedy_ids(assistant: Assistant, waveform: torch.Tensor, penalty: float) -> list[int]:
    """The answer to one window by the parts below `transcribe`, one prompt at a time."""
    tokenizer = assistant.tokenizer
    ends = tuple(tokenizer.id_of(token) for token in ("<|endoftext|>", "<|im_end|>"))
    settings = Settings(max_new_tokens=8, repetition_penalty=penalty, eos_token_ids=ends)
    prompt = chat.encode_raw(RAW, [waveform], tokenizer, sampling_rate=RATE)
    return generate(assistant.model, chat.collate([prompt], ends[0]), settings)[0].ids


def test_a_batch_of_windows_equals_one_by_one_equals_plain_generation(assistant):
    sound = clicks(33, quiet=(28.0,))
    source, options = (sound.numpy(), RATE), {"language": "en", "max_new_tokens": 8}
    together = transcribe.transcribe(assistant, source, **options)
    alone = transcribe.transcribe(assistant, source, batch_size=1, **options)
    assert len(together.segments) == 2 and together == alone
    pieces = audio.split(sound, notice=lambda line: None)
    assert [segment.ids for segment in together.segments] == [
        greedy_ids(assistant, piece.waveform, 1.1) for piece in pieces
    ]


def test_words_are_timed_by_a_quantised_model():
    quantised = load("tiny", device="cpu", quantize="int8")
    clip = tiny.trained().parent / "clips" / "en_snow.flac"
    (segment,) = transcribe.transcribe(quantised, clip, words=True).segments
    assert [word.text for word in segment.words] == segment.text.split()


def test_words_end_where_a_stop_string_does():
    small = load("tiny", device="cpu")
    clip = tiny.trained().parent / "clips" / "en_train.flac"

    def words(**options):
        (segment,) = transcribe.transcribe(small, clip, words=True, **options).segments
        return segment.text, [word.text for word in segment.words]

    whole, every = words()
    assert whole.split() == every and len(every) > 3
    for stop in (every[3], every[3][1:]):  # before a word, and in the middle of one
        text, some = words(stop=stop)
        assert text.split() == some and text == whole[: whole.find(stop)].rstrip()


def test_log_probabilities_of_an_answer(assistant):
    source = (clicks(1).numpy(), RATE)
    plain = transcribe.transcribe(assistant, source, max_new_tokens=4)
    weighed = transcribe.transcribe(assistant, source, max_new_tokens=4, logprobs=0)
    (segment,) = weighed.segments
    assert plain.segments[0].avg_logprob is None and segment.avg_logprob < 0
    prompt = transcribe.Scribe(assistant.tokenizer).prompt(audio.Piece(clicks(1), 0.0, 1.0))
    options = {"greedy": True, "max_new_tokens": 4, "logprobs": 0}
    (reply,) = assistant.stream_prompts([prompt], **options).finished()
    mean = sum(likelihood.logprob for likelihood in reply.logprobs) / len(reply.ids)
    assert segment.ids == reply.ids and segment.avg_logprob == pytest.approx(mean)
    assert json.loads(transcribe.to_json(weighed))["segments"][0]["avg_logprob"] < 0
    assert "avg_logprob" not in json.loads(transcribe.to_json(plain))["segments"][0]


def test_the_checkpoints_penalty_holds_until_another_is_given(assistant):
    sound = clicks(2)
    expected = {penalty: greedy_ids(assistant, sound, penalty) for penalty in (1.0, 1.1)}
    assert expected[1.0] != expected[1.1]
    for penalty, given in ((1.1, {}), (1.0, {"repetition_penalty": 1.0})):
        transcript = transcribe.transcribe(
            assistant, (sound.numpy(), RATE), language="en", max_new_tokens=8, **given
        )
        assert transcript.segments[0].ids == expected[penalty]


def test_files_to_transcripts_end_to_end(assistant, tmp_path):
    path = write_wav(tmp_path / "in" / "talk.wav", 2.0)
    (outcome,) = transcribe.run(
        assistant, [path], tmp_path / "out", "all", language="de", max_new_tokens=5
    )
    assert outcome.error == "" and names(tmp_path / "out") == [
        f"talk.{kind}" for kind in sorted(transcribe.FORMATS)
    ]
    for file in outcome.files:
        assert file.read_bytes().decode() == transcribe.FORMATS[file.suffix[1:]](outcome.transcript)
    written = json.loads((tmp_path / "out" / "talk.json").read_text(encoding="utf-8"))
    assert len(written["segments"][0]["tokens"]) == 5 and written["duration"] == 2.0


# Formats

EXAMPLE = Transcript(
    [
        Segment(0.0, 27.3456, "Ask not what", "en", [1, 2], "stop"),
        Segment(27.3456, 57.0, "", None, [2], "stop"),
        Segment(57.0, 3661.0004, "a --> b & <c> 你好", "en", [3, 4], "length"),
    ],
    "en",
    3661.0004,
    {"audio": 0.1},
)


def test_txt():
    assert transcribe.to_txt(EXAMPLE) == "Ask not what\na --> b & <c> 你好\n"


def test_srt():
    assert transcribe.to_srt(EXAMPLE) == (
        "1\n00:00:00,000 --> 00:00:27,346\nAsk not what\n\n"
        "2\n00:00:57,000 --> 01:01:01,000\na -> b & <c> 你好\n\n"
    )


def test_vtt():
    assert transcribe.to_vtt(EXAMPLE) == (
        "WEBVTT\n\n"
        "00:00:00.000 --> 00:00:27.346\nAsk not what\n\n"
        "00:00:57.000 --> 01:01:01.000\na --&gt; b &amp; &lt;c&gt; 你好\n\n"
    )


def test_tsv():
    assert transcribe.to_tsv(EXAMPLE) == (
        "start\tend\ttext\n0\t27346\tAsk not what\n57000\t3661000\ta --> b & <c> 你好\n"
    )


def test_json():
    text = transcribe.to_json(EXAMPLE)
    assert text.endswith("}\n") and "你好" in text
    content = json.loads(text)
    ratios = [segment.pop("compression_ratio") for segment in content["segments"]]
    assert ratios[1] == 0 and all(0 < ratio < 1 for ratio in ratios[::2])  # too short to gain
    assert Segment(0, 1, "so on " * 50, "en", [], "length").compression_ratio > 10
    assert content == {
        "text": "Ask not what a --> b & <c> 你好",
        "segments": [
            {
                "id": 0,
                "start": 0.0,
                "end": 27.3456,
                "text": "Ask not what",
                "tokens": [1, 2],
                "language": "en",
                "finish_reason": "stop",
            },
            {
                "id": 1,
                "start": 27.3456,
                "end": 57.0,
                "text": "",
                "tokens": [2],
                "language": None,
                "finish_reason": "stop",
            },
            {
                "id": 2,
                "start": 57.0,
                "end": 3661.0004,
                "text": "a --> b & <c> 你好",
                "tokens": [3, 4],
                "language": "en",
                "finish_reason": "length",
            },
        ],
        "language": "en",
        "duration": 3661.0004,
    }


def test_a_line_names_its_file_as_it_was_given():
    long = "n" * 300 + ".flac"
    for source, name in ((long, long), ("https://u:p@host/a.wav?key=1", "https://host/a.wav")):
        line = transcribe.json_line(source, EXAMPLE)
        assert line.count("\n") == 1 and json.loads(line)["file"] == name
        assert json.loads(line)["text"] == EXAMPLE.text


def test_times_round_up_into_the_next_minute_and_pass_a_hundred_hours():
    cue = Transcript([Segment(59.9996, 360_000.25, "x", None, [], "stop")], None, 1.0, {})
    assert "00:01:00,000 --> 100:00:00,250" in transcribe.to_srt(cue)


# Writing


def test_formats_are_checked(tmp_path):
    with pytest.raises(
        InputError, match="'doc' is unknown, expected txt, srt, vtt, tsv, json or all"
    ):
        transcribe.write(EXAMPLE, tmp_path, "talk", ["txt", "doc"])
    with pytest.raises(InputError, match=r"json or all; each by itself: -f srt -f json$"):
        transcribe.kinds_of(["srt,json"])
    with pytest.raises(InputError, match=r"json or all$"):
        transcribe.kinds_of(["doc"])
    for nonsense in ("json,", ",", "srt,doc"):
        with pytest.raises(InputError, match=r"json or all$"):
            transcribe.kinds_of([nonsense])
    with pytest.raises(InputError, match="no format"):
        transcribe.write(EXAMPLE, tmp_path, "talk", [])
    assert names(tmp_path) == []
    files = transcribe.write(EXAMPLE, tmp_path / "new" / "folder", "a.b", ["srt", "srt", "txt"])
    assert [file.name for file in files] == ["a.b.srt", "a.b.txt"]


def test_full_disk_leaves_what_was_there(tmp_path):
    resource = pytest.importorskip("resource")
    (tmp_path / "talk.txt").write_text("from last time")
    long = Transcript([Segment(0, 1, "x" * 30_000, "en", [], "stop")], "en", 1, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The table fits, json does not: not even what fits may appear.
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(InputError, match="cannot write transcripts there") as caught:
            transcribe.write(long, tmp_path, "talk", "all")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert names(tmp_path) == ["talk.txt"]
    assert (tmp_path / "talk.txt").read_text() == "from last time"


def test_interrupted_while_writing(tmp_path, monkeypatch):
    def interrupt(transcript):
        raise KeyboardInterrupt

    monkeypatch.setitem(transcribe.FORMATS, "srt", interrupt)
    with pytest.raises(KeyboardInterrupt):
        transcribe.write(EXAMPLE, tmp_path, "talk", ["txt", "srt"])
    assert names(tmp_path) == []


# Many files


def test_a_bad_file_is_reported_and_the_rest_goes_on(tokenizer, tmp_path):
    good = [write_wav(tmp_path / f"{name}.wav") for name in "ab"]
    (tmp_path / "text.wav").write_text("not a sound")
    files = [good[0], tmp_path / "none.wav", tmp_path / "text.wav", tmp_path, good[1]]
    progress = []
    outcomes = list(
        transcribe.run(
            Fake(tokenizer, ["first", "second"]),
            files,
            tmp_path / "out",
            on_progress=lambda *at: progress.append(at),
        )
    )
    assert [outcome.source for outcome in outcomes] == [str(file) for file in files]
    assert [bool(outcome.error) for outcome in outcomes] == [False, True, True, True, False]
    for file, outcome in zip(files[1:4], outcomes[1:4], strict=True):
        assert str(file) in outcome.error and "\n" not in outcome.error
        assert outcome.transcript is None and outcome.files == []
    assert names(tmp_path / "out") == ["a.txt", "b.txt"]
    assert (tmp_path / "out" / "b.txt").read_text() == "second\n"
    assert progress == [(str(file), done, 1.0) for done in (0.0, 1.0) for file in good]


def test_short_recordings_are_answered_together(tokenizer, tmp_path):
    """By length, in batches; outcomes in the files' order, each file's windows in its own."""
    lengths = {"a": 2.0, "b": 1.0, "long": 95.0, "c": 1.5, "d": 1.2}
    files = [write_wav(tmp_path / f"{name}.wav", lengths[name]) for name in lengths]

    class Echo(Fake):  # says how many audio tokens it heard
        def stream_prompts(self, prompts, answers, **options):
            self.answers = iter([str(sum(prompt.audio_tokens)) for prompt in prompts])
            return super().stream_prompts(prompts, answers, **options)

    fake = Echo(tokenizer, [])
    outcomes = list(transcribe.run(fake, files, tmp_path / "out", batch_size=3))
    assert [outcome.source for outcome in outcomes] == [str(file) for file in files]
    # The long one fills a group up; what comes behind it is the next.
    heard = [[sum(prompt.audio_tokens) for prompt in fake.prompts][i : i + 3] for i in (0, 3)]
    assert fake.batches == [3, 3, 2] and heard[0] == sorted(heard[0]) and min(heard[1]) > 600
    for outcome, seconds in zip(outcomes, lengths.values(), strict=True):
        alone = transcribe.transcribe(Echo(tokenizer, []), outcome.source)
        assert outcome.transcript == alone and alone.duration == seconds
        assert outcome.files[0].read_text() == transcribe.to_txt(alone)
    spent = [outcome.transcript.seconds for outcome in outcomes]
    assert sum(one["decode"] for one in spent) == pytest.approx(3 * 4.0)


def test_a_group_of_short_recordings_has_an_end(tokenizer, tmp_path):
    path = write_wav(tmp_path / "a.wav")
    count = transcribe.TOGETHER + 3
    fake = Fake(tokenizer, ["x"] * count)
    outcomes = transcribe.run(fake, [path] * count, batch_size=1)
    next(outcomes)
    assert len(fake.prompts) == 1  # each Outcome comes as soon as it can
    assert len(list(outcomes)) == count - 1 and len(fake.prompts) == count
    opened = []
    fake = Fake(tokenizer, ["x"] * 100)
    for outcome in transcribe.run(
        fake, [path] * 60, batch_size=1, on_progress=lambda *at: opened.append(at[1])
    ):
        assert outcome.transcript is not None
        assert opened.count(0.0) - opened.count(1.0) < 30  # seconds of sound are in memory


def test_what_is_no_list_of_files(tokenizer, tmp_path):
    for files, message in (
        ("talk.wav", "give a list"),
        (tmp_path / "talk.wav", "give a list"),
        ([(torch.zeros(RATE), RATE)], "tuple is no file's name"),
        (5, "give a list"),
    ):
        with pytest.raises(InputError, match=message):
            next(transcribe.run(Fake(tokenizer, []), files))
    path = write_wav(tmp_path / "x.wav")
    (outcome,) = transcribe.run(Fake(tokenizer, ["x"]), tmp_path.glob("*.wav"))
    assert outcome.transcript.text == "x"
    for wrong in ({"temprature": 1}, {"seed": "x"}, {"logprobs": "x"}, {"stop": 3}):
        with pytest.raises(InputError):
            next(transcribe.run(Fake(tokenizer, []), [tmp_path / "none.wav"], **wrong))
    with pytest.raises(InputError, match=r"x\.wav: named twice"):
        next(transcribe.run(Fake(tokenizer, []), [path, path], tmp_path / "out"))
    (tmp_path / "out" / "x.json").mkdir(parents=True)
    with pytest.raises(InputError, match=r"x\.json: is a folder"):
        next(transcribe.run(Fake(tokenizer, []), [path], tmp_path / "out", "all"))
    assert names(tmp_path / "out") == ["x.json"]


def test_without_a_folder_nothing_is_written(tokenizer, tmp_path):
    path = write_wav(tmp_path / "a.wav")
    outcomes = list(transcribe.run(Fake(tokenizer, ["one", "two"]), [path, path]))
    assert [outcome.transcript.text for outcome in outcomes] == ["one", "two"]
    assert names(tmp_path) == ["a.wav"]


@pytest.mark.parametrize("files", [("a/x.wav", "b/x.wav"), ("x.wav", "x.mp3"), ("x.wav", "X.wav")])
def test_two_files_of_one_name_are_refused_before_any_work(tokenizer, tmp_path, files):
    fake = Fake(tokenizer, [])
    with pytest.raises(InputError, match="would both be written to") as caught:
        list(transcribe.run(fake, [tmp_path / file for file in files], tmp_path / "out"))
    assert all(file in str(caught.value) for file in files)
    assert fake.prompts == [] and not (tmp_path / "out").exists()


def test_a_recording_is_never_overwritten(tokenizer, tmp_path):
    path = write_wav(tmp_path / "talk.txt")  # a sound all the same
    before = path.read_bytes()
    with pytest.raises(InputError, match="take the place of a recording"):
        list(transcribe.run(Fake(tokenizer, ["x"]), [path], tmp_path))
    assert path.read_bytes() == before
    (outcome,) = transcribe.run(Fake(tokenizer, ["x"]), [path], tmp_path / "out")
    assert outcome.error == "" and names(tmp_path / "out") == ["talk.txt"]


@pytest.mark.parametrize(
    "wrong", [{"formats": ["doc"]}, {"language": "xx"}, {"batch_size": 0}, {"folder": "file"}]
)
def test_what_would_hit_every_file_is_raised_at_once(tokenizer, tmp_path, wrong):
    (tmp_path / "file").write_text("")
    folder = tmp_path / wrong.pop("folder", "out")
    with pytest.raises(InputError) as caught:
        list(transcribe.run(Fake(tokenizer, []), [tmp_path / "a.wav"], folder, **wrong))
    assert not isinstance(caught.value, AudioError)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == ""


def test_ctrl_c_keeps_the_files_that_are_finished(tokenizer, tmp_path):
    files = [write_wav(tmp_path / f"{name}.wav") for name in "abc"]
    # The first is the longest, and would have its turn last.
    write_wav(files[0], 2.0)
    outcomes = []
    with pytest.raises(KeyboardInterrupt):
        for outcome in transcribe.run(
            Fake(tokenizer, ["second", "interrupt"]), files, tmp_path / "out", "all", batch_size=1
        ):
            outcomes.append(outcome)
    assert [outcome.transcript.text for outcome in outcomes] == ["second"]
    assert names(tmp_path / "out") == [f"b.{kind}" for kind in sorted(transcribe.FORMATS)]


@pytest.mark.parametrize(
    "source, stem",
    [
        ("folder/talk.wav", "talk"),
        ("a.b.flac", "a.b"),
        (".wav", ".wav"),
        ("https://host/x/my%20talk.mp3?key=1#t", "my talk"),
        ("https://host/..%2F..%2Fetc%2Fpasswd.wav", "passwd"),
        ("https://host", "audio"),
        ("data:audio/wav;base64,AAAA", "audio"),
    ],
)
def test_names_of_transcripts(source, stem):
    assert transcribe._stem(source) == stem
