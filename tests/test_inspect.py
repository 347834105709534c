"""The report: its numbers are those of the probes, its page draws them, and nothing in it is markup
that somebody else wrote."""

import base64
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from dataclasses import replace

import numpy as np
import pytest
import torch
import toy

from qwen2audio_core import attribution, cli, install, probe, tiny
from qwen2audio_core.assistant import load
from qwen2audio_core.errors import InputError
from qwen2audio_core.inspection import collect, report
from qwen2audio_core.inspection.collect import KINDS

soundfile = pytest.importorskip("soundfile")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "</script><img src=x onerror=alert(1)> \"'&amp; <b>What</b>?"


@pytest.fixture(scope="module")
def heard():
    return toy.heard()


@pytest.fixture(scope="module")
def seen(heard):
    """The toy's answer to three beeps."""
    waveform, letters, _ = toy.example(3, 5)
    prompt = toy.prompt_of(waveform, heard)
    ids = [*heard.tokenizer.encode(letters), heard.tokenizer.id_of("<|im_end|>")]
    return collect.look(heard, prompt, ids, question="Which?", finish_reason="stop")


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    tiny.folder()
    yield load("random", device="cpu")
    patch.undo()


def content(page):
    """What the page's script reads."""
    (text,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', page, re.S)
    return json.loads(text)


def unpacked(matrix):
    codes = np.frombuffer(base64.b64decode(matrix["data"]), np.uint8).reshape(matrix["shape"])
    return matrix["low"] + codes / 255 * (matrix["high"] - matrix["low"])


# The numbers


def test_the_numbers_are_those_of_the_probes(heard, seen):
    model = heard.model
    waveform, letters, starts = toy.example(3, 5)
    prompt = toy.prompt_of(waveform, heard)
    batch = attribution.answered(prompt, seen.layout.ids[seen.answer_start :], model)
    tokens = torch.arange(seen.answer_start, seen.answer_start + 4)
    audio = seen.layout.columns("audio")
    assert seen.shown == 4 and seen.tokens == [*letters, "<|im_end|>"]
    with torch.no_grad(), probe.attention_maps(model) as maps:
        chances = probe.run(model, batch)[0].softmax(-1)
    for layer, weights in enumerate(maps.values()):
        rows = weights[0][:, tokens - 1]
        torch.testing.assert_close(
            seen.attention[layer].float(), rows[:, :, audio], rtol=1e-2, atol=1e-4
        )
        torch.testing.assert_close(seen.attention_by_kind[layer].sum(-1), torch.ones(4, 4))
        to_clip = seen.attention_by_kind[layer, ..., KINDS.index("audio")]
        torch.testing.assert_close(to_clip, rows[:, :, audio].sum(-1), rtol=1e-4, atol=1e-5)
    written = chances[tokens - 1, torch.tensor(seen.layout.ids)[tokens]]
    torch.testing.assert_close(seen.probabilities, written)
    torch.testing.assert_close(seen.lens_written[-1], written)
    assert [rows[0][0] for rows in seen.alternatives] == seen.tokens  # it is sure of itself
    assert [cell[0][0] for cell in seen.lens[-1]] == seen.tokens
    _, states = probe.run_with_cache(model, batch, "audio.blocks.*.hook_resid_post")
    size = states["audio.blocks.1.hook_resid_post"][0].square().mean(-1).sqrt()
    torch.testing.assert_close(seen.norms[2], size)
    assert seen.norms.shape == (3, 64) and seen.similarity.shape == (3, 64, 64)
    assert torch.allclose(seen.similarity.diagonal(dim1=1, dim2=2), torch.ones(3, 64), atol=1e-4)
    for i, start in enumerate(starts):
        peak = seen.attributions["occlusion"].peak(i)
        assert start - 0.06 <= peak <= start + toy.WORD + 0.06
    names = [stage.name for stage in seen.stages]
    assert names[-3:] == ["attention rollout", "gradients", "occlusion"]
    assert all(stage.seconds > 0 for stage in seen.stages)


def test_a_question_is_asked_and_the_stages_are_timed(random_model):
    sound = (0.1 * torch.randn(16000), 16000)
    told = []
    found = collect.inspect(
        random_model,
        sound,
        "What?",
        max_new_tokens=6,
        most_tokens=3,
        on_progress=lambda what, part: told.append(part),
    )
    assert found.shown == 3 and len(found.layout.ids) - found.answer_start == 6
    assert found.attributions["gradient"].weights.shape == (3, 25)
    assert told == sorted(told) and told[0] < 0.1 and told[-1] == 1.0
    names = [stage.name for stage in found.stages]
    assert names[:5] == ["clip", "log-mel for the answer", "audio tower", "prompt", "6 tokens"]
    again = random_model.ask("What?", sound, greedy=True, max_new_tokens=6)
    assert found.answer == again.text
    notes = report.content_of(found, "")["notes"]
    assert notes == ["Only the first 3 tokens of the answer were inspected."]


def test_clips_lie_behind_one_another_on_one_axis(random_model):
    sounds = [(0.1 * torch.randn(16000), 16000), (0.1 * torch.randn(8000), 16000)]
    found = collect.inspect(random_model, sounds, "Which?", max_new_tokens=2)
    assert found.bounds == [0.0, 1.0, 1.5] and found.audio_tokens == [25, 12]
    assert found.mel.shape == (128, 150) and len(found.waveform) == 24000
    assert found.attention.shape[-1] == 37
    page = content(report.to_html(found))
    assert [kind for kind, _ in page["runs"] if kind.startswith("audio")] == ["audio 1", "audio 2"]


def test_what_cannot_be_inspected(random_model):
    prompt = random_model.encode([{"role": "user", "content": "Hello"}])
    with pytest.raises(InputError, match="no clip in this conversation"):
        collect.look(random_model, prompt, [1])
    sound = (0.1 * torch.randn(8000), 16000)
    heard = random_model.encode(
        [{"role": "user", "content": [{"audio": sound[0], "sampling_rate": 16000}]}]
    )
    with pytest.raises(InputError, match="the answer is empty"):
        collect.look(random_model, heard, [])


# The page


def test_the_page_holds_the_numbers(seen):
    page = content(report.to_html(seen))
    for name, expected in (
        ("attention", seen.attention.float()),
        ("byKind", seen.attention_by_kind),
        ("norms", seen.norms),
        ("similarity", seen.similarity),
    ):
        got = unpacked(page[name])
        step = (page[name]["high"] - page[name]["low"]) / 255
        np.testing.assert_allclose(got, expected.numpy(), atol=0.51 * step)
    for name, found in seen.attributions.items():
        np.testing.assert_allclose(page["attributions"][name], found.weights, rtol=1e-3, atol=1e-6)
        assert page["peaks"][name][1] == pytest.approx(found.peak(1), abs=1e-3)
    sound = base64.b64decode(page["sound"].removeprefix("data:audio/wav;base64,"))
    assert sound[:4] == b"RIFF" and len(sound) == 44 + 2 * len(seen.waveform)
    samples = np.frombuffer(sound[44:], "<i2") / 32767
    np.testing.assert_allclose(samples, seen.waveform, atol=1 / 32767)
    told = [run for run in page["runs"] if run[0] == "audio 1"]
    assert told == [["audio 1", 32]]


def test_nothing_a_person_or_a_model_wrote_is_markup(seen):
    layout = replace(seen.layout, pieces=[EVIL] * len(seen.layout.pieces))
    bad = replace(
        seen,
        question=EVIL,
        answer=EVIL,
        model=EVIL,
        layout=layout,
        alternatives=[[(EVIL, 0.5)]] * seen.shown,
        lens=[[[(EVIL, 0.5)]] * seen.shown] * len(seen.lens),
    )
    page = report.to_html(bad)
    plain = report.to_html(seen)
    assert page.count("<img") == 0 and page.count("<b>What") == 0
    assert page.count("<script") == plain.count("<script") == 2
    assert page.count("</script") == plain.count("</script") == 2
    found = content(page)
    assert found["answer"] == found["question"] == found["title"] == EVIL
    assert "<title>&lt;/script&gt;&lt;img" in page
    # Text becomes text on the page: nothing is parsed as markup there.
    script = page.rpartition("<script>")[2]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)


