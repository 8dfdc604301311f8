"""What goes wrong behind a page fails a test: shown here with widgets that do go wrong."""

import re

import pytest

WIDGETS = [
    """
import traceback

import ipywidgets

slider = ipywidgets.IntSlider(description="divide")
slider.observe(lambda change: 1 / 0, "value")
slider
""",
    """
def complain(_):
    try:
        [].pop()
    except IndexError:
        traceback.print_exc()


def show(_):
    line.value = "<b>ValueError: shown by the widget</b>"


def fetch(_):
    line.value = "<img src='https://example.org/a.png'>"


line = ipywidgets.HTML()
line.add_class("medctkit-error")
buttons = [ipywidgets.Button(description=react.__name__) for react in (complain, show, fetch)]
for button, react in zip(buttons, (complain, show, fetch), strict=True):
    button.on_click(react)
ipywidgets.VBox([*buttons, line])
""",
]


def divide(page):
    handle = page.control("divide").locator(".noUi-handle")
    handle.focus()
    handle.press("ArrowRight")
    page.screenshot("the page alone does not tell")


def press(name):
    return lambda page: page.tab.get_by_role("button", name=name, exact=True).click()


def throw(page):
    page.tab.evaluate("() => void setTimeout(() => { throw new Error('a script failed') }, 0)")


@pytest.mark.parametrize(
    ("act", "said"),
    [
        pytest.param(divide, "ZeroDivisionError: division by zero", id="the error of a callback"),
        pytest.param(press("complain"), "IndexError: pop from empty list", id="one that is only printed"),
        pytest.param(press("show"), "^on the page: ValueError: shown by the widget$", id="what a widget shows"),
        pytest.param(throw, "a script failed", id="an error in the browser"),
        pytest.param(press("fetch"), "^browser: a request to https://example.org/a.png$", id="a request outside"),
    ],
)
def test_it_is_caught(visit, act, said):
    page = visit("errors", WIDGETS)
    assert page.new_errors() == []
    act(page)
    (error,) = page.errors_that_come()
    assert re.search(said, error)
