"""Quantised checkpoints: written, converted, read again, refused when broken, and used."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen2audio_core as qa
from qwen2audio_core import cli, compare, hub, quantize, saving, tiny, weights
from qwen2audio_core.config import Qwen2AudioConfig
from qwen2audio_core.errors import CheckpointError, InputError
from qwen2audio_core.info import describe
from qwen2audio_core.quantize import SCHEMES, QuantizedLinear, Scheme

ROOT = Path(__file__).resolve().parents[1]
IDS = torch.tensor([[1, 5, 9, 300, 7]])
# Widths that take groups of 128 and of 64.
CONFIG = replace(tiny.TINY, text=replace(tiny.TINY.text, hidden_size=128, intermediate_size=192))
HEAD = "language_model.lm_head"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A small bfloat16 checkpoint, never written to."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    tiny.write_random(folder, CONFIG, std=0.1)
    return folder


@pytest.fixture(scope="module")
def converted(plain, tmp_path_factory) -> dict[str, Path]:
    """The same in int8 and in int4, in several shards, never written to."""
    folder = tmp_path_factory.mktemp("converted")
    for name, scheme in SCHEMES.items():
        saving.save_quantised(plain, folder / name, scheme, max_shard_bytes=400_000)
    return {name: folder / name for name in SCHEMES}


@pytest.fixture
def int4(converted, tmp_path) -> Path:
    """A copy to damage, in one file."""
    folder = Path(shutil.copytree(converted["int4"], tmp_path / "int4"))
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / hub.INDEX).unlink()
    save_file(tensors, folder / hub.WEIGHTS, metadata={"format": "pt"})
    return folder


def in_memory(folder: Path, scheme: Scheme):
    """What a converted checkpoint must equal."""
    model = weights.load_model(folder)
    quantize.quantize(model, scheme.bits, scheme.group)
    return model


def same_state(a, b) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_a_converted_folder_is_the_model_quantised_in_memory(name, plain, converted, tmp_path):
    folder, scheme = converted[name], SCHEMES[name]
    expected = in_memory(plain, scheme)
    read = weights.load_model(folder)
    same_state(read, expected)
    assert torch.equal(read(IDS), expected(IDS))
    assert quantize.scheme_of(read) == scheme and not read.training
    saving.save_model(expected, tmp_path / "saved", companions=plain)
    same_state(weights.load_model(tmp_path / "saved"), expected)
    saving.save_model(expected, tmp_path / "wide", dtype=torch.float32)
    same_state(weights.load_model(tmp_path / "wide", dtype=torch.bfloat16), expected)
    same_state(weights.load_model(plain, scheme=scheme), expected)
    same_state(weights.load_model(folder, scheme=scheme), expected)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_layout_is_the_documented_one(name, plain, converted):
    """Names, dtypes, shapes, and the scheme in config and index; the tokenizer goes along."""
    folder, scheme = converted[name], SCHEMES[name]
    named = {"quant_method": "qwen2audio", "bits": scheme.bits, "group_size": 128}
    config = json.loads((folder / "config.json").read_text())
    index = json.loads((folder / hub.INDEX).read_text())
    assert config["quantization_config"] == named == index["metadata"]["quantization_config"]
    assert config["torch_dtype"] == "bfloat16"
    held = {}
    for path in folder.glob("*.safetensors"):
        held |= load_file(path)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
    published = {key for path in plain.glob("*.safetensors") for key in load_file(path)}
    layers = {key.removesuffix(".qweight") for key in held if key.endswith(".qweight")}
    assert len(layers) == 7 * CONFIG.text.num_hidden_layers + 1 and HEAD in layers
    codes = {f"{layer}.{part}" for layer in layers for part in ("qweight", "scales")}
    assert held.keys() - codes == published - {f"{layer}.weight" for layer in layers}
    rows = CONFIG.text.vocab_size
    if name == "int8":
        expected = ((rows, 128), torch.int8, (rows,))
    else:
        blocks = -(-rows // 64)
        expected = ((blocks, 128, 32), torch.uint8, (1, 64 * blocks, 2))
    qweight, scales = held[f"{HEAD}.qweight"], held[f"{HEAD}.scales"]
    assert (tuple(qweight.shape), qweight.dtype, tuple(scales.shape)) == expected
    assert scales.dtype == torch.bfloat16
    for file in ("vocab.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / file).read_bytes() == (plain / file).read_bytes()


@pytest.mark.parametrize("name", SCHEMES)
def test_another_dtype_leaves_the_codes(name, converted):
    here = weights.load_model(converted[name]).state_dict()
    wide = weights.load_model(converted[name], dtype=torch.float32)
    codes = quantize.code_names(wide)
    for key, tensor in wide.state_dict().items():
        assert tensor.dtype == codes.get(key, torch.float32), key
        assert torch.equal(tensor, here[key].to(tensor.dtype)), key


def test_codes_are_mapped_and_not_copied(converted):
    """As plain weights are: the pages are the file's, at the same places from load to load."""
    layer = weights.load_model(converted["int8"]).language_model.lm_head
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("reads /proc")
    start = layer.qweight.data_ptr()
    for line in maps.read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= start < high:
            assert ".safetensors" in line
            return
    raise AssertionError("the codes are nowhere")


