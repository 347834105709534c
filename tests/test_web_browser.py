"""The web demo as a person meets it: in a real browser, with a microphone that plays a clip.

Pictures of what the browser showed go to the folder named by QWEN2AUDIO_SHOTS, if it is set.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from qwen2audio_core import assistant, cli
from qwen2audio_core.generate import Generation
from qwen2audio_core.web import server
from qwen2audio_core.web.sessions import Limits

CLIPS = Path(cli.__file__).parent / "assets" / "clips"
BELL, TRAIN, CAPITAL = (CLIPS / f"{name}.flac" for name in ("sound_bell", "en_train", "en_capital"))
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
MISSING = [
    *(name for name in ("playwright", "gradio", "soundfile") if find_spec(name) is None),
    *([] if CHROMIUM else ["chromium"]),
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
SHORT = {"greedy": True, "max_new_tokens": 24}
PATIENCE = 60_000  # ms; the machine may be busy with something else


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setattr(server, "PORT", server.PORT + 100)  # test_web.py may be looking for one too
    loaded = assistant.load("random")
    yield loaded
    patch.undo()


@pytest.fixture(scope="module")
def address(model) -> Iterator[str]:
    with server.serving(model, limits=Limits(upload_bytes=2**20)) as (address,):
        yield address


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[Any]:
    import soundfile
    from playwright.sync_api import sync_playwright

    said = tmp_path_factory.mktemp("microphone") / "said.wav"
    samples, rate = soundfile.read(CAPITAL)
    soundfile.write(said, samples, rate)
    flags = (
        *("no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update"),
        *("disable-sync", "no-first-run", "use-fake-ui-for-media-stream"),
        *("use-fake-device-for-media-stream", f"use-file-for-fake-audio-capture={said}"),
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[f"--{flag}" for flag in flags]
        )
        yield browser
        browser.close()


class Visit:
    """One person at the page; notes what the page asks of other hosts, and its errors."""

    def __init__(self, browser: Any, address: str, query: str = "", **options: Any):
        options = {"viewport": {"width": 1280, "height": 860}, "locale": "en-US", **options}
        self.context = browser.new_context(permissions=["microphone"], **options)
        self.elsewhere: list[str] = []
        self.errors: list[str] = []
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("request", lambda request: self._asked(address, request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self._said(said.type, said.text))
        self.page.goto(address + "/" + query)
        self.page.locator(".q2a-heading h1").wait_for()

    def _asked(self, address: str, url: str) -> None:
        if not url.startswith((address + "/", "data:", "blob:")):
            self.elsewhere.append(url)

    def _said(self, kind: str, text: str) -> None:
        if kind == "error" or "Content Security Policy" in text:
            self.errors.append(text)

    def at(self, name: str) -> Any:
        return self.page.locator(f"#q2a-{name}")

    @property
    def text(self) -> Any:
        return self.at("text").locator("textarea")

    @property
    def answers(self) -> Any:
        return self.at("chat").locator("[data-testid=bot]")

    @property
    def waiting(self) -> Any:
        return self.at("waiting").locator("figure")

    def upload(self, *clips: Path) -> None:
        self.at("upload").locator("input[type=file]").set_input_files([str(clip) for clip in clips])

    def set(self, tokens: int = 24) -> None:
        """Settings that keep answers short."""
        self.page.get_by_text("Settings").click()
        box = self.at("tokens").locator("input[type=number]")
        slider = self.at("tokens").locator("input[type=range]")

        def arrived() -> bool:  # a page that has just opened may put its own number back
            box.fill(str(tokens))
            box.press("Enter")
            return slider.input_value() == str(tokens)

        until(arrived)

    def answered(self, count: int) -> str:
        """Wait until so many answers are there and the last is over. What it says."""
        until(lambda: self.answers.count() == count and self.at("send").is_visible())
        return self.answers.last.inner_text().strip()

    def says(self, expected: str, count: int) -> None:
        """Wait until the last of so many answers is this one, and over."""
        said = ""

        def done() -> bool:
            nonlocal said
            said = shown(self.answers.last.inner_text()) if self.answers.count() == count else ""
            return said == shown(expected) and self.at("send").is_visible()

        try:
            until(done)
        except AssertionError:
            assert said == shown(expected)
            raise

    def shot(self, name: str) -> None:
        if folder := os.environ.get("QWEN2AUDIO_SHOTS"):
            time.sleep(0.5)
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE / 1000
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.fixture
def visit(chromium, address) -> Iterator[Callable[..., Visit]]:
    visits: list[Visit] = []

    def open_one(*query: str, **options: Any) -> Visit:
        visits.append(Visit(chromium, address, *query, **options))
        return visits[-1]

    yield open_one
    for one in visits:
        one.context.close()
        assert one.elsewhere == [], "it asked another host"
        assert one.errors == []


def shown(text: str) -> str:
    """An answer as the page's text: markdown folds white space."""
    return re.sub(r"\s+", " ", text).strip()


