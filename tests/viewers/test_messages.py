"""What a widget says when something went wrong."""

import pytest

from medctkit.viewers.drawing.messages import Messages


def failing(error):
    def react():
        raise error

    return react


def test_an_unexpected_error_is_shown_and_raised_again():
    messages = Messages()
    with pytest.raises(KeyError, match="lung"):
        messages.guarded(failing(KeyError("lung <b>")))("what the event brings")
    assert messages.text == "KeyError: 'lung <b>'" and "&lt;b&gt;" in messages.widget.value
    assert "medctkit-error" in messages.widget._dom_classes and messages.widget.layout.display is None


def test_the_next_reaction_that_succeeds_clears_the_line():
    messages = Messages()
    messages.say("too long")
    messages.guarded(lambda: None, keep=True)()
    assert messages.text == "too long"
    messages.guarded(lambda: None)()
    assert (messages.text, messages.widget.value, messages.widget.layout.display) == ("", "", "none")
    assert messages.widget._dom_classes == ()


def test_controls_that_change_together_are_reacted_to_once():
    import ipywidgets as w

    messages, seen = Messages(), []
    controls = [w.IntSlider(), w.IntSlider()]
    for control in controls:
        messages.observe(control, lambda: seen.append([c.value for c in controls]))
    controls[0].value = 3
    messages.say("still here")
    with messages.quietly():
        controls[0].value = 4
        with messages.quietly():
            controls[1].value = 5
        controls[1].value = 6
    assert seen == [[3, 0]] and messages.text == "still here"
    controls[1].value = 7
    assert seen == [[3, 0], [4, 7]] and messages.text == ""
