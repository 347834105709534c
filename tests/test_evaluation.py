"""Scores against the published rules, and runs that are stopped, resumed, and given nonsense."""

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

from qwen2audio_core import cli, tiny
from qwen2audio_core.assistant import Assistant, load
from qwen2audio_core.chat import AUDIO
from qwen2audio_core.errors import InputError
from qwen2audio_core.evaluation import harness, manifest, metrics, normalize, tasks
from qwen2audio_core.evaluation.tasks import Rules
from qwen2audio_core.holding import held
from qwen2audio_core.rows import parse
from qwen2audio_core.tokenizer import Tokenizer

for package in ("jiwer", "sacrebleu", "whisper_normalizer", "cn2an", "opencc"):
    pytest.importorskip(package)

ROOT = Path(cli.__file__).resolve().parents[1]
CLIPS = ROOT / "qwen2audio_core" / "assets" / "clips"
RECOGNIZE = "Detect the language and recognize the speech: "
CLIP = "<|audio_bos|><|AUDIO|><|audio_eos|>"


@pytest.fixture(scope="module")
def assistant(tmp_path_factory) -> Assistant:
    folder = tmp_path_factory.mktemp("evaluation") / "checkpoint"
    tiny.write_random(folder, dtype=torch.float32, std=0.125)
    return load(str(folder), device="cpu", dtype=torch.float32)


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def clip(name: str = "en_train") -> str:
    return str(CLIPS / f"{name}.flac")


def spoken(*languages: str) -> list[dict]:
    """Rows about the clips that ship, in the published form."""
    return [
        {
            "audio": clip(one["file"].removesuffix(".flac")),
            "prompt": f"{RECOGNIZE}<|{one['language']}|>",
            "gt": one["transcript"],
            "source": f"clips_{one['language']}",
        }
        for one in json.loads((CLIPS / "clips.json").read_text("utf-8"))
        if one["kind"] == "speech" and one["language"] in (languages or (one["language"],))
    ]


# Texts to words


def published(text: str, language: str) -> list[str]:
    """What the published script compares, but for Mandarin, said once more."""
    from opencc import OpenCC
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    out, inside = "", False
    for i, c in enumerate(text):
        if text.startswith("<|", i) and "|>" in text[i + 2 :]:
            inside = True
        if not inside:
            out += c
        if inside and text.endswith("|>", 0, i + 1):
            inside, out = False, out + " "
    text = " ".join(out.split())
    for sign in "!,.?;:":
        text = text.replace(f" {sign}", sign)
    if language == "yue":
        text = OpenCC("t2s").convert(text)
    if language == "en":
        text = EnglishTextNormalizer()(text)
    text = BasicTextNormalizer()(text).lower()
    words = [w for w in text.split() if {unicodedata.category(c)[0] for c in w} != {"P"}]
    return list("".join(words)) if language == "yue" else words


PIECES = (
    *("The", "don't", "Mr. O'Neil's", "20%", "$5.50", "twenty-one", "colour", "um,", "[noise]"),
    *("(aside)", "—", "...", "Ça", "l’été", "été", "NAÏVE", "<|en|>", "three hundred", "1,000"),
    *("佢哋", "喺邊度", "食飯？", "。", "ok", "!", " ", "\t", "gonna", "2nd", "10 000", "e-mail"),
)


