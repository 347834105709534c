"""Checkpoints: found, read, refused, written, and exchanged with transformers through files."""

import errno
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2audio_core import hub, saving, tiny, weights
from qwen2audio_core.assistant import load
from qwen2audio_core.config import AudioConfig, Qwen2AudioConfig, TextConfig
from qwen2audio_core.errors import CheckpointError, InputError
from qwen2audio_core.sampling import Settings

ROOT = Path(__file__).resolve().parents[1]
IDS = torch.tensor([[1, 5, 9, 300, 7]])
# Smaller than tiny.TINY: files of a few kilobytes for the tests that damage them.
SMALL = Qwen2AudioConfig(
    AudioConfig(16, 1, 1, 16, 128, 1500),
    replace(
        tiny.TINY.text,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    ),
    tiny.TINY.audio_token_id,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """One small float32 checkpoint in two shards, never written to."""
    folder = tmp_path_factory.mktemp("made") / "small"
    tiny.write_random(folder, SMALL, dtype=torch.float32, std=0.3, max_shard_bytes=300_000)
    return folder


@pytest.fixture
def small(made, tmp_path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(made, tmp_path / "small"))


def shard(folder: Path, i: int = 0) -> Path:
    return sorted(folder.glob("*.safetensors"))[i]


def refused(folder: Path, *words: str, **options) -> str:
    """Loading must fail with one line that holds all the words."""
    with pytest.raises(CheckpointError) as caught:
        weights.load_model(hub.find(folder), **options)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 700, line
    for word in words:
        assert word in line, f"{word!r} is not in {line!r}"
    return line


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not ...}))


def rewrite(path: Path, change) -> None:
    """Load a shard, let `change` edit its dict of tensors, write it back."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def one_file(folder: Path) -> Path:
    """The same checkpoint in one model.safetensors, without an index."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / hub.INDEX).unlink()
    save_file(tensors, folder / hub.WEIGHTS, metadata={"format": "pt"})
    return folder / hub.WEIGHTS


# --- reading ------------------------------------------------------------------------------------


