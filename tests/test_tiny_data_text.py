"""The small model's texts and tasks, and how its answers are scored. Nothing is spoken here."""

import collections
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

pytest.importorskip("jiwer")
pytest.importorskip("soxr")
soundfile = pytest.importorskip("soundfile")

import evaluate_tiny  # noqa: E402
import make_tiny_data  # noqa: E402
import make_tiny_pairs  # noqa: E402

from tiny_data import questions, speech, tasks, texts  # noqa: E402

QUATORZE = "quatre-vingt-quatorze"
OTHERS = texts.LANGUAGES[1:]
SENTENCE_ENDS = (".", "?", "。", "？")

Row = dict[str, Any]


@pytest.fixture(scope="module")
def train() -> list[Row]:
    return [tasks.pretrain(i, 0) for i in range(8_000)] + [tasks.sft(i, 0) for i in range(8_000)]


@pytest.fixture(scope="module")
def drills() -> list[Row]:
    return [tasks.drills(i, 0) for i in range(2_000)]


@pytest.fixture(scope="module")
def trained_on(train: list[Row]) -> list[Row]:
    """Rows of every stage that training hears."""
    others = (tasks.words, tasks.engines, tasks.drills)
    return train + [draw(i, 0) for i in range(1_000) for draw in others]


@pytest.fixture(scope="module")
def held_out() -> list[Row]:
    return [tasks.test(i, 0) for i in range(make_tiny_data.ROWS["test"])]


def spoken(clip: Row) -> list[Row]:
    """The clips of speech in a clip."""
    if clip["kind"] == "speech":
        return [clip]
    return [found for part in clip.get("parts", ()) for found in spoken(part)]


def speeches(rows: list[Row]) -> list[Row]:
    return [found for row in rows for clip in row["clips"] for found in spoken(clip)]


# Texts


def test_numbers() -> None:
    written = {
        "en": {0: "zero", 13: "thirteen", 40: "forty", 71: "seventy-one"},
        "de": {1: "eins", 21: "einundzwanzig", 30: "dreißig", 77: "siebenundsiebzig"},
        "fr": {21: "vingt et un", 71: "soixante et onze", 80: "quatre-vingts", 94: QUATORZE},
        "it": {21: "ventuno", 28: "ventotto", 33: "trentatré", 90: "novanta"},
        "es": {16: "dieciséis", 22: "veintidós", 31: "treinta y uno", 99: "noventa y nueve"},
        "yue": {0: "零", 10: "十", 11: "十一", 20: "二十", 99: "九十九"},
        "zh": {0: "零/ling2", 10: "十/shi2", 12: "十二/shi2er4", 47: "四十七/si4shi2qi1"},
        "ja": {0: "零/ぜろ", 14: "十四/じゅうよん", 30: "三十/さんじゅう"},
    }  # fmt: skip
    for language, cases in written.items():
        assert {n: texts.number(language, n) for n in cases} == cases
        assert len({texts.number(language, n) for n in range(100)}) == 100


@pytest.mark.parametrize("language", texts.LANGUAGES)
def test_words_in_no_order(language) -> None:
    known = {word.split("/")[0] for word in texts.vocabulary(language)}
    assert len(known) > 50 and not any(re.search(r"[.,?!。、，？\s]", word) for word in known)
    rng = random.Random(0)
    said = [texts.shuffled(language, rng) for _ in range(300)]
    assert len({sentence.text for sentence in said}) > 250
    for sentence in said:
        assert sentence.text.endswith("." if language not in texts.UNSPACED else "。")
        assert (sentence.spoken is None) == (language not in ("zh", "ja"))
        if language not in texts.UNSPACED:
            first, *rest = sentence.text[:-1].split(" ")
            assert 1 <= len(rest) <= 5 and set(rest) <= known and first[0].isupper()
    row = tasks.words(0, 0)
    assert row["task"] == "asr" and row["gt"] == row["clips"][0]["text"]