@pytest.mark.parametrize("language", ["en", "fr", "yue", "de"])
def test_words_are_those_of_the_published_script(language: str) -> None:
    draw = random.Random(1)
    for _ in range(300):
        text = " ".join(draw.choices(PIECES, k=draw.randrange(1, 9)))
        assert normalize.items(text, language) == published(text, language), text


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("en", "<|en|> I'm Dr. Who's  colour , ok?", "i am doctor who is color ok"),
        ("fr", "L'Été : « ça va ? »", "l été ça va"),
        ("zh", "<|zh|>今天 25.5 度，Hello 世界！", "今天二十五点五度hello世界"),
        ("zh", "2023年5月3日，增长了80.03%。", "二零二三年五月三日增长了百分之八十点零三"),
        ("zh_tw", "三分之一、3/4", "三分之一四分之三"),
        ("yue", "佢哋喺邊度食飯？", "佢哋喺边度食饭"),
        ("ja", "駅は どこですか。", "駅はどこですか"),
        ("ko", "안녕하세요, 여러분!", "안녕하세요 여러분"),
        ("zh", "，。！", ""),
        ("en", "", ""),
    ],
)
def test_texts_become_words(language: str, text: str, words: str) -> None:
    unspaced = language in ("zh", "zh_tw", "yue", "ja")
    assert normalize.items(text, language) == (list(words) if unspaced else words.split())


def test_numbers_without_a_name_stay_as_they_are() -> None:
    assert "".join(normalize.items("共" + "9" * 40 + "个", "zh")) == "共" + "9" * 40 + "个"


# Words to scores