def test_the_page_needs_no_network(seen):
    page = report.to_html(seen)
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|\bsrc=|@import|url\(", page)


def test_a_large_model_stays_a_small_page(seen):
    """5 s through the published shape: 32 layers of 32 heads, 33 states of the tower."""
    few, pooled, tokens = report.fit(torch.rand(32, 32, 24, 125).half())
    assert few.numel() <= report.MOST_ATTENTION and (pooled, tokens) == (1, 15)
    long = torch.rand(4, 4, 24, 6000).half()
    few, pooled, tokens = report.fit(long, 400_000)
    assert pooled == 6 and tokens == 24 and few.shape[-1] == 1000
    torch.testing.assert_close(few[1, 2, 3, 7], long[1, 2, 3, 42:48].float().mean())
    assert report.fit(torch.rand(2, 2, 3, 10))[1:] == (1, 3)
    generator = torch.Generator().manual_seed(0)
    big = replace(
        seen,
        waveform=torch.rand(80_000, generator=generator) - 0.5,
        bounds=[0.0, 5.0],
        audio_tokens=[125],
        mel=torch.rand(128, 500),
        norms=torch.rand(33, 250),
        similarity=torch.rand(33, 64, 64),
        attention=torch.rand(32, 32, 24, 125).half(),
        attention_by_kind=torch.rand(32, 32, 24, 5),
        lens=[[[("word", 0.5)] * 3] * 24] * 33,
        lens_written=torch.rand(33, 24),
        lens_clip=[[("word", 0.123)] * 125] * 33,
    )
    size = len(report.to_html(big).encode())
    assert 2_000_000 < size < 5_000_000


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")
def test_a_browser_draws_the_page(seen, tmp_path):
    evil = replace(seen, question=EVIL)
    (tmp_path / "report.html").write_text(report.to_html(evil), encoding="utf-8")
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"),
        *("--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"),
        *("--window-size=380,800", "--virtual-time-budget=2000", "--dump-dom"),
        f"file://{tmp_path / 'report.html'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    page = done.stdout
    assert 'id="broken"' not in page, re.findall(r'id="broken">[^<]*', page)
    body = page.rpartition('<script type="application/json"')[0]
    assert body.count('class="token"') == 4 and body.count('aria-pressed="true"') == 2
    assert body.count("<td") == 3 * 4  # the lens: before, between and behind the layers
    assert "3.40" not in body and "1.28 s of sound, 32 audio tokens" in body
    assert re.search(r'<h1 id="title">&lt;/script&gt;&lt;img', body)
    widths = re.findall(r'<canvas id="(\w+)"[^>]*width="(\d+)"', body)
    assert len(widths) == 10 and all(300 < int(width) <= 380 * 3 for _, width in widths)


# The command


@pytest.fixture
def run(monkeypatch, capsys, random_model):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["qwen2audio", "inspect", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, toy.clip("ab", [0.2, 0.6], 1.0, 0).numpy(), 16000)
    return path


def test_the_command_writes_page_numbers_and_pictures(run, clip, tmp_path):
    pytest.importorskip("matplotlib")
    page, numbers, pictures = (tmp_path / name for name in ("r.html", "r.npz", "figures"))
    code, out, err = run(
        *(clip, "Costs 5 $ or $6?", "-o", page, "--data", numbers, "--figures", pictures),
        *("--max-new-tokens", 4, "--model", "random"),
    )
    assert code == 0 and out.endswith("\n")
    assert err.count("wrote ") == 2 + 18 and f"wrote {page}" in err
    held = content(page.read_text(encoding="utf-8"))
    assert held["question"] == "Costs 5 $ or $6?" and held["answer"] == out[:-1]
    with np.load(numbers) as data:
        assert data["attention"].shape == (2, 4, 4, 25)
        assert data["occlusion"].shape == data["gradient"].shape == data["rollout"].shape == (4, 25)
        assert data["waveform"].shape == (16000,) and list(data["kinds"]).count("audio 1") == 25
    names = sorted(path.name for path in pictures.iterdir())
    assert len(names) == 18 and names[::2][0] == "answer.png"
    for path in pictures.glob("*.png"):
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(head[16:20], "big") > 1000
    for path in pictures.glob("*.svg"):
        assert xml.parse(path).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-o", "clip.wav"), "give it a name that ends in .html"),
        (("--data", "numbers.csv"), "a name that ends in .npz"),
        (("-o", "missing/r.html"), "there is no folder missing"),
        (("-o", "folder.html"), "folder.html: is a folder"),
        (("--model", "nowhere"), "nowhere"),
    ],
)
def test_wrong_words_are_one_line(run, clip, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    before = clip.read_bytes()
    code, out, err = run(clip, "What?", *words)
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err, err
    assert clip.read_bytes() == before and not (tmp_path / "report.html").exists()


def test_a_clip_that_is_none_and_figures_without_matplotlib(run, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("absent.wav", "What?")
    assert code == 2 and "absent.wav" in err.splitlines()[-1]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run(clip, "What?", "--figures", "figures")
    assert (code, out) == (2, "")
    assert err == (
        f"error: --figures draws with matplotlib, which is not installed: {install.extra('plot')}\n"
    )
