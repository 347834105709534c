"""Which rules an answer is scored by: a table of tasks, told by the published prompts.

asr        Detect the language and recognize the speech: <|en|>          WER, or CER
translate  Detect the language and translate the speech into German: <|en|>          BLEU
label      Recognize the emotion with keywords in English:          accuracy, to the letter
           Classify the human vocal sound to VocalSound in English:
none       anything else: answers are written down and not scored
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qwen2audio_core.errors import InputError
from qwen2audio_core.evaluation import metrics, normalize
from qwen2audio_core.evaluation.metrics import Score
from qwen2audio_core.transcribe import UNSPACED

# As prompts name them: the languages of CoVoST 2 that are translated into, and their neighbours.
NAMED = {
    **{"english": "en", "german": "de", "french": "fr", "spanish": "es", "italian": "it"},
    **{"mandarin": "zh", "chinese": "zh", "cantonese": "yue", "japanese": "ja", "korean": "ko"},
    **{"russian": "ru", "portuguese": "pt", "arabic": "ar"},
}
TAG = re.compile(r"<\|([a-z_]+)\|>\s*$")


class Rules(NamedTuple):
    """What answers of one kind are scored by."""

    task: str
    language: str = ""  # that the answers are in; "" where it makes no difference

    def __str__(self) -> str:
        return f"{self.task} {self.language}".strip()


@dataclass(frozen=True)
class Task:
    prompts: re.Pattern[str]  # that tell it
    language: Callable[[str], str] | None  # of the answers, by the prompt; None: no difference
    score: Callable[[Sequence[str], Sequence[str], str], Score]  # expected, given, language
    compared: Callable[[str, str], str]  # a text and its language to what of it is compared


def _tag(prompt: str) -> str:
    found = TAG.search(prompt)
    return found[1] if found else ""


def _target(prompt: str) -> str:
    found = re.search(r"\binto (\w+)", prompt)
    return NAMED.get(found[1].lower(), "") if found else ""


def _recognized(expected: Sequence[str], given: Sequence[str], language: str) -> Score:
    wanted, written = (
        [normalize.items(text, language) for text in texts] for texts in (expected, given)
    )
    return metrics.error_rate(wanted, written, "CER" if language in UNSPACED else "WER")


def _words(text: str, language: str) -> str:
    return ("" if language in UNSPACED else " ").join(normalize.items(text, language))


def _labelled(expected: Sequence[str], given: Sequence[str], language: str) -> Score:
    return metrics.accuracy(expected, given)


TASKS = {
    "asr": Task(
        re.compile("^Detect the language and recognize the speech:"),
        _tag,
        _recognized,
        _words,
    ),
    "translate": Task(
        re.compile("^Detect the language and translate the speech into "),
        _target,
        metrics.bleu,
        lambda text, language: text,
    ),
    "label": Task(
        re.compile("^(Recognize the emotion|Classify the human vocal sound) "),
        None,
        _labelled,
        lambda text, language: text.strip(),
    ),
}
NONE = "none"
NAMES = (*TASKS, NONE)


def rules(prompt: str, task: str | None = None, language: str | None = None) -> Rules:
    """What the answers to a prompt are scored by.

    task      one of NAMES; None: by the prompt
    language  that the answers are in; None: by the prompt
    errors    InputError where the prompt tells neither
    """
    if task is None:
        task = next((name for name, one in TASKS.items() if one.prompts.search(prompt)), None)
        if task is None:
            raise InputError(
                f"its prompt {prompt!r:.60} is none of the published ones: say what its answers are"
                f" scored by, --task {', '.join(NAMES)}"
            )
    if task == NONE or (told_by := TASKS[task].language) is None:
        return Rules(task)
    language = language or told_by(prompt)
    if not language:
        raise InputError(
            f"its prompt {prompt!r:.60} does not tell the answers' language: say it, --language"
        )
    return Rules(task, normalize.check(language))


def score(by: Rules, expected: Sequence[str], given: Sequence[str]) -> Score:
    """Of all answers of one kind together. InputError, which says why, where there is none."""
    if by.task == NONE:
        raise InputError("not scored")
    return TASKS[by.task].score(expected, given, by.language)