def edits(a: list[str], b: list[str]) -> int:
    """Levenshtein's distance by its recurrence."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def test_error_rates_are_edits_over_words_of_all_rows() -> None:
    draw = random.Random(2)
    pairs = [[draw.choices("abcd", k=draw.randrange(12)) for _ in range(2)] for _ in range(60)]
    expected, given = zip(*pairs, strict=True)
    found = metrics.error_rate(expected, given)
    wrong = sum(edits(a, b) for a, b in pairs)
    assert found.value == wrong / sum(map(len, expected))
    counts = [int(word) for word in found.detail.replace(",", "").split() if word.isdigit()]
    assert sum(counts[:3]) == wrong and counts[3] == sum(map(len, expected))
    assert found.low < found.value < found.high and found.rows == 60
    assert metrics.error_rate(expected, given) == found, "the same rows, another interval"


def test_more_rows_make_a_narrower_interval() -> None:
    expected, given = [["a", "b"]] * 20, [["a", "b"], ["a"]] * 10
    few, many = (metrics.error_rate(expected * n, given * n) for n in (1, 100))
    assert few.value == many.value == 0.25
    width = 2 * 1.96 * 0.25 / math.sqrt(20)  # each row is off by 0 or by half its words
    assert few.high - few.low == pytest.approx(width, rel=0.15)
    assert many.high - many.low == pytest.approx(width / 10, rel=0.15)


def test_answers_of_nothing_and_about_nothing_count() -> None:
    found = metrics.error_rate([["a"], []], [[], ["x", "y"]])
    assert found.value == 3.0 and found.detail == "0 wrong, 1 left out, 2 too many of 1"
    with pytest.raises(InputError, match="not scored: no expected answer has a word"):
        metrics.error_rate([[], []], [["x"], []])


def test_accuracy_is_to_the_letter() -> None:
    found = metrics.accuracy(["anger", "joy", "joy", "fear"], [" anger", "Joy", "joy.", "fear"])
    assert (found.value, found.detail) == (0.5, "2 of 4 right")


@pytest.mark.parametrize(("language", "tokenizer"), [("de", "13a"), ("zh", "zh"), ("en", "13a")])
def test_bleu_is_sacrebleus(language: str, tokenizer: str) -> None:
    import sacrebleu

    expected = ["Das ist ein kleines Haus, ja.", "Guten Morgen, Welt!", "今天天气怎么样？"]
    given = ["Das ist ein Haus, ja.", "Guten Morgen, Welt!", "今天的天气怎么样？"]
    found = metrics.bleu(expected, given, language)
    assert found.value == sacrebleu.corpus_bleu(given, [expected], tokenize=tokenizer).score
    assert f"tok:{tokenizer}" in found.detail and found.low <= found.value <= found.high


def test_japanese_bleu_says_what_it_needs(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "MeCab", None)
    with pytest.raises(InputError, match=r"BLEU of Japanese needs MeCab.*sacrebleu\[ja\]"):
        metrics.bleu(["はい"], ["はい"], "ja")


# Prompts to rules


@pytest.mark.parametrize(
    ("prompt", "by"),
    [
        *((f"{RECOGNIZE}<|{tag}|>", Rules("asr", tag)) for tag in ("en", "zh", "yue", "fr")),
        (
            "Detect the language and translate the speech into German: <|en|>",
            Rules("translate", "de"),
        ),
        (
            "Detect the language and translate the speech into Mandarin: <|en|>",
            Rules("translate", "zh"),
        ),
        (
            "Detect the language and translate the speech into English: <|it|>",
            Rules("translate", "en"),
        ),
        ("Recognize the emotion with keywords in English:", Rules("label")),
        ("Classify the human vocal sound to VocalSound in English:", Rules("label")),
    ],
)
def test_published_prompts_tell_their_rules(prompt: str, by: Rules) -> None:
    assert tasks.rules(prompt) == by


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("What is said?",), "none of the published ones.*--task asr, translate, label, none"),
        ((RECOGNIZE,), "does not tell the answers' language: say it, --language"),
        (("Write it down.", "asr"), "does not tell the answers' language"),
        (("Write it down.", "asr", "xx"), "language 'xx' is not one of en, de"),
        ((f"{RECOGNIZE}<|unknown|>",), "language 'unknown' is not one of"),
    ],
)
def test_other_prompts_must_be_told(words: tuple[str, ...], line: str) -> None:
    with pytest.raises(InputError, match=line):
        tasks.rules(*words)


def test_rules_can_be_told() -> None:
    assert tasks.rules("Write it down.", "asr", "de") == Rules("asr", "de")
    assert tasks.rules(f"{RECOGNIZE}<|en|>", "label") == Rules("label")
    assert tasks.rules("anything", "none") == Rules("none")


# Files to items


def test_rows_of_every_form_are_read(tmp_path: Path) -> None:
    question = {"role": "user", "content": "<audio>What is it?"}
    rows = [
        {"audio": "a.wav", "prompt": f"{RECOGNIZE}<|en|>", "gt": "hello", "source": "s"},
        {"messages": [question, {"role": "assistant", "content": "a dog"}], "audios": ["a.wav"]},
        {"messages": [question], "audios": ["a.wav"], "id": 7},
        {"query": f"{CLIP}\nWhat is it?", "audio": "a.wav", "id": 8},
        {"query": "<audio>What is it?", "response": "a cat", "audio": "a.wav"},
        {"audio": "a.wav", "prompt": "Say anything."},
    ]
    for file in (write(tmp_path / "rows.jsonl", rows), tmp_path / "rows.json"):
        file.write_text(
            json.dumps(rows) if file.suffix == ".json" else file.read_text("utf-8"), "utf-8"
        )
        items = manifest.read(file, "none")
        assert [item.expected for item in items] == ["hello", "a dog", None, None, "a cat", None]
        assert [item.number for item in items] == [1, 2, 3, 4, 5, 6]
        assert items[2].prompt == "<audio>What is it?" and items[3].raw["id"] == 8
        assert items[0].row is not None and items[0].row.clips == [str(tmp_path / "a.wav")]
    alone = manifest.read(write(tmp_path / "one.jsonl", rows[2:4]))
    assert {item.rules for item in alone} == {Rules("none")}, "there is nothing to compare"


def test_silence_may_be_expected_but_not_learned(tmp_path: Path) -> None:
    row = {"audio": "a.wav", "prompt": f"{RECOGNIZE}<|en|>", "gt": ""}
    (item,) = manifest.read(write(tmp_path / "rows.jsonl", [row]))
    assert item.expected == "" and item.rules == Rules("asr", "en")
    with pytest.raises(InputError, match="nothing to learn"):
        parse(row, "here", tmp_path)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([], "holds no rows"),
        ([{"audio": "a.wav"}], ":1: unknown form, found audio"),
        ([3], ":1: a int, expected an object"),
        (
            [{"prompt": "x", "gt": 1, "audio": "a.wav"}] * 2,
            ":1: gt is 1; and 1 more bad rows: .*:2",
        ),
        ([{"query": "What?", "audio": "a.wav"}], "0 <audio> in the turns for 1 audios"),
        (
            [{"messages": [{"role": "assistant", "content": "x"}]}],
            "no turn of the user's to answer",
        ),
        ([{"prompt": "x", "gt": "y", "clip_audio": "a.wav"}], "clip_audio is not read"),
        (
            [{"gt": "a", "response": "b"}, {"audio": "a.wav", "prompt": "x", "gt": "y"}],
            "some rows have a response and some have none",
        ),
        ([{"gt": "a", "response": 1}], ":1: response is 1, expected a text"),
        (
            [{"gt": "a", "response": "b", "prompt": "x"}],
            "row 1: its prompt 'x' is none of the published",
        ),
    ],
)
def test_bad_rows_are_one_line(tmp_path: Path, rows: list, line: str) -> None:
    with pytest.raises(InputError, match=line) as caught:
        manifest.read(write(tmp_path / "rows.jsonl", rows))
    assert "\n" not in str(caught.value)


def test_parts_are_all_rows_once() -> None:
    items = list(range(10))
    parts = [manifest.part_of(items, f"{k}/3") for k in (1, 2, 3)]  # type: ignore[arg-type]
    assert sorted(itertools.chain(*parts)) == items and manifest.part_of(items, None) == items  # type: ignore[arg-type]
    for wrong in ("0/3", "4/3", "3", "1/0", "-1/2", "a/b", "11/11"):
        with pytest.raises(InputError, match=r"is not K/N|is empty"):
            manifest.part_of(items, wrong)  # type: ignore[arg-type]


# Rows to prompts


@pytest.fixture(scope="module")
def official(shared: Path) -> Path:
    return shared / "official"


def test_rows_are_asked_as_transformers_is(
    official: Path, assistant: Assistant, tmp_path: Path
) -> None:
    """The published rows and queries, put by its processor as the official scripts do."""
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    theirs = transformers.AutoTokenizer.from_pretrained(official)
    processor = transformers.Qwen2AudioProcessor(extractor, theirs)
    ours = Assistant(assistant.model, Tokenizer.from_folder(official), assistant.settings)
    samples = torch.zeros(24_000).numpy()
    pytest.importorskip("soundfile").write(tmp_path / "silence.wav", samples, 16_000)
    system = {"role": "system", "content": "You are a helpful assistant."}

    def encoded(text: str) -> list[int]:
        found = processor(text=text, audio=[samples], sampling_rate=16_000, return_tensors="pt")
        return found["input_ids"][0].tolist()

    def asked(row: dict) -> list[int]:
        read = parse({**row, "audio": "silence.wav"}, "here", tmp_path, answered=False)
        return harness.encode(ours, read).ids

    prompt = f"{RECOGNIZE}<|zh|>"
    assert asked({"prompt": prompt, "gt": "x"}) == encoded(CLIP + prompt)
    for query in (f"{CLIP}What is it?", f"Audio 1: {CLIP}\nWhat is it?", f"What?\n{CLIP}"):
        turns = [system, {"role": "user", "content": query}]
        text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert asked({"query": query}) == encoded(text), query
    turns = [system, {"role": "user", "content": f"Audio 1: {CLIP}\nWhat is it?"}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert asked({"query": "<audio>What is it?"}) == encoded(text)


def test_turns_are_asked_without_the_answer_expected(assistant: Assistant) -> None:
    question = {"role": "user", "content": "<audio>What is it?"}
    answer = {"role": "assistant", "content": "a secret"}
    rows = [{"messages": turns, "audios": [clip()]} for turns in ([question], [question, answer])]
    ids = [harness.encode(assistant, parse(r, "here", CLIPS, answered=False)).ids for r in rows]
    assert ids[0] == ids[1] and assistant.tokenizer.id_of(AUDIO) in ids[0]
    assert "secret" not in assistant.tokenizer.decode(ids[1])


# Prompts to answers


def test_rows_are_answered_alike_alone_and_together(assistant: Assistant, tmp_path: Path) -> None:
    items = manifest.read(write(tmp_path / "rows.jsonl", spoken()))
    options = {"max_new_tokens": 8}
    found = [
        {a.item.number: a.response for a in harness.ask(assistant, items, batch_size=n, **options)}
        for n in (1, 3, 8)
    ]
    assert found[0] == found[1] == found[2] and len(found[0]) == len(items)
    lone = assistant.complete(
        CLIP + items[0].prompt, clip("en_capital"), greedy=True, min_new_tokens=1, **options
    )
    assert found[0][1] == lone.text


def test_a_row_that_cannot_be_heard_does_not_stop_the_others(
    assistant: Assistant, tmp_path: Path
) -> None:
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    rows = [{**spoken("en")[0], "audio": str(tmp_path / "broken.wav")}, *spoken("de", "fr")]
    items = manifest.read(write(tmp_path / "rows.jsonl", rows))
    answers = list(harness.ask(assistant, items, max_new_tokens=2))
    errors = [answer for answer in answers if answer.error]
    assert len(answers) == 3 and len(errors) == 1
    assert errors[0].error.startswith(f"{tmp_path}/rows.jsonl:1: ") and not errors[0].response


def test_long_clips_are_errors_unless_told(assistant: Assistant, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "long.wav", torch.rand(31 * 16_000).numpy() * 0.1, 16_000)
    row = {**spoken("en")[0], "audio": "long.wav"}
    items = manifest.read(write(tmp_path / "rows.jsonl", [row]))
    (answer,) = harness.ask(assistant, items, max_new_tokens=2)
    assert "31" in answer.error and "30" in answer.error
    notices: list[str] = []
    (answer,) = harness.ask(assistant, items, long="cut", notice=notices.append, max_new_tokens=2)
    assert not answer.error and len(notices) == 1 and "rows.jsonl:1: " in notices[0]


def test_groups_follow_one_another(assistant: Assistant, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(harness, "TOGETHER", 1)
    rows = spoken() * 2
    items = manifest.read(write(tmp_path / "rows.jsonl", rows))
    answers = list(harness.ask(assistant, items, batch_size=3, max_new_tokens=1))
    assert sorted(answer.item.number for answer in answers) == list(range(1, len(rows) + 1))
    assert list(harness.ask(assistant, [])) == []


# The command


@pytest.fixture
def run(monkeypatch, capsys):
    """run("rows.jsonl", ...) -> (exit code, stdout, stderr), in this process."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qwen2audio", "evaluate", *map(str, words)])
        monkeypatch.setenv("QWEN2AUDIO_NO_NOTICE", "1")
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


