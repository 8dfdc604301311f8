"""The slice viewer where it runs: notebook 01's own cells, then a plain picture, and two linked volumes."""

import re

import pytest
from pages import cells_up_to

STUDY = """
from medctkit import phantom, viewers

study = phantom.generate(seed=7, findings=["Lung nodule", "Pleural effusion"], shape=(40, 96, 96))
"""
KEYS = [STUDY, "viewers.SliceViewer(study.volume, study.masks)"]
PLAIN = [STUDY, 'viewers.SliceViewer(study.volume, study.masks, canvas="plain")']
LINKED = [
    STUDY,
    """
other = phantom.generate(seed=7, hospital="target", findings=["Lung nodule"], shape=(30, 80, 80))
viewers.SliceViewer(study.volume, other=other.volume, names=("source hospital", "target hospital"))
""",
]
CANVAS = ".jupyter-matplotlib canvas"  # the picture, and on it a second one, which hears the mouse
IMAGE = "img.widget-image"


@pytest.fixture
def course(visit, root):
    """Notebook 01 up to its first viewer."""
    return visit("first_viewer", cells_up_to(root / "notebooks" / "01_data_prep.ipynb", "SliceViewer("))


def slices(page):
    """What the readout says: the slice of each plane."""
    said = page.text_appears(r"axial \d+ of 0 to")
    return {plane: int(n) for plane, n in re.findall(r"(axial|coronal|sagittal) (\d+) of", said)}


def does(page, picture, act):
    """Whether the picture changes when something is done."""
    before = page.pixels(picture)
    act()
    return page.changed(picture, before)


def mouse_on(page):
    """Where ipympl listens."""
    return page.find(CANVAS, 1)


def in_panel(picture, across, down=0.5):
    """A place in the picture for the mouse: shares of its width and height."""
    box = picture.bounding_box()
    return {"x": across * box["width"], "y": down * box["height"]}


def test_notebook_01_opens_runs_and_shows_three_planes(course):
    canvas = course.find(CANVAS)
    assert course.pixels(canvas).startswith("data:image")
    box = canvas.bounding_box()
    assert box["width"] > 1.3 * box["height"] > 650, "a large plane, two beside it"
    assert set(slices(course)) == {"axial", "coronal", "sagittal"}
    course.screenshot("three planes")


def test_a_slider_is_moved_by_its_keys(course):
    handle = course.control("axial").locator(".noUi-handle")
    before = slices(course)
    handle.focus()
    assert does(course, course.find(CANVAS), lambda: handle.press("ArrowRight"))
    assert slices(course) == before | {"axial": before["axial"] + 1}
    course.screenshot("one slice up")


def test_the_wheel_changes_the_slice_of_the_plane_under_the_mouse(course):
    canvas, before = course.find(CANVAS), slices(course)
    mouse_on(course).hover(position=in_panel(canvas, 0.15))
    top = canvas.bounding_box()["y"]
    assert does(course, canvas, lambda: course.tab.mouse.wheel(0, -100))
    after = slices(course)
    assert abs(after["axial"] - before["axial"]) == 1
    assert (after["coronal"], after["sagittal"]) == (before["coronal"], before["sagittal"])
    assert canvas.bounding_box()["y"] == top, "the page stays where it is"
    course.screenshot("after the wheel")


def test_a_click_moves_the_crosshair_in_all_planes(course):
    canvas, before = course.find(CANVAS), slices(course)
    assert does(course, canvas, lambda: mouse_on(course).click(position=in_panel(canvas, 0.10, 0.4)))
    after = slices(course)
    assert after["axial"] == before["axial"]
    assert after["coronal"] != before["coronal"] and after["sagittal"] != before["sagittal"]
    course.screenshot("crosshair")


def test_everything_is_reached_without_a_mouse(visit):
    page = visit("keys", KEYS)  # a page that no mouse has been on
    tab, canvas = page.tab, page.find(CANVAS)
    page.pixels(canvas)
    tab.get_by_role("button", name="three planes").focus()
    focused = "() => document.activeElement.closest('.jupyter-widgets')?.innerText.split('\\n')[0] ?? ''"
    reached = []
    for _ in range(30):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate(focused))
        if tab.evaluate("() => document.activeElement.tagName") == "CANVAS":
            break
    for control in ("crosshair", "?", "axial", "coronal", "sagittal", "window", "centre HU", "width HU", "slab", "zoom",
                    "mouse", "Lung nodule"):  # fmt: skip
        assert control in reached, reached
    before = slices(page)
    assert does(page, canvas, lambda: tab.keyboard.press("ArrowUp")), "keys work once the picture has the focus"
    assert slices(page)["axial"] == before["axial"] + 1
    assert does(page, canvas, lambda: tab.keyboard.press("2"))
    page.text_appears("window centre 40 HU")
    assert does(page, canvas, lambda: tab.keyboard.press("1"))
    assert does(page, canvas, lambda: tab.keyboard.press("m"))
    page.screenshot("masks by key")
    assert does(page, canvas, lambda: tab.keyboard.press("m"))
    tab.keyboard.press("?")
    page.text_appears("slices of the plane that was last clicked")
    assert does(page, canvas, lambda: tab.keyboard.press("+"))
    assert does(page, canvas, lambda: tab.keyboard.press("0"))
    assert does(page, canvas, lambda: tab.keyboard.press("s"))
    page.text_appears("maximum of 10 mm")
    page.screenshot("keys are listed")


