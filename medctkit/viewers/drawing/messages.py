"""What a widget says when something went wrong: a line in the widget, and the exception for everyone else."""

import html
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ipywidgets as w

_TURN = threading.RLock()  # JupyterLab hands events to the kernel on two threads: one callback at a time


class Messages:
    """A line of a widget for what its user has to know; empty and hidden as long as all is well.

    What the user can put right (a sentence that is too long, a study that can't be read) is said in words and has
    the CSS class `medctkit-message`. An exception that nobody expected has the class `medctkit-error`, and is raised
    again, so that logs and tests see it too. The line is `.widget`, what it says ``.text``, "" for nothing.
    """

    def __init__(self) -> None:
        self.widget, self.text, self._quiet = w.HTML(layout={"display": "none"}), "", False

    def say(self, text: str) -> None:
        """Tell the user what to put right."""
        self._show("medctkit-message", text)

    def clear(self) -> None:
        """All is well again."""
        self.widget.value, self.widget.layout.display, self.text = "", "none", ""
        self.widget.remove_class("medctkit-message").remove_class("medctkit-error")

    def guarded(self, react: Callable, keep: bool = False) -> Callable:
        """A callback that clears the line, has `react` called without what the event brings, and says what went wrong.

        With `keep` it leaves what is said now, for what happens without being asked for, such as a moving mouse.
        """

        def call(*_: Any) -> None:
            with _TURN:
                if not keep:
                    self.clear()
                try:
                    react()
                except Exception as error:
                    self._show("medctkit-error", f"{type(error).__name__}: {error}")
                    raise

        return call

    def observe(self, control: Any, react: Callable) -> None:
        """Have `react` called, guarded, when the value of a control changes; not while `quietly`."""
        guarded = self.guarded(react)

        def call(_: Any) -> None:
            with _TURN:  # what another thread brings waits until the controls have changed, and is not passed over
                if not self._quiet:
                    guarded()

        control.observe(call, names="value")

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Controls change together, and nothing that observes them reacts."""
        self._quiet, before = True, self._quiet
        try:
            yield
        finally:
            self._quiet = before

    def _show(self, css_class: str, text: str) -> None:
        self.clear()
        self.text = text
        self.widget.value = f'<b role="alert" style="color:#D55E00">{html.escape(text)}</b>'
        self.widget.add_class(css_class)
        self.widget.layout.display = None