def no_model(monkeypatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("qwen2audio_core.evaluation.command.load", refuse)


def test_a_run_is_scored_written_down_and_not_asked_twice(run, tmp_path: Path, monkeypatch) -> None:
    file, out = write(tmp_path / "rows.jsonl", spoken("de", "zh")), tmp_path / "out"
    code, table, told = run(file, "-o", out)
    assert code == 0 and "scores.json" in told, told
    assert "clips_de  asr de  WER 0.00 %, 1 row, 0 wrong" in table
    assert "clips_zh  asr zh  CER 0.00 %" in table
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text("utf-8").splitlines()]
    assert {a["response"] for a in answers} == {row["gt"] for row in spoken("de", "zh")}
    assert {a["audio_path"] for a in answers} == {row["audio"] for row in spoken("de", "zh")}
    scores = json.loads((out / "scores.json").read_text("utf-8"))
    assert [one["value"] for one in scores["scores"]] == [0.0, 0.0] and scores["failed"] == 0
    assert scores["model"] == "tiny" and scores["generation"]["max_new_tokens"] == 256

    no_model(monkeypatch)
    code, again, told = run(file, "-o", out)
    assert (code, again) == (0, table) and "2 of 2 rows are answered there" in told
    code, scored, _ = run(out / "answers.jsonl")
    assert (code, scored) == (0, table), "answers are rows that need no model"
    code, printed, _ = run(out / "answers.jsonl", "--json")
    assert json.loads(printed)["scores"] == scores["scores"]


