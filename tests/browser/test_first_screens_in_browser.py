"""What a learner meets in JupyterLab before anything is run: a picture and a promise, and answers that are folded."""

import pytest
from conftest import PICTURES, ROOT
from pages import READY

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DRAWN = "() => [...document.querySelectorAll('.jp-RenderedMarkdown img')].some(i => i.complete && i.naturalWidth > 0)"

pytestmark = pytest.mark.parametrize("server", ["lab"], indirect=True)


@pytest.fixture
def opened(browser, server, request):
    """A notebook as it is committed, on the screen of a small laptop."""
    tab = browser.new_page(viewport={"width": 1300, "height": 900})
    tab.set_default_timeout(20_000)
    tab.goto(server.address_of(f"notebooks/{request.param.name}"), timeout=120_000)
    yield tab
    tab.wait_for_function(READY, timeout=60_000)  # a tab that goes while its kernel connects is an error of the server
    tab.close()


@pytest.mark.parametrize("opened", NOTEBOOKS, indirect=True, ids=lambda path: path.stem)
def test_the_first_screen_is_a_picture_and_a_promise(opened, request):
    opened.wait_for_function(DRAWN)
    opened.locator(".jp-RenderedMarkdown", has_text="Afterwards you can").first.wait_for()
    opened.screenshot(path=PICTURES / f"lab-first-screen-{request.node.callspec.id}.png")
    box = opened.locator(".jp-RenderedMarkdown img").first.bounding_box()
    assert box["width"] > 300 and box["y"] + box["height"] <= 900


@pytest.mark.parametrize("opened", [path for path in NOTEBOOKS if path.stem[:2] == "02"], indirect=True, ids=["02"])
def test_an_answer_is_folded_until_one_asks_for_it(opened):
    question = opened.locator(".jp-Cell", has_text="Predict, then run:").first
    question.scroll_into_view_if_needed()
    answer = question.locator("xpath=following-sibling::*[1]")
    folded = answer.locator(".jp-OutputPlaceholder")
    folded.wait_for()
    assert not answer.locator(".jp-OutputArea-output").first.is_visible()
    folded.click()
    answer.locator(".jp-OutputArea-output").first.wait_for()
