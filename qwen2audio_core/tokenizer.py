"""Text to token ids and back: the byte-level BPE of Qwen, with the audio model's added tokens.

    text --NFC--> normal form --split--> words --UTF-8, one symbol a byte--> --merges--> ids

The published tokenizer.json lacks the audio tokens: they stand in tokenizer_config.json alone, and
both files have to be read.
"""

import codecs
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2audio_core.errors import CheckpointError, PromptError

if TYPE_CHECKING:  # importing it costs more than the rest of this package's start
    import tokenizers

# Where Qwen2 cuts text before merging: contractions, words with one leading sign, single digits,
# runs of signs, line ends, other white space.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What a conversation with sound cannot be written without.
REQUIRED = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
)

_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def byte_symbols() -> dict[str, int]:
    """The visible character that stands for each byte in a vocabulary file (from GPT-2)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    symbols = {chr(byte): byte for byte in visible}
    return symbols | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTES = byte_symbols()


class Tokenizer:
    """Token ids of the published model. Safe to share between threads.

    vocab    token (each byte one visible symbol) -> id, the ids 0 .. len(vocab) - 1
    merges   pairs of tokens, the most frequent first
    added    id -> the token's entry as in `added_tokens_decoder`: "content", and optionally
             "special", "normalized", "lstrip", "rstrip", "single_word"; ids follow the vocabulary's
    config   other content of tokenizer_config.json, kept for `save`
    errors   CheckpointError if the parts do not fit together
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Sequence[tuple[str, str]],
        added: Mapping[int, Mapping[str, Any]],
        config: Mapping[str, Any] | None = None,
        where: str = "tokenizer",
    ):
        from tokenizers import models

        try:
            numbered = isinstance(vocab, dict) and set(vocab.values()) == set(range(len(vocab)))
        except TypeError:  # an id that is a list or an object
            numbered = False
        if not numbered:
            raise CheckpointError(f"{where}: the vocabulary's ids must be 0, 1, 2, ..., each once")
        missing = [symbol for symbol in _BYTES if symbol not in vocab]
        if missing:
            raise CheckpointError(
                f"{where}: not a byte-level vocabulary, {len(missing)} of 256 bytes have no token"
            )
        try:
            self._model = models.BPE(vocab, merges)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{where}: {str(error).splitlines()[0]}") from error
        self._added = {number: dict(added[number]) for number in sorted(added)}
        self._config = dict(config or {})
        self._where = where
        try:
            self._plain = self._build(special=False)
        except TypeError as error:
            raise CheckpointError(
                f"{where}: an added token's flags must be true or false"
            ) from error
        self._special_ids = {n for n, entry in self._added.items() if entry.get("special")}
        self._check_added()

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read a checkpoint folder's tokenizer, in either published form.

        folder   holds tokenizer.json, or else vocab.json and merges.txt; and tokenizer_config.json,
                 which may be absent only where tokenizer.json itself holds the audio tokens
        errors   CheckpointError for files that are missing, invalid or of another tokenizer
        """
        folder = Path(folder)
        config: dict[str, Any] = {}
        if (folder / "tokenizer_config.json").exists():
            config = _read_json(folder / "tokenizer_config.json")
        added: dict[int, Mapping[str, Any]] = {}
        if (folder / "tokenizer.json").exists():
            vocab, merges, added = _read_combined(folder / "tokenizer.json")
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            vocab, merges = _read_json(folder / "vocab.json"), _read_merges(folder / "merges.txt")
        else:
            raise CheckpointError(
                f"{folder}: no tokenizer, expected tokenizer.json, or vocab.json and merges.txt"
            )
        where = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
        declared = config.pop("added_tokens_decoder", {})
        if not isinstance(declared, dict) or not all(
            key.isdecimal() and len(key) < 10 for key in declared
        ):
            raise CheckpointError(f"{where} must be an object with ids as its keys")
        for key, entry in declared.items():
            _check_entry(entry, f"{where}[{key}]")
            other = added.setdefault(int(key), entry)["content"]
            if other != entry["content"]:
                raise CheckpointError(
                    f"{where}[{key}] is {entry['content']!r}, but tokenizer.json says {other!r}"
                )
        tokenizer = cls(vocab, merges, added, config, str(folder))
        absent = [token for token in REQUIRED if tokenizer._plain.token_to_id(token) is None]
        if absent:
            raise CheckpointError(
                f"{folder}: the tokenizer has no {', '.join(absent)}; Qwen2-Audio declares them in"
                " tokenizer_config.json under added_tokens_decoder"
            )
        return tokenizer

    def __len__(self) -> int:
        """How many ids have a text. The model's embedding table is padded beyond it."""
        return self._plain.get_vocab_size()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text.

        special  False: "<|im_end|>" and its like in the text are ordinary characters, so that what
                 a person types cannot end a turn or open an audio slot. True: they are tokens.
        errors   PromptError for a text that is not valid Unicode
        """
        tokenizer = self._parsing if special else self._plain
        try:
            return tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            if not isinstance(text, str):
                raise PromptError(f"text must be a string, got {type(text).__name__}") from error
            raise PromptError(
                "the text is not valid Unicode (it holds half a surrogate pair)"
            ) from error

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids, with nothing cleaned up.

        Bytes that are not UTF-8 become U+FFFD. Ids of the embedding table's padding have no text.
        """
        return b"".join(self.bytes_of(int(i), skip_special) for i in ids).decode("utf-8", "replace")

    def bytes_of(self, token: int, skip_special: bool = True) -> bytes:
        """The UTF-8 bytes one token stands for, which may be part of a character."""
        if token in self._added:
            skip = skip_special and token in self._special_ids
            return b"" if skip else self._added[token]["content"].encode()
        return bytes(_BYTES[symbol] for symbol in self._plain.id_to_token(token) or "")

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token: a text of n bytes, in Unicode's form NFC, has n / longest
        tokens at least."""
        return max(len(self.bytes_of(token, skip_special=False)) for token in range(len(self)))

    def id_of(self, token: str) -> int:
        """The id of a token, named as in the vocabulary, for example "<|AUDIO|>".

        errors   CheckpointError if there is none
        """
        number = self._plain.token_to_id(token)
        if number is None:
            raise CheckpointError(f"{self._where}: the tokenizer has no token {token!r}")
        return number

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, complete with the added tokens, and tokenizer_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "Qwen2Tokenizer",
            "pad_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            **self._config,
            "added_tokens_decoder": {str(n): entry for n, entry in self._added.items()},
        }
        _write(folder / "tokenizer.json", self._parsing.to_str())
        _write(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2))

    @cached_property
    def _parsing(self) -> "tokenizers.Tokenizer":
        # A second shell around the same model: switching one shell to and fro is not thread-safe.
        return self._build(special=True)

    def _build(self, special: bool) -> "tokenizers.Tokenizer":
        """The library's object; `special` says whether it finds special tokens in a text."""
        from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
        from tokenizers import Tokenizer as Shell

        shell = Shell(self._model)
        shell.normalizer = normalizers.NFC()
        shell.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        shell.decoder = decoders.ByteLevel()
        # add_tokens numbers them one by one behind the vocabulary, so the order is their id.
        shell.add_tokens(
            [
                AddedToken(
                    entry["content"], **{flag: entry[flag] for flag in _FLAGS if flag in entry}
                )
                for entry in self._added.values()
            ]
        )
        shell.encode_special_tokens = not special
        return shell

    def _check_added(self) -> None:
        for number, entry in self._added.items():
            landed = self._plain.token_to_id(entry["content"])
            if landed != number:
                raise CheckpointError(
                    f"{self._where}: added token {entry['content']!r} is declared with id {number}"
                    f" but lands on {landed}; ids must have no gap and no token twice"
                )


