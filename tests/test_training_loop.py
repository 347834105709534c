"""The loop: the right gradient, the same weights after a kill, and nothing lost on a full disk."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from training_rows import chat_row, checkpoint, official_rows, settings, tone, write_lines

from qwen2audio_core import assistant, cli, install, quantize, saving
from qwen2audio_core import generate as generation
from qwen2audio_core.errors import CheckpointError, InputError
from qwen2audio_core.training import checkpoint as saved
from qwen2audio_core.training import loop, losses, parallel, report
from qwen2audio_core.training.data import Augment, collate
from qwen2audio_core.training.lora import Settings as Adapter
from qwen2audio_core.weights import load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return checkpoint(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    return write_lines(folder / "rows.jsonl", official_rows(folder, 24))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i in range(8):
        clip = tone(folder / f"{i}.wav", 300 + 50 * i, 0.4)
        rows.append(chat_row([clip], ["Good."], rejected_response="Bad and long.", seconds=0.4))
    return write_lines(folder / "pairs.jsonl", rows)


def a_run(base: str, data: list[str], out: Path, **more) -> loop.Run:
    chosen = settings(base, data, out, **more)
    return loop.Run(chosen, parallel.start("cpu"), loop.read_rows(chosen))


def gradients(run: loop.Run, batches, monkeypatch) -> dict[str, torch.Tensor]:
    """Of one step, before they are clipped."""
    found = {}

    def keep(parameters, limit, group) -> float:
        for name, parameter in run.trainee.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.clone()
        return 1.0

    monkeypatch.setattr(parallel, "clip_gradients", keep)
    run.step(batches, 0.0)
    return found


def batch_of(run: loop.Run, numbers):
    return run.loader[0, list(numbers)]


@pytest.mark.parametrize("more", [{"ctc_weight": 0.3}, {"mean_over": "rows"}], ids=str)
def test_accumulated_batches_give_the_gradient_of_one(
    more, base, data, tmp_path, monkeypatch
) -> None:
    # Rows 0 to 5 have 2 to 4 tokens to learn: a mean of the batches' means would differ.
    whole = a_run(base, [data], tmp_path, **more)
    one = gradients(whole, [batch_of(whole, range(6))], monkeypatch)
    parts = a_run(base, [data], tmp_path, **more)
    sizes = [batch_of(parts, [0]), batch_of(parts, [1, 2, 3, 4, 5])]
    assert sizes[0].supervised * 5 != sizes[1].supervised
    assert [batch.supervised_rows for batch in sizes] == [1, 5]
    two = gradients(parts, sizes, monkeypatch)
    assert one.keys() == two.keys() and len(one) > 50
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-3, atol=1e-6, msg=name)


def test_a_mean_over_rows_is_another_gradient(base, data, tmp_path, monkeypatch) -> None:
    runs = [a_run(base, [data], tmp_path, mean_over=over) for over in ("rows", "tokens")]
    one, other = (gradients(run, [batch_of(run, range(6))], monkeypatch) for run in runs)
    name = "model.language_model.lm_head.weight"
    assert (other[name] - one[name]).abs().max() > 1e-4
    with pytest.raises(InputError, match="dpo's loss is of pairs"):
        settings(base, data, tmp_path, stage="dpo", mean_over="rows")
    with pytest.raises(InputError, match="expected tokens or rows"):
        settings(base, data, tmp_path, mean_over="words")


def test_the_validation_loss_is_over_rows_too(base, data, tmp_path) -> None:
    run = a_run(base, [data], tmp_path, valid=str(data), mean_over="rows", samples=0)
    batch = batch_of(run, range(len(run.valid.rows)))
    model = load_model(base)
    logits = model(batch.ids, batch.mel, batch.conv_frames)[:, :-1]
    labels = batch.labels[:, 1:]
    means = [
        torch.nn.functional.cross_entropy(one, wanted, ignore_index=losses.IGNORE).item()
        for one, wanted in zip(logits.detach(), labels, strict=True)
        if bool((wanted != losses.IGNORE).any())
    ]
    found: list[dict] = []
    run.report.evaluation = lambda progress, figures: found.append(figures)
    run.evaluate()
    assert found[0]["valid_loss"] == pytest.approx(sum(means) / len(means), rel=1e-3)


def test_the_gradient_is_that_of_the_masked_loss(base, data, tmp_path, monkeypatch) -> None:
    """Against a step written out with the plain forward and a mask over all positions."""
    run = a_run(base, [data], tmp_path)
    batch = batch_of(run, range(4))
    found = gradients(run, [batch], monkeypatch)
    model = load_model(base).train()
    logits = model(batch.ids, batch.mel, batch.conv_frames)[:, :-1].flatten(0, 1)
    labels = batch.labels[:, 1:].flatten()
    torch.nn.functional.cross_entropy(logits, labels, ignore_index=losses.IGNORE).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            expected = found["model." + name]
            torch.testing.assert_close(expected, parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
    # The control: learning the prompt as well is another gradient.
    batch.labels = torch.where(batch.labels == losses.IGNORE, batch.ids, batch.labels)
    unmasked = gradients(a_run(base, [data], tmp_path), [batch], monkeypatch)
    name = "model.language_model.lm_head.weight"
    assert (unmasked[name] - found[name]).abs().max() > 1e-3


def test_recomputed_activations_give_the_same_gradient(base, data, tmp_path, monkeypatch) -> None:
    plain = a_run(base, [data], tmp_path)
    again = a_run(base, [data], tmp_path, recompute=True)
    one = gradients(plain, [batch_of(plain, range(4))], monkeypatch)
    two = gradients(again, [batch_of(again, range(4))], monkeypatch)
    assert one.keys() == two.keys()
    assert all(torch.equal(two[name], expected) for name, expected in one.items())


def spoken(folder: Path) -> tuple[str, str]:
    """Rows of two tones, one a letter, in either order and at either pace; and when each begins."""
    rows, known = [], []
    for i in range(16):
        change = (0.2, 0.4)[i % 2]
        clip = tone(folder / f"{i}.wav", 300 + 50 * i, 0.6)
        row = {"audio": clip, "prompt": "Which?", "gt": "ab", "source": "asr", "seconds": 0.6}
        rows.append(row)
        known.append({"audio": clip, "phones": [["a", 0.0], ["b", change]], "end": 0.6})
    return write_lines(folder / "rows.jsonl", rows), write_lines(folder / "when.jsonl", known)


def test_attention_is_led_to_where_a_token_is_said(base, tmp_path, monkeypatch) -> None:
    rows, sounds = spoken(tmp_path)
    asked = {"sounds": sounds, "sounds_weight": 1e-9, "attend_weight": 1.0, "lr": 3e-3}
    plain = a_run(base, [rows], tmp_path / "plain", **asked)
    again = a_run(base, [rows], tmp_path / "again", recompute=True, **asked)
    one = gradients(plain, [batch_of(plain, range(4))], monkeypatch)
    two = gradients(again, [batch_of(again, range(4))], monkeypatch)
    assert one.keys() == two.keys()
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-4, atol=1e-7, msg=name)
    for run in (plain, again):  # which ran every layer twice
        assert not run.trainee._queries
    monkeypatch.undo()
    run = a_run(base, [rows], tmp_path / "run", warmup=1, **asked)
    batch = batch_of(run, range(16))
    assert batch.heard is not None and len(batch.heard) >= 16
    found = []
    for _ in range(30):
        found.append(run.step([batch], 0.0)["attend"])
        run.progress.step += 1
    assert found[-1] < 0.5 * found[0]
    with pytest.raises(InputError, match="attend_weight needs to know what is said when"):
        settings(base, [rows], tmp_path, attend_weight=1.0)


def test_recomputing_keeps_less(base, data, tmp_path) -> None:
    def kept(run: loop.Run) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run.trainee(batch_of(run, range(8)))["loss"].backward()
        return sum(sizes.values())

    plain, again = (a_run(base, [data], tmp_path, recompute=flag) for flag in (False, True))
    assert kept(again) < 0.7 * kept(plain)


def test_frozen_parts_stay_as_they_are(base, data, tmp_path) -> None:
    out = tmp_path / "run"
    chosen = settings(base, [data], out, freeze=("audio_tower.*", "*.embed_tokens.*"))
    loop.train(chosen)
    before = load_model(base, dtype=torch.bfloat16).state_dict()
    after = load_model(out / "model").state_dict()
    for name, tensor in before.items():
        frozen = name.startswith("audio_tower.") or ".embed_tokens." in name
        assert torch.equal(after[name], tensor) == frozen, name
    with pytest.raises(InputError, match="no parameter matches 'decoder"):
        a_run(base, [data], tmp_path, freeze=("decoder.*",))
    with pytest.raises(InputError, match="nothing is left to train"):
        a_run(base, [data], tmp_path, freeze=("*",))


def test_it_learns_and_the_result_answers(base, data, tmp_path) -> None:
    out = tmp_path / "run"
    chosen = settings(
        base, [data], out, steps=60, batch_seconds=12.0, valid=data, eval_every=60, eval_rows=24,
        samples=24, ctc_weight=0.5, auxiliary_until=0.5,
    )  # fmt: skip
    result = loop.train(chosen)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    (valid,) = [line for line in lines if line["kind"] == "valid"]
    train = [line for line in lines if line["kind"] == "train"]
    assert valid["step"] == 60 and valid["valid_loss"] < 1.0, valid
    assert {"loss", "ctc", "lr", "norm", "tokens_per_second", "audio_per_second"} <= train[
        -1
    ].keys()
    assert (out / "loss.png").stat().st_size > 5_000
    answers = {said for _, _, said in valid["samples"]}
    assert answers and answers <= {letter * n for letter in "abcd" for n in (1, 2, 3)}, answers
    # What was written is a checkpoint like any other.
    model = assistant.load(str(result))
    row = json.loads(Path(data).read_text().splitlines()[0])
    text = "<|audio_bos|><|AUDIO|><|audio_eos|>Which tone?"
    clip = str(Path(data).parent / row["audio"])
    reply = model.complete(text, clip, greedy=True, repetition_penalty=1.0)
    assert reply.text in answers and reply.finish_reason == "stop"


def test_tensorboard_has_the_curves_of_the_log(base, data, tmp_path) -> None:
    """Also of a run that went on from step 4 after it had come to step 5."""
    reason = "needs the package tensorboard (extra `train`)"
    pytest.importorskip("tensorboard", reason=reason)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = {"valid": data, "eval_every": 3, "eval_rows": 4, "tensorboard": True}
    loop.train(settings(base, [data], tmp_path, steps=4, save_every=4, **more))
    lost = a_run(base, [data], tmp_path, steps=6, **more)
    figures = dict.fromkeys(("loss", "lr", "step_seconds", "audio_seconds", "tokens"), 99.0)
    lost.report.step(asdict(lost.progress) | {"step": 5}, figures, 1.0)
    loop.train(settings(base, [data], tmp_path, steps=6, **more))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for kind, key in (("train", "loss"), ("train", "lr"), ("valid", "valid_loss")):
        curve = {event.step: event.value for event in board.Scalars(f"{kind}/{key}")}
        wanted = {line["step"]: line[key] for line in log if line["kind"] == kind}
        assert curve == pytest.approx(wanted, rel=1e-6) and len(curve) >= 2, (kind, key)


def test_tensorboard_that_is_missing_is_one_line(base, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=re.escape(install.extra("train"))):
        a_run(base, [data], tmp_path, tensorboard=True)


def test_a_model_that_is_downloaded_is_named_before(data, tmp_path, monkeypatch, capsys) -> None:
    def find(model):
        raise CheckpointError(capsys.readouterr().err)

    monkeypatch.setattr(assistant, "find", find)
    for model, said in (("some/model", "training begins with some/model\n"), ("/none", "")):
        out = tmp_path / "run"
        with pytest.raises(CheckpointError) as told:
            loop.train(settings(model, [data], out, tensorboard=True))
        assert str(told.value) == said and not out.exists()


def test_without_matplotlib_a_line_says_that_nothing_was_drawn(
    base, data, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    loop.train(settings(base, [data], tmp_path / "run", steps=1))
    lines = capsys.readouterr().err.splitlines()
    file = tmp_path / "run" / "loss.png"
    wanted = f"{file} was not drawn, that needs matplotlib: {install.extra('train')}"
    assert lines.count(wanted) == 1 and not file.exists(), lines


def test_the_rate_rises_and_falls(base, data, tmp_path) -> None:
    run = a_run(base, [data], tmp_path, lr=1.0, warmup=10, floor=0.1, steps=100)
    rates = []
    for step in range(101):
        run.progress.step = step
        rates.append(run._set_rate(step / 100))
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    half = math.cos(math.pi * (50 - 10) / (100 - 10))
    assert rates[50] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + half)) and rates[10] == 1.0
    assert rates[100] == pytest.approx(0.1) and rates[9:] == sorted(rates[9:], reverse=True)
    run.settings = replace(run.settings, steps=1000)  # goes on for longer: it does not rise again
    run.progress.step = 101
    assert run._set_rate(0.1) < 1.0 and run._set_rate(0.5) < run._set_rate(0.1)
    timed = a_run(base, [data], tmp_path / "timed", lr=1.0, warmup=10, steps=None, minutes=1.0)
    timed.progress.step, timed._began = 9, time.perf_counter() - 6  # a tenth of the time
    assert timed._set_rate(0.1) == 1.0
    timed.progress.step = 10
    assert timed._set_rate(0.1) == pytest.approx(1.0, abs=1e-3)
    assert timed._set_rate(0.55) == pytest.approx(0.5, abs=1e-2)


def test_a_rate_that_is_not_reached_is_told(base, data, tmp_path, capfd) -> None:
    a_run(base, [data], tmp_path, steps=30, warmup=30)
    assert "the rate rises for 30 steps, and 30 are all there are" in capfd.readouterr().err
    a_run(base, [data], tmp_path, steps=30, warmup=29)
    assert "rate rises" not in capfd.readouterr().err


# Preference


def test_preference_loss_is_its_closed_form() -> None:
    policy = torch.tensor([-1.0, -2.0, -3.0, -1.0], dtype=torch.float64)
    reference = torch.tensor([-1.5, -2.0, -2.0, -2.0], dtype=torch.float64)
    found = losses.dpo(policy, reference, beta=0.5)
    # margins: 0.5 * (0.5 - -1) = 0.75 and 0.5 * (0 - 1) = -0.5
    expected = math.log1p(math.exp(-0.75)) + math.log1p(math.exp(0.5))
    assert found.loss.item() == pytest.approx(expected, abs=1e-12)
    assert found.won.item() == 1 and found.margin.item() == pytest.approx(0.25)


def test_row_log_probs_sum_each_answer() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.randint(0, 7, (2, 5))
    labels[0, :2] = labels[1, 3:] = losses.IGNORE
    wanted = labels[:, 1:] != losses.IGNORE
    gathered, targets = losses.supervised(logits, labels)
    found = losses.row_log_probs(gathered, targets, wanted)
    for row in range(2):
        table = logits[row].log_softmax(-1)
        expected = sum(
            table[t - 1, labels[row, t]].item() for t in range(1, 5) if labels[row, t] >= 0
        )
        assert found[row].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("adapter", [None, Adapter(rank=4, alpha=8.0)], ids=["whole", "lora"])
def test_preference_moves_from_one_half_to_the_better_answers(
    adapter, base, pairs, tmp_path
) -> None:
    run = a_run(
        base, [pairs], tmp_path, stage="dpo", adapter=adapter, lr=3e-3, warmup=1, batch_seconds=9.0
    )
    batch = batch_of(run, range(8))
    assert batch.pairs == 8 and batch.mel.shape[0] == 8 and batch.ids.shape[0] == 16
    first = run.step([batch], 0.0)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)  # it is its own reference
    assert first["margin"] == pytest.approx(0.0, abs=1e-5)
    for _ in range(12):
        last = run.step([batch], 0.0)
    assert last["won"] == 1.0 and last["loss"] < 0.6, last


def test_the_better_answers_own_loss_is_their_mean(base, pairs, tmp_path) -> None:
    run = a_run(base, [pairs], tmp_path, stage="dpo", dpo_sft=0.7, batch_seconds=9.0)
    parts = [batch_of(run, range(3)), batch_of(run, range(3, 8))]
    better = collate(run.loader.examples(range(8))[0], run.loader.pad_id)
    with torch.no_grad():
        total = float(run.trainee(better)["loss"])
    assert sum(batch.supervised for batch in parts) == better.supervised
    found = run.step(parts, 0.0)["loss"]  # at first the policy is the reference: log 2
    assert found == pytest.approx(math.log(2) + 0.7 * total / better.supervised, rel=1e-4)


def test_shared_clips_give_the_answers_of_separate_ones(base, pairs, tmp_path) -> None:
    run = a_run(base, [pairs], tmp_path, stage="dpo")
    examples, _ = run.loader.examples(range(3))
    with torch.no_grad():
        together = run.trainee(collate(examples, run.loader.pad_id, pairs=True))["log_probs"]
        for i, example in enumerate(examples):
            alone = run.trainee(collate([example], run.loader.pad_id, pairs=True))["log_probs"]
            torch.testing.assert_close(together[[i, i + 3]], alone, rtol=1e-4, atol=1e-4)
            plain = run.trainee(collate([example], run.loader.pad_id))["loss"]
            assert -alone[0].item() == pytest.approx(plain.item(), rel=1e-4)


def test_rows_without_a_worse_answer_are_bad_rows(base, data, pairs, tmp_path, capfd) -> None:
    run = a_run(base, [data, pairs], tmp_path, stage="dpo", steps=1, batch_seconds=99.0)
    run.go()
    assert run.progress.bad == 24
    assert "no rejected answer to compare with" in capfd.readouterr().err
    with pytest.raises(InputError, match=r"hold no row that can be used: .*no rejected answer"):
        a_run(base, [data], tmp_path / "other", stage="dpo", steps=1).go()


# Stopping, going on, and what goes wrong


TRAIN = """
import sys
from training_rows import settings
from qwen2audio_core.training import loop
from qwen2audio_core.training.data import Augment
from qwen2audio_core.training.lora import Settings as Adapter
base, data, out = sys.argv[1:]
loop.train(settings(base, [data], out, {options}))
"""
OPTIONS = (
    "steps=9, save_every=2, accumulate=2, ctc_weight=0.5,"
    " augment=Augment(speed=0.1, noise=0.5, masking=True)"
)
WITH_ADAPTER = "steps=9, save_every=2, adapter=Adapter(rank=2, dropout=0.3)"


def start(base: str, data: str, out: Path, options: str) -> subprocess.Popen:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    }
    command = [sys.executable, "-c", TRAIN.format(options=options), base, data, str(out)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("options", [OPTIONS, WITH_ADAPTER], ids=["whole", "lora"])
def test_killed_at_any_moment_and_gone_on_is_never_stopped(options, base, data, tmp_path) -> None:
    whole = start(base, data, tmp_path / "whole", options)
    killed = start(base, data, tmp_path / "killed", options)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint-00000004").exists():
        assert time.monotonic() < deadline and killed.poll() is None, killed.stderr.read()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert whole.wait(120) == 0, whole.stderr.read()
    assert not (tmp_path / "killed" / "checkpoint-00000009").exists()
    again = start(base, data, tmp_path / "killed", options)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0 and "going on from" in errors, errors
    for folder, names in (
        ("model", ["model.safetensors"]),
        ("adapter", ["adapter_model.safetensors"]),
    ):
        for name in names:
            if (tmp_path / "whole" / folder).exists():
                expected = (tmp_path / "whole" / folder / name).read_bytes()
                assert (tmp_path / "killed" / folder / name).read_bytes() == expected
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps)) and steps[-1] == 9
    kept = sorted(p.name for p in (tmp_path / "killed").glob("*checkpoint*"))
    assert kept == ["checkpoint-00000008", "checkpoint-00000009"]


@pytest.mark.parametrize("module, name", [(saving, "write"), (saved, "save")])
def test_killed_in_its_very_last_file_it_still_ends_with_a_result(
    module, name, base, data, tmp_path, monkeypatch
) -> None:
    real, calls = getattr(module, name), []

    def killed_the_second_time(*words, **more):
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*words, **more)

    chosen = settings(base, [data], tmp_path / "run", steps=3, save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, killed_the_second_time)
        with pytest.raises(KeyboardInterrupt):
            loop.train(chosen)
    result = loop.train(chosen)
    whole = loop.train(settings(base, [data], tmp_path / "whole", steps=3, save_every=2))
    written = [(folder / "model.safetensors").read_bytes() for folder in (result, whole)]
    assert written[0] == written[1]


def test_a_kill_while_the_result_is_written_leaves_nothing_behind(base, data, tmp_path) -> None:
    chosen = settings(base, [data], tmp_path / "run", steps=1)
    loop.train(chosen)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "run" / "model").iterdir()}

    def killed(stage: str) -> None:
        """As `saving.write` leaves its folder when it is killed there."""
        out = tmp_path / "run"
        (out / ".model.4711.part").mkdir()
        (out / ".model.4711.part" / "model.safetensors").write_bytes(b"half")
        (out / ".checkpoint-00000007.part").mkdir()
        if stage == "renaming":
            (out / "model").rename(out / ".model.4711.old")

    for stage in ("writing", "renaming"):
        killed(stage)
        a_run(base, [data], tmp_path / "run", steps=1)
        hidden = [path.name for path in (tmp_path / "run").iterdir() if path.name[0] == "."]
        assert hidden == []
        kept = {path.name: path.read_bytes() for path in (tmp_path / "run" / "model").iterdir()}
        assert kept == whole, stage
    # Of another folder, or written by hand: not ours.
    for name in (".model.part", ".models.12.part", ".model.x.old"):
        (tmp_path / "run" / name).mkdir()
    saving.clear(tmp_path / "run" / "model")
    assert len([path for path in (tmp_path / "run").iterdir() if path.name[0] == "."]) == 3


def test_a_run_without_a_checkpoint_begins_its_log_anew(base, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(report, "EVERY", 0.0)
    chosen = settings(base, [data], tmp_path / "run", steps=3)
    stopped = a_run(base, [data], tmp_path / "run", steps=3)
    batches = stopped._batches()
    for step in (1, 2):
        figures = stopped.step([next(batches)], 0.0) | {"step_seconds": 1.0}
        stopped.report.step(asdict(stopped.progress) | {"step": step}, figures, 0.1)
    loop.train(chosen)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_going_on_says_what_is_different(base, data, pairs, tmp_path, capfd) -> None:
    out = tmp_path / "run"
    loop.train(settings(base, [data], out, steps=2))
    assert "going on" not in capfd.readouterr().err
    loop.train(settings(base, [data], out, steps=2))
    said = capfd.readouterr().err
    assert "which has all of --steps 2: nothing is trained" in said and "which read" not in said
    loop.train(settings(base, [data + "@2"], out, steps=3))
    said = capfd.readouterr().err
    assert f"which read {data}, not {data}@2" in said and "nothing is trained" not in said
    with pytest.raises(InputError, match=r"is of --stage .*, not dpo: choose another --out"):
        loop.train(settings(base, [pairs], out, steps=3, stage="dpo"))
    a_run(base, [data + "@2"], out, lr=0.5, seed=7, augment=Augment(noise=0.1))
    said = capfd.readouterr().err
    assert "lr was 0.01 and is 0.5" in said and "seed was 0 and is 7" in said
    assert "augment was speed 0.0, noise 0.0, " in said and "steps was" not in said
    assert "weight_decay was" not in said and "have changed" not in said


def test_going_on_with_other_rows_in_the_same_file_is_told(base, data, tmp_path, capfd) -> None:
    rows = official_rows(tmp_path, 6)
    file = write_lines(tmp_path / "rows.jsonl", rows)
    a_run(base, [file], tmp_path / "run").save()
    write_lines(tmp_path / "rows.jsonl", rows[:3])
    a_run(base, [file], tmp_path / "run")
    assert "whose data had 6 rows and have changed since" in capfd.readouterr().err


def test_a_run_does_not_go_on_with_another_model_or_other_parts_of_it(
    base, data, tmp_path, capfd
) -> None:
    """Nothing that was trained may be lost, or stand over weights that it was not trained on."""
    full, adapted = {"out": tmp_path / "full"}, {"out": tmp_path / "lora", "adapter": Adapter()}
    for kept in (full, adapted):
        a_run(base, [data], **kept).save()
    other = checkpoint(tmp_path / "other")
    queries = Adapter(patterns=("language_model.*.q_proj",))
    for kept, more, said in (
        (full, {"freeze": ("audio_tower.*",)}, r"with freeze none, not audio_tower\.\*: choose"),
        (full, {"mean_over": "rows"}, "with mean_over tokens, not rows"),
        (adapted, {"adapter": Adapter(alpha=1)}, "alpha 16.0, .*, not rank 8, alpha 1"),
        (adapted, {"adapter": queries}, "with adapter .*, not .*q_proj: choose"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            a_run(base, [data], **{**kept, **more})
        assert "\n" not in str(caught.value)
    moved = checkpoint(tmp_path / "moved")
    a_run(moved, [data], tmp_path / "run").save()
    os.rename(moved, tmp_path / "elsewhere")
    a_run(str(tmp_path / "elsewhere"), [data], tmp_path / "run")
    assert "moved, which is not there any more: " in capfd.readouterr().err
    with pytest.raises(InputError, match=r"with model .*/base.*, not .*/other: choose"):
        a_run(other, [data], **full)
    a_run(str(Path(base) / ".." / Path(base).name), [data], **full)  # the same by another name
    # One from before the settings stood in it: what was trained is still not given up.
    for place in saved.checkpoints(tmp_path / "full"):
        told = json.loads((place / "progress.json").read_text())
        del told["settings"]
        (place / "progress.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=r"it has trained audio_tower.*, and this run leaves"):
        a_run(base, [data], tmp_path / "full", freeze=("audio_tower.*",))


def test_a_result_that_was_taken_away_is_written_again(base, data, tmp_path) -> None:
    chosen = settings(base, [data], tmp_path / "run", steps=2)
    result = loop.train(chosen)
    before = load_model(result).state_dict()
    shutil.rmtree(result)
    assert loop.train(chosen) == result
    after = load_model(result).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # The newest checkpoint given up, the one before it is the result.
    assert loop.train(replace(chosen, steps=4, save_every=1)) == result
    shutil.rmtree(saved.checkpoints(tmp_path / "run")[-1])
    loop.train(replace(chosen, steps=3))
    third = load_model(result).state_dict()
    again = a_run(base, [data], tmp_path / "run", steps=3)
    assert again.progress.step == 3
    held = again.trainee.model.state_dict()
    assert all(
        torch.equal(third[name], held[name].bfloat16().to(third[name].dtype)) for name in third
    )


def test_codes_are_not_trained(base, data, tmp_path) -> None:
    model = load_model(base)
    quantize.quantize(model, 8)
    saving.save_model(model, tmp_path / "int8", companions=base)
    with pytest.raises(InputError, match="in int8, which is not trained; train the checkpoint"):
        loop.train(settings(str(tmp_path / "int8"), [data], tmp_path / "run", steps=1))


def test_a_full_disk_leaves_the_last_checkpoint(base, data, tmp_path) -> None:
    out = tmp_path / "run"
    run = a_run(base, [data], out, steps=2, save_every=1)
    run.save()
    before = sorted(p.relative_to(out) for p in out.rglob("*"))
    run.progress.step = 1
    # No file may grow beyond 10 kB: as on a full disk, a write fails in its midst.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write it .*File too large") as caught:
            run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert sorted(p.relative_to(out) for p in out.rglob("*")) == before
    again = a_run(base, [data], out, steps=2)
    assert again.progress.step == 0
    run.save()
    assert a_run(base, [data], out).progress.step == 1


def test_parts_without_a_gradient_so_far_go_on_as_well(base, data, tmp_path) -> None:
    """While the encoder alone learns, the language model has no moments to save."""
    more = {"listen_steps": 3, "ctc_weight": 1.0, "save_every": 2}
    loop.train(settings(base, [data], tmp_path / "whole", steps=5, **more))
    half = a_run(base, [data], tmp_path / "half", steps=5, **more)
    batches = half._batches()
    for _ in range(2):
        half.step([next(batches)], half._part())
        half.progress.step += 1
        half._advance()
    head = half.trainee.model.language_model.lm_head.weight
    assert head not in half.optimizer.state and len(half.optimizer.state) > 20
    half.save()
    loop.train(settings(base, [data], tmp_path / "half", steps=5, **more))
    one, two = (load_model(tmp_path / name / "model").state_dict() for name in ("whole", "half"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_of_another_shape_is_refused_in_one_line(base, data, tmp_path) -> None:
    a_run(base, [data], tmp_path).save()
    (place,) = saved.checkpoints(tmp_path)
    told = json.loads((place / "progress.json").read_text())
    del told["settings"]  # as before they stood there
    (place / "progress.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="does not fit this run") as caught:
        a_run(base, [data], tmp_path, adapter=Adapter())
    assert "\n" not in str(caught.value)


def test_a_gradient_that_is_no_number_is_skipped_and_ten_are_an_error(
    base, data, tmp_path, capfd
) -> None:
    run = a_run(base, [data], tmp_path)
    batch = batch_of(run, [0])
    batch.mel.fill_(math.nan)
    before = [p.clone() for p in run.trained]
    for _ in range(9):
        run.step([batch], 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, run.trained, strict=True))
    assert "step 0: the gradient is not finite, nothing is changed" in capfd.readouterr().err
    with pytest.raises(InputError, match="not been finite for 10 steps"):
        run.step([batch], 0.0)
    figures = {"loss": math.nan, "audio_seconds": 1.0, "tokens": 1, "lr": 0.1, "step_seconds": 1.0}
    run.report.step({"step": 1, "seconds": 1.0}, figures, 1.0)
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] is None and "NaN" not in line


def test_batches_without_a_usable_row_are_passed_over(base, tmp_path, capfd) -> None:
    """As is an overlong clip that is alone in the first batch."""
    rows = official_rows(tmp_path, 6)
    for row in rows[:5]:
        row["audio"] = "gone.wav"
    rows[5]["seconds"] = 0.3
    file = write_lines(tmp_path / "rows.jsonl", rows)
    order = a_run(base, [file], tmp_path, batch_seconds=0.1)._plan(0)
    assert [len(batch) for batch in order] == [1] * 6 and order[0] != [5]
    run = a_run(base, [file], tmp_path / "run", steps=2, batch_seconds=0.1)
    run.go()
    met = [number for batch in order + run._plan(1) for number in batch]
    end = met.index(5, met.index(5) + 1) + 1  # two steps are two meetings with the good row
    assert run.progress.step == 2 and run.progress.bad == end - 2
    assert run.progress.epoch * 6 + run.progress.batch == end
    assert capfd.readouterr().err.count("gone.wav") == 5  # each once, in two epochs
    write_lines(tmp_path / "rows.jsonl", rows[:5])
    with pytest.raises(InputError, match=r"an epoch hold no row that can be used: .*:\d: .*gone"):
        a_run(base, [file], tmp_path / "none", steps=2, batch_seconds=0.1).go()


def test_a_last_step_without_a_gradient_still_ends_with_a_result(
    base, data, tmp_path, monkeypatch
) -> None:
    clip, calls = parallel.clip_gradients, []

    def broken(*words) -> float:
        calls.append(1)
        return math.nan if len(calls) == 3 else clip(*words)

    monkeypatch.setattr(parallel, "clip_gradients", broken)
    result = loop.train(settings(base, [data], tmp_path / "run", steps=3, save_every=100))
    assert result.exists() and len(saved.checkpoints(tmp_path / "run")) == 1


def test_answers_are_shown_at_every_evaluation(base, data, tmp_path, capfd) -> None:
    loop.train(
        settings(base, [data], tmp_path, steps=2, valid=data, samples=2, eval_every=1, lr=1e-9)
    )
    assert capfd.readouterr().err.count(" -> ") == 4


def test_what_cannot_be_measured_is_no_perfect_score(base, data, tmp_path, capfd) -> None:
    rows = [{**row, "audio": "gone.wav"} for row in official_rows(tmp_path, 2)]
    valid = write_lines(tmp_path / "valid.jsonl", rows)
    loop.train(settings(base, [data], tmp_path / "run", steps=1, valid=valid, samples=2))
    assert "none of its rows can be used, nothing is measured" in capfd.readouterr().err
    lines = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert not any("valid_loss" in line for line in lines)


def test_measuring_keeps_to_the_limits_of_a_batch(base, data, tmp_path, monkeypatch) -> None:
    run = a_run(base, [data], tmp_path, valid=data, batch_seconds=2.0, samples=9)
    asked: list[list[int]] = []
    load, write = type(run.valid).__getitem__, report.generate
    monkeypatch.setattr(
        type(run.valid), "__getitem__", lambda self, item: asked.append(item[1]) or load(self, item)
    )
    written: list[tuple[int, int]] = []

    def generate(model, batch, settings):
        written.append((len(batch.ids), settings.max_new_tokens))
        return write(model, batch, settings)

    monkeypatch.setattr(report, "generate", generate)
    run.evaluate()
    seconds = run.valid.rows.seconds
    assert sorted(number for batch in asked for number in batch) == list(range(24))
    assert all(float(seconds[batch].max()) * len(batch) <= 2.0 for batch in asked)
    assert len(asked) > 4 and sum(count for count, _ in written) == 8 and len(written) > 1
    assert {most for _, most in written} == {64}


def test_a_long_transcript_has_room_to_be_written(base, data, tmp_path, monkeypatch) -> None:
    run = a_run(base, [data], tmp_path)
    row = {**official_rows(tmp_path, 1)[0], "gt": "abc " * 30}
    rows = loop.Rows([write_lines(tmp_path / "long.jsonl", [row])])
    examples, _ = loop.Loader(rows, run.tokenizer, num_mel_bins=128).examples([0])
    begin, end = examples[0].answers[0]
    assert end - begin > 64
    model = run.trainee.model.eval()

    def perfect(model, batch, settings):
        return [generation.Answer(examples[0].ids[begin:end][: settings.max_new_tokens])]

    monkeypatch.setattr(report, "generate", perfect)
    found = report.samples(model, run.tokenizer, [examples])
    assert found["exact"] == 1 and found["cer"] == 0


def test_the_best_result_is_kept_beside_the_newest(base, data, tmp_path, monkeypatch) -> None:
    def at(place: Path) -> torch.Tensor:
        return load_model(place).audio_tower.layers[0].fc1.weight

    losses, seen = iter((3.0, 2.0, math.nan, 2.5, 2.2, 1.0)), []

    def evaluate(run: loop.Run) -> float:
        seen.append(run.trainee.model.audio_tower.layers[0].fc1.weight.to(torch.bfloat16))
        return next(losses)

    monkeypatch.setattr(loop.Run, "evaluate", evaluate)
    out, best = tmp_path / "run", tmp_path / "run" / "best-model"
    options = {"valid": data, "eval_every": 1, "save_every": 2, "keep_best": True}
    newest = loop.train(settings(base, [data], out, **options))
    assert torch.equal(at(best), seen[1]) and torch.equal(at(newest), seen[3])
    loop.train(settings(base, [data], out, **options, steps=5))
    assert torch.equal(at(best), seen[1]), "2.2 is no better than the 2.0 before"
    loop.train(settings(base, [data], out, **options, steps=6))
    assert torch.equal(at(best), seen[5])
    with pytest.raises(InputError, match="keep_best is of rows to measure on: give valid"):
        settings(base, [data], out, keep_best=True)


def test_two_runs_do_not_write_to_one_folder(base, data, tmp_path, monkeypatch) -> None:
    out, errors = tmp_path / "run", []

    def evaluate(run: loop.Run) -> None:
        before = sorted(out.rglob("*"))
        with pytest.raises(InputError) as caught:
            loop.train(settings(base, [data], out))
        errors.append(str(caught.value))
        assert sorted(out.rglob("*")) == before

    monkeypatch.setattr(loop.Run, "evaluate", evaluate)
    loop.train(settings(base, [data], out, eval_every=2))
    assert len(errors) == 2 and "another run is writing there" in errors[0]


def test_bad_rows_to_measure_on_are_named(base, data, tmp_path, capfd) -> None:
    valid = write_lines(tmp_path / "valid.jsonl", [*official_rows(tmp_path, 2), "{"])
    a_run(base, [data], tmp_path / "run", valid=valid)
    errors = capfd.readouterr().err
    assert f"{valid}:3: not JSON" in errors
    assert "to measure on: 2 rows, 1 bad ones left out" in errors


def test_rows_that_cannot_be_read_are_named_and_counted(base, tmp_path, capfd) -> None:
    rows = official_rows(tmp_path, 6)
    rows[2]["audio"] = "gone.wav"
    file = write_lines(tmp_path / "rows.jsonl", [*rows, "{"])
    run = a_run(base, [file], tmp_path / "run", steps=1, batch_seconds=99.0)
    run.go()
    errors = capfd.readouterr().err
    assert f"{file}:3: " in errors and "gone.wav" in errors and f"{file}:7: not JSON" in errors
    assert "6 rows, 1 bad" in errors and run.progress.bad == 1


def test_no_usable_row_is_an_error_in_one_line(base, tmp_path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", ["{"])
    with pytest.raises(InputError, match=r"no row that can be used; the first bad one: .*:1: not"):
        a_run(base, [file], tmp_path)
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
        a_run(base, [str(tmp_path / "none.jsonl")], tmp_path)


def test_minutes_end_a_run(base, data, tmp_path) -> None:
    chosen = settings(base, [data], tmp_path / "run", steps=None, minutes=0.02)
    loop.train(chosen)
    run = a_run(base, [data], tmp_path / "run", steps=None, minutes=0.02)
    assert run.progress.step >= 1 and run._part() == 1.0


def test_augmented_batches_differ_by_batch_and_not_by_run(base, data, tmp_path) -> None:
    runs = [a_run(base, [data], tmp_path, augment=Augment(noise=1.0)) for _ in range(2)]
    a, b = (next(run._batches()) for run in runs)
    assert torch.equal(a.mel, b.mel)
    plain = next(a_run(base, [data], tmp_path)._batches())
    assert not torch.equal(a.mel, plain.mel)


def test_every_option_of_the_command_reaches_the_run(data, monkeypatch) -> None:
    """All are given another value than their default, and every setting has one."""
    seen: list[loop.Settings] = []
    monkeypatch.setattr(loop, "train", lambda chosen: seen.append(chosen) or Path("out"))
    words = {
        "--out": "there", "--stage": "pretrain", "--valid": str(data), "--steps": "7",
        "--minutes": "3", "--lr": "0.5", "--warmup": "3", "--floor": "0.25", "--clip": "2",
        "--weight-decay": "0.5", "--batch-seconds": "5", "--batch-tokens": "50",
        "--accumulate": "2", "--freeze": "a*", "--mean-over": "rows", "--beta": "0.7",
        "--dpo-sft": "0.3", "--ctc-weight": "0.6", "--sounds": "s.jsonl",
        "--sounds-weight": "0.8", "--attend-weight": "0.9", "--auxiliary-until": "0.4",
        "--listen-steps": "4", "--short-first": "5", "--noise": "0.1", "--voice": "0.2",
        "--workers": "1", "--device": "cpu", "--save-every": "6", "--keep": "8",
        "--eval-every": "9", "--eval-rows": "10", "--samples": "11", "--seed": "12",
        "--model": "here",
    }  # fmt: skip
    flags = ["--lora", "--spec-augment", "--float32", "--recompute", "--tensorboard", "--keep-best"]
    pairs = [word for pair in words.items() for word in pair]
    cli.app(["train", str(data), *pairs, *flags], standalone_mode=False)
    given, usual = asdict(seen[0]), asdict(loop.Settings("m", ["d"], "o"))
    # Fixed by the command: one number of AdamW.
    assert {name for name in usual if given[name] == usual[name]} == {"beta2"}
    assert given["mean_over"] == "rows" and given["augment"]["voice"] == 0.2
