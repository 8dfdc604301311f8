"""The picture of the architecture is the one that the model's own numbers draw."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from tools.architecture import pictures

IMAGES = Path(__file__).resolve().parents[2] / "notebooks" / "images"


@pytest.mark.parametrize(("name", "svg"), pictures().items())
def test_the_picture_is_drawn_from_the_model(name, svg):
    assert (IMAGES / name).read_text(encoding="utf-8") == svg
    words = "".join(ElementTree.fromstring(svg).itertext())
    assert "1,671,168 numbers are trained, 0.38%" in words and "344,064" in words and "1,327,104" in words
    assert ("you are here" in words) == ("_" in name)
