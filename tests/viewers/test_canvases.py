"""Which canvas works where."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from medctkit.viewers.drawing import canvases


@pytest.mark.parametrize(
    ("shell", "colab", "ipympl", "kind"),
    [
        (SimpleNamespace(kernel=object()), False, True, "ipympl"),
        (SimpleNamespace(kernel=object()), True, True, "plain"),
        (SimpleNamespace(kernel=object()), False, False, "plain"),
        (SimpleNamespace(), False, True, "plain"),  # a terminal
        (None, False, True, "plain"),  # a script
    ],
)
def test_a_notebook_gets_the_canvas_that_hears_the_mouse_where_it_works(monkeypatch, shell, colab, ipympl, kind):
    monkeypatch.setattr(canvases, "get_ipython", lambda: shell)
    monkeypatch.setattr(canvases, "find_spec", lambda name: ipympl or None)
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    if colab:
        monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    assert canvases.kind_that_works() == kind


def test_nobody_sees_that_the_picture_on_the_screen_is_a_jpeg():
    grey = np.random.default_rng(0).normal(120, 15, (200, 300)).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(grey).convert("RGB")
    shown = np.asarray(Image.open(io.BytesIO(canvases.jpeg(picture)))).astype(int)
    assert np.abs(shown - np.asarray(picture)).mean() < 2  # of 255, in noise alone
