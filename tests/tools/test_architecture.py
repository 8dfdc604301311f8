"""The pictures of the architecture are those that the model's own numbers draw."""

from pathlib import Path
from xml.etree import ElementTree

from tools.architecture import pictures

IMAGES = Path(__file__).resolve().parents[2] / "notebooks" / "images"


def test_the_pictures_are_drawn_from_the_model():
    for name, svg in pictures().items():
        assert (IMAGES / name).read_text(encoding="utf-8") == svg
        words = "".join(ElementTree.fromstring(svg).itertext())
        assert "1,671,168 numbers are trained, 0.38%" in words and "344,064" in words and "1,327,104" in words
        assert ("you are here" in words) == ("_" in name)