class TextStream:
    """Text of ids that arrive one by one.

    What all calls return, joined, equals Tokenizer.decode of all ids; a character whose bytes are
    spread over several tokens appears when its last byte has come.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, often empty in scripts of several bytes a character."""
        return self._decoder.decode(self._tokenizer.bytes_of(int(token), self._skip_special))

    def finish(self) -> str:
        """The rest: U+FFFD for a character that never came to its end, or nothing."""
        return self._decoder.decode(b"", final=True)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _read_merges(path: Path) -> list[tuple[str, str]]:
    lines = _read_text(path).strip()
    if lines.startswith("#version"):
        lines = lines.partition("\n")[2]
    # No symbol of a byte is white space, so a merge is two words.
    words = lines.split()
    if len(words) != 2 * (lines.count("\n") + 1 if lines else 0):
        raise CheckpointError(f"{path}: expected two tokens on each line")
    return list(zip(words[::2], words[1::2], strict=True))


def _read_combined(
    path: Path,
) -> tuple[dict[str, int], list[tuple[str, str]], dict[int, Mapping[str, Any]]]:
    """Vocabulary, merges and added tokens of a tokenizer.json.

    The library's own reader takes twice as long as this page's way through the parts.
    """
    raw = _read_json(path)
    try:
        split = raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        known = raw["normalizer"]["type"] == "NFC" and raw["model"]["type"] == "BPE"
        if split != SPLIT_PATTERN or not known:
            raise CheckpointError(
                f"{path}: not the tokenizer of Qwen2 (NFC, its split pattern, BPE)"
            )
        vocab = raw["model"]["vocab"]
        merges: list[Any] = [
            tuple(pair.split(" ") if isinstance(pair, str) else pair)
            for pair in raw["model"]["merges"]
        ]
        added = {entry["id"]: entry for entry in raw.get("added_tokens", [])}
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path}: incomplete, {error!r} while reading it") from error
    for number, entry in added.items():
        if not isinstance(number, int):
            raise CheckpointError(f"{path}: added_tokens id {number!r} is not a number")
        _check_entry(entry, f"{path}: added_tokens id {number}")
    return vocab, merges, added


def _check_entry(entry: Any, where: str) -> None:
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("content"), str)
        or not entry["content"]
    ):
        raise CheckpointError(f"{where} must be an object with a text as its content")


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
