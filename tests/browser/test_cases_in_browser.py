"""The case browser where it runs: studies picked, sorted and filtered, sentences scored, and what is wrong."""

import re

import pytest
from pages import MESSAGE
from test_slices_in_browser import CANVAS, does

BROWSER = [
    """
import tempfile

import torch

from medctkit import load_mini_base, lora, viewers
from medctkit.cohort.manifest import load_manifest

manifest = load_manifest("../data_manifest.csv")
at_target = manifest[(manifest["hospital"] == "target") & (manifest["split"] == "test")][:6]
base = load_mini_base()
torch.manual_seed(1)
adapted = lora.add_lora(load_mini_base().model, "paper", r=4, init_lora_weights=False)
models = {"base": base.model, "adapted": adapted.eval()}
cache = tempfile.mkdtemp()
""",
    "viewers.CaseBrowser(at_target, models, base.tokenizer, base.preprocess_config, cache)",
]
PROBABILITIES, SCORES = ".medctkit-probabilities", ".medctkit-sentence"


@pytest.fixture
def cases(visit):
    """All six studies, those with the largest disagreement first."""
    page = visit("cases", BROWSER)
    choose(page, "finding", "all findings")
    choose(page, "sort by", "disagreement")
    page.text_appears(r"6 of 6 studies, with their disagreement \(mean of the findings\)", seconds=30)
    return page


def choose(page, description, option):
    page.control(description).locator("select").select_option(option)


def studies(page):
    """The lines of the list: a number and a study's name."""
    return page.find(".widget-select select").locator("option").all_inner_texts()


def drawn(page, unlike=()):
    """For each finding what a screen reader says of its probabilities, once that is not what was said before."""
    for _ in range(50):
        bars = page.find(PROBABILITIES).locator("svg[role=img]")
        said = bars.evaluate_all("bars => bars.map(bar => bar.getAttribute('aria-label'))")
        if len(said) == 18 and said != unlike:
            return said
        page.tab.wait_for_timeout(100)
    raise AssertionError(f"no other probabilities than {said}")


def report(page, study):
    """Its facts, labels and report; waits until they are there."""
    return page.text_appears(rf"{study}patient ", seconds=20)


def test_it_says_what_it_costs_and_opens_with_the_largest_disagreement(cases):
    cases.text_appears(r"6 studies, 2 models \(base, adapted\): 12 of 12 embeddings are to be computed, 6 volumes")
    assert cases.pixels(cases.find(CANVAS)).startswith("data:image")
    values = [float(line.split()[0]) for line in studies(cases)]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    first = studies(cases)[0].split()[1]
    assert re.search(r"target hospital, test split.*Labels.*Report", report(cases, first), flags=re.S)
    assert all(re.search(r", (present|absent): base \d\.\d\d, adapted \d\.\d\d$", line) for line in drawn(cases))
    cases.screenshot("opened", full_page=True)


def test_another_study_is_picked(cases):
    picture, names = cases.find(CANVAS), [line.split()[1] for line in studies(cases)]
    before, said = report(cases, names[0]), drawn(cases)
    assert does(cases, picture, lambda: cases.find(".widget-select option", 3).click())
    after = report(cases, names[3])
    assert after.split("Report")[1] != before.split("Report")[1]
    said = drawn(cases, unlike=said)
    cases.screenshot("the fourth", full_page=True)
    labels = after.split("Labels")[1].split("Report")[0]
    for line in said:
        finding, label = re.match(r"(.+), (present|absent):", line).groups()
        assert (finding in labels) == (label == "present"), "the table and the list of labels agree"


def test_the_next_study_is_reached_by_key(cases):
    """The list itself takes up and down in voila only: JupyterLab moves on a cell."""
    cases.find(".widget-select select").select_option(index=0)
    names = [line.split()[1] for line in studies(cases)]
    report(cases, names[0])
    button = cases.tab.get_by_role("button", name="next study")
    button.focus()
    assert does(cases, cases.find(CANVAS), lambda: button.press("Enter"))
    report(cases, names[1])
    cases.screenshot("the second", full_page=True)


def test_a_sentence_is_scored_at_enter_and_one_too_long_gives_a_message(cases):
    cases.enter("states", "there is a lung nodule")
    scores = cases.find(SCORES)
    scores.wait_for()
    assert re.search(r"base\s+-?\d\.\d\d\s+\d+% of the other 5 studies\s+target_test", scores.inner_text())
    assert "cosine" in scores.inner_text()
    cases.text_appears("The text encoder reads: there is a lung nodule")
    cases.enter("states", "there is a zebra in the giraffe")
    cases.text_appears("Not in its vocabulary, read in pieces: zebra, giraffe")
    cases.text_appears("made of words that the model does not know")
    cases.screenshot("unknown words", full_page=True)
    cases.enter("states", "there is a lung nodule")
    cases.enter("denies", "there is no lung nodule")
    cases.tab.get_by_text("probability", exact=True).wait_for()
    scores.scroll_into_view_if_needed()
    cases.screenshot("scored", full_page=True)
    cases.enter("states", "nodule " * 600)
    cases.find(MESSAGE).wait_for()
    assert re.search(r"has \d+ tokens, the text encoder takes \d+; shorten it", cases.find(MESSAGE).inner_text())
    scores.wait_for(state="detached")  # no score of another sentence
    cases.find(MESSAGE).scroll_into_view_if_needed()
    cases.screenshot("too long", full_page=True)
    cases.enter("states", "there is emphysema")
    scores.wait_for()
    cases.text_appears("The text encoder reads: there is emphysema")
    assert cases.tab.locator(MESSAGE).count() == 0