def test_a_conversation(visit, model):
    """Two uploads and a text, then a recording about them, then retry, edit, clear."""
    one = visit()
    one.shot("empty")
    one.set()
    one.upload(BELL, TRAIN)
    until(lambda: one.waiting.count() == 2)
    assert one.waiting.first.locator("img").evaluate("image => image.naturalHeight") == 128
    one.shot("clips")
    one.text.fill("What do you hear?")
    one.text.press("Enter")
    talk = model.chat()
    one.says(talk.say("What do you hear?", [BELL, TRAIN], **SHORT).text, 1)
    assert one.waiting.count() == 0 and one.text.input_value() == ""
    assert "24 tokens" in one.at("status").inner_text()
    one.shot("answer")

    one.text.fill("And the first one?")  # the clips are still part of the conversation
    one.at("send").click()
    second = talk.say("And the first one?", **SHORT).text
    one.says(second, 2)
    assert second != model.ask("And the first one?", **SHORT).text

    one.at("temperature").locator("input[type=number]").fill("1.5")
    one.at("seed").locator("input, textarea").fill("5")
    one.at("retry").click()
    drawn = {"temperature": 1.5, "seed": 5, "max_new_tokens": 24}
    for _ in (turn := talk.retry(**drawn)):
        pass
    assert turn.reply.text != second
    one.says(turn.reply.text, 2)
    one.at("temperature").locator("input[type=number]").fill("0")

    one.at("edit").click()
    until(lambda: one.answers.count() == 1)
    assert one.text.input_value() == "And the first one?"
    one.text.fill("And the second one?")
    one.at("send").click()
    talk.messages = talk.messages[:2]
    one.says(talk.say("And the second one?", **SHORT).text, 2)

    one.page.get_by_role("tab", name="Look inside").click()
    until(lambda: one.page.locator(".q2a-token").count() == 24)
    one.page.locator(".q2a-token").first.hover()
    assert one.page.locator(".q2a-token li").first.is_visible()
    one.at("look").click()
    frame = one.at("report").locator("iframe")
    frame.wait_for()
    assert "And the second one?" in frame.get_attribute("srcdoc")
    assert frame.get_attribute("sandbox") == "allow-scripts"
    assert frame.bounding_box()["height"] > 300
    one.shot("inside")
    one.page.get_by_role("tab", name="Conversation").click()

    one.at("clear").click()
    until(lambda: one.answers.count() == 0)
    one.page.get_by_text("Name a sound").wait_for()


def test_the_microphone(visit):
    """What is recorded waits as a clip, or is answered at once; it is the clip that was played."""
    one = visit()
    one.set(tokens=4)
    for at_once in (False, True):
        if at_once:
            one.at("voice").locator("input").check()
        one.at("microphone").get_by_role("button", name="Record", exact=True).click()
        stop = one.at("microphone").get_by_role("button", name="Stop", exact=True)
        stop.wait_for()
        time.sleep(1.2)
        one.shot("recording")
        stop.click()
        if not at_once:
            one.waiting.wait_for()
            assert "recording 1" in one.waiting.inner_text()
            seconds = float(re.search(r"([\d.]+) s", one.waiting.inner_text())[1])
            assert 0.5 < seconds < 10
            one.waiting.get_by_role("button").click()
            until(lambda: one.waiting.count() == 0)
    one.answered(1)
    played = one.at("chat").locator("audio")
    until(lambda: played.evaluate("audio => audio.readyState") >= 1)
    assert played.evaluate("audio => audio.duration") > 0.5
    assert "recording 2" in one.at("chat").inner_text()


@pytest.fixture
def slow_model(monkeypatch):
    """A model that takes its time, so that it can be interrupted on any machine."""
    whole = Generation.step

    def step(self: Generation) -> list[tuple[int, int]]:
        time.sleep(0.05)
        return whole(self)

    monkeypatch.setattr(Generation, "step", step)


