"""The tokenizer against recorded ids, transformers' tokenizer over all scripts, and bad files."""

import copy
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from qwen2audio_core.errors import CheckpointError, PromptError
from qwen2audio_core.tokenizer import REQUIRED, SPLIT_PATTERN, TextStream, Tokenizer

SETTINGS = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# Pieces that the split rule, the normal form or the merges treat in a way of their own.
PIECES = [
    *(
        "Hello",
        " world",
        "it's",
        "WE'LL",
        "don't",
        "'s",
        "ſ",
        "straße",
        "İstanbul",
        "ﬁ",
        "Ⅷ",
        "½",
        "²",
    ),
    *(
        "'Training",
        "１０２０",
        "1",
        "23",
        " 456",
        "٣٤",
        "三",
        "६७",
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\n\n \n",
        "\u00a0",
        "\u3000",
    ),
    *(
        "e\u0301",
        "\u212b",
        "\u1100\u1161\u11a8",
        "각",
        "カ\u3099",
        "o\u0323\u0302",
        "\u0302\u0323",
        "\u0344",
    ),
    *(
        "你好,世界",
        "こんにちは",
        "안녕하세요",
        "Привет",
        "שלום",
        "مرحبا",
        "नमस्ते",
        "สวัสดี",
        "ខ្មែរ",
        "ไทย",
    ),
    *(
        "🦙",
        "👩‍👩‍👧",
        "🏳️‍🌈",
        "🇩🇪",
        "😶‍🌫️",
        "✅",
        "𓀀",
        "𝔘",
        "\U0010ffff",
        "\ufffd",
        "\u200b",
        "\x00",
        "\ufeff",
    ),
    *("...", "!!!", "(", "``", "_", "#include <a>", "~\n", "=\n\n"),
    *(
        "<|AUDIO|>",
        "<|im_end|>",
        "<|zh|>",
        "<|0.00|>",
        "<|30.00|>",
        "<|endoftext|>",
        "<|",
        "|>",
        "<|AUDIO",
    ),
]
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
)


@pytest.fixture(scope="session")
def official(shared: Path) -> Path:
    return shared / "official"


@pytest.fixture(scope="session")
def tokenizer(official: Path) -> Tokenizer:
    return Tokenizer.from_folder(official)


@pytest.fixture(scope="session")
def reference(official: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(official)


@pytest.fixture(scope="session")
def cases(official: Path) -> list[tuple[str, list[int]]]:
    texts = (official / "qwen2_tokenizer_cases.inp").read_bytes().decode()
    lines = (official / "qwen2_tokenizer_cases.out").read_text().split("\n")
    ids = [[int(i) for i in line.split()] for line in lines]
    return list(zip(texts.split("\n__ggml_vocab_test__\n"), ids, strict=True))


def variant(tokenizer: Tokenizer, **parts) -> Tokenizer:
    """The same tokenizer with one part of its pipeline made wrong."""
    wrong = copy.copy(tokenizer)
    wrong._plain = tokenizer._build(special=False)
    for name, part in parts.items():
        setattr(wrong._plain, name, part)
    return wrong


def split(pattern: str, **options) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(
        **{"add_prefix_space": False, "use_regex": False, **options}
    )
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


WRONG = {
    "no normal form": {"normalizer": normalizers.Sequence([])},
    "NFKC": {"normalizer": normalizers.NFKC()},
    "digits in threes": {
        "pre_tokenizer": split(SPLIT_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"))
    },
    "line ends apart from signs": {"pre_tokenizer": split(SPLIT_PATTERN.replace(r"[\r\n]*", ""))},
    "GPT-2's split": {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False)},
    "contractions in lower case only": {
        "pre_tokenizer": split(SPLIT_PATTERN.replace("(?i:", "(?:"))
    },
    "a space before the text": {"pre_tokenizer": split(SPLIT_PATTERN, add_prefix_space=True)},
    "specials are parsed": {"encode_special_tokens": False},
}
# Texts that between them show each of the faults above; the property test draws from more.
TELLING = ["e\u0301 \u212b", "ﬁ ² Ⅷ", "１０", "'Training", "Hello", "=\n\n=", "<|AUDIO|>"]


def differing(tokenizer: Tokenizer, reference, texts: list[str]) -> list[str]:
    """The texts whose ids are not the reference's, special tokens in them taken as text."""
    theirs = [reference(t, split_special_tokens=True)["input_ids"] for t in texts]
    return [t for t, ids in zip(texts, theirs, strict=True) if tokenizer.encode(t) != ids]


def test_recorded_cases(tokenizer, cases):
    assert len(cases) == 47
    assert [tokenizer.encode(text) for text, _ in cases] == [ids for _, ids in cases]


@pytest.mark.parametrize("fault", ["GPT-2's split", "a space before the text"])
def test_recorded_cases_tell_a_wrong_split(tokenizer, cases, fault):
    wrong = variant(tokenizer, **WRONG[fault])
    assert [wrong.encode(text) for text, _ in cases] != [ids for _, ids in cases]


def test_recorded_ids_of_the_published_prompt(tokenizer):
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nAudio 1: <|audio_bos|>"
    )
    prefix = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    prefix += [151644, 872, 198, 14755, 220, 16, 25, 220, 151647]
    assert tokenizer.encode(text, special=True) == prefix
    assert tokenizer.encode("What's that sound?") == [3838, 594, 429, 5112, 30]
    assert tokenizer.id_of("<|endoftext|>") == 151643
    assert tokenizer.id_of("<|AUDIO|>") == 151646
    assert tokenizer.id_of("<|audio_eos|>") == 151648
    assert len(tokenizer) == 154931


