"""What goes wrong behind a page fails a test: shown here with widgets that do go wrong."""

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


def press(page, name):
    page.tab.get_by_role("button", name=name, exact=True).click()


def test_the_error_of_a_callback_is_caught(visit):
    page = visit("errors", WIDGETS)
    assert page.new_errors() == []
    handle = page.control("divide").locator(".noUi-handle")
    handle.focus()
    handle.press("ArrowRight")
    page.screenshot("the page alone does not tell")
    (error,) = page.errors_that_come()
    assert "ZeroDivisionError: division by zero" in error


def test_an_error_that_is_only_printed_is_caught(visit):
    page = visit("errors", WIDGETS)
    press(page, "complain")
    (error,) = page.errors_that_come()
    assert "IndexError: pop from empty list" in error


def test_what_a_widget_shows_as_an_error_is_caught(visit):
    page = visit("errors", WIDGETS)
    press(page, "show")
    assert page.errors_that_come() == ["on the page: ValueError: shown by the widget"]


def test_an_error_in_the_browser_is_caught(visit):
    page = visit("errors", WIDGETS)
    page.tab.evaluate("() => void setTimeout(() => { throw new Error('a script failed') }, 0)")
    (error,) = page.errors_that_come()
    assert "a script failed" in error


def test_a_request_to_the_outside_is_caught(visit):
    page = visit("errors", WIDGETS)
    press(page, "fetch")
    assert page.errors_that_come() == ["browser: a request to https://example.org/a.png"]


def test_the_error_of_a_cell_is_caught(visit):
    page = visit("cell_error", ["{}['a cell that fails']"])
    errors = page.errors_that_come()
    assert any("KeyError: 'a cell that fails'" in error for error in errors if error.startswith("on the page"))
    assert any("KeyError: 'a cell that fails'" in error for error in errors if error.startswith("in kernels.log"))
