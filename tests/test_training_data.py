"""Rows of every form to ids, labels and batches: what is trained on, and what is said of others."""

import json
from pathlib import Path

import pytest
import torch
from training_rows import chat_row, official_rows, tone, write_lines

from qwen2audio_core import audio, audio_files, tiny
from qwen2audio_core.errors import InputError
from qwen2audio_core.frontend import clip_lengths, log_mel, mel_edges
from qwen2audio_core.rows import parse
from qwen2audio_core.tokenizer import Tokenizer
from qwen2audio_core.training.data import (
    Augment,
    Example,
    Loader,
    Rows,
    Sounds,
    collate,
    encode,
    plan,
)
from qwen2audio_core.training.losses import IGNORE


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in tiny.byte_tokenizer().items():
        (folder / name).write_bytes(content)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    tone(folder / "a.wav", 300, 0.5)
    tone(folder / "b.wav", 500, 0.9)
    return folder


def taught(example: Example, tokenizer: Tokenizer) -> list[str]:
    return [
        tokenizer.decode(example.ids[begin:end], skip_special=False)
        for begin, end in example.answers
    ]


def row_of(raw: dict, folder: Path):
    return parse(json.loads(json.dumps(raw)), "x.jsonl:1", folder)


# Forms


def test_the_official_form(tokenizer, clips) -> None:
    raw = {"audio": "a.wav", "prompt": "Say it: <|en|>", "gt": "hello", "source": "asr_en"}
    example = encode(row_of(raw, clips), tokenizer)
    places = clip_lengths(8000).audio_tokens
    text = tokenizer.decode(example.ids, skip_special=False)
    assert text == (
        "<|audio_bos|>" + "<|AUDIO|>" * places + "<|audio_eos|>Say it: <|en|>hello<|endoftext|>"
    )
    assert tokenizer.id_of("<|en|>") in example.ids
    assert taught(example, tokenizer) == ["hello<|endoftext|>"]
    assert example.row.transcript == "hello"


@pytest.mark.parametrize("key", ["prompt", "gt", "rejected"])
def test_a_clip_s_place_written_by_hand_is_a_bad_row(key, tokenizer, clips) -> None:
    raw = {"audio": "a.wav", "prompt": "Say it: <|en|>", "gt": "hello", "rejected": "<|en|>no"}
    assert encode(row_of(raw, clips), tokenizer).rejected is not None
    raw[key] += "<|AUDIO|>"
    with pytest.raises(InputError, match=rf"x.jsonl:1: {key} holds <\|AUDIO\|>"):
        encode(row_of(raw, clips), tokenizer)


def test_ms_swift_turns_are_taught_with_their_ends_and_nothing_else(tokenizer, clips) -> None:
    raw = chat_row(["a.wav", "b.wav"], ["First answer.", "Second\nanswer."], source="analysis")
    example = encode(row_of(raw, clips), tokenizer)
    assert taught(example, tokenizer) == ["First answer.<|im_end|>", "Second\nanswer.<|im_end|>"]
    text = tokenizer.decode(example.ids, skip_special=False)
    assert text.count("<|audio_bos|>") == 2 and "Audio 2: <|audio_bos|>" in text
    assert text.endswith("Second\nanswer.<|im_end|>")
    assert [len(clip) for clip in example.clips] == [8000, 14400]
    assert example.row.transcript == ""


def test_a_shifted_mask_would_be_noticed(tokenizer, clips) -> None:
    example = encode(row_of(chat_row(["a.wav"], ["Yes."]), clips), tokenizer)
    for begin, end in ((-1, 0), (0, -1), (1, 0)):
        shifted = [(b + begin, e + end) for b, e in example.answers]
        wrong = Example(example.ids, shifted, example.clips, example.row)
        assert taught(wrong, tokenizer) != taught(example, tokenizer)


def test_the_template_is_that_of_the_model(tokenizer, clips) -> None:
    """What precedes an answer is to the token what the model is prompted with."""
    from qwen2audio_core import chat

    example = encode(row_of(chat_row(["a.wav"], ["Yes."]), clips), tokenizer)
    question = [
        {"type": "audio", "audio": str(clips / "a.wav")},
        {"type": "text", "text": "Question 0?"},
    ]
    prompt = chat.encode([{"role": "user", "content": question}], tokenizer)
    assert example.ids[: example.answers[0][0]] == prompt.ids