def test_a_load_gives_every_tensor_of_the_files(made):
    model = weights.load_model(made)
    stored = {
        name: tensor
        for path in made.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    state = model.state_dict()
    assert len(list(made.glob("*.safetensors"))) > 1
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert not model.training
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["audio_tower.embed_positions.weight"]
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_one_file_equals_shards(made, small):
    one_file(small)
    assert torch.equal(weights.load_model(small)(IDS), weights.load_model(made)(IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_named_dtype_converts(made, dtype, monkeypatch):
    monkeypatch.setattr(weights, "PIECE_BYTES", 1000)  # so that tensors are read in several pieces
    plain = weights.load_model(made).state_dict()
    for name, tensor in weights.load_model(made, dtype=dtype).state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, plain[name].to(dtype)), name


def test_training_writes_to_private_pages_never_to_the_file(made):
    before = shard(made).read_bytes()
    model = weights.load_model(made)
    model.audio_tower.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert shard(made).read_bytes() == before
    assert weights.load_model(made).state_dict()["audio_tower.conv1.weight"].any()


def test_a_loaded_model_survives_the_removal_of_its_files(small):
    model = weights.load_model(small)
    expected = weights.load_model(small, dtype=torch.float64).float()(IDS)
    shutil.rmtree(small)
    assert torch.equal(model(IDS), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_load_onto_a_gpu(made, dtype):
    plain = weights.load_model(made, dtype=dtype).state_dict()
    for name, tensor in weights.load_model(made, device="cuda", dtype=dtype).state_dict().items():
        assert tensor.is_cuda and torch.equal(tensor.cpu(), plain[name]), name


TRUNKS = (
    "language_model.model.",
    "language_model.model.model.",
    "model.language_model.",
    "language_model.",
)


@pytest.mark.parametrize("head", ["language_model.lm_head.", "lm_head.", "model.lm_head."])
@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("lead", ["", "model."])
def test_all_spellings_of_the_names(made, small, trunk, head, lead):
    def rename(name: str) -> str:
        if name.startswith("language_model.lm_head."):
            return name.replace("language_model.lm_head.", head)
        if name.startswith("language_model.model."):
            return name.replace("language_model.model.", trunk, 1)
        return lead + name

    one_file(small)
    old = load_file(small / hub.WEIGHTS)
    save_file({rename(name): tensor for name, tensor in old.items()}, small / hub.WEIGHTS)
    assert torch.equal(weights.load_model(small)(IDS), weights.load_model(made)(IDS))


def test_rope_base_in_either_place_of_the_config(small):
    raw = json.loads((small / "config.json").read_text())
    text = raw["text_config"] | {"rope_theta": 77.0}
    edit_json(small / "config.json", text_config=text)
    old = weights.load_model(small)
    del text["rope_theta"]
    text["rope_parameters"] = {"rope_theta": 77.0, "rope_type": "default"}
    edit_json(small / "config.json", text_config=text)
    new = weights.load_model(small)
    assert old.config == new.config and new.config.text.rope_theta == 77.0


def test_names_and_bytes_equal_the_published_index(shared):
    index = json.loads((shared / "official" / "model.safetensors.index.json").read_text())
    config = Qwen2AudioConfig.from_json(shared / "official" / "config.json")
    state = weights.without_storage(config).state_dict()
    assert state.keys() == index["weight_map"].keys() and len(state) == 876
    assert sum(t.numel() * 2 for t in state.values()) == index["metadata"]["total_size"]
    groups = saving._split({n: 2 * t.numel() for n, t in state.items()}, 4_000_000_000)
    assert set(groups) == set(index["weight_map"].values())  # five shards of the published names
    assert groups["model-00005-of-00005.safetensors"] == ["language_model.lm_head.weight"]


MEASURE = r"""
import re, sys, torch
from pathlib import Path
from qwen2audio_core import weights
folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
weights.PIECE_BYTES = 2_000_000       # as small against this file as the usual one to a real file
def peak():                           # not ru_maxrss: a process inherits that from its parent
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
weights.load_model(sys.argv[3], dtype=dtype)      # what a first load imports and keeps
before = peak()
model = weights.load_model(folder, dtype=dtype)
total = sum(float(p.sum()) * 0 + p.numel() * p.element_size() for p in model.parameters())
print((peak() - before) / total)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])  # mapped, and converted
def test_peak_memory_of_a_load_is_that_of_the_weights(made, tmp_path, dtype):
    """Every weight is read, so pages that are merely mapped count too."""
    config = oracle.tiny_config("official", text={"hidden_size": 128})
    tiny.write_random(tmp_path / "big", config)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "big"), dtype, str(made)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    ratio = float(run.stdout)
    assert 0.8 < ratio <= 1.1, ratio


# --- hostile and broken files -------------------------------------------------------------------


def test_missing_unexpected_and_misshaped_tensors_are_named(small):
    path = one_file(small)

    def change(tensors):
        del tensors["audio_tower.conv1.bias"]
        tensors["audio_tower.extra"] = torch.zeros(1)
        tensors["language_model.model.norm.weight"] = torch.zeros(17)

    rewrite(path, change)
    refused(
        small,
        "missing audio_tower.conv1.bias",
        "unexpected audio_tower.extra",
        "language_model.model.norm.weight is 17, expected 16",
    )


def test_many_faults_are_counted(small):
    path = one_file(small)
    rewrite(path, lambda t: [t.pop(name) for name in list(t) if ".layers." in name])
    refused(small, "missing ", "more")


def test_transposed_weight_of_equal_size_is_misshaped(small):
    path = one_file(small)
    name = "language_model.model.embed_tokens.weight"
    rewrite(path, lambda t: t.update({name: t[name].T.contiguous()}))
    refused(small, f"{name} is 16x", "expected ")


def test_the_same_tensor_under_two_names(small):
    rewrite(
        one_file(small),
        lambda t: t.update({"lm_head.weight": t["language_model.lm_head.weight"].clone()}),
    )
    refused(small, "lm_head.weight is the same tensor as ")


def test_mixed_dtypes_are_refused_and_named_unless_a_dtype_is_asked_for(made, small):
    path = one_file(small)
    name = "audio_tower.conv1.weight"
    rewrite(path, lambda t: t.update({name: t[name].bfloat16()}))
    refused(small, "mixed dtypes", f"bfloat16: {name}", "float32")
    for dtype in (torch.float64, torch.float32):
        state = weights.load_model(small, dtype=dtype).state_dict()
        assert {t.dtype for t in state.values()} == {dtype}
        expected = load_file(path)
        assert all(torch.equal(state[key], expected[key].to(dtype)) for key in state)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("wanted", [None, torch.float32])
def test_dtypes_that_are_no_weights(small, dtype, wanted):
    name = "audio_tower.conv1.weight"
    rewrite(one_file(small), lambda t: t.update({name: t[name].to(dtype)}))
    refused(small, name, "dtype", "supported", dtype=wanted)


def test_a_folder_whose_name_is_not_utf8(small):
    folder = small.rename(small.parent / os.fsdecode(b"m\xff"))
    refused(folder, "no path that is not UTF-8; rename it")


@pytest.mark.parametrize("keep", [0, 4, 8, 1000, -1])
def test_truncated_shard(small, keep):
    path = shard(small, 1)
    path.write_bytes(path.read_bytes()[:keep])
    refused(small, path.name, "not a whole safetensors file")


def with_header(path: Path, change) -> None:
    """Rewrite a file's header through `change(dict)`, leaving the data as it is."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def set_offsets(begin: int, end: int):
    def change(header):
        name = next(name for name in header if name != "__metadata__")
        header[name]["data_offsets"] = [begin, end]

    return change


def overlap(header):
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second] = header[first]


LIES = {
    "offsets behind the end": set_offsets(2**40, 2**40 + 64),
    "offsets before the start": set_offsets(-64, 0),
    "offsets backwards": set_offsets(64, 0),
    "offsets that overflow": set_offsets(0, 2**64 - 1),
    "offsets that overlap": overlap,
    "no JSON": lambda header: b"\x80\x04 not json at all",
    "not an object": lambda header: b"[1, 2, 3]",
    "deep nesting": lambda header: b"[" * 100_000,
    "not text": lambda header: b"\xff\xfe" * 50,
    "a shape of other size": lambda header: header["audio_tower.conv1.bias"].update(shape=[3]),
    "a shape that overflows": lambda header: header["audio_tower.conv1.bias"].update(
        shape=[2**40] * 3
    ),
    "unknown dtype": lambda header: header["audio_tower.conv1.bias"].update(dtype="PICKLE"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_header(small, lie):
    path = shard(small)
    with_header(path, LIES[lie])
    refused(small, path.name, "not a whole safetensors file")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**12, 50_000_000])
def test_header_longer_than_the_file(small, length):
    path = shard(small)
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(small, path.name, "not a whole safetensors file")


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_a_pickle_under_another_name_is_not_run(small, monkeypatch, tmp_path):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    shard(small).write_bytes(pickle.dumps(Bomb()))
    refused(small, shard(small).name, "not a whole safetensors file")
    for path in small.glob("model*"):
        path.unlink()
    torch.save({"x": Bomb()}, small / "pytorch_model.bin")
    refused(small, "pytorch_model.bin", "safetensors")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "C:x", "x\0y"],
)
def test_an_index_that_names_a_file_elsewhere(small, name):
    shutil.copy(shard(small), small.parent / "x.safetensors")  # it would work if it were read
    index = json.loads((small / hub.INDEX).read_text())
    index["weight_map"] = {
        key: name if file == shard(small).name else file
        for key, file in index["weight_map"].items()
    }
    (small / hub.INDEX).write_text(json.dumps(index))
    if name == "C:x" and os.name != "nt":
        refused(small, "C:x", "no such file")
    else:
        refused(small, "leaves the folder")