@SETTINGS
@given(text=TEXTS)
def test_ids_equal_transformers(tokenizer, reference, text):
    assert differing(tokenizer, reference, [text]) == []
    assert tokenizer.encode(text, special=True) == reference(text)["input_ids"]


def test_ids_equal_transformers_on_telling_texts(tokenizer, reference):
    assert differing(tokenizer, reference, TELLING + PIECES) == []


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_variant_differs_from_transformers(tokenizer, reference, fault):
    assert differing(variant(tokenizer, **WRONG[fault]), reference, TELLING) != []


@SETTINGS
@given(text=TEXTS)
def test_round_trip(tokenizer, text):
    # The library's own normal form: Python's knows another version of Unicode.
    normal = normalizers.NFC().normalize_str(text)
    assert tokenizer.decode(tokenizer.encode(text)) == normal
    parsed = tokenizer.decode(tokenizer.encode(text, special=True), skip_special=False)
    assert normalizers.NFC().normalize_str(parsed) == normal


IDS = st.lists(
    st.one_of(
        st.integers(0, 255),  # single bytes, so that broken UTF-8 is frequent
        st.integers(0, 151642),
        st.integers(151643, 156031),  # added tokens, then the padding of the embedding table
    ),
    max_size=30,
)


@SETTINGS
@given(ids=IDS, skip=st.booleans())
def test_text_equals_transformers(tokenizer, reference, ids, skip):
    theirs = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert tokenizer.decode(ids, skip_special=skip) == theirs


@SETTINGS
@given(ids=st.one_of(IDS, TEXTS), skip=st.booleans())
def test_a_stream_joins_to_the_whole(tokenizer, ids, skip):
    if isinstance(ids, str):
        text, ids = ids, tokenizer.encode(ids)
    else:
        text = None
    stream = TextStream(tokenizer, skip_special=skip)
    parts = [stream.push(i) for i in ids]
    rest = stream.finish()
    assert "".join(parts) + rest == tokenizer.decode(ids, skip_special=skip)
    if text is not None and "\ufffd" not in text:  # valid text never shows a broken character
        assert rest == ""
        assert "\ufffd" not in "".join(parts)


def test_a_stream_holds_a_character_back_until_it_is_whole(tokenizer):
    ids = tokenizer.encode(" 🦙")
    assert ids == [11162, 99, 247]
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in ids] == [" ", "", "🦙"]
    stream.push(ids[0])
    assert stream.finish() == "\ufffd"
    # The obvious way, one token's text after the other, breaks it.
    assert "".join(tokenizer.decode([i]) for i in ids) == " \ufffd\ufffd\ufffd"


def test_special_tokens_in_text_are_text_unless_asked_for(tokenizer):
    assert tokenizer.encode("<|AUDIO|>") == [27, 91, 95666, 91, 29]
    assert tokenizer.encode("<|AUDIO|>", special=True) == [151646]
    assert tokenizer.decode([151646, 9707], skip_special=False) == "<|AUDIO|>Hello"
    assert tokenizer.decode([151646, 9707]) == "Hello"