def test_english_vocabulary_and_sentences() -> None:
    rng = random.Random(0)
    sentences = {texts.english(rng, "train").text for _ in range(20_000)}
    assert len(sentences) > 8_000
    words = collections.Counter(
        word for text in sentences for word in re.findall("[a-z]+", text.lower())
    )
    assert len([word for word, count in words.items() if count >= 3]) >= 200
    longer = {text for text in sentences if len(text.split()) > 8}
    assert all(re.match(r"The \w+ to \w+ leaves at \w+ (in|at) ", text) for text in longer)
    for n in range(100):
        assert texts.word("en", ("num", str(n))).text.strip(".").lower() in texts.number("en", n)


@pytest.mark.parametrize("language", OTHERS)
def test_vocabulary_of_the_other_languages(language: str) -> None:
    """Thirty content words beside the numbers, and no two meanings written or spoken alike."""
    kinds = [kind for kind in texts.KINDS if kind not in ("num", "nums")]
    slots = {slot for kind in kinds for meaning in texts.meanings(kind) for slot in meaning[1:]}
    words = {slot for slot in slots if slot and not slot.isdigit()}
    assert len(words) >= 30
    all_of_them = [
        meaning for kind in texts.KINDS if kind != "nums" for meaning in texts.meanings(kind)
    ]
    sentences = [texts.word(language, meaning) for meaning in all_of_them]
    assert len({s.text for s in sentences}) == len(sentences)
    assert len({s.spoken or s.text for s in sentences}) == len(sentences)
    assert all(s.english for s in sentences)
    assert all(s.mandarin for s in sentences) == (language != "zh")
    # Each word stands in some sentence that training may have.
    trained = [m for m in all_of_them if not texts.is_test(texts.word(language, m), m[0])]
    assert words <= {slot for meaning in trained for slot in meaning[1:]}


def test_writing_is_regular() -> None:
    rng = random.Random(1)
    for language in texts.LANGUAGES:
        for _ in range(400):
            sentence = texts.sentence(language, rng, "train")
            assert sentence.text.endswith(SENTENCE_ENDS)
            assert sentence.text[0] == sentence.text[0].upper()
            assert "  " not in sentence.text and "/" not in sentence.text
            assert (sentence.spoken is not None) == (language in ("zh", "ja"))
            if language == "zh":
                assert re.fullmatch(r"[a-z0-9 ,.?]+", sentence.spoken or "")
            if language == "ja":
                assert not re.search("[\u4e00-\u9fff]", sentence.spoken or "")


def test_the_clips_that_ship_are_learned(train: list[Row]) -> None:
    file = ROOT / "qwen2audio_core" / "assets" / "clips" / "clips.json"
    shipped = [clip for clip in json.loads(file.read_text()) if clip["kind"] == "speech"]
    heard = {(clip["language"], clip["text"]) for clip in speeches(train)}
    ours = {(clip["language"], clip["transcript"]) for clip in shipped}
    assert ours - heard == {("en", "What colour is snow?")}  # which is asked in other words
    assert ("What colour is the snow?", "White.") in questions.facts("colours")
    assert not texts.held_out("What colour is the snow?")
    answers = dict(questions.facts("capitals"))
    assert answers["What is the capital of France?"] == "Paris."


@pytest.mark.parametrize("topic", [topic for topic in questions.TOPICS if questions.facts(topic)])
def test_every_fact_is_trained_in_some_wording(topic: str) -> None:
    facts = questions.facts(topic)
    assert len({text for text, _ in facts}) == len(facts)
    fact = {text: re.sub("[^a-z ]", "", text.lower()).split() for text, _ in facts}
    everything = collections.Counter(answer for _, answer in facts)
    trained = collections.Counter(a for t, a in facts if not texts.held_out(t))
    assert everything.keys() == trained.keys(), fact
    if topic == "arithmetic":
        sums = {re.search(r"\w+ (plus|minus|times) \w+", t.lower())[0] for t, _ in facts}  # type: ignore[index]
        taught = " | ".join(t.lower() for t, _ in facts if not texts.held_out(t))
        assert all(sum_ in taught for sum_ in sums)