@pytest.mark.parametrize(
    "raw",
    [
        {"conversations": [{"from": "human", "value": "<audio>What?"},
                           {"from": "gpt", "value": "A."}],
         "audios": ["a.wav"], "system": "Be brief."},
        {"messages": [{"role": "system", "content": "Be brief."},
                      {"role": "user", "content": "<audio>What?"},
                      {"role": "assistant", "content": "A."}], "audios": ["a.wav"]},
        {"conversations": [{"from": "system", "value": "Be brief."},
                           {"from": "human", "value": "<audio>What?"}],
         "chosen": {"from": "gpt", "value": "A."}, "audios": "a.wav"},
    ],
)  # fmt: skip
def test_llama_factory_and_openai_say_the_same(raw, tokenizer, clips) -> None:
    example = encode(row_of(raw, clips), tokenizer)
    text = tokenizer.decode(example.ids, skip_special=False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAudio 1: ")
    assert taught(example, tokenizer) == ["A.<|im_end|>"]


@pytest.mark.parametrize(
    "raw",
    [
        chat_row(["a.wav"], ["Good."], rejected_response="Bad one."),
        {"conversations": [{"from": "human", "value": "<audio>Question 0?"}], "audios": ["a.wav"],
         "chosen": {"from": "gpt", "value": "Good."},
         "rejected": {"from": "gpt", "value": "Bad one."}},
        {"messages": [{"role": "user", "content": "<audio>Question 0?"}], "audios": ["a.wav"],
         "chosen": {"role": "assistant", "content": "Good."},
         "rejected": {"role": "assistant", "content": "Bad one."}},
    ],
)  # fmt: skip
def test_better_and_worse_answers(raw, tokenizer, clips) -> None:
    example = encode(row_of(raw, clips), tokenizer)
    begin = example.answers[-1][0]
    assert taught(example, tokenizer) == ["Good.<|im_end|>"]
    assert tokenizer.decode(example.rejected[begin:], skip_special=False) == "Bad one.<|im_end|>"
    assert example.rejected[:begin] == example.ids[:begin]
    batch = collate([example, example], 0, pairs=True)
    assert batch.pairs == 2 and len(batch.ids) == 4 and batch.mel.shape[0] == 2
    learned = [row[row != IGNORE].tolist() for row in batch.labels]
    assert [tokenizer.decode(ids) for ids in learned] == ["Good."] * 2 + ["Bad one."] * 2


def test_an_answer_that_begins_with_a_line_end_is_learned_from_there(shared) -> None:
    """That line end is one token with the role's own; the other answer has it by itself."""
    official = Tokenizer.from_folder(shared / "official")
    for better, worse in (("yes", "\nno"), ("\nyes", "no")):
        raw = chat_row([], [better], rejected_response=worse)
        batch = collate([encode(row_of(raw, Path()), official)], 0, pairs=True)
        learned = [official.decode(row[row != IGNORE].tolist()) for row in batch.labels]
        assert [text.lstrip("\n") for text in learned] == ["yes", "no"], learned
        assert [text.startswith("\n") for text in learned] == [better < "a", worse < "a"]


def test_numbers_and_names_of_clips_are_no_clips(tmp_path):
    """Which people have beside them. What might be a clip is refused, above."""
    row = {"audio": "a.wav", "prompt": "Say:", "gt": "hello"}
    more = {"audio_id": "77", "audio_duration": "3.2", "audio_seconds": 3, "id": "a.wav", "x": None}
    assert parse(row | more, "r:1", tmp_path).clips == parse(row, "r:1", tmp_path).clips
    for key, value in (("audio_path", "b"), ("audio_1", "b.wav"), ("audio_list", ["b"])):
        with pytest.raises(InputError, match=f"{key} is not read"):
            parse(row | {key: value}, "r:1", tmp_path)
    older = {"query": "<audio>Say:", "response": "hello", "audios": ["a.wav"], "gt": None}
    assert parse(older, "r:1", tmp_path).messages


def test_a_pair_is_as_long_as_its_longer_answer(tokenizer, clips) -> None:
    for rejected, length in (("", 5), ("y" * 3, 5), ("y" * 400, 400)):
        chat = chat_row([], ["right"], rejected_response=rejected)
        plain = {"prompt": "Question 0?", "gt": "right", "rejected": rejected}
        for raw in (chat, plain):
            assert row_of(raw, clips).size == len("Question 0?") + length
    rows = [chat_row([], ["a"], rejected_response="word " * 80)] * 16
    found = Rows([write_lines(clips / "long.jsonl", rows)])
    most = max(len(batch) for batch in plan(found, 0, batch_seconds=9.0, batch_tokens=600))
    assert most * (400 / 3 + 8) <= 600
    assert row_of({"prompt": "x", "gt": "ሰላም"}, clips).size == 10  # bytes, of which BPE has merges


def test_clips_stand_in_audio_or_in_audios(tokenizer, clips) -> None:
    spoken = [str(clips / "a.wav")]
    turns = chat_row([], ["Yes."])["messages"]
    turns[0]["content"] = "<audio>What?"
    old = {"query": "<audio>What?", "response": "Yes."}
    ways = [{"audio": "a.wav"}, {"audio": ["a.wav"]}, {"audios": ["a.wav"]}]
    ways += [{"audios": "a.wav", "audio": None}, {"audio": "a.wav", "audios": []}]
    for form in ({"prompt": "x", "gt": "y"}, {"messages": turns}, old):
        for named in ways:
            row = row_of({**form, **named}, clips)
            assert row.clips == spoken, (form, named)
            assert len(encode(row, tokenizer).clips) == 1
    both = row_of({"audios": ["a.wav", "b.wav"], "prompt": "x", "gt": "y"}, clips)
    ids = encode(both, tokenizer).ids
    assert ids.count(tokenizer.id_of("<|audio_bos|>")) == 2


def test_ms_swift_s_older_form(tokenizer, clips) -> None:
    old = {
        "system": "Be brief.",
        "history": [["<audio>Who?", "Ann."], ["Sure?", "Yes."]],
        "query": "<audio>And here?",
        "response": "Bob.",
        "audios": ["a.wav", "b.wav"],
        "rejected_response": "Ann.",
    }
    turns = [{"role": "system", "content": "Be brief."}]
    for question, answer in (("<audio>Who?", "Ann."), ("Sure?", "Yes."),
                             ("<audio>And here?", "Bob.")):  # fmt: skip
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer})
    new = {"messages": turns, "audios": old["audios"], "rejected_response": "Ann."}
    assert row_of(old, clips) == row_of(new, clips)
    bare = row_of({"query": "Hi", "response": "Ho", "history": None, "system": None}, clips)
    assert encode(bare, tokenizer).answers == encode(row_of(
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        clips), tokenizer).answers  # fmt: skip


