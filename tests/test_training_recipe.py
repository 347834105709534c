"""docs/finetune.md as a person follows it, and the other ways to look at a data set."""

import errno
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_rows import SHAPE, chat_row, checkpoint, official_rows, settings, tone, write_lines

from qwen2audio_core import cli, ops
from qwen2audio_core.config import Qwen2AudioConfig
from qwen2audio_core.errors import InputError
from qwen2audio_core.training import inspect, loop, lora
from qwen2audio_core.training.make_rows import make
from qwen2audio_core.weights import load_model

ROOT = Path(cli.__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "finetune.md"
SMALL = Path(cli.__file__).parent / "assets" / "tiny"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return checkpoint(tmp_path_factory.mktemp("base") / "model", torch.bfloat16)


@pytest.fixture
def run(monkeypatch, capsys):
    """run("train", ...) -> what it printed, in this process."""

    def call(*words, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["qwen2audio", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        assert stop.value.code == code, captured.err
        return captured.out + (captured.err if code else "")

    return call


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line]
    assert len(lines) >= 7
    return [shlex.split(line)[1:] for line in lines]


def follow(run, model: str, steps: int, more: list[str]) -> list[str]:
    """Every command of the guide, on another model and for fewer steps. Returns their outputs."""
    outputs = []
    for words in commands():
        if words[0] in ("train", "merge"):
            words = [*words, "--model", model]
        if "--steps" in words:
            words = [*words, *more]
            for option, value in (
                ("--steps", steps),
                ("--save-every", steps),
                ("--eval-every", steps),
            ):
                words[words.index(option) + 1] = str(value)
        outputs.append(run(*words))
    return outputs


def test_the_guide_runs_as_it_stands(base, run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recordings").mkdir()
    for i in range(10):
        tone(tmp_path / "recordings" / f"{i + 1:04}.wav", 200 + 40 * i, 0.4)
        (tmp_path / "recordings" / f"{i + 1:04}.txt").write_text("abc"[i % 3] + "\n")
    outputs = follow(run, base, 2, ["--samples", "2", "--device", "cpu"])
    assert "9 rows" in outputs[0] and "1 rows" in outputs[0]
    assert "9 good, 0 bad" in outputs[1]
    assert "·<|endoftext|>]" in outputs[2]
    assert "total" in outputs[3]
    merged = load_model(tmp_path / "my-model")
    expected = load_model(base)
    lora.load(expected, tmp_path / "run" / "adapter")
    lora.merge(expected)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor), name
    changed = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(load_model(base).state_dict()[changed], merged.state_dict()[changed])


@pytest.mark.slow
def test_the_guide_lowers_the_error_on_new_words(run, tmp_path, monkeypatch) -> None:
    """On words that the small model never learned, in voices that the adapter never heard."""
    if not (SMALL / "config.json").exists():
        pytest.skip("the small model is not part of this checkout")
    if shutil.which("espeak-ng") is None:
        pytest.skip("needs the program espeak-ng to speak the new words")
    words = ["walnut", "lantern", "hammer", "violin", "pepper", "ladder", "saddle", "magnet"]
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)

    def say(folder: str, count: int, voices: list[str]) -> None:
        (tmp_path / folder).mkdir()
        for i in range(count):
            text = " ".join(draw.choices(words, k=draw.randint(1, 3)))
            path = tmp_path / folder / f"{i + 1:04}.wav"
            speed, pitch = str(draw.randint(130, 180)), str(draw.randint(35, 65))
            voice = draw.choice(voices)
            command = ["espeak-ng", "-v", voice, "-s", speed, "-p", pitch, "-w", str(path), text]
            subprocess.run(command, check=True)
            path.with_suffix(".txt").write_text(text)

    say("recordings", 300, ["en-us+m1", "en-us+m3", "en-us+f1", "en-us+f2", "en-gb+m2"])
    say("held", 60, ["en-us+f4", "en-gb+m5"])
    own = "Detect the language and recognize the speech: <|en|>"
    for name, prompt in (("own", own), ("guide", "Recognize the speech:")):
        run("rows", "held", "--out", name, "--valid-part", "0", "--prompt", prompt)

    def error(prompt: str, adapter: Path | None) -> float:
        rows = f"{prompt}/train.jsonl"
        chosen = settings(
            str(SMALL), [rows], tmp_path / "measure", valid=rows, samples=60, eval_rows=60,
            bf16=True,
        )  # fmt: skip
        measured = loop.Run(chosen, loop.parallel.start("cpu"), loop.read_rows(chosen))
        if adapter is not None:
            lora.load(measured.trainee.model, adapter)
        measured.evaluate()
        lines = (tmp_path / "measure" / "log.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["cer"]

    # The better of the two: to be asked in words it knows is not what it is to learn.
    before = min(error("own", None), error("guide", None))
    more = ["--samples", "4", "--lr", "1e-3", "--device", "cpu"]
    more += ["--target", "language_model.model.layers.*_proj", "--target", "audio_tower.layers.*"]
    follow(run, str(SMALL), 150, more)
    after = error("guide", tmp_path / "run" / "adapter")
    assert after < 0.6 * before, (before, after)


def test_a_folder_of_clips_becomes_rows(run, tmp_path) -> None:
    folder = tmp_path / "clips"
    (folder / "deep").mkdir(parents=True)
    for name, text in (("a.wav", "eins"), ("deep/b.wav", "zwei")):
        tone(folder / name, 300, 0.5)
        (folder / name).with_suffix(".txt").write_text(text + "\n")
    run(
        "rows", folder, "--out", tmp_path / "data", "--valid-part", "0.5", "--prompt", "Say: <|de|>"
    )
    lines = [(tmp_path / "data" / f"{name}.jsonl").read_text() for name in ("train", "valid")]
    found = [json.loads(line) for text in lines for line in text.splitlines()]
    assert sorted(row["gt"] for row in found) == ["eins", "zwei"]
    assert all(row["prompt"] == "Say: <|de|>" and row["seconds"] == 0.5 for row in found)
    run("rows", folder, "--out", tmp_path / "few", "--valid-part", "0.1")
    assert len((tmp_path / "few" / "valid.jsonl").read_text().splitlines()) == 1


def test_rows_are_not_written_over_others_unasked(run, tmp_path) -> None:
    """Nor is an empty file of rows to measure on written, or one of before left beside new rows."""
    folder, out = tmp_path / "clips", tmp_path / "data"
    folder.mkdir()
    for name in ("a", "b"):
        tone(folder / f"{name}.wav", 300, 0.5)
        (folder / f"{name}.txt").write_text("eins\n")
    run("rows", folder, "--out", out, "--valid-part", "0")
    assert [path.name for path in out.iterdir()] == ["train.jsonl"]
    (out / "train.jsonl").write_text("mine")
    said = run("rows", folder, "--out", out, code=2)
    assert said == (
        f"error: {out}/train.jsonl: is there already; choose another folder, or replace it with"
        " --overwrite\n"
    )
    assert (out / "train.jsonl").read_text() == "mine"
    run("rows", folder, "--out", out, "--overwrite")
    assert len((out / "train.jsonl").read_text().splitlines()) == 1
    (out / "train.jsonl").unlink()
    assert f"error: {out}/valid.jsonl: is there" in run("rows", folder, "--out", out, code=2)
    run("rows", folder, "--out", out, "--valid-part", "0", "--overwrite")
    assert [path.name for path in out.iterdir()] == ["train.jsonl"]
    run("rows", folder, "--out", tmp_path / "most", "--valid-part", "0.9")
    assert len((tmp_path / "most" / "train.jsonl").read_text().splitlines()) == 1


def test_texts_and_clips_without_the_other_are_named(tmp_path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("a.wav", "b.oga", "c.AIFF", "d.flac"):  # what a file holds is found by itself
        tone(folder / name, 300, 31 if name == "b.oga" else 0.5)
        (folder / name).with_suffix(".txt").write_text("eins\n")
    for name in ("e.wv", "f.wv", "g.wv", "h.wv"):
        (folder / name).write_bytes(b"wvpk")
        (folder / name).with_suffix(".txt").write_text("eins\n")
    said: list[str] = []
    found = list(make(folder, "x", "asr", said.append))
    assert [Path(row["audio"]).name for row in found] == ["a.wav", "c.AIFF", "d.flac"]
    assert said == [
        f"{folder}: left out, 4 .txt without a clip of that name: e.txt, f.txt, g.txt and 1 more",
        f"{folder}: left out, 1 clips over 30 s, cut them into pieces: b.oga",
    ]


def test_a_folder_that_makes_no_rows_is_one_line(run, tmp_path) -> None:
    folder = tmp_path / "clips"

    def refused(place=folder) -> str:
        said = run("rows", place, "--out", tmp_path / "data", code=2)
        assert not (tmp_path / "data").exists()
        return said.removeprefix(f"error: {place}: ").removesuffix("\n")

    assert refused() == "no such folder"
    (folder / "deep").mkdir(parents=True)
    said = refused()
    assert said.startswith("no clip here, looked for .3g2") and ".aiff, " in said
    for name in ("a", "b", "c", "d", "deep/e"):
        tone(folder / f"{name}.wav", 300, 0.5)
    assert refused(folder / "a.wav") == "not a folder, nor a table (tsv, csv)"
    no_text = "with no .txt of the same name"
    assert refused() == f"of 5 clips, 5 {no_text}: a.wav, b.wav, c.wav and 2 more"
    (folder / "a.txt").write_text("eins")
    (folder / "b.txt").write_bytes("zwölf".encode("latin-1"))
    (folder / "deep" / "e.txt").write_text("\n")
    assert refused() == (
        f"of 5 clips, 1 with a text that is not UTF-8: b.txt; 2 {no_text}: c.wav, d.wav;"
        " 1 with an empty text: deep/e.txt"
    )


def test_what_real_folders_hold(run, tmp_path) -> None:
    """macOS's own files, endings in capitals, lines, one text for two clips, names of other days,
    and clips that cannot be heard, all of which are counted at once."""
    folder = tmp_path / "clips"
    (folder / "__MACOSX").mkdir(parents=True)
    for name in ("._a.wav", "__MACOSX/a.wav"):
        (folder / name).write_bytes(b"x")
    tone(folder / "a.wav", 300, 0.5)
    (folder / "a.TXT").write_bytes("\ufeffeins\r\nzwei \n".encode())
    (row,) = make(folder, "x", "asr", print)
    assert row["gt"] == "eins zwei" and Path(row["audio"]).name == "a.wav"

    tone(folder / "b.wav", 300, 0.01)
    (folder / "c.wav").write_text("no sound")
    for name in "bc":
        (folder / f"{name}.txt").write_text("x")
    with pytest.raises(InputError, match=r"b\.wav: too short to be heard; and 1 more: c\.wav$"):
        list(make(folder, "x", "asr", print))
    tone(folder / "b.flac", 300, 0.5)
    (folder / "c.txt").write_bytes("zwölf".encode("utf-16-le"))
    name = os.fsdecode(b"stra\xdfe.wav")
    try:
        tone(folder / "d.wav", 300, 0.5)
        os.rename(folder / "d.wav", folder / name)
    except OSError:
        name = ""  # a disk that takes UTF-8 alone
    with pytest.raises(InputError) as caught:
        list(make(folder, "x", "asr", print))
    said = str(caught.value)
    assert "2 with a clip of the same name: b.flac, b.wav" in said
    assert "1 with a text that is not UTF-8: c.txt" in said
    assert not name or "1 with a name that is not UTF-8: stra" in said
    assert said.encode()


def test_librispeech_and_common_voice(run, tmp_path) -> None:
    """A LibriSpeech folder, and tables as Common Voice and Hugging Face's datasets have them."""
    chapter = tmp_path / "LibriSpeech" / "1" / "2"
    (chapter / "clips").mkdir(parents=True)
    for name in ("1-2-0000.wav", "1-2-0001.wav", "clips/a.wav", "clips/b.wav"):
        tone(chapter / name, 300, 0.5)
    lines = "1-2-0000 HELLO THERE\n1-2-0001 GOOD BYE\n1-2-0002 LOST\n"
    (chapter / "1-2.trans.txt").write_text(lines)
    with pytest.raises(
        InputError, match=r"of 4 clips, 2 with no .txt of the same name: 1/2/clips/a"
    ):
        list(make(tmp_path / "LibriSpeech", "x", "asr", print))
    for name in "ab":
        (chapter / "clips" / f"{name}.txt").write_text(name)
    said: list[str] = []
    found = list(make(tmp_path / "LibriSpeech", "x", "asr", said.append))
    assert [row["gt"] for row in found] == ["HELLO THERE", "GOOD BYE", "a", "b"]
    assert "1 lines of .trans.txt without a clip of that name: 1/2/1-2-0002" in said.pop()

    def table(name: str, text: str) -> Path:
        path = chapter / name
        path.write_text(text, encoding="utf-8", newline="")
        return path

    voice = table(
        "v.tsv", '\ufeffclient_id\tpath\tsentence\n1\ta.wav\t"Ja, sagte er\r\n2\tb.wav\tNein\n'
    )
    found = list(make(voice, "x", "asr", said.append))
    assert [row["gt"] for row in found] == ['"Ja, sagte er', "Nein"]
    assert found[0]["audio"] == str((chapter / "clips" / "a.wav").resolve())
    with pytest.raises(InputError, match="no table"):
        list(
            make(table("open.csv", 'path,text\na.wav,"never closed\nb.wav,x\n'), "x", "asr", print)
        )
    hub = table("metadata.csv", 'file_name,transcription\nclips/a.wav,"one, two"\n')
    assert [row["gt"] for row in make(hub, "x", "asr", said.append)] == ["one, two"]
    out = run("rows", voice, "--out", tmp_path / "data")
    assert "train.jsonl  1 rows" in out and "valid.jsonl  1 rows" in out
    for text, why in (
        ("id\twords\n1\tx\n", "its columns are id, words; expected one of path, file_name"),
        ("path\tsentence\nnone.wav\tx\na.wav\t \n", "of its rows, 1 with no clip there: line 2"),
        ("path\tsentence\na.wav\t \n", "1 with an empty text: line 2"),
        ("path\tsentence\n", "no rows below the head line"),
        ("", "its columns are none"),
        (f"path\tsentence\n{'x' * 5000}\tx\n", "1 with no clip there: line 2"),
    ):
        with pytest.raises(InputError, match=re.escape(why)) as caught:
            list(make(table("t.tsv", text), "x", "asr", print))
        assert "\n" not in str(caught.value)
    (chapter / "t.tsv").write_bytes(b"path\tsentence\na.wav\t\xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        list(make(chapter / "t.tsv", "x", "asr", print))


def test_rows_on_a_full_disk_leave_nothing(run, tmp_path, monkeypatch) -> None:
    folder, out = tmp_path / "clips", tmp_path / "data"
    folder.mkdir()
    for name in "abc":
        tone(folder / f"{name}.wav", 300, 0.5)
        (folder / f"{name}.txt").write_text("x")
    real = Path.write_text

    def full(path: Path, *args, **kwargs) -> int:
        if path.name.startswith("valid"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    said = run("rows", folder, "--out", out, code=2)
    assert said == f"error: {out}/valid.jsonl: cannot write it (No space left on device)\n"
    assert list(out.iterdir()) == []
    monkeypatch.undo()
    assert "train.jsonl" in run("rows", folder, "--out", out)


def test_statistics_count_what_is_there(base, tmp_path) -> None:
    rows = official_rows(tmp_path, 5)
    clip = tone(tmp_path / "c.wav", 300, 1.0)
    rows.append(chat_row([clip, clip], ["One.", "Two."], source="analysis"))
    rows.append({"audio": "gone.wav", "prompt": "x", "gt": "y", "seconds": 1})
    file = write_lines(tmp_path / "rows.jsonl", [*rows, "{"])
    page, bad = inspect.statistics(settings(base, [file], tmp_path))
    assert bad == 2
    assert f"bad  {file}:8: not JSON" in page and f"bad  {file}:7: " in page
    assert "rows            6 good, 2 bad" in page
    # Answers of 1, 2, 3, 1, 2 letters with their ends, and two turns of 4 letters with theirs.
    assert "answers         7 trained on, 24 tokens" in page
    assert "clips           7 (5 with 1, 1 with 2)" in page
    assert "least 0.3, median 0.5, 95 % 2.0, most 2.0 s" in page
    assert "source          asr_tone: 5" in page and "source          analysis: 1" in page


def test_a_check_that_finds_bad_rows_ends_with_2(base, run, tmp_path) -> None:
    rows = official_rows(tmp_path, 3)
    good = write_lines(tmp_path / "good.jsonl", rows)
    assert "3 good, 0 bad" in run("train", good, "--model", base, "--check")
    file = write_lines(tmp_path / "rows.jsonl", [*rows, "{"])
    printed = run("train", file, "--model", base, "--check", "--show", 1, code=2)
    assert "3 good, 1 bad" in printed and "<|audio_eos|>" in printed
    assert printed.endswith("error: bad rows: 1; training leaves out those it cannot read\n")


def test_a_check_compares_what_rows_say_of_their_length(base, run, tmp_path) -> None:
    rows = official_rows(tmp_path, 3)
    rows[1]["seconds"] = 29999
    file = write_lines(tmp_path / "rows.jsonl", rows)
    said = run("train", file, "--model", base, "--check", code=2)
    assert f"bad  {file}:2: seconds is 29999, the clips have 0.37" in said


def test_a_check_reads_the_rows_to_measure_on_too(base, run, tmp_path) -> None:
    rows = official_rows(tmp_path, 3)
    good = write_lines(tmp_path / "good.jsonl", rows)
    bad = write_lines(tmp_path / "bad.jsonl", [*rows, {**rows[0], "audio": "gone.wav"}, "{"])
    words = ["train", good, "--model", base, "--check", "--valid"]
    assert "3 good, 0 bad\nto measure on   3 good, 0 bad" in run(*words, good)
    printed = run(*words, bad, code=2)
    assert "rows            3 good, 0 bad\nto measure on   3 good, 2 bad" in printed
    assert f"bad  {bad}:4: " in printed and f"bad  {bad}:5: not JSON" in printed
    assert printed.endswith("error: bad rows: 2; training leaves out those it cannot read\n")


def test_a_check_counts_the_batches_that_a_run_has(base, tmp_path) -> None:
    rows = [chat_row([], ["Good."], rejected_response="Bad.")] * 12
    file = write_lines(tmp_path / "rows.jsonl", rows)
    for stage in ("sft", "dpo"):
        chosen = settings(base, [file], tmp_path, stage=stage, batch_tokens=60)
        page, _ = inspect.statistics(chosen)
        planned = loop.Run(chosen, loop.parallel.start("cpu"), loop.read_rows(chosen))._plan(0)
        assert f"batches         {len(planned)} an epoch" in page
        assert len(planned) == {"sft": 3, "dpo": 6}[stage]


def test_masks_are_shown_in_brackets(base, tmp_path) -> None:
    clip = tone(tmp_path / "c.wav", 300, 0.4)
    row = chat_row([clip], ["No.", "Yes."], rejected_response="Oh")
    file = write_lines(tmp_path / "rows.jsonl", [row])
    page = inspect.masks(settings(base, [file], tmp_path, stage="sft"), 5)
    assert "·<|AUDIO|> x 10·<|audio_eos|>·\\n·Q·u·e·s·t·i·o·n· ·0·?·<|im_end|>" in page
    assert "a·s·s·i·s·t·a·n·t·\\n·[N·o·.·<|im_end|>]·\\n·<|im_start|>" in page
    assert page.endswith("[Y·e·s·.·<|im_end|>]") and f"{file}:1   9 of " in page
    both = inspect.masks(settings(base, [file], tmp_path, stage="dpo"), 1)
    assert both.split("rejected: ")[1].endswith("[O·h·<|im_end|>]")


def test_the_counted_memory_is_the_memory(base, tmp_path) -> None:
    """Weights, gradients and moments to the byte; activations against what autograd keeps."""
    clip = tone(tmp_path / "c.wav", 300, 2.0)
    row = chat_row([clip], ["a" * 60])
    file = write_lines(tmp_path / "rows.jsonl", [row] * 4)
    chosen = settings(base, [file], tmp_path, stage="sft", batch_seconds=8.0, batch_tokens=9999)
    measured = loop.Run(chosen, loop.parallel.start("cpu"), loop.read_rows(chosen))
    batch = measured.loader[0, [0, 1, 2, 3]]
    chosen.batch_tokens = batch.ids.numel()
    counted, trained, everything = inspect.count(chosen, SHAPE)
    parameters = list(measured.trainee.model.parameters())
    assert everything == sum(p.numel() for p in parameters)
    assert trained == sum(p.numel() for p in parameters if p.requires_grad)
    assert counted.weights == sum(p.numel() * p.element_size() for p in parameters)
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in parameters}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model = measured.trainee.model
    for module in model.modules():  # as on a GPU, where no scores are kept
        if hasattr(module, "attention_op"):
            module.attention_op = ops.sdpa
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(model.embed(batch.ids, batch.mel, batch.conv_frames))
    total = sum(kept.values())
    measured.step([batch], 0.0)
    moments = sum(
        tensor.numel() * tensor.element_size()
        for state in measured.optimizer.state.values()
        for tensor in (state["exp_avg"], state["exp_avg_sq"])
    )
    assert counted.moments == moments == 8 * trained and counted.gradients == 4 * trained
    assert 0.7 < counted.activations / total < 1.4, (counted.activations, total)


def test_the_casts_that_autocast_keeps_are_counted(base, tmp_path) -> None:
    """A matrix is multiplied in bfloat16, and what is multiplied is kept for the way back."""
    clip = tone(tmp_path / "c.wav", 300, 1.0)
    file = write_lines(tmp_path / "rows.jsonl", [chat_row([clip], ["Good."])])
    chosen = settings(base, [file], tmp_path, stage="sft", bf16=True)
    run = loop.Run(chosen, loop.parallel.start("cpu"), loop.read_rows(chosen))
    batch, model = run.loader[0, [0]], run.trainee.model
    shapes = {tuple(p.shape) for p in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    kept: dict[int, int] = {}

    def pack(tensor):
        if tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        model(batch.ids, batch.mel, batch.conv_frames)
    assert sum(kept.values()) == inspect.count(chosen, SHAPE)[0].casts
    chosen.bf16 = False
    assert inspect.count(chosen, SHAPE)[0].casts == 0


@pytest.mark.parametrize("adapter", [None, lora.Settings(rank=2)], ids=["whole", "lora"])
def test_the_model_that_preference_compares_with_is_counted(adapter, base, tmp_path) -> None:
    row = chat_row([], ["Good."], rejected_response="Bad.")
    file = write_lines(tmp_path / "rows.jsonl", [row])
    chosen = settings(base, [file], tmp_path, stage="dpo", adapter=adapter, freeze=("*.fc1.*",))
    measured = loop.Run(chosen, loop.parallel.start("cpu"), loop.read_rows(chosen))
    kept = measured.reference.parameters() if measured.reference is not None else ()
    counted, _, _ = inspect.count(chosen, SHAPE)
    assert counted.reference == sum(p.numel() * p.element_size() for p in kept)
    assert (counted.reference > 0) == (adapter is None)
    chosen.stage = "sft"
    without, _, _ = inspect.count(chosen, SHAPE)
    assert without.reference == 0 and counted.total == without.total + counted.reference


def test_memory_of_an_adapter_on_the_published_shape(tmp_path) -> None:
    chosen = settings(
        "unused", ["unused"], tmp_path, adapter=lora.Settings(rank=8), bf16=True, recompute=True,
        batch_seconds=60.0, batch_tokens=2048,
    )  # fmt: skip
    counted, trained, everything = inspect.count(chosen, Qwen2AudioConfig())
    # 32 layers: q, k, v, o are 4096 x 4096; gate, up and down join 4096 and 11008.
    assert trained == 32 * 8 * (4 * (4096 + 4096) + 3 * (4096 + 11008)) == 19_988_480
    assert everything - trained == 8_397_094_912
    assert counted.weights == 2 * 8_397_094_912 + 4 * trained
    assert counted.gradients + counted.moments == 12 * trained
    # The encoder is frozen and lies below all that is trained, so it keeps nothing.
    chosen.batch_seconds = 600.0
    assert inspect.count(chosen, Qwen2AudioConfig())[0].activations == counted.activations


def test_options_that_do_not_go_together_are_one_line(base, run, tmp_path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", official_rows(tmp_path, 2))
    for words, why in (
        ([], "say when the run ends"),
        (["--steps", 1, "--target", "x"], "give --lora with it"),
        (["--steps", 1, "--rank", 64], "--rank is of adapters: give --lora"),
        (["--steps", 1, "--alpha", 8], "--alpha is of adapters: give --lora"),
        (["--steps", 1, "--dropout", 0.1], "--dropout is of adapters: give --lora"),
        (["--steps", 1, "--lr", 0], "lr is 0"),
        (["--steps", 1, "--lr", "inf"], "lr is inf"),
        (["--steps", 1, "--workers", -1], "workers is -1, it must be at least 0"),
        (["--steps", 1, "--warmup", -5], "warmup is -5"),
        (["--steps", 1, "--weight-decay", -1], "weight_decay is -1"),
        (["--steps", 1, "--ctc-weight", "nan"], "ctc_weight is nan"),
        (["--steps", 1, "--floor", 7], "floor is 7.0, it must be 0 to 1"),
        (["--steps", 1, "--noise", 5], "noise is 5.0, it must be 0 to 1"),
        (["--steps", 1, "--speed", 1.5], "speed is 1.5"),
        (["--steps", 1, "--voice", -1], "voice is -1"),
        (["--steps", 1, "--eval-rows", 0], "eval_rows is 0"),
        (["--steps", 1, "--seed", 10**14], "seed is 100000000000000, it must be 0 to"),
        (["--steps", 1, "--device", "tpu"], "device 'tpu'"),
        (["--steps", 1, "--listen-steps", 5], "needs an auxiliary loss"),
        (["--steps", 1, "--listen-steps", 5, "--stage", "dpo"], "listen_steps is for pretrain"),
    ):
        error = run("train", file, "--model", base, "--out", tmp_path / "o", *words, code=2)
        assert error.startswith("error: ") and why in error and error.count("\n") == 1, error
    with pytest.raises(InputError, match="stage is 'rl'"):
        settings(base, [file], tmp_path, stage="rl")


def test_a_number_of_rows_to_show_below_0_is_refused(base, run, tmp_path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", official_rows(tmp_path, 1))
    said = run("train", file, "--model", base, "--show", -1, code=2)
    assert said.startswith("error: ") and "'--show'" in said


@pytest.mark.parametrize("words", [["gone.jsonl"], ["gone.jsonl@2", "--lora", "--target", "x"]])
def test_a_missing_file_is_said_before_anything_else(run, words) -> None:
    """Before --steps or --minutes is asked for, before a model is looked for."""
    assert run("train", *words, code=2) == "error: gone.jsonl: no such file\n"
