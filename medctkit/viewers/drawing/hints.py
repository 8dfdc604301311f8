"""What a viewer's mouse and keys do, and lines of text that keep their height."""

import html
from collections.abc import Sequence

from medctkit.viewers.drawing.rendering import SLABS, WINDOWS

STEPS = {"up": 1, "right": 1, "down": -1, "left": -1, "pageup": 10, "pagedown": -10}  # slices
ZOOMS = {"+": 1.5, "=": 1.5, "-": 1 / 1.5, "0": 0.0}  # times the zoom that is; the slider ends at 1
HELP = {
    "wheel": "next or previous slice of the plane under the mouse",
    "click, drag": "the crosshair; draws a distance or a region where one is chosen",
    "right drag": "window and level: to the right wider, down a higher centre",
    "control + wheel": "zoom",
    "arrows, page up, page down": "slices of the plane that was last clicked (keys work after a click)",
    "1, 2, 3": f"windows: {', '.join(WINDOWS)}",
    "+, -, 0": "zoom in, zoom out, whole slices",
    "d, r, x": "measure a distance; a region; no more",
    "s": f"slab: {', '.join(SLABS)}",
    "c, m": "crosshair, all masks: on or off",
    "?": "this list",
}
NO_MOUSE = """Here the picture hears neither mouse nor keys; sliders and lists do all of it. To measure, move the
crosshair to one end, choose distance or region, and move on to the other end."""


def help_of(mouse: bool) -> str:
    """What mouse and keys do, as HTML; or, where the picture does not hear them, what to do instead."""
    rows = "".join(f"<tr><td><b>{html.escape(keys)}</b></td><td>{what}</td></tr>" for keys, what in HELP.items())
    return f'<table style="line-height:1.4;border-spacing:8px 0">{rows}</table>' if mouse else NO_MOUSE


def lines(said: Sequence[str]) -> str:
    """Lines of text as HTML, each as tall as any other, whatever is in it: the page below does not move."""
    style = "height:1.4em;line-height:1.4em;overflow:hidden;white-space:nowrap;text-overflow:ellipsis"
    return "".join(f'<div style="{style}">{html.escape(line)}</div>' for line in said)