def test_a_turn_whose_loss_is_false_is_read_and_not_learned(tokenizer, clips) -> None:
    raw = chat_row(["a.wav"], ["One.", "Two.", "Three."])
    whole = encode(row_of(raw, clips), tokenizer)
    turns = raw["messages"]
    turns[1]["loss"], turns[3]["loss"], turns[5]["loss"] = False, True, None
    part = encode(row_of(raw, clips), tokenizer)
    assert part.ids == whole.ids
    assert taught(part, tokenizer) == ["Two.<|im_end|>", "Three.<|im_end|>"]
    # What stands behind the last turn to learn from is left out, its clips too.
    turns[1]["loss"], turns[5]["loss"] = True, False
    turns[4]["content"] = "<audio>" + turns[4]["content"]
    row = row_of({**raw, "audios": ["a.wav", "b.wav"]}, clips)
    cut = encode(row, tokenizer)
    assert cut.ids == whole.ids[: whole.answers[1][1]] and len(cut.clips) == 1
    assert taught(cut, tokenizer) == ["One.<|im_end|>", "Two.<|im_end|>"]
    assert "Three" not in tokenizer.decode(cut.ids)


def test_a_json_array_is_read_like_lines(tokenizer, clips) -> None:
    rows = [chat_row(["a.wav"], ["Grüße 日本."]), "no row", chat_row([], ["]}{["])]
    lines = Rows([write_lines(clips / "lines.jsonl", [json.dumps(row) for row in rows])])
    file = clips / "array.json"
    text = json.dumps(rows, ensure_ascii=False, indent=2)
    for content in (text, "\ufeff\n " + text + "\n", json.dumps(rows)):
        file.write_text(content, encoding="utf-8")
        found = Rows([str(file)])
        assert found.bad == [f"{file}:item 2: a str, expected an object"]
        assert [found[i].messages for i in range(2)] == [lines[i].messages for i in range(2)]
        assert found[1].where == f"{file}:item 3"
        assert torch.equal(found.tokens, lines.tokens) and torch.equal(found.seconds, lines.seconds)
    for content, why in (
        (text[:-1], "behind item 3 (expected , or ])"),
        (text.replace(",", "", 1), "behind item 0 (Expecting ',' delimiter"),
        ("[]\n{}", "more behind the array's end"),
    ):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(InputError) as caught:
            Rows([str(file)])
        said = str(caught.value)
        assert said.startswith(f"{file}: not a JSON array of rows") and why in said, said
        assert "\n" not in said and "jsonl" in said
    file.write_text("[ ]", encoding="utf-8")
    assert len(Rows([str(file)])) == 0