def drag(page, start, end, button="left"):
    """From one place of the picture to another, pixels of the page."""
    page.find(CANVAS).scroll_into_view_if_needed()  # the mouse moves on the screen only
    mouse, box = page.tab.mouse, page.find(CANVAS).bounding_box()
    mouse.move(box["x"] + start[0], box["y"] + start[1])
    mouse.down(button=button)
    mouse.move(box["x"] + end[0], box["y"] + end[1], steps=6)
    mouse.up(button=button)


def test_the_right_button_changes_window_and_level(course):
    canvas, before = course.find(CANVAS), slices(course)
    assert does(course, canvas, lambda: drag(course, (150, 150), (190, 250), "right"))
    said = course.text_appears(r"window centre -?\d+ HU, width \d+ HU")
    centre, width = map(int, re.search(r"window centre (-?\d+) HU, width (\d+) HU", said).groups())
    assert centre > -600 and width > 1500 and slices(course) == before
    course.screenshot("window and level")
    course.control("window").locator("select").select_option("lung")
    course.text_appears("window centre -600 HU, width 1500 HU")


def test_a_distance_and_a_region_are_drawn_and_the_page_stays_where_it_is(course):
    canvas, mouse = course.find(CANVAS), course.control("mouse").locator("select")
    below = course.tab.get_by_text(re.compile("window centre")).first
    mouse.select_option("distance")
    course.text_appears(r"distance 0\.0 mm")
    canvas.scroll_into_view_if_needed()
    at = below.bounding_box()["y"]
    assert does(course, canvas, lambda: drag(course, (150, 150), (300, 200)))
    assert float(re.search(r"[\d.]+", course.text_appears(r"distance \d+\.\d mm")).group()) > 50
    course.screenshot("distance")
    mouse.select_option("region")
    assert does(course, canvas, lambda: drag(course, (150, 250), (220, 300)))
    course.text_appears(r"region [\d,]+ mm², [\d,]+ voxels: mean -?\d+ HU, deviation \d+ HU")
    course.screenshot("region")
    assert below.bounding_box()["y"] == at
    mouse.select_option("crosshair")


def test_control_and_wheel_zoom(course):
    canvas = course.find(CANVAS)
    mouse_on(course).hover(position=in_panel(canvas, 0.3))
    course.tab.keyboard.down("Control")
    assert does(course, canvas, lambda: course.tab.mouse.wheel(0, -100))
    course.tab.keyboard.up("Control")
    course.screenshot("zoomed")
    canvas.click(position=in_panel(canvas, 0.3), force=True)
    assert does(course, canvas, lambda: course.tab.keyboard.press("0"))


def test_the_plain_picture_follows_its_sliders(visit):
    page = visit("plain", PLAIN)
    image = page.find(IMAGE)
    handle = page.control("sagittal").locator(".noUi-handle")
    before = slices(page)
    handle.focus()
    assert does(page, image, lambda: handle.press("PageUp"))
    assert slices(page)["sagittal"] > before["sagittal"]
    assert does(page, image, lambda: page.control("window").locator("select").select_option("bone"))
    page.text_appears("window centre 400 HU")
    assert does(page, image, page.tab.get_by_label("Pleural effusion").first.check)
    page.screenshot("plain")
    assert page.tab.locator(CANVAS).count() == 0


def test_two_volumes_move_together(visit):
    page = visit("linked", LINKED)
    canvas = page.find(CANVAS)
    told = page.text_appears("target hospital: ")
    handle = page.control("axial").locator(".noUi-handle")
    handle.focus()
    assert does(page, canvas, lambda: handle.press("PageUp"))
    assert page.text_appears("target hospital: ") != told
    page.screenshot("slider")
    before = slices(page)
    lower_row = in_panel(canvas, 0.12, 0.8)
    assert does(page, canvas, lambda: mouse_on(page).click(position=lower_row))
    assert slices(page) != before
    page.screenshot("click in the second volume")
