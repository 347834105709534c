"""Texts to the words or characters that they are compared in, as the published evaluation does it.

Of evaluate_asr.py, in its order: tags out; Cantonese in simplified characters; English as Whisper's
English normaliser writes it; every language but Mandarin through Whisper's basic one, English too;
lower case. Mandarin, Cantonese and Japanese are compared character by character, which is a CER.

The official rules for Mandarin (SpeechIO's) and for Cantonese (zhconv's) are not those of the
libraries used here: numbers are written out by cn2an, characters converted by OpenCC. Texts without
digits, and those that OpenCC and zhconv convert alike, come out the same.
"""

import re
import unicodedata
import warnings
from collections.abc import Callable
from functools import cache

from qwen2audio_core import install
from qwen2audio_core.errors import InputError
from qwen2audio_core.transcribe import LANGUAGES, UNSPACED

MANDARIN = ("zh", "zh_tw", "wuu", "nan")  # of these only zh is in the published evaluation
Rewrite = Callable[[str], str]


def check(language: str) -> str:
    """The language, if there are rules for it; InputError if not."""
    if language not in LANGUAGES:
        raise InputError(f"language {language!r} is not one of {', '.join(LANGUAGES)}")
    return language


def items(text: str, language: str) -> list[str]:
    """The words of a text, or for a language without spaces its characters.

    language  one of transcribe.LANGUAGES
    errors    InputError where the extra `eval` is not installed
    """
    text = without_tags(text)
    for rewrite in _rules(language):
        text = rewrite(text)
    # What is left of punctuation stands in words of its own, and these go.
    words = [word for word in text.split() if not all(map(_is_punctuation, word))]
    words = [word.lower() for word in words]
    return list("".join(words)) if language in UNSPACED else words


def without_tags(text: str) -> str:
    """Without <|...|>, spaces squeezed, none before ! , . ? ; and :."""
    text = re.sub(r"\s+", " ", re.sub(r"<\|.*?\|>", " ", text))
    return re.sub(r" ?([!,.?;:])", r"\1", text).lstrip(" ")


@cache
def _rules(language: str) -> tuple[Rewrite, ...]:
    """What a text of this language goes through."""
    try:
        if language in MANDARIN:
            import cn2an

            return (lambda text: _mandarin(text, cn2an.transform),)
        from whisper_normalizer.basic import BasicTextNormalizer
        from whisper_normalizer.english import EnglishTextNormalizer

        basic = BasicTextNormalizer()
        if language == "yue":
            import opencc

            return opencc.OpenCC("t2s").convert, basic
        return (EnglishTextNormalizer(), basic) if language == "en" else (basic,)
    except ImportError as error:
        raise InputError(
            f"texts are compared with packages that are not installed: {install.extra('eval')}"
        ) from error


def _mandarin(text: str, numbers: Callable[[str, str], str]) -> str:
    """No spaces, numbers in characters, signs to spaces."""
    text = re.sub(r"\s+", "", text)
    with warnings.catch_warnings(action="ignore"):  # of numbers that have no name: they stay
        text = numbers(text, "an2cn")
    return "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text)


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] == "P"