def turn(content, role: str = "user", **more) -> dict:
    return {"role": role, "content": content, **more}


YES = turn("Yes.", "assistant")
OFFICIAL = {"prompt": "x", "gt": "y"}
LOST = [  # what a person meant to be heard or learned, and what would not be
    ({**OFFICIAL, "audio": "a.wav", "audios": ["b.wav"]}, "both audio and audios name clips"),
    ({**OFFICIAL, "audio_path": "a.wav"}, "audio_path is not read"),
    ({**OFFICIAL, "Audio": {"path": "a.wav"}}, "Audio is not read"),
    ({**OFFICIAL, "audios": [{"path": "a.wav"}]}, "audios is [{'path': 'a.wav'}], expected a file"),
    ({**OFFICIAL, "images": ["a.png"]}, "images: the model takes sound and text alone"),
    ({**OFFICIAL, "videos": ["a.mp4"]}, "videos: the model takes"),
    ({**OFFICIAL, "prompt": "<audio>x", "audio": "a.wav"}, "<audio> in the prompt"),
    ({**OFFICIAL, "prompt": "<image>x"}, "prompt: <image>: the model takes"),
    ({"messages": [turn("<audio>x", audios=["a.wav"]), YES]}, "messages[0]: audios is not read"),
    ({"messages": [turn("<video>x"), YES]}, "messages[0]: <video>: the model takes"),
    ({"messages": [turn("x"), turn("<audio>y", "assistant")], "audios": ["a.wav"]},
     "messages[1]: <audio> in an assistant's turn"),
    ({"messages": [turn("x"), YES], "rejected_response": "<audio>no"},
     "rejected_response: <audio> in an assistant's turn"),
    ({"messages": [turn("x")], "chosen": "<audio>", "rejected": "no"}, "chosen: <audio> in an"),
    ({"messages": [turn([{"type": "text", "text": "x"}]), YES]},
     "messages[0]: content is a list of parts, expected one text with <audio>"),
    ({"messages": [turn("x", "system"), turn("x"), YES], "system": "y"},
     "both system and a system turn"),
    ({"messages": [turn("x"), YES], "system": ["y"]}, "system is ['y']"),
    ({"messages": [turn("x"), {**YES, "loss": 0}]}, "messages[1]: loss is 0, expected true or"),
    ({"messages": [turn("x"), {**YES, "loss": False}]}, "loss is false in each answer"),
    ({"messages": [turn("x"), YES, turn("x"), {**YES, "loss": False}], "rejected_response": "no"},
     "loss is false in the turn that is compared"),
    ({"query": "x"}, "response is missing"),
    ({"query": "x", "response": "y", "history": ["a", "b"]}, "history[0] is 'a', expected [query"),
    ({"query": "x", "response": "y", "history": {"a": "b"}}, "history is {'a': 'b'}, expected a"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "why"), LOST, ids=[why for _, why in LOST])