def test_mistakes_are_written_down_as_they_were_compared(run, tmp_path: Path) -> None:
    rows, out = spoken("de") + spoken("zh"), tmp_path / "out"
    rows[0] = {**rows[0], "gt": "Ich möchte ZWEI Tassen, bitte."}
    rows.append({**spoken("fr")[0], "prompt": "Which language is this?", "gt": "French"})
    code, _, _ = run(write(tmp_path / "rows.jsonl", rows[:2]), "-o", out)
    lines = (out / "wrong.jsonl").read_text("utf-8").splitlines()
    (one,) = map(json.loads, lines)
    assert code == 0 and one["row"] == 1 and one["expected"] == "ich möchte zwei tassen bitte"
    assert one["wrong"] == edits(one["expected"].split(), one["given"].split())
    items = manifest.read(write(tmp_path / "rows.jsonl", rows), "label")
    texts = [(items[0], " Ich möchte ZWEI Tassen, bitte."), (items[2], "Spanish")]
    (one,) = harness.mistakes(texts, harness.scores(texts))
    assert one == {
        **{"wrong": 1, "row": 3, "source": "clips_fr"},
        **{"expected": "French", "given": "Spanish"},
    }


def test_a_stopped_run_goes_on(run, tmp_path: Path) -> None:
    file, out = write(tmp_path / "rows.jsonl", spoken("de", "fr", "it")), tmp_path / "out"
    options = ("-o", out, "--batch-size", 1)
    _, whole, _ = run(file, *options)
    lines = (out / "answers.jsonl").read_bytes().splitlines(keepends=True)
    kept = {**json.loads(lines[0]), "response": "kept"}
    torn = json.dumps(kept).encode() + b"\n" + lines[1][:20]
    (out / "answers.jsonl").write_bytes(torn)
    code, table, told = run(file, *options)
    assert code == 0 and "1 of 3 rows are answered there" in told
    lines = (out / "answers.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 3 and json.loads(lines[0])["response"] == "kept"
    assert table != whole and table.count("WER 0.00 %") == 2


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (("--model", "random"), "another model \\('tiny', now 'random'\\)"),
        (("--batch-size", "2"), "another batch_size"),
        (("--repetition-penalty", "1.5"), "another generation"),
        (("--part", "1/1"), "another part"),
        (("rows",), "another rows"),
    ],
)
def test_another_run_does_not_go_on_in_a_folder(
    run, tmp_path: Path, monkeypatch, change: tuple[str, ...], key: str
) -> None:
    file, out = write(tmp_path / "rows.jsonl", spoken("de")), tmp_path / "out"
    run(file, "-o", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    no_model(monkeypatch)
    if change == ("rows",):
        write(file, spoken("de", "fr"))
        change = ()
    code, table, told = run(file, "-o", out, *change)
    assert (code, table) == (2, "")
    with pytest.raises(InputError, match=key):
        raise InputError(told)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_rows_that_fail_are_named_and_asked_again(run, tmp_path: Path) -> None:
    rows, out = spoken("de", "fr"), tmp_path / "out"
    rows[0]["audio"] = "later.flac"
    file = write(tmp_path / "rows.jsonl", rows)
    code, table, told = run(file, "-o", out)
    assert code == 2 and "rows.jsonl:1: " in told and "not in the scores: 1 of 2 rows" in told
    assert "clips_fr" in table and "clips_de" not in table
    assert json.loads((out / "scores.json").read_text("utf-8"))["failed"] == 1
    (tmp_path / "later.flac").write_bytes(Path(spoken("de")[0]["audio"]).read_bytes())
    code, table, _ = run(file, "-o", out)
    assert code == 0 and "clips_fr" in table and "clips_de" in table


def test_a_model_that_is_not_there_leaves_no_folder(run, tmp_path: Path) -> None:
    file, out = write(tmp_path / "rows.jsonl", spoken("de")), tmp_path / "out"
    for words in (("-m", tmp_path / "nothing"), ("--repetition-penalty", "-1")):
        code, table, told = run(file, "-o", out, *words)
        assert (code, table) == (2, "") and told.count("\n") == 1 and not out.exists()


def test_a_second_run_in_the_folder_is_refused(run, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("fcntl", reason="this system has no such locks")
    file, out = write(tmp_path / "rows.jsonl", spoken("de")), tmp_path / "out"
    no_model(monkeypatch)
    with held(out):
        code, table, told = run(file, "-o", out)
    assert (code, table) == (2, "") and "another run is writing there" in told


def test_texts_that_are_no_unicode_come_back_as_they_were(run, tmp_path: Path) -> None:
    row = {**spoken("de")[0], "source": "half \ud800\n\x1b[2J", "gt": "Ich \ud800 trinke"}
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_text(json.dumps(row) + "\n")
    code, table, _ = run(file, "-o", out)
    assert code == 0 and table.count("\n") == 1 and "\x1b" not in table
    (told,) = [json.loads(line) for line in (out / "answers.jsonl").read_text("utf-8").splitlines()]
    assert told["gt"] == row["gt"] and told["source"] == row["source"]
    assert run(file, "-o", out)[1] == run(out / "answers.jsonl")[1] == table


def test_a_source_without_words_takes_no_other_score_along(run, tmp_path: Path) -> None:
    rows = [*spoken("de"), {**spoken("fr")[0], "gt": "...", "source": "silence"}]
    code, table, _ = run(write(tmp_path / "rows.jsonl", rows))
    assert code == 0 and "WER 0.00 %" in table
    assert "silence   asr fr  not scored: no expected answer has a word" in table


def test_parts_come_together_again(run, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", spoken("de", "fr", "it"))
    _, whole, _ = run(file)
    answers = b""
    for k in (1, 2):
        run(file, "-o", tmp_path / str(k), "--part", f"{k}/2")
        answers += (tmp_path / str(k) / "answers.jsonl").read_bytes()
    (tmp_path / "all.jsonl").write_bytes(answers)
    assert run(tmp_path / "all.jsonl")[1] == whole


def test_results_of_the_official_scripts_are_scored(run, tmp_path: Path, monkeypatch) -> None:
    no_model(monkeypatch)
    rows = [
        {"gt": "hello world", "response": "<|en|>Hello, word!", "source": "x", "audio_path": "a"},
        {"gt": "good day", "response": "Good day.", "source": "x", "audio_path": "b"},
    ]
    (tmp_path / "results.json").write_text(json.dumps(rows), "utf-8")
    file = tmp_path / "results.json"
    code, table, _ = run(file, "--task", "asr", "--language", "en")
    assert code == 0 and "x  asr en  WER 25.00 %" in table and "1 wrong" in table
    code, _, told = run(file)
    assert code == 2 and "--task" in told
    code, _, told = run(file, "--task", "asr", "--language", "en", "-o", tmp_path / "out")
    assert code == 2 and "leave --out away" in told and not (tmp_path / "out").exists()


def test_answers_that_nobody_compares_are_written_down(run, tmp_path: Path) -> None:
    rows = [{"audio": clip("sound_bell"), "query": "<audio>What is that sound?", "id": 4}]
    file, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    code, table, _ = run(file, "-o", out)
    assert code == 0 and "not scored" in table
    (line,) = (out / "answers.jsonl").read_text("utf-8").splitlines()
    told = json.loads(line)
    assert told["id"] == 4 and told["gt"] is None and "bell" in told["response"]
    code, _, error = run(file, "--task", "label")
    assert code == 2 and "has no gt that an answer could be compared with" in error


@pytest.mark.parametrize("package", ["jiwer", "sacrebleu", "whisper_normalizer.basic", "cn2an"])
def test_what_scores_need_is_asked_for_first(
    run, tmp_path: Path, monkeypatch, package: str
) -> None:
    language = {"cn2an": "zh", "sacrebleu": "en"}.get(package, "en")
    row = {**spoken("en")[0], "prompt": f"{RECOGNIZE}<|{language}|>"}
    if package == "sacrebleu":
        row["prompt"] = "Detect the language and translate the speech into English: <|de|>"
        monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    monkeypatch.setitem(sys.modules, package, None)
    normalize._rules.cache_clear()
    no_model(monkeypatch)
    code, table, told = run(write(tmp_path / "rows.jsonl", [row]))
    normalize._rules.cache_clear()
    assert (code, table) == (2, "") and "[eval]" in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("missing.jsonl",), "missing.jsonl: no such file"),
        ((".",), "cannot read it"),
        (("rows.jsonl", "-o", "file"), "file: cannot be made (File exists)"),
        (("rows.jsonl", "-o", "foreign"), "of no run that is known"),
        (("rows.jsonl", "-o", "broken"), "run.json: not JSON"),
        (("rows.jsonl", "-o", "other"), "answers.jsonl:1: no answer of a run"),
        (("rows.jsonl", "--part", "3/2"), "part '3/2' is not K/N"),
        (("rows.jsonl", "--language", "xx"), "language 'xx' is not one of"),
    ],
)
def test_nonsense_is_one_line(run, tmp_path: Path, monkeypatch, words: tuple, line: str) -> None:
    monkeypatch.chdir(tmp_path)
    no_model(monkeypatch)
    write(tmp_path / "rows.jsonl", spoken("de"))
    (tmp_path / "file").write_text("")
    for name in ("foreign", "broken", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "foreign" / "answers.jsonl").write_text("")
    (tmp_path / "broken" / "run.json").write_text("{")
    if "other" in words:
        about = {
            **{"rows": harness.digest(Path("rows.jsonl")), "model": "tiny", "dtype": None},
            **{"quantize": None, "part": None, "batch_size": 8, "long": "error"},
            "generation": harness.PUBLISHED,
        }
        (tmp_path / "other" / "run.json").write_text(json.dumps(about))
        (tmp_path / "other" / "answers.jsonl").write_text('{"row": []}\n')
    code, table, told = run(*words)
    assert (code, table) == (2, "") and line in told and told.count("\n") == 1, told