def test_state_dicts_are_as_stored_in_any_form(plain):
    """Loading into a layer that has its codes in another order for its device."""
    model, other = in_memory(plain, Scheme(4)), in_memory(plain, Scheme(4))
    for layer in other.modules():
        if isinstance(layer, QuantizedLinear):
            layer.qweight = quantize._pack(quantize._unpack(layer.qweight, 64), 32)
            layer.form = 32
            layer.qweight.zero_()
    other.load_state_dict(model.state_dict())
    same_state(other, model)
    assert torch.equal(other(IDS), model(IDS))


def test_what_is_left_to_read_of_the_published_shape():
    shape = weights.without_storage(Qwen2AudioConfig())
    before = quantize.stored_bytes(shape, 2)
    sizes = {}
    for name, scheme in SCHEMES.items():
        model = weights.without_storage(Qwen2AudioConfig())
        paths = quantize.linear_paths(model)
        quantize.lay_out(model, paths, scheme)
        sizes[name] = quantize.stored_bytes(model, 2)
        parts = [f"{path}.{part}" for path in paths for part in ("qweight", "scales")]
        state = model.state_dict()
        sizes[f"{name} step"] = sum(state[part].nbytes for part in parts)
    assert round(before / 1e9, 2) == 16.79  # the published index to the byte in test_weights.py
    assert round(sizes["int4"] / 1e9, 2) == 6.34 and round(before / sizes["int4"], 2) == 2.65
    assert round(sizes["int8"] / 1e9, 2) == 9.68 and round(before / sizes["int8"], 2) == 1.73
    # And of one decoding step, which reads no embedding and no audio tower: 14.23 GB in bfloat16.
    assert round(14.23e9 / sizes["int4 step"], 2) == 3.76
    assert round(14.23e9 / sizes["int8 step"], 2) == 2.0