def test_nothing_is_lost_without_a_word(raw, why, clips) -> None:
    with pytest.raises(InputError) as caught:
        row_of(raw, clips)
    assert str(caught.value).startswith("x.jsonl:1: ") and why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_empty_or_of_no_concern_is_passed_over(clips) -> None:
    more = {"audio_seconds": 0.5, "audio_path": "", "images": [], "videos": None, "id": "audio-7"}
    assert row_of({**OFFICIAL, "audio": "a.wav", "system": None, "source": None, **more}, clips)
    said = {"messages": [turn("x", id=3), {**YES, "audio": None}], "conversations": None}
    assert row_of({**said, "system": "", "rejected_response": None, **more}, clips)


BROKEN = [
    ("{", "not JSON"),
    ("[]", "expected an object"),
    ({"text": "x"}, "unknown form, found text"),
    ({"audio": "a.wav", "prompt": "x", "gt": ""}, "gt is empty"),
    ({"audio": "a.wav", "prompt": "x", "gt": " \n"}, "gt is empty"),
    ({**chat_row([], ["x"]), "label": False}, "label is false"),
    ({"audio": "a.wav", "gt": "x"}, "prompt is missing"),
    ({"audio": 3, "prompt": "x", "gt": "y"}, "audio is 3"),
    ({"audio": "a.wav", "prompt": "x", "gt": "y", "seconds": "1"}, "seconds is '1'"),
    ({"audio": "a.wav", "prompt": "x", "gt": "y", "seconds": 0}, "seconds is 0"),
    ({"messages": []}, "messages must be a list"),
    ({"messages": [{"role": "user"}]}, "messages[0]: content is missing"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "role is 'bot'"),
    ({"messages": [{"role": "user", "content": "x"}]}, "the last turn is not the assistant's"),
    (chat_row([], [""]), "turn is empty"),
    ({**chat_row([], ["x"]), "audios": ["a.wav"]}, "0 <audio> in the turns for 1 audios"),
    (chat_row(["none.wav"], ["x"]), "none.wav"),
]


@pytest.mark.parametrize(("raw", "why"), BROKEN, ids=[why for _, why in BROKEN])
def test_a_bad_row_is_named_and_the_others_stay(raw, why, clips) -> None:
    good = {"audio": "a.wav", "prompt": "x", "gt": "y", "seconds": 0.5}
    file = write_lines(clips / "mixed.jsonl", [good, raw, good])
    rows = Rows([file])
    assert len(rows) == 2 and len(rows.bad) == 1
    assert rows.bad[0].startswith(f"{file}:2: ") and why in rows.bad[0], rows.bad
    assert "\n" not in rows.bad[0]
    assert rows[1].where == f"{file}:3"


def test_a_worse_answer_in_the_official_form_has_either_name(clips) -> None:
    for key in ("rejected", "rejected_response"):
        assert row_of({"prompt": "x", "gt": "good", key: "bad"}, clips).rejected == "bad"
    assert row_of({**chat_row([], ["x"]), "label": True}, clips).messages


def test_a_file_s_head_says_how_long_it_is(clips, monkeypatch) -> None:
    """Nothing is decoded for the index, unless the head is no help; then what is wrong is said."""
    row = {"audio": "a.wav", "prompt": "x", "gt": "y"}
    (clips / "bad.wav").write_text("no sound")
    decoded: list[str] = []
    load = audio.load
    monkeypatch.setattr(audio, "load", lambda clip: decoded.append(clip) or load(clip))
    rows = Rows([write_lines(clips / "heads.jsonl", [row, {**row, "audio": "bad.wav"}])])
    assert rows.seconds.tolist() == pytest.approx([len(load(str(clips / "a.wav"))) / 16_000])
    assert decoded == [str(clips / "bad.wav")] and "bad.wav" in rows.bad[0]
    assert audio_files.stated_seconds("https://host/a.wav") is None