def test_threads_do_not_disturb_each_other(tokenizer):
    with ThreadPoolExecutor(4) as pool:
        ways = [bool(i % 2) for i in range(400)]
        results = list(pool.map(lambda special: tokenizer.encode("<|AUDIO|>", special), ways))
    assert results == [[151646] if special else [27, 91, 95666, 91, 29] for special in ways]


@pytest.fixture(scope="session")
def combined(official, tmp_path_factory) -> Path:
    """A folder with a tokenizer.json as published: three added tokens, none of audio."""
    folder = tmp_path_factory.mktemp("combined")
    library = Library(
        models.BPE.from_file(str(official / "vocab.json"), str(official / "merges.txt"))
    )
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = split(SPLIT_PATTERN)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    library.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_bytes(
        (official / "tokenizer_config.json").read_bytes()
    )
    return folder


def test_both_published_forms_give_equal_ids(tokenizer, combined, cases):
    texts = [text for text, _ in cases] + PIECES + ["".join(PIECES)]
    expected = [tokenizer.encode(t, special) for t in texts for special in (False, True)]
    assert Library.from_file(str(combined / "tokenizer.json")).token_to_id("<|AUDIO|>") is None
    other = Tokenizer.from_folder(combined)
    assert [other.encode(t, special) for t in texts for special in (False, True)] == expected
    # Older files write a merge as "a b", newer ones as ["a", "b"].
    raw = json.loads((combined / "tokenizer.json").read_text(encoding="utf-8"))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in raw["model"]["merges"]]
    raw["model"]["merges"] = (
        pairs
        if isinstance(raw["model"]["merges"][0], list)
        else [pair.split(" ") for pair in pairs]
    )
    folder = combined / "other"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    (folder / "tokenizer_config.json").write_bytes(
        (combined / "tokenizer_config.json").read_bytes()
    )
    other = Tokenizer.from_folder(folder)
    assert [other.encode(t, special) for t in texts for special in (False, True)] == expected


