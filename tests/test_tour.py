"""The tour's code runs and its claims hold; every picture that it shows is there."""

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


def test_a_claim_that_does_not_hold_is_an_error_at_its_line(tmp_path):
    text = "# Title\n\n```python\nx = 1\nassert x == 2\n```\n"
    with pytest.raises(AssertionError) as caught:
        make_tour.run(text, tmp_path)
    assert caught.traceback[-1].lineno + 1 == 5


def test_a_picture_that_no_block_drew_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"tour.md:1: no figure was drawn for a.png"):
        make_tour.run("![a](tour/a.png)\n", tmp_path)