def test_faults_found_on_reading_are_named_and_counted(tokenizer, clips) -> None:
    good = {"audio": "a.wav", "prompt": "x", "gt": "y", "seconds": 0.5}
    long = {**good, "gt": "y" * 300}
    file = write_lines(clips / "read.jsonl", [good, {**good, "audio": "gone.wav"}, long])
    loader = Loader(Rows([file]), tokenizer, limit=256)
    batch = loader[0, [0, 1, 2]]
    assert len(batch.ids) == 1
    assert [line.split(": ")[0] for line in batch.bad] == [f"{file}:2", f"{file}:3"]
    assert "tokens, the model's context holds 256" in batch.bad[1]
    empty = loader[0, [1]]
    assert empty.supervised == 0 and empty.ids.shape == (1, 1) and len(empty.bad) == 1


def test_a_row_without_clips_has_no_seconds(clips) -> None:
    silent = chat_row([], ["Hello."]) | {"seconds": 0.0}
    rows = Rows([write_lines(clips / "silent.jsonl", [silent])])
    assert len(rows) == 1 and not rows.bad and rows.seconds.tolist() == [0.0]


def test_a_clip_over_thirty_seconds_is_a_bad_row(tokenizer, clips) -> None:
    tone(clips / "long.wav", 300, 31)
    row = row_of({"audio": "long.wav", "prompt": "x", "gt": "y"}, clips)
    with pytest.raises(InputError, match=r"x.jsonl:1: .*long.wav is 31.0 s long.* cut it into"):
        encode(row, tokenizer)
    # Played faster it would fit, and be another row in every epoch.
    with pytest.raises(InputError, match=r"long.wav is 31.0 s long"):
        encode(row, tokenizer, change=lambda waveform: waveform[::2])


# Batches


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Rows:
    folder = tmp_path_factory.mktemp("rows")
    return Rows([write_lines(folder / "rows.jsonl", official_rows(folder, 40))])


def test_an_epoch_holds_every_row_once_in_full_batches(rows) -> None:
    batches = plan(rows, 0, batch_seconds=2.0, batch_tokens=10_000)
    assert sorted(i for batch in batches for i in batch) == list(range(40))
    for batch in batches:
        assert float(rows.seconds[batch].max()) * len(batch) <= 2.0 + 1e-5
    assert plan(rows, 0, batch_seconds=2.0, batch_tokens=10_000) == batches
    assert plan(rows, 1, batch_seconds=2.0, batch_tokens=10_000) != batches
    assert plan(rows, 0, batch_seconds=2.0, batch_tokens=10_000, seed=1) != batches
    by_tokens = plan(rows, 0, batch_seconds=1e9, batch_tokens=100)
    assert all(float(rows.tokens[batch].max()) * len(batch) <= 100 for batch in by_tokens)
    assert len(by_tokens) > 5


def test_short_rows_may_come_first(rows) -> None:
    plain = plan(rows, 0, batch_seconds=1.0, batch_tokens=10_000)
    ordered = plan(rows, 0, batch_seconds=1.0, batch_tokens=10_000, short_first=6)

    def lengths(batches):
        return [float(rows.tokens[batch].mean()) for batch in batches]

    assert lengths(ordered)[:6] == sorted(lengths(plain)[:6]) != lengths(plain)[:6]
    assert ordered[6:] == plain[6:]
    assert plan(rows, 1, batch_seconds=1.0, batch_tokens=10_000, short_first=6) == plan(
        rows, 1, batch_seconds=1.0, batch_tokens=10_000
    )


def test_a_file_counts_as_its_weight_says(tmp_path) -> None:
    official = official_rows(tmp_path, 8)
    one = write_lines(tmp_path / "one.jsonl", official[:4])
    two = write_lines(tmp_path / "two.jsonl", official[4:])
    rows = Rows([f"{one}@2.5", f"{two}@0.5"])
    numbers = [i for batch in plan(rows, 0, batch_seconds=9, batch_tokens=999) for i in batch]
    counts = [numbers.count(i) for i in range(8)]
    assert set(counts[:4]) <= {2, 3} and sum(counts[:4]) == 10
    assert set(counts[4:]) <= {0, 1} and sum(counts[4:]) == 2
    with pytest.raises(InputError, match="weight is 0"):
        Rows([f"{one}@0"])


