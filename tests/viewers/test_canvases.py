"""Which canvas works where."""

import importlib.util
import io
from types import SimpleNamespace

import IPython
import numpy as np
import pytest
from PIL import Image

from medctkit.viewers.drawing import canvases


@pytest.fixture
def in_a_notebook(monkeypatch):
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)


def test_a_notebook_gets_the_canvas_that_hears_the_mouse(in_a_notebook):
    assert canvases.kind_that_works() == "ipympl"


def test_colab_gets_the_plain_one(in_a_notebook, monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    assert canvases.kind_that_works() == "plain"


def test_without_ipympl_there_is_the_plain_one(in_a_notebook, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ipympl" else find_spec(name))
    assert canvases.kind_that_works() == "plain"


def test_a_script_or_terminal_gets_the_plain_one(monkeypatch):
    for shell in (None, SimpleNamespace()):
        monkeypatch.setattr(IPython, "get_ipython", lambda shell=shell: shell)
        assert canvases.kind_that_works() == "plain"


def test_nobody_sees_that_the_picture_on_the_screen_is_a_jpeg():
    grey = np.random.default_rng(0).normal(120, 15, (200, 300)).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(grey).convert("RGB")
    shown = np.asarray(Image.open(io.BytesIO(canvases.jpeg(picture)))).astype(int)
    assert np.abs(shown - np.asarray(picture)).mean() < 2  # of 255, in noise alone
