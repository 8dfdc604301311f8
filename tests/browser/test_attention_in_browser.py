"""The attention viewer where it runs: maps chosen by key, a place clicked, prompts and sentences, and what is wrong."""

import re

import pytest
from pages import MESSAGE
from test_slices_in_browser import CANVAS, does, in_panel, mouse_on

VIEWER = [
    """
import torch

from medctkit import load_mini_base, lora, phantom, viewers

study = phantom.generate(seed=7, findings=["Consolidation", "Pleural effusion"], shape=(48, 96, 96))
base = load_mini_base()
torch.manual_seed(1)
adapted = lora.add_lora(load_mini_base().model, "paper", r=4, init_lora_weights=False)
models = {"base": base.model, "adapted": adapted.eval()}
""",
    "viewers.AttentionViewer(study.volume, models, base.tokenizer, base.preprocess_config, study.masks)",
]


@pytest.fixture
def viewer(visit):
    return visit("attention", VIEWER)


def show(page, what):
    """Choose with the mouse."""
    page.tab.get_by_role("button", name="base", exact=True).click()
    page.control("show").locator("select").select_option(what)


def test_it_opens_with_a_map_and_says_what_it_is(viewer):
    assert viewer.pixels(viewer.find(CANVAS)).startswith("data:image")
    said = viewer.text_appears("base: rollout")
    said = viewer.find(".jp-OutputArea-output:has(canvas), .widget-vbox:has(canvas)").inner_text()
    for mask in ("Consolidation", "Pleural effusion"):
        assert re.search(rf"{mask}: [\d.]+ times chance; [\d.]+% of the map in [\d.]+% of what the model sees", said)
    assert re.search("inside of (Consolidation|Pleural effusion)", said), "it starts at a finding"
    top, bottom = (box["y"] for box in (viewer.control("show").bounding_box(), viewer.find(CANVAS).bounding_box()))
    assert bottom - top < 250, "controls are folded"
    viewer.screenshot("rollout", full_page=True)


def test_what_is_shown_is_chosen_by_key(viewer):
    """A drop-down by the first letter of what is wanted: JupyterLab takes up and down for itself, to move on a cell."""
    show(viewer, "rollout")
    viewer.text_appears("base: rollout")
    canvas, shown = viewer.find(CANVAS), viewer.control("show").locator("select")
    shown.focus()
    assert does(viewer, canvas, lambda: shown.press("s"))
    viewer.text_appears("base: spatial attention of a patch, layer 0 of 0 to 1, mean of heads")
    layer = viewer.control("layer").locator(".noUi-handle")
    layer.focus()
    assert does(viewer, canvas, lambda: layer.press("ArrowRight"))
    viewer.text_appears("base: spatial attention of a patch, layer 1 of 0 to 1, mean of heads")
    head = viewer.control("head").locator("select")
    head.focus()
    assert does(viewer, canvas, lambda: head.press("h"))
    viewer.text_appears("layer 1 of 0 to 1, head 0")
    adapted = viewer.tab.get_by_role("button", name="adapted", exact=True)
    adapted.focus()
    assert does(viewer, canvas, lambda: adapted.press("Enter"))
    viewer.text_appears("adapted: spatial attention of a patch, layer 1 of 0 to 1, head 0")
    viewer.screenshot("by key", full_page=True)


def test_a_click_asks_the_patch_at_that_place(viewer):
    show(viewer, "spatial attention of a patch")
    viewer.text_appears("base: spatial attention of a patch")
    canvas = viewer.find(CANVAS)
    for across, side in ((0.2, "R"), (0.45, "L")):
        assert does(viewer, canvas, lambda x=across: mouse_on(viewer).click(position=in_panel(canvas, x, 0.7)))
        viewer.text_appears(
            rf"patch \(t, i, j\) = \(\d+, \d+, \d+\) under the crosshair, around {side} \d+ mm, P \d+ mm"
        )
        viewer.screenshot("clicked")


def test_any_sentence_is_asked_and_one_too_long_gives_a_message(viewer):
    show(viewer, "speaks for a prompt")
    canvas = viewer.find(CANVAS)
    viewer.enter("states", "there is fluid around the lung")
    viewer.text_appears("base: speaks for a prompt: 'there is fluid around the lung'")
    assert viewer.control("prompt").locator("select").input_value() == "a sentence of my own"
    assert viewer.control("denies").locator("input").input_value() == "", "what it denied was another sentence"
    assert does(viewer, canvas, lambda: viewer.enter("states", "fluid " * 600))
    viewer.find(MESSAGE).wait_for()
    assert re.search(r"has \d+ tokens, the text encoder takes \d+; shorten it", viewer.find(MESSAGE).inner_text())
    viewer.screenshot("too long", full_page=True)
    assert does(viewer, canvas, lambda: viewer.enter("states", "there is emphysema"))
    viewer.text_appears("base: speaks for a prompt: 'there is emphysema'")
    assert viewer.tab.locator(MESSAGE).count() == 0
    assert does(viewer, canvas, lambda: viewer.enter("denies", "there is no emphysema"))
    viewer.text_appears("'there is emphysema' against 'there is no emphysema'")