@pytest.mark.parametrize(
    ("flags", "script", "said"),
    [
        ([], "", "No microphone was found: connect one"),
        (
            ["--use-fake-device-for-media-stream", "--deny-permission-prompts"],
            "",
            "The microphone was not allowed",
        ),
        (
            [],
            "Object.defineProperty(navigator, 'mediaDevices', {value: undefined})",
            "browsers give it to https",
        ),
    ],
    ids=["missing", "refused", "insecure"],
)
def test_why_there_is_no_microphone(chromium, address, flags, script, said):
    browser = chromium.browser_type.launch(
        executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", *flags]
    )
    page = browser.new_context(locale="en-US").new_page()
    page.set_default_timeout(PATIENCE)
    page.add_init_script(script)
    page.goto(address)
    page.locator(".q2a-heading h1").wait_for()
    lines = page.locator("#q2a-trouble p")
    until(lambda: lines.count() == 3)
    if not script:
        assert not any(line.is_visible() for line in lines.all())
        page.locator("#q2a-microphone button.record").first.click()
    shown = page.locator("#q2a-trouble p:visible")
    until(lambda: shown.count() == 1)
    assert said in shown.inner_text()
    browser.close()


def test_words_stand_as_they_were_typed_and_drafts_stay(visit, model, monkeypatch):
    """No HTML, no Markdown; the page says its language; an example leaves what was begun alone."""
    one = visit()
    one.set()
    typed = "a <noise> & __b__ 2*3*4 <img src=x>"
    one.text.fill(typed)
    one.at("send").click()
    one.answered(1)
    question = one.at("chat").locator("[data-testid=user]").last
    assert question.inner_text().strip() == typed
    assert one.at("chat").locator("img").count() == 0
    one.text.fill("begun")
    one.at("edit").click()
    until(lambda: one.text.input_value() == f"{typed}\nbegun")
    one.page.get_by_text("Name a sound").click()
    one.answered(1)
    assert one.text.input_value() == f"{typed}\nbegun"
    assert one.page.get_by_label("Message", exact=True).count() == 1
    language = "document.documentElement.lang"
    assert one.page.evaluate(language) == "en"
    one.at("language").click()
    until(lambda: one.page.evaluate(language) == "zh")


def test_one_may_read_further_up_while_an_answer_is_written(visit, slow_model):
    """The end is followed until somebody scrolls; a new question is in sight again."""
    one = visit(viewport={"width": 800, "height": 560})
    one.set(tokens=60)
    where = "() => { const box = document.querySelector('#q2a-chat [role=log]');"
    below = where + " return box.scrollHeight - box.scrollTop - box.clientHeight; }"
    top = where + " return box.scrollTop; }"
    for count in range(1, 4):
        one.text.fill("line\n" * 12)
        one.at("send").click()
        one.answered(count)
    assert one.page.evaluate(top) > 200
    until(lambda: one.page.evaluate(below) < 40)
    one.text.fill("and now?")
    one.at("send").click()
    until(lambda: one.at("stop").is_visible() and one.answers.count() == 4)
    log = one.at("chat").locator("[role=log]")
    until(lambda: log.get_attribute("aria-busy") == "true")
    until(lambda: one.page.evaluate(below) < 40)
    log.hover()
    one.page.mouse.wheel(0, -400)
    until(lambda: one.page.evaluate(below) > 300)
    place, said = one.page.evaluate(top), one.answers.last.inner_text()
    until(lambda: one.answers.last.inner_text() != said)
    time.sleep(0.3)
    assert abs(one.page.evaluate(top) - place) < 5
    one.at("stop").click()
    until(lambda: log.get_attribute("aria-busy") == "false")


def test_the_keyboard_alone(visit, model):
    """From the box to Send and back, and a reload asks first."""
    one = visit()
    one.set()
    one.text.fill("What is that?")
    one.page.keyboard.press("Tab")
    assert one.page.evaluate("document.activeElement.id") == "q2a-send"
    one.page.keyboard.press("Enter")
    one.answered(1)
    until(lambda: one.page.evaluate("document.activeElement.tagName") == "TEXTAREA")
    asked: list[str] = []
    one.page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    one.page.reload()
    assert asked == ["beforeunload"]