MEASURE = """
import re, sys
from pathlib import Path
from qwen2audio_core import quantize, saving
quantize.PIECE = 2**16        # as small against this file as the usual one to a real file
def peak():                   # not ru_maxrss: a process inherits that from its parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
plain, small, out, bits = sys.argv[1:]
scheme = quantize.Scheme(int(bits))
saving.save_quantised(small, out + "-small", scheme)      # what a first one imports and keeps
before = peak()
saving.save_quantised(plain, out, scheme, max_shard_bytes=20_000_000)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_a_conversion_is_that_of_a_tensor(plain, tmp_path):
    text = replace(tiny.TINY.text, hidden_size=512, intermediate_size=2048, num_hidden_layers=10)
    tiny.write_random(tmp_path / "big", replace(tiny.TINY, text=text))
    size = sum(path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors"))
    assert size > 80_000_000
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, (tmp_path / "big", plain, tmp_path / "out", 4))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert int(run.stdout) < size / 8, run.stdout


# --- broken and hostile ---------------------------------------------------------------------------


def refused(folder: Path, *words: str, **options) -> None:
    with pytest.raises(CheckpointError) as caught:
        weights.load_model(hub.find(folder), **options)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 700, line
    for word in words:
        assert word in line, f"{word!r} is not in {line!r}"


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / hub.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / hub.WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, value) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = value
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != ...}))


CHANGES = {
    "scales missing": (lambda t: t.pop(f"{HEAD}.scales"), ("missing", f"{HEAD}.scales")),
    "codes missing": (lambda t: t.pop(f"{HEAD}.qweight"), ("unexpected", f"{HEAD}.scales")),
    "weight beside codes": (
        lambda t: t.update({f"{HEAD}.weight": torch.zeros(CONFIG.text.vocab_size, 128).bfloat16()}),
        ("unexpected", f"{HEAD}.weight"),
    ),
    "codes misshaped": (
        lambda t: t.update({f"{HEAD}.qweight": t[f"{HEAD}.qweight"][:-1].clone()}),
        (f"{HEAD}.qweight is", "expected"),
    ),
    "scales misshaped": (
        lambda t: t.update({f"{HEAD}.scales": t[f"{HEAD}.scales"][:, :-1].clone()}),
        (f"{HEAD}.scales is", "expected"),
    ),
    "codes of another dtype": (
        lambda t: t.update({f"{HEAD}.qweight": t[f"{HEAD}.qweight"].view(torch.int8)}),
        (f"{HEAD}.qweight has dtype I8, expected uint8",),
    ),
    "scales of another dtype": (
        lambda t: t.update({f"{HEAD}.scales": t[f"{HEAD}.scales"].float()}),
        (f"{HEAD}.scales has dtype F32, expected bfloat16",),
    ),
    "codes of what is no layer": (
        lambda t: t.update({"language_model.model.norm.qweight": torch.zeros(1)}),
        ("language_model.model.norm is quantised, but no linear layer",),
    ),
    "codes of nothing": (
        lambda t: t.update({"qweight.qweight": torch.zeros(1)}),
        ("qweight is quantised, but no linear layer",),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_broken_codes(name, dtype, int4):
    change, words = CHANGES[name]
    edit(int4, change)
    refused(int4, *words, dtype=dtype)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (..., ("unexpected", ".qweight")),
        ({"quant_method": "gptq", "bits": 4}, ("quantised with 'gptq'", "unquantised checkpoint")),
        ({"quant_method": "qwen2audio", "bits": 3}, ("3 bits", "choose 8 or 4")),
        ({"quant_method": "qwen2audio", "bits": [4] * 10**4}, ("bits",)),
        ({"quant_method": "qwen2audio", "bits": True}, ("True bits",)),
        ({"quant_method": "qwen2audio", "bits": 4, "group_size": 7}, ("group of 7",)),
        ({"quant_method": "qwen2audio", "bits": 4, "group_size": 64}, (".scales is", "expected")),
        ({"quant_method": "qwen2audio", "bits": 8}, (".qweight is", "expected")),
        ("gptq" * 10**4, ("quantised with",)),
        ([], ("quantised with",)),
    ],
)
def test_schemes_that_are_not_this_folders(value, words, int4):
    edit_config(int4, value)
    refused(int4, "config.json" if value != ... else "", *words)


def test_a_scheme_without_codes(plain, tmp_path):
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    edit_config(folder, Scheme(8).to_json())
    refused(folder, "names a quantisation, the weights hold no codes")


def test_an_index_of_another_scheme(converted, tmp_path):
    folder = Path(shutil.copytree(converted["int8"], tmp_path / "model"))
    index = json.loads((folder / hub.INDEX).read_text())
    index["metadata"].pop("quantization_config")
    (folder / hub.INDEX).write_text(json.dumps(index))
    refused(folder, hub.INDEX, "quantization_config", "config.json")


def test_nothing_is_quantised_twice_or_otherwise(converted, tmp_path):
    with pytest.raises(InputError, match="quantised already, in int8"):
        saving.save_quantised(converted["int8"], tmp_path / "new", Scheme(4))
    with pytest.raises(InputError, match="in int8 already, not in int4 in groups of 128"):
        weights.load_model(converted["int8"], scheme=Scheme(4))
    with pytest.raises(InputError, match="quantize is 'int2', choose 'int8' or 'int4'"):
        qa.load(str(converted["int8"]), quantize="int2")
    assert not (tmp_path / "new").exists()


def test_a_weight_that_no_code_stands_for(plain, tmp_path):
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    edit(folder, lambda t: t[f"{HEAD}.weight"][3, 5:6].fill_(float("nan")))
    for call in (
        lambda: saving.save_quantised(folder, tmp_path / "new", Scheme(8)),
        lambda: weights.load_model(folder, scheme=Scheme(8)),
    ):
        with pytest.raises(InputError, match=f"{HEAD}: the weight holds NaN"):
            call()
    assert not (tmp_path / "new").exists()


def test_widths_that_int4_cannot_hold(tmp_path):
    text = replace(tiny.TINY.text, hidden_size=48, num_attention_heads=2, num_key_value_heads=2)
    tiny.write_random(tmp_path / "model", replace(tiny.TINY, text=text))
    with pytest.raises(InputError, match="48 inputs do not divide into groups of 32; use int8"):
        weights.load_model(tmp_path / "model", scheme=Scheme(4))
    assert describe(str(tmp_path / "model")).quantised_bytes.keys() == {"int8"}
    weights.load_model(tmp_path / "model", scheme=Scheme(8))(IDS)


# --- in use ---------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys):
    """run("ask", ...) -> (exit code, stdout, stderr), in this process."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["qwen2audio", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