def test_arithmetic_is_right() -> None:
    value = {texts.number("en", n): n for n in range(100)}
    for text, answer in questions.facts("arithmetic"):
        sum_ = r"(\w+) (plus|minus|times) (\w+)"
        a, sign, b = re.search(sum_, text.lower()).groups()  # type: ignore[union-attr]
        results = {
            "plus": value[a] + value[b],
            "minus": value[a] - value[b],
            "times": value[a] * value[b],
        }
        told = re.fullmatch(rf"{sum_} is ([\w-]+)\.", answer.lower())
        assert told and told.groups()[:3] == (a, sign, b) and value[told[4]] == results[sign]


# Splits


def test_no_test_sentence_is_trained(trained_on: list[Row], held_out: list[Row]) -> None:
    trained = {clip["text"] for clip in speeches(trained_on)}
    tested = {clip["text"] for clip in speeches(held_out)}
    assert len(tested) > 800
    assert not tested & trained
    assert all(texts.held_out(text) for text in tested)


def test_no_test_voice_speed_or_noise_is_trained(
    trained_on: list[Row], held_out: list[Row]
) -> None:
    def voices(rows: list[Row]) -> set[tuple[str, ...]]:
        # Of espeak the variant is the voice, in whichever language.
        found = {tuple(clip["voice"]) for clip in speeches(rows)}
        return {(e, v if e == "espeak" else n) for e, n, v in found}

    assert not voices(trained_on) & voices(held_out)
    assert len([v for v in voices(held_out) if v[0] == "espeak"]) >= 15
    assert len([v for v in voices(held_out) if v[0] == "flite"]) >= 1
    for what in ("rate", "pitch"):
        ours, theirs = ({clip[what] for clip in speeches(rows)} for rows in (trained_on, held_out))
        assert ours & theirs == ({50} if what == "pitch" else set())
    levels = [
        {clip["noise"]["snr_db"] for clip in speeches(rows) if clip["noise"]}
        for rows in (trained_on, held_out)
    ]
    assert levels[0] and levels[1] and not levels[0] & levels[1]
    engine = speeches([row for row in held_out if row["set"] == "engine"])
    assert engine and all(clip["voice"][0] == "festival" for clip in engine)
    assert "festival" not in {clip["voice"][0] for clip in speeches(trained_on)}
    other = speeches([row for row in held_out if row["set"] == "flite"])
    assert other and {tuple(clip["voice"]) for clip in other} == {("flite", "slt", "")}


# Rows


