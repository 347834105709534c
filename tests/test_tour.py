"""The tour's code runs and its claims hold; every picture that it shows is there."""

import codeop
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the tour draws with matplotlib (extra `plot`)")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import make_tour  # noqa: E402

TEXT = make_tour.TEXT.read_text(encoding="utf-8")


def test_the_text_shows_the_pictures_that_are_there():
    shown = [picture for _, picture, _ in make_tour.parts(TEXT) if picture]
    assert shown == sorted(path.name for path in make_tour.PICTURES.iterdir())
    assert len(shown) == 11 and TEXT.count("](tour/") == len(shown)
    assert all((make_tour.PICTURES / name).stat().st_size <= make_tour.LARGEST for name in shown)


def test_every_block_is_found():
    blocks = [code for code, _, _ in make_tour.parts(TEXT) if code]
    assert len(blocks) == TEXT.count("```python") == 12
    assert TEXT.count("```py\n") == 1  # the comparison, which needs transformers


def refused(code: str, first: int = 1) -> list[tuple[int, str]]:
    """Lines at which Python's prompt raises SyntaxError, if a block and an empty line are pasted.

    There a compound statement goes on up to the first empty line, and no further.
    """
    wrong, waiting = [], ""
    for number, line in enumerate([*code.splitlines(), ""], first):
        waiting += line + "\n"
        try:
            if codeop.compile_command(waiting[:-1]) is not None:
                waiting = ""
        except SyntaxError:
            wrong.append((number, line))
            waiting = ""
    return [*wrong, (first, "unfinished")] if waiting else wrong


@pytest.mark.parametrize("path", [make_tour.TEXT, ROOT / "README.md"], ids=lambda path: path.name)
def test_blocks_can_be_pasted_at_the_prompt(path):
    text = path.read_text(encoding="utf-8").replace("```py\n", "```python\n")
    blocks = [part for part in make_tour.parts(text) if part[0]]
    assert blocks and [line for code, _, first in blocks for line in refused(code, first)] == []


def test_what_cannot_be_pasted_is_found():
    assert refused("for i in 'ab':\n    i\n\nprint(\n    1,\n)\n") == []
    assert refused("for i in 'ab':\n    i\nprint()\n") == [(3, "print()")]
    assert refused("def f():\n    i = 1\n\n    return i\n", 5) == [(8, "    return i")]
    assert refused("print(\n", 7) == [(7, "unfinished")]


def test_all_blocks_run_and_draw(tmp_path):
    import torch
    from PIL import Image

    before = torch.is_grad_enabled()
    drawn = make_tour.run(TEXT, tmp_path)
    assert torch.is_grad_enabled() == before
    assert [path.name for path in drawn] == [
        picture for _, picture, _ in make_tour.parts(TEXT) if picture
    ]
    for path in drawn:
        with Image.open(path) as image:
            assert len(image.convert("RGB").getcolors()) > 4, f"{path.name} is blank"


def test_pictures_open_at_the_prompt_and_make_tour_puts_back_what_was(tmp_path):
    import matplotlib
    import torch

    first = next(code for code, _, _ in make_tour.parts(TEXT) if code)
    assert "\nplt.ion()" in first
    on, before = "assert plt.isinteractive()\nplt.figure()\ntorch.rand(1)\n", torch.get_rng_state()
    make_tour.run(f"```python\n{first}{on}```\n\n![a](tour/a.png)\n", tmp_path)
    assert not matplotlib.is_interactive() and torch.equal(torch.get_rng_state(), before)


def test_the_comparison_says_where_a_change_is_seen(monkeypatch, capsys):
    pytest.importorskip("transformers", reason="compare runs transformers (extra `test`)")
    monkeypatch.chdir(ROOT)
    code = TEXT.partition("```py\n")[2].partition("```")[0]
    assert code.count("prepare=change") == 1
    names = {"__name__": "tour"}
    exec(code, names)
    assert names["report"].module.startswith("audio_tower.layers.0.")
    assert "DIFFERS" in capsys.readouterr().out
    exec(code.replace("prepare=change", "prepare=None"), names)
    assert names["report"].first is None


def test_a_claim_that_does_not_hold_is_an_error_at_its_line(tmp_path):
    text = "# Title\n\n```python\nx = 1\nassert x == 2\n```\n"
    with pytest.raises(AssertionError) as caught:
        make_tour.run(text, tmp_path)
    assert caught.traceback[-1].lineno + 1 == 5


def test_a_picture_that_no_block_drew_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"tour.md:1: no figure was drawn for a.png"):
        make_tour.run("![a](tour/a.png)\n", tmp_path)