@pytest.mark.parametrize(
    "name", ["config.json", "shard", "generation_config.json", "preprocessor_config.json"]
)
def test_a_link_that_leaves_the_folder(small, name):
    path = shard(small) if name == "shard" else small / name
    outside = small.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(CheckpointError, match="leaves the folder"):
        weights.load_model(small)
        weights.read_settings(small)


def test_links_inside_the_folder_and_a_linked_folder_work(made, small):
    shard(small).rename(small / "held")
    (small / shard(made).name).symlink_to("held")
    (small.parent / "linked").symlink_to(small)
    model = weights.load_model(hub.find(small.parent / "linked"))
    assert torch.equal(model(IDS), weights.load_model(made)(IDS))


def test_special_files_are_not_opened(small):
    (small / "config.json").unlink()
    os.mkfifo(small / "config.json")  # reading it would block for ever
    refused(small, "not a regular file")


def test_a_loop_of_links(small):
    path = shard(small)
    path.unlink()
    path.symlink_to("loop")
    (small / "loop").symlink_to(path.name)
    refused(small, path.name, "no such file")


@pytest.mark.parametrize(
    "content", ["", "[]", "{", "[" * 100_000, '{"weight_map": {}}', '{"weight_map": {"a": 3}}']
)
def test_broken_index(small, content):
    (small / hub.INDEX).write_text(content)
    refused(small, hub.INDEX)


def test_index_and_shards_that_disagree(small):
    index = json.loads((small / hub.INDEX).read_text())
    files = index["weight_map"]
    key = "audio_tower.conv1.bias"
    other = next(file for file in files.values() if file != files[key])
    edit_json(small / hub.INDEX, weight_map=files | {key: other})
    refused(small, hub.INDEX, key)
    edit_json(small / hub.INDEX, weight_map={k: v for k, v in files.items() if k != key})
    refused(small, hub.INDEX, key)


HUGE = 2**31 - 1