def test_rows_are_well_formed(train: list[Row], held_out: list[Row]) -> None:
    for row in [*train, *held_out]:
        assert bool(row["clips"]) == (row["task"] != "written")
        assert row["task"] and row["language"] in texts.LANGUAGES
        if "messages" in row:
            roles = [message["role"] for message in row["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            placeholders = sum(m["content"].count("<audio>") for m in row["messages"][::2])
            assert placeholders == len(row["clips"])
            assert all(message["content"].strip() for message in row["messages"])
            assert not any("<audio>" in message["content"] for message in row["messages"][1::2])
        else:
            assert len(row["clips"]) == 1 and row["gt"].strip() and row["source"]
            tagged = row["prompt"].endswith(f"<|{row['language']}|>")
            assert tagged == (
                row["task"] in ("asr", "asr_long", "asr_silence", "translate_en", "translate_zh")
            )
            assert ("<|" in row["gt"]) == (row["task"] == "language")


def test_half_of_the_training_has_drawn_voices_and_no_test_row(
    train: list[Row], held_out: list[Row]
) -> None:
    voices = [clip["voice"][2] for clip in speeches(train)]
    drawn = [name for name in voices if name.startswith("drawn ")]
    assert 0.4 < len(drawn) / len(voices) < 0.65
    assert len(set(drawn)) > 2_000
    assert not any(clip["voice"][2].startswith("drawn ") for clip in speeches(held_out))
    genders = {"drawn 0": "man", "drawn 1": "woman"}
    assert all(speech.drawn("en", "en-us", int(n[6:])).gender == g for n, g in genders.items())
    rows = [tasks.engines(i, 0) for i in range(300)]
    assert {clip["voice"][0] for clip in speeches(rows)} == {"rhvoice", "pico"}


def test_shares_of_tasks(train: list[Row], held_out: list[Row]) -> None:
    pretrain, sft = train[:8_000], train[8_000:]
    counts = collections.Counter(row["task"] for row in pretrain)
    total = sum(tasks.PRETRAIN.values())
    assert total == 100
    assert abs(counts["asr"] / len(pretrain) - 0.43) < 0.02
    english = sum(row["language"] == "en" for row in pretrain if row["task"] == "asr")
    assert abs(english / counts["asr"] - 0.35) < 0.03
    assert {row["language"] for row in pretrain} == set(texts.LANGUAGES)
    assert {row["task"] for row in sft} == {
        "voice_chat",
        "analysis",
        "several_clips",
        "talk",
        "written",
        "silence",
    }
    tested = collections.Counter((row["task"], row["set"]) for row in held_out)
    assert min(tested.values()) >= 30
    assert tested["asr", "engine"] >= 80
    least = held_out[: make_tiny_data.LEAST["test"]]
    assert {row["task"] for row in least} == {row["task"] for row in held_out}
    for language in texts.LANGUAGES:
        rows = [r for r in held_out if r["task"] == "asr" and r["language"] == language]
        assert len(rows) >= 60, language


DRAWS = (
    tasks.pretrain,
    tasks.sft,
    tasks.test,
    tasks.valid,
    tasks.pairs,
    tasks.engines,
    tasks.drills,
)


def test_one_seed_decides_everything() -> None:
    for draw in DRAWS:
        first = [draw(i, 3) for i in range(30)]
        assert [draw(i, 3) for i in reversed(range(30))] == first[::-1]
        assert [draw(i, 4) for i in range(30)] != first
    assert [tasks.pretrain(i, 0, "valid") for i in range(30)] != [
        tasks.pretrain(i, 0) for i in range(30)
    ]


def test_talk_is_turns_of_other_tasks_each_with_its_clip(train: list[Row]) -> None:
    rows = [row for row in train if row["task"] == "talk"]
    assert {len(row["clips"]) for row in rows} == {2, 3, 4}
    for row in rows:
        users = [message["content"] for message in row["messages"][::2]]
        assert users[0].startswith("<audio>")
        assert sum(content.startswith("<audio>") for content in users) == len(row["clips"])
    assert any(row["messages"][0]["content"] != "<audio>" for row in rows)


def test_what_is_written_is_asked_and_answered_without_a_clip(
    train: list[Row], held_out: list[Row]
) -> None:
    rows = [row for row in train if row["task"] == "written"]
    told = [
        (user["content"], model["content"])
        for row in rows
        for user, model in zip(row["messages"][::2], row["messages"][1::2], strict=True)
    ]
    assert len(told) == 4 * len(rows) > 1_000
    assert set(told) & set(questions.facts("arithmetic"))
    asked = [re.sub("^Translate into (English|Chinese): ", "", text) for text, _ in told]
    assert 0.3 < sum(text in dict(told) for text in asked) / len(asked) < 0.8
    assert not set(asked) & {clip["text"] for clip in speeches(held_out)}


def test_drills_are_short_answers_as_the_test_asks_for_them(
    drills: list[Row], held_out: list[Row]
) -> None:
    drilled = {(row["task"], row["subtask"]) for row in drills}
    assert drilled == {
        ("gender", ""),
        ("manner", "pitch"),
        ("analysis", "gender"),
        ("analysis", "pitch"),
        ("several_clips", "louder"),
        ("several_clips", "which_gender"),
        ("several_clips", "gender"),
        ("several_clips", "same_language"),
    }
    assert drilled <= {(row["task"], row["subtask"]) for row in held_out}
    for kind in drilled:  # nothing is won by guessing
        answers = [
            evaluate_tiny.expected(row) for row in drills if (row["task"], row["subtask"]) == kind
        ]
        few = collections.Counter(text for text in answers if not tasks.is_chinese(text))
        assert len(few) == 2 and max(few.values()) < 2 * min(few.values()), (kind, few)


def test_drills_are_right(drills: list[Row]) -> None:
    for row in drills:
        voices = [speech.voice(*clip["voice"]) for clip in row["clips"]]
        if row["task"] == "gender":
            assert row["gt"] == voices[0].gender
        elif row["subtask"] == "gender":
            question, answer = (message["content"] for message in row["messages"])
            sex = voices["second" in question].gender
            assert answer in (
                {"man": "A man.", "woman": "A woman."}[sex],
                {"man": "男的。", "woman": "女的。"}[sex],
            )
        elif row["subtask"] == "pitch":
            high = row["clips"][0]["pitch"] in tasks.HIGH[0]
            assert high or row["clips"][0]["pitch"] in tasks.LOW[0]
            said = evaluate_tiny.expected(row)
            assert said.lower().strip(".") == ("high" if high else "low")


def test_sums_in_every_language(train: list[Row]) -> None:
    rows = [row for row in train if (row["task"], row["subtask"]) == ("voice_chat", "arithmetic")]
    by_language = collections.Counter(row["language"] for row in rows)
    assert min(by_language[code] for code in OTHERS) > 20
    for row in rows:
        if row["language"] == "en":
            continue
        known = {
            question.sentence.text: question.answer
            for question in questions._foreign_sums(row["language"], False)
        }
        assert row["messages"][-1]["content"] == known[row["clips"][0]["text"]]


def test_answers_about_several_clips(train: list[Row], drills: list[Row]) -> None:
    rows = [
        row for row in train + drills if row["task"] == "several_clips" and len(row["clips"]) == 2
    ]
    louder = [row for row in rows if row["subtask"] == "louder"]
    assert len(louder) > 20
    for row in louder:
        first, second = (clip["gain_db"] for clip in row["clips"])
        last = row["messages"][-1]["content"]
        assert last == tasks.ONES[second > first]
        assert abs(first - second) >= 12
    for row in rows:
        if row["subtask"] == "which_gender":
            question, answer = (message["content"] for message in row["messages"][-2:])
            wanted = "woman" if "woman" in question else "man"
            asked = row["clips"][tasks.ONES.index(answer)]
            assert speech.voice(*asked["voice"]).gender == wanted
        if row["subtask"] == "same_language":
            languages = {clip["language"] for clip in row["clips"]}
            assert row["messages"][-1]["content"] == ("Yes." if len(languages) == 1 else "No.")
        if row["subtask"] == "says":
            question, answer = (message["content"] for message in row["messages"][-2:])
            which = 1 if "second" in question else 0
            assert row["clips"][which]["text"] == answer


# Files


def test_a_broken_off_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def render(clip: Row, seed: int) -> tuple[np.ndarray, list]:
        return np.full(1_600 + seed % 100, 0.5, np.float32), []

    monkeypatch.setattr(make_tiny_data.render, "render_with_sounds", render)
    monkeypatch.setattr(make_tiny_data, "CHUNK", 5)
    make_tiny_data.make(tmp_path, "sft", 12, 0, 1, None)
    whole = (tmp_path / "sft.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in whole.splitlines()]
    assert len(rows) == 12
    for i, row in enumerate(rows):
        assert row["messages"] == tasks.sft(i, 0)["messages"]
        sounds = [soundfile.info(tmp_path / clip) for clip in row["audios"]]
        assert all((s.subtype, s.samplerate, s.channels) == ("PCM_16", 16_000, 1) for s in sounds)
        assert abs(sum(s.duration for s in sounds) - row["seconds"]) < 0.01
    (tmp_path / "sft.jsonl").unlink()
    (tmp_path / "parts" / "sft-0-0000005-0000010.jsonl").unlink()
    chunk = make_tiny_data.make_chunk
    monkeypatch.setattr(make_tiny_data, "make_chunk", lambda job: made.append(job[2]) or chunk(job))
    monkeypatch.setattr(make_tiny_data.multiprocessing, "get_context", lambda _: InProcess)
    make_tiny_data.make(tmp_path, "sft", 12, 0, 1, None)
    assert made == [5]
    assert (tmp_path / "sft.jsonl").read_text(encoding="utf-8") == whole
    make_tiny_data.make(tmp_path / "other", "sft", 12, 1, 1, None)
    assert (tmp_path / "other" / "sft.jsonl").read_text(encoding="utf-8") != whole


def test_validation_by_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silence = np.zeros(1_600), []
    monkeypatch.setattr(make_tiny_data.render, "render_with_sounds", lambda clip, seed: silence)
    make_tiny_data.make(tmp_path, "valid", 12, 0, 1, None)
    forms = [list(make_tiny_data.read(tmp_path / f"valid-{f}.jsonl")) for f in ("pretrain", "sft")]
    assert [len(rows) for rows in forms] == [6, 6]
    assert all("prompt" in row for row in forms[0]) and all("messages" in row for row in forms[1])


class InProcess:
    """A pool of workers that is this process."""

    def __init__(self, workers: int):
        self.imap = map

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    Pool = classmethod(lambda cls, workers: cls(workers))


# Scores


def row(task: str, wanted: str, language: str = "en", **more: Any) -> Row:
    return {
        "task": task,
        "subtask": "",
        "set": "voices",
        "language": language,
        "gt": wanted,
        **more,
    }


def test_rows_that_cannot_be_scored_are_named(tmp_path: Path, capsys) -> None:
    about = {"task": "asr", "subtask": "", "set": "x", "language": "en", "seconds": 1.0}
    row = {**about, "audio": "a.flac", "prompt": "?", "gt": "one\u2028two"}
    good = json.dumps(row, ensure_ascii=False).encode()
    path = tmp_path / "test.jsonl"
    path.write_bytes(good + b"\n\n" + good)
    (first, second) = evaluate_tiny.read(path)
    assert first == second == {**row, "audio": str(tmp_path / "a.flac")}
    wrong = ["--model", "tiny", "--data", str(tmp_path)]
    for line, said in (
        (b"{", "line 2: no row of make_tiny_data.py ("),
        (b"[]", "line 2: no row"),
        (b"\xff\xfe", "line 2: no row"),
        (b'{"audio": "a", "prompt": "p", "gt": "g", "source": "s"}', "it lacks language, seconds"),
        (json.dumps({**about, "messages": []}).encode(), "it lacks audios"),
    ):
        path.write_bytes(good + b"\n" + line)
        assert evaluate_tiny.main(wrong) == 2
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1
    path.write_bytes(b"\n")
    assert evaluate_tiny.main(wrong) == 2 and "holds no rows" in capsys.readouterr().err
    path.write_bytes(good)
    for option in ("--json", "--answers"):
        assert evaluate_tiny.main([*wrong, option, str(tmp_path / "none" / "x")]) == 2
        assert "no such folder" in capsys.readouterr().err
    for option in ("--batch", "--limit"):
        with pytest.raises(SystemExit):
            evaluate_tiny.main([*wrong, option, "0"])


def test_normalise() -> None:
    assert evaluate_tiny.normalise("Twenty-one, please!") == "twenty one please"
    assert evaluate_tiny.normalise("<|fr|>Où est l'hôtel ?") == "où est l hôtel"
    assert evaluate_tiny.normalise("二十一，三。", unspaced=True) == "二十一三"


def test_error_rates() -> None:
    rows = [row("asr", "The red book."), row("asr", "Ten.")]
    assert evaluate_tiny.error_rate(rows, ["the red cook", "ten"], "wer") == 1 / 4
    assert evaluate_tiny.error_rate(rows, ["the red", "ten ten ten"], "wer") == 3 / 4
    han = [row("asr", "红色的书。", "zh")]
    assert evaluate_tiny.error_rate(han, ["红 色 的 树"], "cer") == 1 / 4
    assert evaluate_tiny.error_rate([row("asr", "Zwei Äpfel.", "de")], ["zwei apfel"], "cer") == 0.1


def test_scores_by_task_language_and_engine() -> None:
    rows = [
        row("asr", "One two."),
        row("asr", "One two.") | {"set": "engine"},
        row("asr", "One two.") | {"set": "flite"},
        row("asr_long", "Uno. Due tre.", "it"),
        row("asr_long", "一。二三。", "zh"),
        row("asr", "Le chat.", "fr"),
        row("language", "<|de|>Hallo.", "de"),
        row("language", "<|it|>Ciao.", "it"),
        row("sounds", "A bell rings."),
        {**row("voice_chat", ""), "messages": [{"content": "<audio>"}, {"content": "Paris."}]},
    ]
    answers = [
        "One.",
        "One two.",
        "Two.",
        "uno due tre",
        "一二四",
        "Le chat",
        "<|de|>Ballon.",
        "<|es|>Ciao.",
        "A siren.",
        "paris",
    ]
    scores = evaluate_tiny.score(rows, answers)
    assert {name: found["value"] for name, found in scores.items()} == {
        "wer.en": 0.5,
        "wer.unseen_engine": 0.0,
        "wer.unseen_voice_flite": 0.5,
        "cer.others_long": round(1 / 14, 4),
        "cer.fr": 0.0,
        "accuracy.language": 0.5,
        "accuracy.language.de": 1.0,
        "accuracy.language.it": 0.0,
        "accuracy.sounds": 0.0,
        "accuracy.voice_chat": 1.0,
    }
    assert scores["accuracy.language"]["rows"] == 2
    table = evaluate_tiny.table(scores)
    assert "| which language, accuracy | 2 | 50.0% |" in table.splitlines()
    assert set(evaluate_tiny.TITLES) >= {n for n in scores if n.count(".") == 1}


def test_a_conversation_is_given_without_its_last_answer() -> None:
    messages = [
        {"role": "user", "content": "<audio><audio>What is said?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "<audio>"},
        {"role": "assistant", "content": "Two."},
    ]
    turns = evaluate_tiny.turns({"messages": messages, "audios": ["a", "b", "c"]})
    clip = [{"type": "audio", "audio": name} for name in "abc"]
    assert [[item for item in turn["content"] if item] for turn in turns] == [
        [clip[0], clip[1], "What is said?"],
        ["One."],
        [clip[2]],
    ]


def test_pairs_take_the_wrong_answer_given_most() -> None:
    said = {**tasks.pairs(0, 0), "audios": ["a.wav"], "seconds": 1.0}
    right = said["messages"][-1]["content"]
    assert make_tiny_pairs.pair(said, [right, right.upper()]) is None
    assert make_tiny_pairs.pair(said, [right, ""]) is None
    made = make_tiny_pairs.pair(said, [right, "The book.", "<|en|>The book.", "No book at all."])
    assert made is not None
    assert made["rejected_response"] == "The book."
    assert made["messages"] == said["messages"] and made["audios"] == ["a.wav"]


def test_pairs_of_the_official_form_keep_the_tag() -> None:
    said = row("language", "<|de|>Drei Hunde.", "de", audio="a.wav", prompt="Recognize: ")
    assert make_tiny_pairs.pair(said, ["<|de|>drei hunde"]) is None
    made = make_tiny_pairs.pair(said, ["<|fr|>Drei Hunde.<|AUDIO|>", "<|fr|>Drei Hunde."])
    assert made == {**said, "rejected": "<|fr|>Drei Hunde."}
    # The tag alone is what the test counts; to learn from, the words count too.
    made = make_tiny_pairs.pair(said, ["<|de|>Drei Hunde.", "<|de|>Drei Katzen."])
    assert made is not None and made["rejected"] == "<|de|>Drei Katzen."


def test_pairs_are_of_every_task() -> None:
    drawn = collections.Counter(tasks.pairs(i, 0)["task"] for i in range(2_000))
    everything = {tasks.test(i, 0)["task"] for i in range(make_tiny_data.LEAST["test"])}
    assert set(drawn) == everything | {"talk", "written"} and drawn["silence"] < 500
