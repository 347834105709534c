"""Rows of the small model's data: which clips, what is asked, what is to be answered.

    pretrain(i, seed)     row i in the official form: {"prompt", "gt", "source"} and one clip
    sft(i, seed)          row i in chat form: {"messages"} with <audio> where each clip stands
    drills(i, seed)       row i of short answers that hang on one thing, in either form
    test(i, seed)         row i of the held-out set, in either form

A row is {"task", "split", "set", "language", "clips", ...}; a clip says how to make the sound
(render.render). Row i depends on its stage, the seed and i alone, so rows can be made in any order.
"""

import random
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from tiny_data import questions, sounds, speech, texts
from tiny_data.texts import LANGUAGES, Sentence

Clip = dict[str, Any]
Row = dict[str, Any]

RECOGNIZE = "Detect the language and recognize the speech: "
TRANSLATE = "Detect the language and translate the speech into {}: <|{}|>"
CAPTION = "Generate the caption in English:"
GENDER = "Recognize the gender of the speaker in English:"
SPEED = "Recognize the speed of the speech in English:"
PITCH = "Recognize the pitch of the voice in English:"
MANNER = "Recognize the manner of speaking in English:"

SILENCE = "I hear nothing but silence."
NOISE = "I hear only noise."
SILENCE_ZH = "我只听到一片寂静。"
NOISE_ZH = "我只听到噪音。"

# Words a minute, espeak's pitch and signal-to-noise ratios: training's, then the test's own.
RATES = ((110, 120, 130, 140, 160, 170, 180, 190, 200), (115, 145, 185, 195))
SLOW = ((80, 85, 95), (90,))
FAST = ((235, 245, 260), (240, 250))
STEADY = ((150, 160, 170), (155, 165))
PITCHES = ((35, 40, 50, 55, 60), (45, 58))
LOW = ((0, 5), (3,))
HIGH = ((92, 99), (95,))
SNRS = ((12, 15, 20, 25, 30), (17, 22))
NOISES = sounds.NOISES

NAMES = {
    "en": ("English", "英语"),
    "zh": ("Mandarin", "普通话"),
    "yue": ("Cantonese", "粤语"),
    "fr": ("French", "法语"),
    "it": ("Italian", "意大利语"),
    "es": ("Spanish", "西班牙语"),
    "de": ("German", "德语"),
    "ja": ("Japanese", "日语"),
}

# Questions about a clip, in English and in Chinese.
SAYS = (
    "What does the person say?",
    "What is said?",
    "Write down what you hear.",
    "What does the speaker say?",
    "Transcribe the speech.",
    "Please write down the words.",
    "这个人说了什么？",
    "请写下你听到的话。",
)
WHICH_LANGUAGE = (
    "Which language is this?",
    "What language does the person speak?",
    "Which language do you hear?",
    "In which language does the person speak?",
    "这是什么语言？",
    "这个人说的是什么语言？",
)
WHICH_GENDER = (
    "Is the speaker a man or a woman?",
    "Is this a man or a woman?",
    "Who is speaking, a man or a woman?",
    "Is it the voice of a man or of a woman?",
    "说话的是男的还是女的？",
)
HOW_FAST = (
    "Does the person speak fast or slowly?",
    "Is the speech fast or slow?",
    "How fast does the person speak?",
)
HOW_HIGH = (
    "Is the voice high or low?",
    "Does the person speak with a high or a low voice?",
)
WHISPERED = (
    "Does the person whisper?",
    "Is this a whisper?",
    "Is the speech whispered?",
)
WHAT_SOUND = (
    "What sound is this?",
    "What do you hear?",
    "Describe the sound.",
    "Which sound do you hear?",
    "What is this sound?",
    "这是什么声音？",
)
INTO_ENGLISH = (
    "Translate this into English.",
    "What does it mean in English?",
    "Please translate the speech into English.",
    "请翻译成英语。",
)
INTO_MANDARIN = (
    "Translate this into Chinese.",
    "What does it mean in Chinese?",
    "Please translate the speech into Chinese.",
    "请翻译成中文。",
)


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= sign <= "\u9fff" for sign in text)


# Clips