@pytest.mark.parametrize(
    "section, values",
    [
        ("text_config", {"vocab_size": HUGE}),
        ("text_config", {"hidden_size": 2**30, "intermediate_size": HUGE}),
        ("text_config", {"num_hidden_layers": HUGE}),
        ("audio_config", {"encoder_layers": HUGE}),
        ("audio_config", {"d_model": 2**30, "encoder_ffn_dim": HUGE}),
        ("audio_config", {"max_source_positions": HUGE}),
    ],
)
def test_huge_declared_shapes_allocate_nothing(small, section, values):
    raw = json.loads((small / "config.json").read_text())
    edit_json(small / "config.json", **{section: raw[section] | values})
    refused(small, "config.json")


def test_folders_without_a_checkpoint(small, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json", "this folder holds no checkpoint")
    refused(tmp_path / "nowhere", "no such folder")
    refused(small / "config.json", "this is a file")
    first, *others = sorted(small.glob("*.safetensors"))
    first.unlink()
    refused(small, first.name, "fetch")
    (small / hub.INDEX).unlink()
    refused(small, hub.INDEX, "missing")
    for path in others:
        path.unlink()
    refused(small, "holds no checkpoint")
    edit_json(small / "config.json", model_type="llama")
    with pytest.raises(CheckpointError, match="qwen2_audio"):
        weights.load_model(small)


def test_an_empty_weight_file(small):
    one_file(small)
    save_file({}, small / hub.WEIGHTS)
    refused(small, "no tensor")


def test_a_device_that_is_not_there(small):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused(small, "cuda", device="cuda")


# --- settings -----------------------------------------------------------------------------------


def test_published_settings(shared):
    assert weights.read_settings(shared / "official") == Settings(
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.5,
        repetition_penalty=1.1,
        eos_token_ids=(151643, 151645),
        pad_token_id=151643,
    )
    config = Qwen2AudioConfig.from_json(shared / "official" / "config.json")
    weights.check_preprocessor(shared / "official", config)
    raw = json.loads((shared / "official" / "preprocessor_config.json").read_text())
    assert weights.preprocessor_config(config) == raw


def test_settings_that_are_absent(tmp_path):
    assert weights.read_settings(tmp_path) == Settings(top_k=50)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": null}')
    assert weights.read_settings(tmp_path) == Settings(top_k=50, eos_token_ids=(7,))


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 1.5},
        {"do_sample": 1},
        {"repetition_penalty": -1},
        {"eos_token_id": []},
        {"eos_token_id": ["</s>"]},
        {"eos_token_id": -1},
        {"pad_token_id": True},
    ],
)
def test_bad_settings(tmp_path, values):
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=next(iter(values))):
        weights.read_settings(tmp_path)


@pytest.mark.parametrize(
    "values", [{"sampling_rate": 8000}, {"hop_length": 320}, {"n_fft": 512}, {"feature_size": 80},
               {"chunk_length": 20}, {"dither": 0.1}, {"do_normalize": True}]
)  # fmt: skip
def test_other_log_mels_are_refused(small, values):
    edit_json(small / "preprocessor_config.json", **values)
    refused(small, "preprocessor_config.json", next(iter(values)))


def test_log_mel_settings_where_later_releases_put_them(small):
    path = small / "preprocessor_config.json"
    (small / "processor_config.json").write_text(
        json.dumps({"feature_extractor": json.loads(path.read_text()) | {"hop_length": 320}})
    )
    path.unlink()
    refused(small, "processor_config.json", "hop_length")


# --- writing ------------------------------------------------------------------------------------


def test_saved_and_loaded_again(made, tmp_path):
    model = weights.load_model(made)
    saving.save_model(model, tmp_path / "deep" / "new", companions=made, max_shard_bytes=100_000)
    new = tmp_path / "deep" / "new"
    again = weights.load_model(new)
    assert again.config == model.config
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    index = json.loads((new / hub.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in state.values())
    for path in new.glob("*.safetensors"):
        assert re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", path.name)
        held = load_file(path)
        assert sum(t.numel() * 4 for t in held.values()) <= 100_000 or len(held) == 1
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "generation_config.json"):
        assert (new / name).read_bytes() == (made / name).read_bytes()
    assert sorted(p.name for p in new.parent.iterdir()) == ["new"]