def test_the_commands(run, tmp_path, monkeypatch):
    """Convert, look at it, ask it; and ask what was not converted, in the same bits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "tiny-int4"
    code, shown, notes = run("quantize", "--bits", 4, out)
    assert (code, shown) == (0, f"{out}\n") and "int4 in groups of 128: " in notes
    found = json.loads(run("info", "--json", "--model", out)[1])
    assert found["quantised"] == "int4 in groups of 128"
    before = json.loads(run("info", "--json")[1])
    assert before["quantised_bytes"]["int4"] == found["weight_bytes"]
    assert found["plain_bytes"] == before["weight_bytes"] == before["plain_bytes"]
    assert found["cache_bytes_per_token"] == before["cache_bytes_per_token"]
    assert "with --quantize int4" in run("info")[1]
    assert "times less than" in run("info", "--model", out)[1]
    words = ("ask", "What?", "--json", "--greedy", "--max-new-tokens", 6)
    answers = [
        json.loads(run(*words, *more)[1])
        for more in (("--model", out), ("--quantize", "int4"), ("--quantize", "int8"), ())
    ]
    assert answers[0]["ids"] == answers[1]["ids"]
    assert tiny.WARNINGS["tiny"] in run("ask", "x", "--max-new-tokens", 1, "--model", out)[2]
    assert {answer["dtype"] for answer in answers} == {"bfloat16"}
    for words in (("quantize", "--model", out, tmp_path / "x"), ("ask", "x", "--quantize", "int2")):
        code, shown, notes = run(*words)
        assert code == 2 and shown == "" and "Traceback" not in notes
    code, _, notes = run("quantize", "--bits", 5, tmp_path / "x")
    assert code == 2 and "5 bits a weight are not supported" in notes
    code, _, notes = run("quantize", "--group", 0, tmp_path / "x")
    assert code == 2 and "a group of 0 weights is not supported" in notes
    code, _, notes = run("quantize", "--bits", 8, "--group", 64, tmp_path / "x")
    assert code == 2 and "--group is for --bits 4" in notes and not (tmp_path / "x").exists()
    code, _, notes = run("quantize", out)
    assert code == 2 and "holds a checkpoint already" in notes and "--overwrite" in notes
    assert run("quantize", "--overwrite", "--bits", 8, out)[0] == 0
    assert describe(str(out)).quantised == "int8"
    assert "int8, which transformers does not read" in run("compare", "x", "--model", out)[2]


def test_the_answer_of_a_quantised_folder_is_that_of_the_quantised_model(plain, converted):
    """Also through the cache, whose dtype is the embedding's: the head has none."""
    assistant = qa.load(str(converted["int8"]))
    assert assistant.dtype == torch.bfloat16 and assistant.device.type == "cpu"
    reply = assistant.ask("What?", greedy=True, max_new_tokens=5)
    other = qa.load(str(plain), quantize="int8").ask("What?", greedy=True, max_new_tokens=5)
    assert reply.ids == other.ids


def test_compare_says_what_to_compare_instead(converted):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="compare the checkpoint that it was made from"):
        compare.compare(converted["int8"], [], "x")