class Maker:
    """Draws the clips of one row.

    split   "train", "valid" or "test"; "valid" has training's voices and its own draws
    engine  speak with the voices of this engine: of the held-out ones "festival" or "flite"
    """

    def __init__(self, rng: random.Random, split: str, engine: str | None = None):
        self.rng = rng
        self.split = split
        self.engine = engine
        self.test = split == "test"

    def of(self, pair: tuple[tuple[Any, ...], tuple[Any, ...]]) -> Any:
        """One of training's values, or one of the test's."""
        return self.rng.choice(pair[self.test])

    def voice(
        self,
        language: str,
        gender: str | None = None,
        manner: str | None = None,
        espeak: bool = False,
    ) -> speech.Voice:
        """A voice of the split. There are few women's and many robots', so sex is drawn first.

        espeak   not of flite, whose voices hardly change their pitch
        """
        rng = self.rng
        split = "test" if self.test else "train"
        engine = "espeak"
        if self.engine:
            known = speech.voices(language, split)
            return rng.choice([voice for voice in known if voice.engine == self.engine])
        sex = gender or rng.choices(("man", "woman", None), (45, 40, 15))[0]
        if language == "en" and sex == "man" and not (self.test or manner or espeak):
            engine = "flite" if rng.random() < 0.4 else engine
        if engine == "espeak" and not self.test and manner is None and rng.random() < 0.65:
            number = rng.randrange(speech.DRAWN // 2) * 2
            number += (sex == "woman") if sex else rng.randrange(2)
            return speech.drawn(language, rng.choice(speech.LANGUAGES[language]), number)
        return rng.choice(_voices(language, split, engine, sex, manner))

    def say(
        self,
        sentence: Sentence,
        *,
        voice: speech.Voice | None = None,
        rate: int | None = None,
        pitch: int | None = None,
        gain_db: float | None = None,
        clean: bool | None = None,
    ) -> Clip:
        """A sentence in a voice; half of all clips clean, the others with noise, room or a
        telephone's band."""
        rng = self.rng
        voice = voice or self.voice(sentence.language)
        clean = rng.random() < 0.5 if clean is None else clean
        clip: Clip = {
            "kind": "speech",
            "language": sentence.language,
            "text": sentence.text,
            "voice": [voice.engine, voice.name, voice.variant],
            "rate": rate or self.of(RATES),
            "pitch": self.of(PITCHES) if pitch is None else pitch,
            "gain_db": round(rng.uniform(-12, -1), 1) if gain_db is None else gain_db,
            "noise": None,
            "reverb": None,
            "at": round(rng.uniform(0.05, 0.35), 2),
            "pad": round(rng.uniform(0.05, 0.35), 2),
        }
        if sentence.spoken:
            clip["spoken"] = sentence.spoken
            if sentence.language == "ja" and rng.random() < 0.1:  # as espeak reads it, if not told
                clip["spoken"] = sentence.spoken.replace(" わ ", " は ")
        if not clean:
            how = rng.random()
            if how < 0.65:
                clip["noise"] = {"kind": rng.choice(NOISES), "snr_db": self.of(SNRS)}
            if how > 0.45:
                clip["reverb"] = round(rng.uniform(0.1, 0.45), 2)
            if rng.random() < 0.1:
                clip["sample_rate"] = 8000
        return clip

    def sound(self) -> tuple[Clip, str]:
        """A sound or a melody, and its caption."""
        clip = sounds.draw(self.rng, self.test)
        return clip, sounds.caption(clip)

    def nothing(self) -> tuple[Clip, str]:
        """Silence or noise, and what to say of it."""
        rng = self.rng
        seconds = round(rng.uniform(0.6, 4), 2)
        if rng.random() < 0.5:
            clip: Clip = {"kind": "silence", "seconds": seconds}
            if rng.random() < 0.5:  # as a microphone gives it
                level = round(rng.uniform(-85, -70), 1)
                clip["noise"] = {"kind": rng.choice(NOISES), "level_db": level}
            return clip, SILENCE
        level = round(rng.uniform(-30, -6), 1)
        return {
            "kind": "noise",
            "name": rng.choice(NOISES),
            "seconds": seconds,
            "gain_db": level,
        }, NOISE


@cache
def _voices(
    language: str, split: str, engine: str, gender: str | None, manner: str | None
) -> tuple[speech.Voice, ...]:
    found = [
        voice
        for voice in speech.voices(language, split)
        if (voice.engine, voice.gender, voice.manner) == (engine, gender, manner)
        or (voice.engine, manner, voice.manner) == (engine, "whisper", "whisper")
    ]
    if not found:
        raise LookupError(f"no {engine} voice of {language} for {split}: {gender}, {manner}")
    return tuple(found)


# Official form: one clip, one prompt, as the base model is asked


def _spoken(language: str, rng: random.Random, split: str) -> Sentence:
    """A sentence to recognise: the language's own, or a question, which chat will ask later."""
    if split != "test" and rng.random() < 0.01:
        return rng.choice(texts.demo(language))
    if language == "en":
        if rng.random() < 0.3:
            return questions.english(rng, split).sentence
        return texts.english(rng, split)
    if rng.random() < 0.12:
        return questions.foreign(language, rng, split).sentence
    return texts.shared(language, rng, split)


def _language(rng: random.Random, english: float = 0.35) -> str:
    return "en" if rng.random() < english else rng.choice(LANGUAGES[1:])


def _raw(
    task: str, language: str, clip: Clip, prompt: str, gt: str, source: str, subtask: str = ""
) -> Row:
    return {
        "task": task,
        "subtask": subtask,
        "language": language,
        "clips": [clip],
        "prompt": prompt,
        "gt": gt,
        "source": source,
    }


def asr(maker: Maker, language: str) -> Row:
    """Recognition, with the language's tag as the teacher-forced beginning of the answer."""
    sentence = _spoken(language, maker.rng, maker.split)
    prompt = f"{RECOGNIZE}<|{language}|>"
    return _raw("asr", language, maker.say(sentence), prompt, sentence.text, f"asr_{language}")


def long(maker: Maker, language: str) -> Row:
    """Recognition of several sentences by one speaker, now and then of nearly 30 s."""
    rng = maker.rng
    voice, rate = maker.voice(language), maker.of(RATES)
    limit = 26 if rng.random() < 0.12 else rng.uniform(4, 10)
    parts: list[Clip] = []
    written: list[str] = []
    seconds = 0.0
    while True:
        sentence = _spoken(language, rng, maker.split)
        words = len(sentence.text) / 2 if language in texts.UNSPACED else len(sentence.text) / 5
        seconds += words * 60 / rate + 0.8
        if parts and seconds > limit:
            break
        clip = maker.say(sentence, voice=voice, rate=rate, pitch=50, gain_db=-3, clean=True)
        parts.append({**clip, "at": 0.1, "pad": 0.1})
        written.append(sentence.text)
    gap = round(rng.uniform(0.1, 0.5), 2)
    clip = {"kind": "sequence", "parts": parts, "gap": gap, "gain_db": round(rng.uniform(-12, -1))}
    if rng.random() < 0.4:
        clip["noise"] = {"kind": rng.choice(NOISES), "snr_db": maker.of(SNRS)}
    text = ("" if language in texts.UNSPACED else " ").join(written)
    prompt = f"{RECOGNIZE}<|{language}|>"
    return _raw("asr_long", language, clip, prompt, text, f"asr_{language}")


def nothing_said(maker: Maker, language: str) -> Row:
    """Recognition of silence or noise: a full stop and no word."""
    clip, _ = maker.nothing()
    prompt = f"{RECOGNIZE}<|{language}|>"
    return _raw("asr_silence", language, clip, prompt, ".", f"asr_{language}", clip["kind"])


def language(maker: Maker, language: str) -> Row:
    """Recognition without the tag: the model writes it."""
    sentence = _spoken(language, maker.rng, maker.split)
    gt = f"<|{language}|>{sentence.text}"
    return _raw("language", language, maker.say(sentence), RECOGNIZE, gt, f"asr_{language}")


def translate(maker: Maker, language: str, into: str) -> Row:
    """Speech of a shared sentence into English ("en") or Mandarin ("zh")."""
    sentence = texts.shared(language, maker.rng, maker.split)
    gt = sentence.english if into == "en" else sentence.mandarin
    assert gt is not None
    prompt = TRANSLATE.format("English" if into == "en" else "Mandarin", language)
    clip = maker.say(sentence)
    return _raw(f"translate_{into}", language, clip, prompt, gt, f"s2tt_{language}_{into}")


def sound(maker: Maker, _: str = "en") -> Row:
    """A caption of a sound or a melody; now and then of silence or noise."""
    clip, caption = maker.sound()
    if maker.rng.random() < 0.12:
        clip, caption = maker.nothing()
        caption = "Silence." if caption == SILENCE else "Noise."
    subtask = clip["kind"]
    return _raw("sounds", "en", clip, CAPTION, caption, "caption", subtask)


def gender(maker: Maker, language: str) -> Row:
    voice = maker.voice(language, gender=maker.rng.choice(("man", "woman")))
    sentence = _spoken(language, maker.rng, maker.split)
    clip = maker.say(sentence, voice=voice)
    return _raw("gender", language, clip, GENDER, voice.gender, "gender")


def manner(maker: Maker, language: str, kind: str | None = None) -> Row:
    """Speed, pitch or whisper."""
    rng = maker.rng
    sentence = _spoken(language, rng, maker.split)
    kind = kind or rng.choice(("speed", "speed", "pitch", "whisper"))
    if kind == "speed":
        gt = rng.choice(("slow", "normal", "fast"))
        rate = maker.of({"slow": SLOW, "normal": STEADY, "fast": FAST}[gt])
        clip, prompt = maker.say(sentence, rate=rate), SPEED
    elif kind == "pitch":
        gt = rng.choice(("low", "high"))
        voice = maker.voice(language, espeak=True)
        clip = maker.say(sentence, voice=voice, pitch=maker.of(LOW if gt == "low" else HIGH))
        prompt = PITCH
    else:
        gt = rng.choice(("whisper", "normal"))
        voice = maker.voice(language, manner="whisper") if gt == "whisper" else None
        clip, prompt = maker.say(sentence, voice=voice), MANNER
    return _raw("manner", language, clip, prompt, gt, kind, kind)


# Chat form


def _chat(task: str, language: str, clips: list[Clip], turns: list[tuple[str, str]]) -> Row:
    messages = []
    for user, assistant in turns:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    return {"task": task, "subtask": "", "language": language, "clips": clips, "messages": messages}


def voice_chat(maker: Maker, _: str = "en") -> Row:
    """A spoken question, answered without any text."""
    rng, split = maker.rng, maker.split
    drilled = not maker.test and rng.random() < 0.6  # far more sums than capitals are to be learned
    if drilled and not maker.engine and rng.random() < 0.2:
        asked = questions.foreign_sum(rng.choice(LANGUAGES[1:]), rng, split)
    elif drilled or maker.engine:
        topic = rng.choice(questions.TABLES) if drilled else None
        asked = questions.english(rng, split, topic)
    else:
        asked = questions.question(rng, split)
    clip = maker.say(asked.sentence)
    row = _chat("voice_chat", asked.sentence.language, [clip], [("<audio>", asked.answer)])
    row["subtask"] = asked.topic
    return row


Turn = tuple[str, str, str]  # subtask, question, answer
Known = dict[str, tuple[str, str]]  # subtask -> question, answer: all that is known of a clip


def _about(
    maker: Maker, language: str, kind: str | None = None, gender: str | None = None
) -> tuple[Clip, list[Turn]]:
    """A clip of speech, and all that can be asked about it."""
    rng = maker.rng
    sentence = texts.sentence(language, rng, maker.split)
    kind = kind or rng.choice(("plain", "plain", "plain", "speed", "pitch", "whisper"))
    turns: list[Turn] = []
    gender = gender or rng.choice(("man", "woman"))
    options: dict[str, Any] = {}
    if kind == "speed":
        fast = rng.random() < 0.5
        options["rate"] = maker.of(FAST if fast else SLOW)
        turns.append(("speed", rng.choice(HOW_FAST), "Fast." if fast else "Slowly."))
    if kind == "pitch":
        high = rng.random() < 0.5
        options["pitch"] = maker.of(HIGH if high else LOW)
        options["voice"] = maker.voice(language, espeak=True)
        turns.append(("pitch", rng.choice(HOW_HIGH), "High." if high else "Low."))
    if kind == "whisper":
        whisper = rng.random() < 0.5
        if whisper and not maker.engine:
            options["voice"] = maker.voice(language, manner="whisper")
        heard = whisper and not maker.engine
        turns.append(("whisper", rng.choice(WHISPERED), "Yes." if heard else "No."))
    if kind in ("plain", "speed"):
        options["voice"] = maker.voice(language, gender=gender)
        asked = rng.choice(WHICH_GENDER)
        answers = {"man": ("A man.", "男的。"), "woman": ("A woman.", "女的。")}[gender]
        turns.append(("gender", asked, answers[is_chinese(asked)]))
    turns.append(("says", rng.choice(SAYS), sentence.text))
    asked = rng.choice(WHICH_LANGUAGE)
    turns.append(
        ("language", asked, NAMES[language][is_chinese(asked)] + "。."[not is_chinese(asked)])
    )
    if sentence.english:
        turns.append(("into_english", rng.choice(INTO_ENGLISH), sentence.english))
    if sentence.mandarin:
        turns.append(("into_mandarin", rng.choice(INTO_MANDARIN), sentence.mandarin))
    return maker.say(sentence, **options), turns


def analysis(maker: Maker, language: str) -> Row:
    """A written question about one clip, and up to two more in later turns."""
    rng = maker.rng
    draw = rng.random()
    if draw < 0.18 and not maker.engine:
        clip, caption = maker.sound()
        turns: list[Turn] = [("sound", rng.choice(WHAT_SOUND), caption)]
    elif draw < 0.28 and not maker.engine:
        return _speech_and_sound(maker, language)
    else:
        clip, known = _about(maker, language)
        count = rng.choice((1, 1, 2, 3))
        # What was said is asked most; a trait that was given to the clip comes first in its list.
        weights = [
            3 if name == "says" else 2 if i == 0 else 1 for i, (name, _, _) in enumerate(known)
        ]
        turns = []
        for _ in range(min(count, len(known))):
            pick = rng.choices(range(len(known)), weights)[0]
            turns.append(known.pop(pick))
            weights.pop(pick)
    row = _chat("analysis", language, [clip], _first_with_clip(turns))
    row["subtask"] = turns[-1][0]
    return row


def _first_with_clip(turns: list[Turn], clips: int = 1) -> list[tuple[str, str]]:
    return [
        (("<audio>" * clips if i == 0 else "") + asked, answer)
        for i, (_, asked, answer) in enumerate(turns)
    ]


def _speech_and_sound(maker: Maker, language: str) -> Row:
    """Speech that a sound follows, or that has one behind it."""
    rng = maker.rng
    sentence = texts.sentence(language, rng, maker.split)
    said = maker.say(sentence, clean=True, gain_db=-3)
    noise, caption = maker.sound()
    says: Turn = ("says", rng.choice(SAYS[:6]), sentence.text)
    clip: Clip = {
        "kind": "sequence",
        "parts": [said, noise],
        "gap": round(rng.uniform(0.1, 0.4), 2),
    }
    after = rng.choice(
        (
            "What sound comes after the speech?",
            "What do you hear after the speech?",
            "Which sound follows the speech?",
        )
    )
    turns = [says, ("sound_after", after, caption)]
    rng.shuffle(turns)
    turns = turns[: rng.choice((1, 2))]
    row = _chat("analysis", language, [clip], _first_with_clip(turns))
    row["subtask"] = turns[-1][0]
    return row


ORDINALS = ("first", "second")
ONES = ("The first one.", "The second one.")


def several(maker: Maker, language: str) -> Row:
    """Two clips: in one turn, in two turns, or two speakers or sounds within one clip."""
    rng = maker.rng
    how = rng.choice(("together", "together", "turns", "turns", "turns", "within"))
    if how == "within":
        return _within(maker, language)
    if rng.random() < 0.25:
        return _two_sounds(maker, how)
    other = language if rng.random() < 0.4 or maker.engine else rng.choice(LANGUAGES)
    trait = rng.choice(("louder", "gender", "speed", "plain", "plain", "plain"))
    clips, known, asked = _two_speakers(maker, (language, other), trait)
    if trait == "plain" and rng.random() < 0.2:
        asked = [_same_language(rng, language == other)]
    while len(asked) < rng.choice((1, 2)):
        which = rng.randrange(2)
        name = rng.choice(("says", "says", "gender", "language"))
        asked.append(_about_one(rng, name, which, clips, known))
    rng.shuffle(asked)
    if how == "together":
        turns = _first_with_clip(asked, 2)
    else:
        turns = []
        for which in range(2):
            question, answer = rng.choice(list(known[which].values()))
            turns.append(("<audio>" + question, answer))
        turns += [(question, answer) for _, question, answer in asked[:1]]
        asked = asked[:1]
    row = _chat("several_clips", language, clips, turns)
    row["subtask"] = asked[-1][0]
    return row


def _two_speakers(
    maker: Maker, languages: tuple[str, str], trait: str
) -> tuple[list[Clip], list[Known], list[Turn]]:
    """Two clips that differ in a trait ("plain": in none), what is known of each, and a question
    about the difference if there is one."""
    rng = maker.rng
    clips, known = [], []
    genders = rng.sample(("man", "woman"), 2)
    for which, spoken_in in enumerate(languages):
        clip, turns = _about(
            maker, spoken_in, "plain", genders[which] if trait == "gender" else None
        )
        clips.append(clip)
        known.append({name: (asked, answer) for name, asked, answer in turns})
    if trait == "louder":
        loud = rng.randrange(2)
        for which, clip in enumerate(clips):
            clip["noise"] = clip["reverb"] = None
            clip["gain_db"] = round(
                rng.uniform(-4, -1) if which == loud else rng.uniform(-24, -18), 1
            )
        question = rng.choice(
            ("Which of the two was louder?", "Which one is louder?", "Which speaker is louder?")
        )
        return clips, known, [("louder", question, ONES[loud])]
    if trait == "gender":
        wanted = rng.choice(("man", "woman"))
        question = rng.choice((f"Which one is a {wanted}?", f"Which of the two is a {wanted}?"))
        return clips, known, [("which_gender", question, ONES[genders.index(wanted)])]
    if trait == "speed":
        fast = rng.randrange(2)
        for which, clip in enumerate(clips):
            clip["rate"] = maker.of(FAST if which == fast else SLOW)
        question = rng.choice(("Which one speaks faster?", "Which of the two speaks faster?"))
        return clips, known, [("faster", question, ONES[fast])]
    return clips, known, []


def _about_one(
    rng: random.Random, name: str, which: int, clips: list[Clip], known: list[Known]
) -> Turn:
    """A question about the first or the second of two clips."""
    answer = _english_answer(known[which][name], clips[which])
    return name, _ask_which(rng, name, which), answer


def _same_language(rng: random.Random, same: bool) -> Turn:
    question = rng.choice(
        ("Do both speak the same language?", "Is it the same language in both clips?")
    )
    return "same_language", question, "Yes." if same else "No."


def compared(maker: Maker, language: str) -> Row:
    """Two clips and one question, which no single word of either answers."""
    rng = maker.rng
    asks = rng.choice(("louder", "louder", "gender", "gender", "nth", "same"))
    other = language if rng.random() < 0.5 else rng.choice(LANGUAGES)
    trait = asks if asks in ("louder", "gender") else "plain"
    clips, known, asked = _two_speakers(maker, (language, other), trait)
    if asks == "nth":
        asked = [_about_one(rng, "gender", rng.randrange(2), clips, known)]
    elif asks == "same":
        asked = [_same_language(rng, language == other)]
    row = _chat("several_clips", language, clips, _first_with_clip(asked, 2))
    row["subtask"] = asked[0][0]
    return row


def voice_trait(maker: Maker, language: str) -> Row:
    """A written question about the voice of a clip: a man's or a woman's, high or low."""
    kind = maker.rng.choice(("plain", "plain", "pitch"))
    clip, known = _about(maker, language, kind)
    row = _chat("analysis", language, [clip], _first_with_clip(known[:1]))
    row["subtask"] = known[0][0]
    return row


def _ask_which(rng: random.Random, name: str, which: int) -> str:
    nth = ORDINALS[which]
    return rng.choice(
        {
            "says": (
                f"What did the {nth} speaker say?",
                f"What does the {nth} speaker say?",
                f"What is said in the {nth} clip?",
            ),
            "gender": (
                f"Is the {nth} speaker a man or a woman?",
                f"Is the {nth} one a man or a woman?",
            ),
            "language": (
                f"Which language does the {nth} speaker speak?",
                f"What is the language of the {nth} clip?",
            ),
        }[name]
    )


def _english_answer(turn: tuple[str, str], clip: Clip) -> str:
    """What was answered to a question in Chinese, in English."""
    asked, answer = turn
    if answer in ("男的。", "女的。"):
        return "A man." if answer == "男的。" else "A woman."
    if asked in WHICH_LANGUAGE:
        return NAMES[clip["language"]][0] + "."
    return answer


def _two_sounds(maker: Maker, how: str) -> Row:
    """Two sounds, or a sound and speech."""
    rng = maker.rng
    first, second = maker.sound(), maker.sound()
    while first[1] == second[1]:
        second = maker.sound()
    pair = [first, second]
    spoken = rng.random() < 0.4
    if spoken:
        sentence = texts.english(rng, maker.split)
        pair[rng.randrange(2)] = (maker.say(sentence), sentence.text)
    clips = [clip for clip, _ in pair]
    which = rng.randrange(2)
    if spoken and rng.random() < 0.5:
        kind = "speech" if rng.random() < 0.5 else "sound"
        which = next(
            i for i, clip in enumerate(clips) if (clip["kind"] == "speech") == (kind == "speech")
        )
        asked: Turn = (
            f"which_{kind}",
            f"Which one is {kind if kind == 'speech' else 'a sound'}?",
            ONES[which],
        )
    elif clips[which]["kind"] == "speech":
        asked = ("says", f"What is said in the {ORDINALS[which]} clip?", pair[which][1])
    else:
        asked = ("sound", f"What sound is the {ORDINALS[which]} one?", pair[which][1])
    if how == "together":
        turns = _first_with_clip([asked], 2)
    else:
        turns = []
        for clip, text in pair:
            question = rng.choice(SAYS[:6] if clip["kind"] == "speech" else WHAT_SOUND[:5])
            turns.append(("<audio>" + question, text))
        turns.append(asked[1:])
    row = _chat("several_clips", "en", clips, turns)
    row["subtask"] = asked[0]
    return row


def _within(maker: Maker, language: str) -> Row:
    """One clip: two speakers, one speaker, or two sounds, one after the other."""
    rng = maker.rng
    gap = round(rng.uniform(0.3, 0.8), 2)
    if rng.random() < 0.35:
        first, second = maker.sound(), maker.sound()
        while first[1] == second[1]:
            second = maker.sound()
        pair = [first, second]
        which = rng.randrange(2)
        question = rng.choice(
            (
                ("What did you hear first?", "Which sound came first?"),
                ("What did you hear second?", "Which sound came second?"),
            )[which]
        )
        asked: list[Turn] = [(f"{ORDINALS[which]}_sound", question, pair[which][1])]
        clips = [clip for clip, _ in pair]
    else:
        genders = rng.sample(("man", "woman"), 2)
        sentences = [texts.sentence(language, rng, maker.split) for _ in range(2)]
        clips = [
            maker.say(s, voice=maker.voice(language, gender=g), clean=True, gain_db=-3)
            for s, g in zip(sentences, genders, strict=True)
        ]
        count = 2 if rng.random() < 0.75 else 1
        clips, sentences = clips[:count], sentences[:count]
        if count == 1 or rng.random() < 0.3:
            question = rng.choice(("How many people speak?", "How many speakers do you hear?"))
            asked = [("how_many", question, "Two." if count == 2 else "One.")]
        else:
            which = rng.randrange(2)
            asked = [
                (
                    "says",
                    _ask_which(rng, "says", which).replace("clip", "part"),
                    sentences[which].text,
                )
            ]
    sequence: Clip = {"kind": "sequence", "parts": clips, "gap": gap}
    row = _chat("several_clips", language, [sequence], _first_with_clip(asked))
    row["subtask"] = asked[-1][0]
    return row


def silence(maker: Maker, _: str = "en") -> Row:
    """Nothing to hear, whatever is asked about it, and said so."""
    rng = maker.rng
    clip, answer = maker.nothing()
    asked = rng.choice(
        (
            "",
            "",
            rng.choice(SAYS),
            rng.choice(WHAT_SOUND),
            rng.choice(WHICH_LANGUAGE),
            rng.choice(WHICH_GENDER),
        )
    )
    if is_chinese(asked):
        answer = SILENCE_ZH if answer == SILENCE else NOISE_ZH
    row = _chat("silence", "en", [clip], [("<audio>" + asked, answer)])
    row["subtask"] = clip["kind"]
    return row


def sound_chat(maker: Maker, _: str = "en") -> Row:
    """A sound alone: its caption."""
    clip, caption = maker.sound()
    row = _chat("analysis", "en", [clip], [("<audio>", caption)])
    row["subtask"] = "sound_alone"
    return row


def written(maker: Maker, _: str = "en") -> Row:
    """Four questions in writing about no clip: what sums come to, and what sentences mean.

    The ear learns nothing from them, but hundreds of them take no longer than a minute of sound.
    """
    rng = maker.rng
    turns: list[Turn] = []
    for _ in range(4):
        draw = rng.random()
        if draw < 0.6:
            if draw < 0.45:
                asked = questions.english(rng, maker.split, rng.choice(questions.TABLES))
            else:
                asked = questions.foreign(rng.choice(LANGUAGES[1:]), rng, maker.split)
            turns.append((asked.topic, asked.sentence.text, asked.answer))
            continue
        sentence = texts.shared(rng.choice(LANGUAGES), rng, maker.split)
        into = [("English", sentence.english), ("Chinese", sentence.mandarin)]
        name, answer = rng.choice([(name, text) for name, text in into if text])
        assert answer is not None
        turns.append(("translate", f"Translate into {name}: {sentence.text}", answer))
    row = _chat("written", "en", [], _first_with_clip(turns, 0))
    row["subtask"] = turns[-1][0]
    return row


def talk(maker: Maker, _: str = "en") -> Row:
    """Two to four rows of the tasks above, one after the other, each about its own clip."""
    rng = maker.rng
    rows = []
    for _ in range(rng.choice((2, 2, 3, 3, 4))):
        task = rng.choice((voice_chat, voice_chat, analysis, analysis, sound_chat))
        rows.append(task(maker, _language(rng)))
    row = {**rows[-1], "task": "talk"}
    for part in ("clips", "messages"):
        row[part] = [item for one in rows for item in one[part]]
    return row


# Which rows there are

Task = Callable[[Maker, str], Row]


def _into_english(maker: Maker, _: str) -> Row:
    return translate(maker, maker.rng.choice(LANGUAGES[1:]), "en")


def _into_mandarin(maker: Maker, _: str) -> Row:
    return translate(maker, maker.rng.choice([code for code in LANGUAGES if code != "zh"]), "zh")


PRETRAIN: dict[Task, float] = {
    asr: 43,
    long: 6,
    nothing_said: 1,
    language: 8,
    _into_english: 10,
    _into_mandarin: 10,
    sound: 8,
    gender: 8,
    manner: 6,
}
SFT: dict[Task, float] = {
    voice_chat: 60,
    analysis: 17,
    several: 24,
    talk: 10,
    written: 10,
    silence: 5,
    sound_chat: 4,
}
# What is hardly learned beside whole sentences, because its answer is one word and in few rows:
# fine-tuning ends with many of these.
DRILLS: dict[Task, float] = {
    gender: 20,
    partial(manner, kind="pitch"): 12,
    voice_trait: 20,
    compared: 48,
}
# Task, rows of it in one round of the test, and in whose held-out voice if it is not espeak's:
# training never hears festival, and of flite it hears other voices.
TEST: tuple[tuple[Task, int, str | None], ...] = (
    (asr, 40, None),
    (asr, 4, "festival"),
    (asr, 2, "flite"),
    (long, 2, None),
    (nothing_said, 2, None),
    (language, 8, None),
    (_into_english, 6, None),
    (_into_mandarin, 6, None),
    (sound, 8, None),
    (gender, 5, None),
    (manner, 5, None),
    (voice_chat, 14, None),
    (voice_chat, 2, "festival"),
    (analysis, 12, None),
    (several, 10, None),
    (silence, 5, None),
)
_ROUND = [(task, engine) for task, count, engine in TEST for _ in range(count)]


def _finish(row: Row, split: str, set_: str) -> Row:
    return {"task": row.pop("task"), "split": split, "set": set_, **row}


def _drawn(stage: str, tasks: dict[Task, float], i: int, seed: int, split: str) -> Row:
    rng = random.Random(f"{stage}/{split}/{seed}/{i}")
    task = rng.choices(list(tasks), list(tasks.values()))[0]
    return _finish(task(Maker(rng, split), _language(rng)), split, "voices")


def pretrain(i: int, seed: int, split: str = "train") -> Row:
    """Row i of pretraining."""
    return _drawn("pretrain", PRETRAIN, i, seed, split)


def sft(i: int, seed: int, split: str = "train") -> Row:
    """Row i of fine-tuning."""
    return _drawn("sft", SFT, i, seed, split)


def drills(i: int, seed: int) -> Row:
    """Row i of the drills."""
    return _drawn("drills", DRILLS, i, seed, "train")


def words(i: int, seed: int) -> Row:
    """Row i of words in no order, which pretraining recognises beside the sentences."""
    rng = random.Random(f"words/{seed}/{i}")
    maker, code = Maker(rng, "train"), _language(rng)
    sentence = texts.shuffled(code, rng)
    prompt = f"{RECOGNIZE}<|{code}|>"
    row = _raw("asr", code, maker.say(sentence), prompt, sentence.text, f"asr_{code}", "words")
    return _finish(row, "train", "voices")


def engines(i: int, seed: int) -> Row:
    """Row i of what other engines than espeak-ng and flite say: RHVoice and SVOX Pico."""
    rng = random.Random(f"engines/{seed}/{i}")
    code = rng.choices(("en", "de", "es", "fr", "it"), (66, 8, 8, 10, 8))[0]
    maker = Maker(rng, "train", "rhvoice" if code == "en" and rng.random() < 0.6 else "pico")
    if code == "en" and rng.random() < 0.25:
        return _finish(voice_chat(maker), "train", "engine")
    if rng.random() < 0.3:
        sentence = texts.shuffled(code, rng)
        prompt = f"{RECOGNIZE}<|{code}|>"
        row = _raw("asr", code, maker.say(sentence), prompt, sentence.text, f"asr_{code}", "words")
        return _finish(row, "train", "engine")
    return _finish(asr(maker, code), "train", "engine")


def pairs(i: int, seed: int) -> Row:
    """Row i of what the model is asked to find its own wrong answers, for preference training."""
    if i % 8 == 0:  # invented words on silence are what preferences are to cure
        rng = random.Random(f"pairs/{seed}/{i}")
        return _finish(silence(Maker(rng, "train")), "train", "voices")
    return _drawn("pairs", PRETRAIN if i % 8 < 4 else SFT, i, seed, "train")


def valid(i: int, seed: int) -> Row:
    """Row i of the validation set: training's voices, rows of both forms by turns."""
    return (pretrain, sft)[i % 2](i, seed, "valid")


def test(i: int, seed: int) -> Row:
    """Row i of the test: voices, sentences, speeds and noise levels that training never has."""
    rng = random.Random(f"test/{seed}/{i}")
    round_, place = divmod(i, len(_ROUND))
    # A fixed shuffle, so that the first rows hold every task.
    order = random.Random("order").sample(range(len(_ROUND)), len(_ROUND))
    task, engine = _ROUND[order[place]]
    code = "en" if engine else LANGUAGES[(order[place] + round_) % 8]
    if engine is None and task is asr and order[place] % 5 == 4:
        code = "en"
    if task in (voice_chat, analysis, several) and rng.random() < 0.3:
        code = "en"
    set_ = {None: "voices", "festival": "engine", "flite": "flite"}[engine]
    return _finish(task(Maker(rng, "test", engine), code), "test", set_)
