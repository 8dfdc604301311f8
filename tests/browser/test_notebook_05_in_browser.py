"""Notebook 05 in JupyterLab: its own cells up to the attention viewer, with an adapter where notebook 03 leaves it."""

import re

import pytest
from pages import cells_up_to
from test_slices_in_browser import CANVAS, does

from medctkit import load_mini_base
from medctkit.lora import adapter as lora

pytestmark = pytest.mark.parametrize("server", ["lab"], indirect=True)
VIEWERS = ("one scan", "two hospitals", "attention")


@pytest.fixture
def course(visit, root):
    """The notebook, after its attention viewer has run."""
    folder = root / "runs" / "notebooks" / "adapter"  # the notebook's ../runs/notebooks
    if not folder.exists():
        lora.save_adapter(lora.add_lora(load_mini_base().model, "paper", r=4, init_lora_weights=False), folder)
    notebook = root / "notebooks" / "05_slices_and_attention.ipynb"
    return visit("up_to_attention", cells_up_to(notebook, "AttentionViewer("))


def viewer(page, name):
    """One of the three viewers: the output of its cell, in view, and its picture."""
    output = page.tab.locator(".jp-OutputArea-output").filter(has=page.tab.locator(CANVAS)).nth(VIEWERS.index(name))
    picture = output.locator(CANVAS).first
    picture.scroll_into_view_if_needed()
    return output, picture


def press(output, description, key):
    """A key on a slider of one viewer."""
    label = output.locator(".widget-label", has_text=re.compile(f"^{description}$"))
    handle = label.locator("xpath=..").locator(".noUi-handle")
    handle.focus()
    handle.press(key)


def axial(output):
    """The axial slice that a viewer's readout tells."""
    return int(re.search(r"axial (\d+) of 0 to", output.text_content()).group(1))


def test_notebook_05_runs_up_to_the_attention_viewer(course):
    assert course.tab.get_by_text("by hand and package agree; all patches together: 1.0000").count() == 1
    assert course.tab.locator(".jp-RenderedImage img").count() == 3, "heads, rollout, relevance"
    for name in VIEWERS:
        _, picture = viewer(course, name)
        assert course.pixels(picture).startswith("data:image")
        course.screenshot(name)


def test_every_viewer_of_notebook_05_follows_the_keys_of_its_sliders(course):
    for name in VIEWERS:
        output, picture = viewer(course, name)
        if name == "attention":
            output.get_by_text("slices, window, slab").click()  # folded at first
        before = axial(output)
        assert does(course, picture, lambda output=output: press(output, "axial", "ArrowRight")), name
        output.get_by_text(f"axial {before + 1} of 0 to").last.wait_for()
        course.screenshot(name)


def test_the_attention_viewer_of_notebook_05_compares_the_models(course):
    output, picture = viewer(course, "attention")
    (asked,) = re.findall(
        r"base: speaks for a prompt: ('.+ is present\.' against '.+ is not present\.')", output.text_content()
    )
    assert does(course, picture, output.get_by_role("button", name="adapted", exact=True).click)
    course.text_appears(re.escape(f"adapted: speaks for a prompt: {asked}"))
    shown = output.locator("select").first
    assert does(course, picture, lambda: shown.select_option("spatial attention of a patch"))
    assert does(course, picture, lambda: press(output, "layer", "ArrowRight"))
    course.text_appears(r"adapted: spatial attention of a patch, layer 1 of 0 to 1, mean of heads; patch \(t, i, j\)")
    course.screenshot("layer 1")