def test_padding_is_at_the_right_and_never_learned(tokenizer, rows) -> None:
    examples = [encode(rows[i], tokenizer) for i in (0, 4)]
    batch = collate(examples, 7)
    for example, ids, labels in zip(examples, batch.ids, batch.labels, strict=True):
        length = len(example.ids)
        assert ids[:length].tolist() == example.ids and (ids[length:] == 7).all()
        ((begin, end),) = example.answers
        assert labels[begin:end].tolist() == example.ids[begin:end]
        assert (labels[:begin] == IGNORE).all() and (labels[end:] == IGNORE).all()
    assert batch.supervised == sum(end - begin for e in examples for begin, end in e.answers)
    assert batch.spoken == [(0, "a"), (1, "aa")]
    assert batch.tokens == sum(len(example.ids) for example in examples)


def test_worker_processes_prepare_the_same_batches(tokenizer, rows) -> None:
    from torch.utils.data import DataLoader

    loader = Loader(rows, tokenizer, augment=Augment(speed=0.1, noise=0.5, masking=True))
    items = [(seed, [seed, seed + 1]) for seed in range(4)]
    alone = [loader[item] for item in items]
    helped = DataLoader(
        loader, batch_size=None, sampler=items, num_workers=2, multiprocessing_context="fork"
    )
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels)
        assert torch.equal(a.conv_frames, b.conv_frames)
        torch.testing.assert_close(a.mel, b.mel)  # a worker has one thread, which rounds otherwise


def test_speech_sounds_become_a_label_for_every_frame(tokenizer, tmp_path) -> None:
    tone(tmp_path / "a.wav", 300, 0.2)
    phones = [["_", 0.0], ["h", 0.035], ["i", 0.08], ["_:", 0.14]]
    known = {"audio": "a.wav", "phones": phones, "end": 0.16}
    sounds = Sounds(write_lines(tmp_path / "phones.jsonl", [known]))
    assert list(sounds.names) == ["", "h", "i"]
    # Frames are 20 ms; their middles are 10, 30, 50, ... ms.
    clip = str(tmp_path / "a.wav")
    assert sounds.frames(clip, 10).tolist() == [0, 0, 1, 1, 2, 2, 2, 0, 0, 0]
    row = {"audio": "a.wav", "prompt": "x", "gt": "y"}
    example = encode(row_of(row, tmp_path), tokenizer)
    batch = collate([example, example], 0, sounds=sounds)
    assert [i for i, _ in batch.sounds] == [0, 1]
    assert all(len(labels) == int(batch.conv_frames[0]) for _, labels in batch.sounds)
    assert sounds.frames(str(tmp_path / "b.wav"), 10) is None
    with pytest.raises(InputError, match=r"phones.jsonl:1: expected audio, phones and end"):
        Sounds(write_lines(tmp_path / "phones.jsonl", [{"audio": "a.wav"}]))


def test_tokens_of_a_transcript_are_placed_where_they_are_said(tokenizer, tmp_path) -> None:
    tone(tmp_path / "a.wav", 300, 2.0)
    phones = [["_", 0.0], ["h", 0.4], ["i", 0.8], ["_:", 1.2], ["h", 1.4], ["i", 1.6], ["_", 1.9]]
    known = {"audio": "a.wav", "phones": phones, "end": 1.9}
    sounds = Sounds(write_lines(tmp_path / "phones.jsonl", [known]))
    clip = str(tmp_path / "a.wav")
    parts = torch.tensor([0.0, 0.125, 0.25, 0.5, 1.0])
    assert sounds.when(clip, parts).tolist() == pytest.approx([0.4, 0.6, 0.8, 1.4, 1.9])
    assert sounds.when(str(tmp_path / "b.wav"), parts) is None

    row = {"audio": "a.wav", "prompt": "Write it down: ", "gt": "<|en|>hi hi", "source": "asr_en"}
    other = {**row, "source": "caption"}
    examples = [encode(row_of(each, tmp_path), tokenizer) for each in (other, row)]
    assert collate(examples, 0, sounds=sounds).heard is None
    batch = collate(examples, 0, sounds=sounds, tokenizer=tokenizer)
    said = [(r, int(batch.ids[r, p]), low, high) for r, p, low, high in batch.heard.tolist()]
    assert {r for r, *_ in said} == {1}
    spelled = b"".join(tokenizer.bytes_of(token) for _, token, _, _ in said)
    assert spelled == b"hi hi"  # neither the tag nor the end of the turn
    ids = batch.ids[1].tolist()
    first = ids.index(tokenizer.id_of("<|AUDIO|>"))
    _, _, low, high = said[0]
    # The first token, a fifth or two of the text, is said within 0.4 to 1.4 s: 40 ms a position.
    assert first + 10 - 6 <= low < high <= first + 35 + 7
    assert all(first <= low < high <= first + 50 for _, _, low, high in said)
    assert [low for _, _, low, _ in said] == sorted(low for _, _, low, _ in said)