# The guide


def test_the_guide_runs_as_it_stands(tmp_path: Path, monkeypatch) -> None:
    text = (ROOT / "docs" / "evaluate.md").read_text("utf-8")
    first, *others = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    printed = re.search(r"prints a line for each.*?```\n(.*?)```", text, re.DOTALL)
    assert printed is not None
    (tmp_path / "qwen2audio_core").symlink_to(ROOT / "qwen2audio_core")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "qwen2audio").write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -m qwen2audio_core "$@"\n'
    )
    (tmp_path / "bin" / "qwen2audio").chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def bash(script: str) -> str:
        done = subprocess.run(
            ["bash", "-ec", script],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert bash(first) == printed[1]
    again, found = bash("\n".join(others)).split("\n{")
    assert again + "\n" == printed[1]
    assert json.loads("{" + found)["scores"][0]["rows"] == 2
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "en asr en WER 14.29 %" in done.stdout, done.stderr


def test_the_guide_names_the_published_prompts() -> None:
    text = (ROOT / "docs" / "evaluate.md").read_text("utf-8").replace("\\|", "|")
    table = re.findall(r"^\| `([^`]+)`[^|]*(?:\|[a-z]+\|[^|]*)?\| `(\w+)`", text, re.MULTILINE)
    assert len(table) == 4
    for prompt, task in table:
        assert tasks.rules(prompt).task == task