def test_an_answer_streams_and_stops(visit, slow_model):
    one = visit()
    one.set(tokens=1000)
    one.text.fill("Tell me everything")
    one.at("send").click()
    lengths: list[int] = []

    def longer() -> bool:
        if one.answers.count():
            lengths.append(len(one.answers.last.inner_text()))
        return len(set(lengths)) > 3

    until(longer)
    one.at("stop").click()
    kept = one.answered(1)
    assert "stopped" in one.at("status").inner_text()
    tokens = int(one.at("status").inner_text().split()[0])
    assert 3 <= tokens < 900 and len(kept) <= tokens
    time.sleep(0.5)
    assert one.answers.last.inner_text().strip() == kept


def test_two_people_at_once(visit, slow_model):
    """Neither sees the other's words; the second waits in the line and is told so."""
    one, two = visit(), visit("?lang=zh")
    assert two.at("send").inner_text() == "发送"
    one.set(tokens=1000)
    one.text.fill("First person")
    one.at("send").click()
    one.at("stop").wait_for()
    two.upload(BELL)
    two.waiting.wait_for()
    two.at("send").click()
    two.page.get_by_text("排队中，前面还有 1 个").wait_for()
    two.shot("line")
    one.at("stop").click()
    one.answered(1)
    until(lambda: two.answers.count() == 1 and "排队" not in two.answers.last.inner_text())
    two.at("stop").click()
    two.answered(1)
    assert "First" not in two.at("chat").inner_text()
    assert "bell" not in one.at("chat").inner_text()
    one.at("language").click()
    until(lambda: one.at("send").inner_text() == "发送")
    assert "First person" in one.at("chat").inner_text()


def test_a_broken_upload_and_one_too_large(visit, tmp_path):
    one = visit()
    (tmp_path / "broken.wav").write_bytes(b"RIFF nothing of the kind")
    one.upload(tmp_path / "broken.wav")
    alert = one.at("status").get_by_role("alert")
    alert.wait_for()
    assert alert.inner_text().startswith("broken.wav: ") and "Traceback" not in one.page.content()
    one.shot("broken")
    (tmp_path / "large.wav").write_bytes(bytes(2**20 + 1))
    one.upload(tmp_path / "large.wav")
    one.page.get_by_text("exceed the maximum allowed size of 1.0 Mb").first.wait_for()
    one.upload(BELL)
    one.waiting.wait_for()


def test_a_phone_in_the_dark(visit):
    """380 pixels wide: nothing sticks out, everything can be reached."""
    phone = {"width": 380, "height": 780}
    one = visit(viewport=phone, is_mobile=True, has_touch=True, color_scheme="dark")
    one.upload(BELL)
    one.waiting.wait_for()
    one.set(tokens=200)
    one.text.fill("What is that?")
    one.at("send").tap()
    one.answered(1)
    wide = one.page.evaluate("document.documentElement.scrollWidth")
    outer = one.page.evaluate("window.innerWidth")
    assert wide == outer == 380
    for name in ("send", "retry", "edit", "clear", "microphone", "upload", "language"):
        box = one.at(name).bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 380, name
    red, green, blue = map(
        int,
        re.findall(r"\d+", one.page.evaluate("getComputedStyle(document.body).backgroundColor"))[
            :3
        ],
    )
    assert max(red, green, blue) < 80
    one.shot("phone-dark")


def test_the_small_model_gives_the_right_words(chromium):
    """A language named, the second turn about the first one's clip, then another clip."""
    with server.serving(assistant.load("tiny")) as (address,):
        one = Visit(chromium, address)
        for count, (clip, question, answer) in enumerate(
            (
                (TRAIN, "Which language is this?", "English."),
                (
                    None,
                    "What does the person say?",
                    "The train to London leaves at seven in the morning.",
                ),
                (BELL, "What is that sound?", "A bell is ringing."),
            ),
            start=1,
        ):
            if clip:
                one.upload(clip)
                until(lambda: one.waiting.count() == 1)
            one.text.fill(question)
            one.text.press("Enter")
            one.says(answer, count)
        one.context.close()
        assert one.elsewhere == [] and one.errors == []


@pytest.mark.slow
def test_every_example_answers(visit, model):
    from qwen2audio_core.web.views import EXAMPLES
    from qwen2audio_core.web.words import words

    for title, text, clips in EXAMPLES:
        one = visit()
        one.set()
        one.page.get_by_text(words("en")[title]).click()
        question = words("en")[text] if text else None
        reply = model.ask(question, [CLIPS / clip for clip in clips], **SHORT)
        one.says(reply.text, 1)
        one.context.close()
