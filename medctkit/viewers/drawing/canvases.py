"""Where a viewer shows its picture: an ipympl canvas that also hears mouse and keys, or a plain image.

Both have `.widget`, `.show(picture)` and ``.close()``. Neither touches pyplot or the backend of a notebook's figures.
"""

import base64
import io
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import ipywidgets as w
from IPython import get_ipython
from matplotlib.figure import Figure
from PIL.Image import Image

KINDS = ("ipympl", "plain")


def kind_that_works() -> str:
    """The canvas that works here: "ipympl" in a notebook that can show it, else "plain".

    Outside a kernel nobody could click; Colab shows widgets other than ipywidgets' own only after its custom widget
    manager is switched on, which can't be asked from here.
    """
    in_kernel = getattr(get_ipython(), "kernel", None) is not None
    in_colab = "COLAB_RELEASE_TAG" in os.environ
    return "ipympl" if in_kernel and not in_colab and find_spec("ipympl") is not None else "plain"


def jpeg(picture: Image) -> bytes:
    """A picture (PIL image) for the screen: at this quality no difference can be seen, in a tenth of PNG's time."""
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=95, subsampling=0)
    return buffer.getvalue()


class PlainCanvas:
    """An `ipywidgets.Image`: works wherever ipywidgets do, hears nothing."""

    def __init__(self) -> None:
        # not stretched, and smaller where the page is narrower
        self.widget = w.Image(format="jpeg", layout={"align_self": "flex-start", "max_width": "100%"})

    def show(self, picture: Image) -> None:
        """Show a picture (PIL image)."""
        self.widget.value = jpeg(picture)

    def close(self) -> None:
        """Remove the widget."""
        self.widget.close()


class MouseCanvas:
    """An ipympl canvas that shows one picture and tells of what happens over it.

    `on_event` is called with "press", "drag", "level", "hover", "scroll", "zoom" or "key"; x and y in pixels of the
    picture from its upper left corner; and what belongs to it: +1 or -1 for the wheel, alone or with control; for
    "level", a drag with the right button, the pixels (x, y) since the last; the key's name; else None.
    """

    def __init__(self, on_event: Callable[[str, float, float, Any], None]):
        canvas, manager = _ipympl()
        self._figure, self._on_event = Figure(), on_event
        self.widget = canvas(self._figure)
        self.widget.toolbar_visible = self.widget.header_visible = self.widget.footer_visible = False
        self.widget.resizable, self.widget.capture_scroll = False, True
        self.widget.layout.align_self = "flex-start"
        self._manager, self._last = manager(self.widget, 0), (0.0, 0.0)
        self.widget.mpl_disconnect(self._manager.key_press_handler_id)  # matplotlib's own keys: q would close it
        self.widget.mpl_connect("button_press_event", self._press)
        self.widget.mpl_connect("motion_notify_event", self._move)
        self.widget.mpl_connect("scroll_event", self._scroll)
        self.widget.mpl_connect("key_press_event", self._key)

    def show(self, picture: Image) -> None:
        """Show a picture (PIL image)."""
        known = self.widget.picture
        self.widget.picture = picture
        if known is None or known.size != picture.size:
            ratio = self.widget.device_pixel_ratio / self._figure.dpi
            inches = ((n + 0.01) * ratio for n in picture.size)  # matplotlib rounds down, and 509.99 is not 510
            self._figure.set_size_inches(*inches)
        self.widget.draw()

    def close(self) -> None:
        """Remove the widget."""
        self._manager.toolbar.close()
        self.widget.close()

    def _tell(self, what: str, event: Any, more: Any = None) -> None:
        if self.widget.picture is None or event.x is None:
            return
        (wide, tall), size = self._figure.bbox.size, self.widget.picture.size
        x, y = event.x / wide * size[0], (1 - event.y / tall) * size[1]
        if what == "level":
            more = x - self._last[0], y - self._last[1]
        self._last = x, y
        if what:
            self._on_event(what, x, y, more)

    def _press(self, event: Any) -> None:
        self._tell("press" if event.button == 1 else "", event)

    def _move(self, event: Any) -> None:
        self._tell({1: "drag", 3: "level"}.get(event.button, "hover"), event)

    def _scroll(self, event: Any) -> None:
        what = "zoom" if "ctrl" in getattr(event, "modifiers", ()) else "scroll"
        self._tell(what, event, 1 if event.step > 0 else -1)

    def _key(self, event: Any) -> None:
        if self.widget.picture is not None:  # wherever the mouse is: it may never have been over the picture
            self._on_event("key", 0, 0, event.key)


@lru_cache
def _ipympl() -> tuple[Any, Any]:
    """Canvas and manager classes, made on first use, as importing ipympl takes a moment."""
    with patch("matplotlib.use"):  # ipympl makes itself the backend of all figures when it is imported
        from ipympl.backend_nbagg import Canvas, FigureManager

    class PictureCanvas(Canvas):  # type: ignore[misc]
        """An ipympl canvas whose figure is never drawn by matplotlib, because the picture is there already.

        That saves drawing it through Agg and compressing it as PNG, which alone takes 100 ms for a noisy CT.
        """

        picture: Image | None = None

        def draw(self) -> None:
            self._png_is_old = True
            self.manager.refresh_all()

        def get_diff_image(self) -> bytes | None:
            if self.picture is None or not self._png_is_old:
                return None
            self._png_is_old = False
            self.set_image_mode("full")
            size = tuple(round(n) for n in self.figure.bbox.size)  # more pixels than ours on a fine screen
            return jpeg(self.picture if size == self.picture.size else self.picture.resize(size))

        def send_binary(self, data: bytes) -> None:
            if self.syncing_data_url:  # no page shows it yet: what a saved page will show
                self._data_url = "data:image/jpeg;base64," + base64.b64encode(data).decode()
            self.send({"data": '{"type": "binary"}'}, buffers=[data])

    return PictureCanvas, FigureManager
