"""Spoken questions and what to answer: what the small model knows of the world.

    question(rng, split)      a Question in English or, one in six, in another language

A fact is asked in several wordings, and one wording in eight is kept for the test: there the model
knows the fact but never heard it asked that way.

Where many answers look alike (sums, counting, days, opposites), the answer says what was heard
before it says what follows from it: "Seven plus three is ten." What follows is then read off what
is already written, which a small model learns far sooner than to hear and to reckon in one token.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from tiny_data import texts
from tiny_data.texts import DAYS, SLOTS, Sentence, held_out, number

CAPITALS = dict(zip(SLOTS["country"], SLOTS["city"], strict=True))
OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("old", "new"),
    ("good", "bad"),
    ("happy", "sad"),
    ("open", "closed"),
    ("day", "night"),
    ("black", "white"),
    ("up", "down"),
    ("fast", "slow"),
    ("long", "short"),
    ("rich", "poor"),
    ("wet", "dry"),
    ("high", "low"),
)
COLOURS = {
    "the sky": "Blue.",
    "the grass": "Green.",
    "the snow": "White.",
    "milk": "White.",
    "a banana": "Yellow.",
    "a lemon": "Yellow.",
    "a tomato": "Red.",
    "blood": "Red.",
    "an elephant": "Grey.",
    "a pig": "Pink.",
    "chocolate": "Brown.",
    "the night": "Black.",
}
LEGS = {"dog": "Four.", "cat": "Four.", "horse": "Four.", "cow": "Four.", "bird": "Two."}
GREETINGS = {
    "Hello.": "Hello! How can I help you?",
    "Good morning.": "Good morning! How can I help you?",
    "Good evening.": "Good evening! How can I help you?",
    "Good night.": "Good night!",
    "Thank you very much.": "You are welcome.",
    "Goodbye.": "Goodbye!",
    "How are you?": "I am fine, thank you.",
    "What is your name?": "I am a small audio model.",
    "Who are you?": "I am a small audio model.",
    "What can you do?": "I listen to speech and sounds.",
}
UNKNOWN = "I am sorry, I do not know."
SAID = "You said: "

# The same in the other languages.
SUMS = {
    "zh": ("{a} 加/jia1 {b} 等于/deng3yu2 多少/duo1shao3 ？", "请问/qing3wen4 ， {a} 加/jia1 {b} 是/shi4 多少/duo1shao3 ？"),  # noqa: E501
    "yue": ("{a} 加 {b} 等于 几多 ？", "请问 ， {a} 加 {b} 系 几多 ？"),
    "ja": ("{a} 足す/たす {b} は/わ いくつ です か 。", "すみません 、 {a} 足す/たす {b} は/わ いくつ です か 。"),  # noqa: E501
    "fr": ("Combien font {a} plus {b} ?", "Dis-moi, combien font {a} plus {b} ?"),
    "it": ("Quanto fa {a} più {b}?", "Dimmi, quanto fa {a} più {b}?"),
    "es": ("¿Cuánto es {a} más {b}?", "Dime, ¿cuánto es {a} más {b}?"),
    "de": ("Wie viel ist {a} plus {b}?", "Sag mir, wie viel ist {a} plus {b}?"),
}  # fmt: skip
RESULTS = {
    "zh": "{a} 加 {b} 等于 {c} 。",
    "yue": "{a} 加 {b} 等于 {c} 。",
    "ja": "{a} 足す {b} は {c} です 。",
    "fr": "{a} plus {b} font {c}.",
    "it": "{a} più {b} fa {c}.",
    "es": "{a} más {b} es {c}.",
    "de": "{a} plus {b} ist {c}.",
}
REPLIES = {
    "zh": ("你好！", "早上好！", "晚上好！", "晚安！", "不客气。", "再见！", "我很好，谢谢你。", "对不起，我不知道。"),  # noqa: E501
    "yue": ("你好！", "早晨！", "晚上好！", "晚安！", "唔使客气。", "再见！", "我好好，多谢你。", "对唔住，我唔知道。"),  # noqa: E501
    "fr": ("Salut !", "Bonjour !", "Bonsoir !", "Bonne nuit !", "De rien.", "Au revoir !", "Je vais bien, merci.", "Désolé, je ne sais pas."),  # noqa: E501
    "it": ("Ciao!", "Buongiorno!", "Buonasera!", "Buonanotte!", "Prego.", "Arrivederci!", "Sto bene, grazie.", "Mi dispiace, non lo so."),  # noqa: E501
    "es": ("¡Hola!", "¡Buenos días!", "¡Buenas tardes!", "¡Buenas noches!", "De nada.", "¡Adiós!", "Estoy bien, gracias.", "Lo siento, no lo sé."),  # noqa: E501
    "de": ("Hallo!", "Guten Morgen!", "Guten Abend!", "Gute Nacht!", "Bitte sehr.", "Auf Wiedersehen!", "Mir geht es gut, danke.", "Es tut mir leid, das weiß ich nicht."),  # noqa: E501
    "ja": ("こんにちは。", "おはようございます。", "こんばんは。", "おやすみなさい。", "どういたしまして。", "さようなら。", "元気です。", "すみません、分かりません。"),  # noqa: E501
}  # fmt: skip
HEARD = {
    "zh": "你说：",
    "yue": "你讲：",
    "fr": "Vous avez dit : ",
    "it": "Hai detto: ",
    "es": "Has dicho: ",
    "de": "Du hast gesagt: ",
    "ja": "あなたの言葉：",
}


@dataclass(frozen=True)
class Question:
    """A spoken text and the answer to it."""

    sentence: Sentence
    answer: str
    topic: str


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _sums() -> Iterator[tuple[str, int]]:
    for a in range(10):
        for b in range(10):
            x, y = number("en", a), number("en", b)
            yield f"{x} plus {y}", a + b
            if a >= b:
                yield f"{x} minus {y}", a - b
            if 2 <= a <= 5 and 2 <= b <= 5:
                yield f"{x} times {y}", a * b


@cache
def facts(topic: str) -> tuple[tuple[str, str], ...]:
    """All questions of a topic, in every wording, with their answers."""
    made: list[tuple[str, str]] = []

    def ask(answer: str, *wordings: str) -> None:
        made.extend((_capital(wording), answer) for wording in wordings)

    match topic:
        case "arithmetic":
            for sum_, result in _sums():
                ask(
                    _capital(f"{sum_} is {number('en', result)}."),
                    f"what is {sum_}?",
                    f"how much is {sum_}?",
                    f"tell me, what is {sum_}?",
                    f"please tell me, how much is {sum_}?",
                )
        case "capitals":
            for country, city in CAPITALS.items():
                ask(
                    city + ".",
                    f"what is the capital of {country}?",
                    f"tell me the capital of {country}.",
                    f"which city is the capital of {country}?",
                    f"the capital of {country}, please.",
                )
        case "opposites":
            for pair in OPPOSITES:
                for word, other in (pair, pair[::-1]):
                    ask(
                        f"The opposite of {word} is {other}.",
                        f"what is the opposite of {word}?",
                        f"tell me the opposite of {word}.",
                        f"which word is the opposite of {word}?",
                        f"the opposite of {word}, please.",
                    )
        case "colours":
            for thing, colour in COLOURS.items():
                ask(
                    colour,
                    f"what colour is {thing}?",
                    f"tell me, what colour is {thing}?",
                    f"which colour is {thing}?",
                    f"do you know what colour {thing} is?",
                )
        case "days":
            for i, day in enumerate(DAYS):
                for what, other in (("after", DAYS[(i + 1) % 7]), ("before", DAYS[i - 1])):
                    ask(
                        f"{_capital(what)} {day} comes {other}.",
                        f"what day comes {what} {day}?",
                        f"which day is {what} {day}?",
                        f"tell me the day {what} {day}.",
                        f"the day {what} {day}, please.",
                    )
        case "counting":
            for n in range(1, 50):
                for what, other in (("after", n + 1), ("before", n - 1)):
                    ask(
                        f"{_capital(what)} {number('en', n)} comes {number('en', other)}.",
                        f"what number comes {what} {number('en', n)}?",
                        f"which number is {what} {number('en', n)}?",
                        f"tell me the number {what} {number('en', n)}.",
                        f"the number {what} {number('en', n)}, please.",
                    )
        case "legs":
            for animal, legs in LEGS.items():
                ask(
                    legs,
                    f"how many legs does a {animal} have?",
                    f"tell me, how many legs does a {animal} have?",
                )
        case "names":
            for name in SLOTS["name"]:
                ask(
                    f"Hello, {name}!",
                    f"my name is {name}.",
                    f"hello, my name is {name}.",
                    f"I am {name}.",
                    f"hello, I am {name}.",
                )
        case "greetings":
            for text, answer in GREETINGS.items():
                ask(answer, text)
    return tuple(made)


# topic -> how often it is asked
TOPICS = {
    "arithmetic": 26,
    "capitals": 8,
    "opposites": 10,
    "colours": 6,
    "days": 8,
    "counting": 12,
    "legs": 2,
    "names": 5,
    "greetings": 5,
    "repeat": 10,
    "unknown": 3,
    "said": 5,
}
# Topics whose every answer is to be learned by heart, the largest most often.
TABLES = ("arithmetic",) * 5 + ("counting",) * 2 + ("days", "opposites", "capitals")
REPEAT = ("Repeat after me: ", "Say after me: ", "Please repeat: ", "Please say: ")


@cache
def _in_split(topic: str, test: bool) -> tuple[tuple[str, str], ...]:
    return tuple((text, answer) for text, answer in facts(topic) if held_out(text) == test)


def english(rng: random.Random, split: str, topic: str | None = None) -> Question:
    """A question in English."""
    test = split == "test"
    names = [name for name in TOPICS if not (test and name == "greetings")]
    topic = topic or rng.choices(names, [TOPICS[name] for name in names])[0]
    if topic == "greetings":  # so few that training needs them all
        text, answer = rng.choice(facts(topic))
        return Question(Sentence("en", text), answer, topic)
    if topic in ("repeat", "said", "unknown"):
        while True:
            sentence = texts.english(rng, split)
            asked = sentence.text.endswith("?")
            if topic == "repeat":
                first = rng.choice(REPEAT)
                text = first + sentence.text[0].lower() + sentence.text[1:]
                if sentence.text.split()[0].strip(",.?") in ("I", *SLOTS["name"], *DAYS):
                    text = first + sentence.text
                if len(sentence.text.split()) <= 6 and held_out(text) == test:
                    return Question(Sentence("en", text), sentence.text, topic)
            elif asked == (topic == "unknown") and sentence.text not in GREETINGS:
                answer = UNKNOWN if asked else SAID + sentence.text
                return Question(sentence, answer, topic)
    text, answer = rng.choice(_in_split(topic, test))
    return Question(Sentence("en", text), answer, topic)


@cache
def _foreign_sums(language: str, test: bool) -> tuple[Question, ...]:
    made = []
    for wording in SUMS[language]:
        for a in range(1, 6):
            for b in range(1, 6):
                numbers = {x: number(language, n) for x, n in (("a", a), ("b", b), ("c", a + b))}
                text, spoken = texts.read(language, wording.format(**numbers))
                result, _ = texts.read(language, RESULTS[language].format(**numbers))
                asked = Sentence(language, text, spoken)
                question = Question(asked, _capital(result), "arithmetic")
                if held_out(text) == test:
                    made.append(question)
    return tuple(made)


def foreign_sum(language: str, rng: random.Random, split: str) -> Question:
    """A sum in one of the other languages."""
    return rng.choice(_foreign_sums(language, split == "test"))


def foreign(language: str, rng: random.Random, split: str) -> Question:
    """A question in one of the other languages, answered in that language."""
    draw = rng.random()
    if draw < 0.5 or (draw < 0.75 and split == "test"):
        return foreign_sum(language, rng, split)
    if draw < 0.75:
        i = rng.randrange(len(texts.GREETINGS))
        sentence = texts.word(language, ("greet", texts.GREETINGS[i]))
        return Question(sentence, REPLIES[language][i], "greetings")
    if draw < 0.85:
        where = texts.shared(language, rng, split, ("where",))
        return Question(where, REPLIES[language][-1], "unknown")
    kinds = ("np", "is", "see", "have", "table") + (
        () if split == "test" else ("want", "go", "day")
    )
    sentence = texts.shared(language, rng, split, kinds)
    return Question(sentence, HEARD[language] + sentence.text, "said")


def question(rng: random.Random, split: str) -> Question:
    """A question in any language, five in six of them English."""
    if rng.random() < 5 / 6:
        return english(rng, split)
    return foreign(rng.choice(texts.LANGUAGES[1:]), rng, split)