def test_a_missing_generation_config_is_named_where_its_tokens_are_needed(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny.trained(), folder)
    (folder / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no generation_config\.json.*151645.*1536"):
        load(str(folder), device="cpu")


def test_parameters_that_are_views_of_one_buffer_are_saved(made, tmp_path):
    """Packed weights are such views; safetensors' own writer refuses them."""
    model = weights.load_model(made)
    attention = model.language_model.model.layers[0].self_attn
    packed = torch.cat([attention.k_proj.weight.data, attention.v_proj.weight.data])
    attention.k_proj.weight.data, attention.v_proj.weight.data = packed.chunk(2)
    saving.save_model(model, tmp_path / "new")
    assert torch.equal(weights.load_model(tmp_path / "new")(IDS), weights.load_model(made)(IDS))


def test_what_is_there_is_not_overwritten_unasked(made, small, tmp_path):
    model = weights.load_model(made)
    (tmp_path / "empty").mkdir()
    saving.save_model(model, tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"--overwrite \(in Python: overwrite=True\)"):
        saving.save_model(model, small)
    saving.save_model(model.bfloat16(), small, overwrite=True)
    assert {t.dtype for t in weights.load_model(small).state_dict().values()} == {torch.bfloat16}
    (small / "notes.md").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.md"):
        saving.save_model(model, small, overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="in the way"):
        saving.save_model(model, tmp_path / "file", overwrite=True)
    assert (small / "notes.md").read_text() == (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_may_replace_the_one_its_model_is_mapped_from(small):
    model = weights.load_model(small)
    expected = model(IDS)
    saving.save_model(model, small, companions=small, overwrite=True)
    assert torch.equal(weights.load_model(small)(IDS), expected)
    assert torch.equal(model(IDS), expected)
    assert (small / "vocab.json").exists()


def test_a_model_that_could_not_be_loaded_again_is_not_saved(made, tmp_path):
    model = weights.load_model(made)
    linear = model.multi_modal_projector.linear
    model.multi_modal_projector.linear = torch.nn.Sequential(linear, torch.nn.GELU())
    with pytest.raises(CheckpointError, match=r"'multi_modal_projector\.linear\.0\.bias'"):
        saving.save_model(model, tmp_path / "out")
    model.multi_modal_projector.linear = linear
    with pytest.raises(InputError, match="dtype is 'float16'"):
        saving.save_model(model, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_too_few_positions_for_a_clip_are_refused(small):
    raw = json.loads((small / "config.json").read_text())
    short = {"audio_config": raw["audio_config"] | {"max_source_positions": 500}}
    edit_json(small / "config.json", **short)
    refused(small, "max_source_positions is 500", "1500 frames")


def test_a_model_of_mixed_dtypes_is_not_saved(made, tmp_path):
    model = weights.load_model(made)
    model.audio_tower.bfloat16()
    with pytest.raises(CheckpointError, match="mixed dtypes"):
        saving.save_model(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


FULL_DISK = """
import resource, signal, sys
from qwen2audio_core import saving, weights
from qwen2audio_core.errors import CheckpointError
model = weights.load_model(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for folder in sys.argv[2:]:
    try:
        saving.save_model(model, folder, overwrite=True)
    except CheckpointError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="setrlimit")
def test_a_write_that_fails_half_way_leaves_nothing(made, small, tmp_path):
    """The system refuses the write itself, as it does on a full disk."""
    before = {path.name: path.read_bytes() for path in small.iterdir()}
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(made), str(tmp_path / "new"), str(small)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 2 and all("cannot write it" in line for line in lines), run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    assert {path.name: path.read_bytes() for path in small.iterdir()} == before


def test_too_little_space_is_said_before_writing(made, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="are needed"):
        saving.save_model(weights.load_model(made), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")]
)
@pytest.mark.parametrize("at", ["a tensor", "the rename"])
def test_an_interrupted_save_leaves_what_was_there(made, small, tmp_path, monkeypatch, stop, at):
    model = weights.load_model(made)
    expected = model(IDS)
    rename, write = Path.rename, saving._write_shard

    def no_rename(path, target):
        if path.name.endswith(".part"):
            raise stop
        return rename(path, target)

    def half(path, *rest):
        write(path, *rest)
        raise stop

    if at == "the rename":
        monkeypatch.setattr(Path, "rename", no_rename)
    else:
        monkeypatch.setattr(saving, "_write_shard", half)
    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        saving.save_model(model, small, overwrite=True)
    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        saving.save_model(model, tmp_path / "new")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    assert torch.equal(weights.load_model(small)(IDS), expected)


# --- random checkpoints -------------------------------------------------------------------------


def test_added_tokens_are_the_published_ones(shared):
    raw = json.loads((shared / "official" / "tokenizer_config.json").read_text())
    added = raw["added_tokens_decoder"]
    published = [added[i]["content"] for i in sorted(added, key=int)]
    assert published == tiny.SPECIAL_TOKENS
    ours = json.loads(tiny.byte_tokenizer()["tokenizer_config.json"])
    assert ours["additional_special_tokens"] == raw["additional_special_tokens"]
    assert set(map(str, ours["added_tokens_decoder"]["256"])) == set(added["151643"])


def test_the_byte_tokenizer_is_read_alike_by_us_and_by_transformers(made):
    from qwen2audio_core.tokenizer import Tokenizer

    transformers = pytest.importorskip("transformers")
    text = "<|im_start|>Grüße, 世界! 🎧 42\n<|audio_bos|><|AUDIO|><|audio_eos|><|zh|><|2.50|>"
    ours = Tokenizer.from_folder(made)
    theirs = transformers.AutoTokenizer.from_pretrained(made)
    ids = ours.encode(text, special=True)
    assert ids == theirs(text)["input_ids"]
    assert ids[0] == 257 and SMALL.audio_token_id in ids and max(ids) < SMALL.text.vocab_size
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids) == text


def test_a_seed_repeats_and_the_order_of_tensors_does_not_matter(tmp_path):
    for name, seed, size in (("a", 1, 10**9), ("b", 1, 50_000), ("c", 2, 10**9)):
        tiny.write_random(
            tmp_path / name, SMALL, seed=seed, dtype=torch.float32, max_shard_bytes=size
        )
    a, b, c = (weights.load_model(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)
    assert abs(float(a["language_model.lm_head.weight"].std()) / 0.02 - 1) < 0.02


def test_make_checkpoint(shared, tmp_path, capsys):
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import make_checkpoint
    finally:
        sys.path.pop(0)
    official, out = shared / "official", tmp_path / "out"
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(oracle.tiny_config("official", text={"hidden_size": 16}).to_json())
    )
    arguments = ["--config", str(config), "--tokenizer", str(official), "--dtype", "bfloat16"]
    assert make_checkpoint.main([*arguments, str(out)]) == 0
    model = weights.load_model(out)
    assert model.config.audio_token_id == 151646 and model.config.text.vocab_size == 156032
    assert weights.read_settings(out) == weights.read_settings(official)
    assert (out / "vocab.json").read_bytes() == (official / "vocab.json").read_bytes()
    assert make_checkpoint.main([*arguments, str(out)]) == 2
    assert (
        make_checkpoint.main(
            ["--shapes", "tiny", "--tokenizer", str(official), str(tmp_path / "t")]
        )
        == 2
    )
    assert (
        make_checkpoint.main(
            ["--shapes", "tiny", "--tokenizer", str(tmp_path), str(tmp_path / "t")]
        )
        == 2
    )
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "overwrite" in errors[0] and "vocabulary" in errors[1] and "no tokenizer" in errors[2]
    assert make_checkpoint.main(["--shapes", "tiny", "--seed", "3", str(tmp_path / "t")]) == 0
    assert weights.load_model(tmp_path / "t").config == tiny.TINY


def test_the_tiny_checkpoint_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tiny.folder()
    stamp = shard(folder).stat().st_mtime_ns
    assert folder.is_relative_to(tmp_path / "cache")
    assert tiny.folder() == folder and shard(folder).stat().st_mtime_ns == stamp
    assert weights.load_model(folder).config == tiny.TINY
    assert sorted(folder.parent.iterdir()) == [folder]


def test_the_tiny_checkpoint_without_a_writable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nothing can be made below a file
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    assert tiny.folder().is_relative_to(tmp_path / "temp")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="cannot write"):
        tiny.folder()


# --- transformers -------------------------------------------------------------------------------


def reference_logits(model, ids=IDS):
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("vocabulary", ["bytes", "official"])
def test_files_of_the_reference_give_equal_logits(tmp_path, vocabulary, request):
    tokenizer = request.getfixturevalue("shared") / "official" if vocabulary == "official" else None
    config = oracle.tiny_config(vocabulary)
    folder = oracle.save_official(oracle.reference_model(config), tmp_path / "ref", tokenizer)
    ours, reference = oracle.load_both(folder)
    assert ours.config == config
    expected = reference_logits(reference)
    scale = expected.abs().max()
    assert (ours(IDS) - expected).abs().max() <= 2e-5 * scale
    # The control: one swapped pair of weights must show.
    layer = ours.language_model.model.layers[0].mlp
    layer.gate_proj, layer.up_proj = layer.up_proj, layer.gate_proj
    assert (ours(IDS) - expected).abs().max() > 1e-2 * scale


def test_what_save_pretrained_writes_is_read(tmp_path):
    """Whatever names this release of the library gives (5.17 doubles the trunk's prefix)."""
    reference = oracle.reference_model(oracle.tiny_config())
    reference.save_pretrained(tmp_path / "ref")
    expected = reference_logits(reference)
    ours = weights.load_model(tmp_path / "ref")
    assert (ours(IDS) - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_what_we_save_is_read_by_the_reference(tmp_path):
    folder = tmp_path / "ours"
    tiny.write_random(
        folder, oracle.tiny_config(), seed=5, dtype=torch.float32, std=0.2, max_shard_bytes=200_000
    )
    saving.save_model(
        weights.load_model(folder), tmp_path / "again", companions=folder, max_shard_bytes=300_000
    )
    for path in (folder, tmp_path / "again"):
        ours, reference = oracle.load_both(path)  # it also checks that no name is left over
        expected = reference_logits(reference)
        assert (ours(IDS) - expected).abs().max() <= 2e-5 * expected.abs().max()
        assert reference.config.text_config.vocab_size == ours.config.text.vocab_size
        settings = weights.read_settings(path)
        assert tuple(reference.generation_config.eos_token_id) == settings.eos_token_ids


# --- finding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", ["no/such/folder", "./nowhere", "Qwen", "a b/c", "", "Qwen/", "/nowhere"]
)
def test_neither_a_folder_nor_a_hub_id(model):
    with pytest.raises(CheckpointError, match=r"no such folder|holds no checkpoint|is empty"):
        hub.find(model)


NOWHERE = "http://127.0.0.1:9"  # refuses connections


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download uses. Repositories: name -> {file: content}."""

    repositories: dict[str, dict[str, bytes]] = {}  # noqa: RUF012
    cut, cuts = "", 0  # a file whose content breaks off, and how many times
    requests: list[str] = []  # noqa: RUF012
    sha = "0123456789abcdef0123456789abcdef01234567"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        FakeHub.requests.append(f"{self.command} {path} {self.headers.get('Range') or ''}")
        match = re.fullmatch(
            r"(?:/api/models)?/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path
        )
        repository, kind, revision, name = match.groups() if match else ("", "", "", "")
        if repository == "owner/gated":
            return self.answer(
                403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}
            )
        if repository == "owner/broken":
            return self.answer(500, b"{}", {})
        files = self.repositories.get(repository)
        if files is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", self.sha):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if kind == "resolve":
            headers = {"ETag": f'"{name}-1"', "X-Repo-Commit": self.sha, "Accept-Ranges": "bytes"}
            cut = self.command == "GET" and name == self.cut and FakeHub.cuts > 0
            FakeHub.cuts -= cut
            return self.answer(200, files[name], headers, cut)
        if kind == "tree":
            rows = [
                {"type": "file", "path": n, "size": len(c), "oid": f"{n}-1"}
                for n, c in files.items()
            ]
            return self.answer(200, json.dumps(rows).encode(), {})
        siblings = [{"rfilename": n} for n in files]
        about = {
            "id": repository,
            "sha": self.sha,
            "siblings": siblings,
            "private": False,
            "tags": [],
        }
        return self.answer(200, json.dumps(about).encode(), {})

    def answer(self, status, body, headers, cut=False):
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and status == 200:
            start, status = int(asked[1]), 206
            headers = headers | {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        body = body[start:]
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut


def finds(monkeypatch, endpoint: str, *calls: dict, offline: bool = False) -> list[str]:
    """hub.find for each call against the hub at `endpoint`: "OK folder" or "ERROR line"."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    constants = pytest.importorskip("huggingface_hub.constants")
    lines = []
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(
            huggingface_hub,
            "snapshot_download",
            partial(huggingface_hub.snapshot_download, endpoint=endpoint, etag_timeout=2),
        )
        for call in calls:
            try:
                lines.append(f"OK {hub.find(**call)}")
            except CheckpointError as error:
                assert "\n" not in str(error)
                lines.append(f"ERROR {error}")
    return lines


@pytest.fixture
def fake_hub(made):
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    FakeHub.repositories = {
        "owner/model": files
        | {"pytorch_model.bin": b"pickle", "demo.wav": b"sound", "README.md": b"#"},
        "owner/pickled": {"config.json": files["config.json"], "pytorch_model.bin": b"pickle"},
    }
    FakeHub.requests, FakeHub.cut = [], ""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_download(fake_hub, made, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    model = {"model": "owner/model", "cache_dir": cache}
    unknown, gated, broken, pickled, revision, fetched = finds(
        monkeypatch,
        fake_hub,
        {"model": "owner/unknown", "cache_dir": cache},
        {"model": "owner/gated", "cache_dir": cache},
        {"model": "owner/broken", "cache_dir": cache},
        {"model": "owner/pickled", "cache_dir": cache},
        {**model, "revision": "nope"},
        model,
    )
    assert unknown.startswith("ERROR owner/unknown: the hub knows no such model")
    assert "access is restricted" in gated and "hf auth login" in gated
    assert broken.startswith("ERROR owner/broken: ")
    assert pickled.startswith("ERROR ") and "no checkpoint" in pickled
    assert "no such revision" in revision
    assert fetched.startswith("OK ")
    folder = Path(fetched.removeprefix("OK "))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in made.iterdir()
    )
    asked = " ".join(FakeHub.requests)
    assert "pytorch_model.bin" not in asked and "demo.wav" not in asked and "README" not in asked
    assert shard(folder).is_symlink()  # the cache's own layout, links into ../../blobs
    assert torch.equal(weights.load_model(folder)(IDS), weights.load_model(made)(IDS))

    # From the cache: offline by the setting, by the argument, and with the network gone.
    FakeHub.requests.clear()
    assert finds(monkeypatch, fake_hub, model, offline=True) == [fetched]
    assert finds(monkeypatch, fake_hub, {**model, "offline": True}) == [fetched]
    assert FakeHub.requests == []
    assert finds(monkeypatch, NOWHERE, model) == [fetched]

    # A cache that lost a file: refused offline, completed online.
    lost = shard(folder)
    lost.unlink()
    (line,) = finds(monkeypatch, fake_hub, model, offline=True)
    assert line.startswith("ERROR ") and ("cache" in line or lost.name in line), line
    assert finds(monkeypatch, fake_hub, model) == [fetched] and lost.exists()


def test_a_connection_that_breaks_once_is_taken_up_again(fake_hub, made, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before the library tries again
    FakeHub.cut, FakeHub.cuts = shard(made).name, 1
    call = {"model": "owner/model", "cache_dir": str(tmp_path / "cache")}
    (line,) = finds(monkeypatch, fake_hub, call)
    assert shard(Path(line.removeprefix("OK "))).read_bytes() == shard(made).read_bytes()
    first, second = (r for r in FakeHub.requests if r.startswith("GET") and shard(made).name in r)
    assert "bytes=" not in first and re.search(r" bytes=[1-9]\d*-$", second)


def test_a_download_that_was_given_up_goes_on_with_the_files_it_lacks(
    fake_hub, made, tmp_path, monkeypatch
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    call = {"model": "owner/model", "cache_dir": str(tmp_path / "cache")}
    FakeHub.cut, FakeHub.cuts = shard(made).name, 1000
    (line,) = finds(monkeypatch, fake_hub, call)
    assert line.startswith("ERROR owner/model: ") and "run it again" in line, line
    FakeHub.cut = ""
    FakeHub.requests.clear()
    (line,) = finds(monkeypatch, fake_hub, call)
    assert shard(Path(line.removeprefix("OK "))).read_bytes() == shard(made).read_bytes()
    fetched = [r for r in FakeHub.requests if r.startswith("GET") and "/resolve/" in r]
    assert len(fetched) == 1 and shard(made).name in fetched[0]


def test_no_network_and_nothing_cached(tmp_path, monkeypatch):
    call = {"model": "Qwen/Qwen2-Audio-7B-Instruct", "cache_dir": str(tmp_path)}
    (line,) = finds(monkeypatch, NOWHERE, call)
    assert line.startswith("ERROR Qwen/Qwen2-Audio-7B-Instruct: ")
    assert "cannot be reached" in line and "network" in line


def test_the_offline_switch_of_the_environment(tmp_path):
    pytest.importorskip("huggingface_hub")
    run = subprocess.run(
        [sys.executable, "-c", "from qwen2audio_core import hub; hub.find('owner/model')"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    last = run.stderr.splitlines()[-1]
    assert "CheckpointError: owner/model: offline mode is on" in last and "HF_HUB_OFFLINE=0" in last


@pytest.mark.parametrize(
    "failure, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "/cache"), "/cache cannot be written"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), "/cache cannot be written"),
        (RuntimeError("something\nin many lines"), "something"),
        (ConnectionResetError(), "run it again to resume"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_failures_of_the_disk_under_a_download(monkeypatch, failure, words, wrapped):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def fail(*arguments, **options):
        if wrapped and not isinstance(failure, RuntimeError | ConnectionResetError):
            raise RuntimeError("worker failed") from failure
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as caught:
        hub.find("owner/model")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written(fake_hub, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")  # also root cannot make a folder below a file
    call = {"model": "owner/model", "cache_dir": str(tmp_path / "file" / "cache")}
    (line,) = finds(monkeypatch, fake_hub, call)
    assert (
        line.startswith("ERROR owner/model: ") and "cannot be written" in line and "HF_HOME" in line
    )


def test_the_snapshots_of_the_cache_may_link_to_their_blobs_and_nowhere_else(made, tmp_path):
    repository = tmp_path / "models--owner--model"
    snapshot = repository / "snapshots" / FakeHub.sha
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in made.iterdir():
        shutil.copy(path, repository / "blobs" / f"sha-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/sha-{path.name}")
    assert torch.equal(weights.load_model(hub.find(snapshot))(IDS), weights.load_model(made)(IDS))
    outside = tmp_path / "outside"
    shutil.move(repository / "blobs" / "sha-config.json", outside)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../outside")
    refused(snapshot, "leaves the folder")


def test_text_config_of_the_official_files_is_read_with_its_absent_values(shared):
    config = Qwen2AudioConfig.from_json(shared / "official" / "config.json")
    assert config == Qwen2AudioConfig() and config.text == TextConfig()