def test_a_tokenizer_json_alone_lacks_the_audio_tokens(combined, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((combined / "tokenizer.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"no <\|AUDIO\|>.*added_tokens_decoder"):
        Tokenizer.from_folder(tmp_path)


def test_saved_files_load_here_and_in_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    again, theirs = (
        Tokenizer.from_folder(tmp_path),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
    )
    text = "".join(PIECES)
    for special in (False, True):
        ids = tokenizer.encode(text, special)
        assert again.encode(text, special) == ids
        assert theirs(text, split_special_tokens=not special)["input_ids"] == ids
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.padding_side) == (
        151643,
        151645,
        "left",
    )


def test_the_library_is_imported_only_when_a_tokenizer_is_read():
    code = "import sys, qwen2audio_core.tokenizer; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# From here on a small tokenizer, so that these run without the reference files.


def small_files() -> tuple[dict, str, dict]:
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"he": 256, "ll": 257, "hell": 258}
    entries = {
        str(259 + i): {"content": token, "special": True} for i, token in enumerate(REQUIRED)
    }
    return vocab, "#version: 0.2\nh e\nl l\nhe ll\n", {"added_tokens_decoder": entries}


def write(folder: Path, vocab, merges: str, config) -> Path:
    for name, content in (("vocab.json", vocab), ("tokenizer_config.json", config)):
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    return folder


def test_a_small_tokenizer_merges_in_order(tmp_path):
    tokenizer = Tokenizer.from_folder(write(tmp_path, *small_files()))
    assert tokenizer.encode("hello") == [258, tokenizer.id_of("o")]
    assert tokenizer.encode("<|im_end|>", special=True) == [261]
    assert tokenizer.decode(tokenizer.encode("hello 🦙 \n")) == "hello 🦙 \n"
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.from_folder(tmp_path / "saved")
    assert again.encode("hello<|AUDIO|>", special=True) == tokenizer.encode(
        "hello<|AUDIO|>", special=True
    )


def test_tokens_that_are_added_but_not_special_are_always_parsed(tmp_path):
    vocab, merges, config = small_files()
    config["added_tokens_decoder"]["265"] = {"content": "<note>", "special": False}
    tokenizer = Tokenizer.from_folder(write(tmp_path, vocab, merges, config))
    assert tokenizer.encode("<note>") == [265]
    assert tokenizer.decode([265, 261]) == "<note>"


def test_a_half_surrogate_is_an_error(tmp_path):
    tokenizer = Tokenizer.from_folder(write(tmp_path, *small_files()))
    with pytest.raises(PromptError, match="not valid Unicode"):
        tokenizer.encode("a\ud83e")
    with pytest.raises(PromptError, match="must be a string, got int"):
        tokenizer.encode(3)  # type: ignore[arg-type]


def test_an_unknown_token_has_no_id(tmp_path):
    tokenizer = Tokenizer.from_folder(write(tmp_path, *small_files()))
    with pytest.raises(CheckpointError, match=r"no token '<\|nothing\|>'"):
        tokenizer.id_of("<|nothing|>")


BAD_CONFIGS = {
    "a gap": ({"259": REQUIRED[0], "261": REQUIRED[1]}, "id 261 but lands on 260"),
    "a token twice": ({"259": REQUIRED[0], "260": REQUIRED[0]}, "id 260 but lands on 259"),
    "an id of the vocabulary": ({"5": REQUIRED[0]}, "id 5 but lands on 259"),
    "no audio tokens": ({"259": REQUIRED[0]}, r"no <\|im_start\|>, .*<\|AUDIO\|>"),
    "a name as id": ({"x": REQUIRED[0]}, "ids as its keys"),
    "an endless id": ({"9" * 5000: REQUIRED[0]}, "ids as its keys"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_added_tokens(tmp_path, name):
    tokens, message = BAD_CONFIGS[name]
    vocab, merges, _ = small_files()
    config = {
        "added_tokens_decoder": {k: {"content": c, "special": True} for k, c in tokens.items()}
    }
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_folder(write(tmp_path, vocab, merges, config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "content", "message"),
    [
        ("vocab.json", "{", "not valid JSON"),
        ("vocab.json", "[" * 100_000, "not valid JSON"),
        ("vocab.json", "[]", "expected a JSON object, found list"),
        ("vocab.json", "{}", "256 of 256 bytes"),
        ("vocab.json", '{"a": 1}', "ids must be 0, 1, 2"),
        ("vocab.json", '{"a": "b"}', "ids must be 0, 1, 2"),
        ("vocab.json", '{"a": [0]}', "ids must be 0, 1, 2"),
        ("vocab.json", b"\xff\xfe", "not UTF-8"),
        ("merges.txt", "h e\nl\n", "two tokens on each line"),
        ("merges.txt", "h zz\n", "out of vocabulary"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "ids as its keys"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"259": 1}}', "text as its content"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"259": {"content": "a!", "special": 3}}}',
            "flags must be true or false",
        ),
        ("tokenizer_config.json", "{}", "no <"),
        ("tokenizer.json", "{}", "incomplete"),
        ("tokenizer.json", '{"pre_tokenizer": {"pretokenizers": [3]}}', "incomplete"),
    ],
)
def test_bad_files(tmp_path, changed, content, message):
    write(tmp_path, *small_files())
    (tmp_path / changed).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("absent", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_missing_files(tmp_path, absent):
    (write(tmp_path, *small_files()) / absent).unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer_config|expected tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def saved_parts(folder: Path) -> dict:
    Tokenizer.from_folder(write(folder, *small_files())).save(folder)
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(normalizer={"type": "NFKC"}), "not the tokenizer of Qwen2"),
        (lambda raw: raw.update(normalizer=None), "incomplete"),
        (lambda raw: raw["model"].update(type="Unigram"), "not the tokenizer of Qwen2"),
        (
            lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "x"}),
            "not the tokenizer of Qwen2",
        ),
        (lambda raw: raw["model"].update(vocab=[]), "ids must be 0, 1, 2"),
        (lambda raw: raw["model"].update(merges=["a"]), "Merges"),
        (lambda raw: raw["model"].update(merges=7), "incomplete"),
        (lambda raw: raw.update(added_tokens=[{"content": "x"}]), "incomplete"),
        (lambda raw: raw["added_tokens"][0].update(id="x"), "is not a number"),
        (
            lambda raw: raw["added_tokens"][0].update(content="other"),
            "but tokenizer.json says 'other'",
        ),
    ],
)
def test_bad_combined_file(tmp_path, change, message):
    raw = saved_parts(tmp_path)
    change(raw)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    tokenizer = Tokenizer.from_folder(write(tmp_path, *small_files()))
    tokenizer.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(path, text, encoding):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        tokenizer.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