# Random changes


def test_speed_changes_the_clip_and_its_places_alike(tokenizer, rows) -> None:
    loader = Loader(rows, tokenizer, augment=Augment(speed=0.3))
    audio = tokenizer.id_of("<|AUDIO|>")
    lengths = set()
    for seed in range(6):
        batch = loader[seed, [0]]
        lengths.add(int(batch.conv_frames))
        assert int((batch.ids == audio).sum()) == int(batch.conv_frames) // 2
    assert len(lengths) > 2 and all(15 / 1.3 - 1 <= frames <= 15 / 0.7 + 1 for frames in lengths)


def test_a_slower_clip_is_not_longer_than_the_model_hears(tokenizer, tmp_path) -> None:
    tone(tmp_path / "a.wav", 300, 29)
    row = {"audio": "a.wav", "prompt": "x", "gt": "y", "seconds": 29}
    rows = Rows([write_lines(tmp_path / "rows.jsonl", [row])])
    loader = Loader(rows, tokenizer, augment=Augment(speed=0.1))
    examples = [loader.examples([0], torch.Generator().manual_seed(i)) for i in range(12)]
    assert not any(bad for _, bad in examples)
    lengths = [len(found[0].clips[0]) for found, _ in examples]
    assert lengths.count(480_000) > 1 and len(set(lengths)) > 4 and max(lengths) == 480_000


def test_noise_lies_between_5_and_30_decibels_below() -> None:
    clip = torch.sin(torch.arange(16_000) * 0.1)
    levels = []
    for seed in range(20):
        noisy = Augment(noise=1.0).waveform(clip, torch.Generator().manual_seed(seed))
        ratio = clip.square().mean() / (noisy - clip).square().mean()
        levels.append(10 * float(ratio.log10()))
    assert 5 - 0.01 <= min(levels) < 12 and 22 < max(levels) <= 30 + 0.01
    off = Augment().waveform(clip, torch.Generator().manual_seed(0))
    assert off is clip


def test_a_voice_is_moved_in_frequency_and_in_tone() -> None:
    clip = torch.sin(torch.arange(16_000) * (2 * torch.pi * 2_000 / 16_000))
    mel = log_mel(clip)
    middles = mel_edges()[1:-1]
    found, tones = [], []
    for seed in range(30):
        changed = Augment(voice=0.1).mel(mel.clone(), torch.Generator().manual_seed(seed))
        assert changed.shape == mel.shape and changed.isfinite().all()
        found.append(float(middles[changed.mean(1).argmax()]))
        tones.append(float(changed.max() - mel.max()))
    # A bin is some 50 Hz wide there.
    assert 1_770 < min(found) < 1_900 and 2_100 < max(found) < 2_300
    assert min(tones) < -0.02 and 0.02 < max(tones) < 0.4
    assert torch.equal(Augment().mel(mel, torch.Generator()), mel)


def test_masking_puts_bands_to_the_mean_and_leaves_the_rest() -> None:
    mel = torch.randn(128, 100)
    masked = Augment(masking=True).mel(mel.clone(), torch.Generator().manual_seed(3))
    changed = masked != mel
    assert 0 < changed.float().mean() < 0.8
    assert torch.allclose(masked[changed], mel.mean())
    assert torch.equal(Augment().mel(mel, torch.Generator()), mel)
