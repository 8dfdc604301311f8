"""A stack of slices as one HTML file that works alone."""

import base64
import hashlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from written_pages import Page

from medctkit.phantom.study import generate
from medctkit.scans.heat_map import HeatMap
from medctkit.scans.volumes import CTVolume
from medctkit.viewers.drawing.linked_scans import LinkedScans
from medctkit.viewers.drawing.rendering import WINDOWS, Look, draw_slice
from medctkit.viewers.drawing.stack_page import write_stack_page


@pytest.fixture(scope="module")
def linked():
    study = generate(4, findings=["Pleural effusion", "Lung nodule"], shape=(32, 64, 64))
    return LinkedScans(study.volume, study.masks)


@pytest.fixture(scope="module")
def scan(linked):
    return linked.scans[0]


@pytest.fixture(scope="module")
def page(linked, scan, tmp_path_factory):
    values = np.linspace(0, 2, 4 * 8 * 8).reshape(4, 8, 8)
    heat_map = HeatMap(values, scan.volume.affine @ np.diag([8, 8, 8, 1]), "relevance <of> a prompt")
    path = tmp_path_factory.mktemp("stack") / "stack.html"
    windows = {"lung": (-600, 1500), "mediastinum": (40, 400)}
    look = Look(masks=("Lung nodule",), heat_map=heat_map)
    assert write_stack_page(path, linked, "axial", windows, look, "Phantom <4>") == path
    assert [file.name for file in path.parent.iterdir()] == ["stack.html"]
    return path.read_text(encoding="utf-8")


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def image(url):
    assert url.startswith("data:image/webp;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_every_slice_is_there_in_every_window(page, scan):
    data = data_of(page)
    (of_scan,) = data["scans"]
    assert [len(slices) for slices in of_scan] == [32, 32] and len(data["texts"][0]) == 32
    for slices, window in zip(of_scan, ((-600, 1500), (40, 400)), strict=True):
        for index in (0, 13, 31):
            shown = np.asarray(image(slices[index]).convert("L")).astype(float)
            exact = np.asarray(draw_slice(scan, "axial", index, shown.shape[::-1], Look(window)).convert("L"))
            assert np.abs(shown - exact).mean() < 4  # of 255: WebP
    assert data["names"][1] == "mediastinum window, centre 40 HU, width 400 HU"


def test_texts_say_slice_place_and_what_is_marked(page, scan):
    (texts,), step = data_of(page)["texts"], scan.volume.spacing[0]
    assert [text.split(", ")[1].split("; ")[0] for text in texts[::31]] == ["I 155 mm", "S 155 mm"]
    filled = scan.masks["Lung nodule"].any(axis=(1, 2))
    for index, text in enumerate(texts):
        place = round((index - 15.5) * step)
        assert text.startswith(f"axial slice {index} of 0 to 31, {'SI'[place < 0]} {abs(place)} mm")
        assert text.endswith("; marked: Lung nodule") == filled[index]
    assert filled.any()


def test_masks_and_map_are_layers(page, scan):
    heat, masks = data_of(page)["layers"]
    filled = scan.masks["Lung nodule"]
    for index in range(32):
        if not filled[index].any():
            assert masks[index] is None
            continue
        tint = np.asarray(image(masks[index]).convert("RGBA"))
        np.testing.assert_array_equal(tint[..., 3] == 255, filled[index])
        at = list(scan.masks).index("Lung nodule")
        assert (tint[filled[index]][:, :3] == [(230, 159, 0), (86, 180, 233)][at]).all()
    low, high = (np.asarray(image(heat[index]).convert("RGBA"))[..., 3].mean() for index in (4, 26))
    assert low < 60 < 190 < high
    assert "relevance &lt;of&gt; a prompt, 0 to 2" in page


def test_the_page_needs_no_network_and_its_policy_allows_none(page):
    assert not re.search(r"https?:|://|=\"//|url\(|@import|<link|<iframe|eval\(", page)
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)[1]
    script = re.search(r"</script><script>(.*?)</script>", page, re.S)[1]
    style = re.search(r"<style>(.*?)</style>", page, re.S)[1]

    def digest(text):
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest(style)}'; script-src 'sha256-{digest(script)}'"
    )
    assert " style=" not in page and " onclick" not in page  # the policy would refuse them


def test_the_page_can_be_read_and_used_without_seeing_or_a_mouse(page):
    read = Page(page)
    assert read.all("html")[0]["lang"] == "en" and read.all("title") and read.all("noscript")
    images = read.all("img")
    assert images[0]["alt"] == "axial slice 16 of 0 to 31, S 5 mm; lung window, centre -600 HU, width 1500 HU"
    assert images[0]["src"] == data_of(page)["scans"][0][0][16]  # shown before any script runs
    inputs = [(attributes["type"], inside) for tag, attributes, inside in read.tags if tag == "input"]
    assert [kind for kind, _ in inputs] == ["range", "radio", "radio", "range", "range"]
    assert all("label" in inside for _, inside in inputs)
    assert "<h1>Phantom &lt;4&gt;, axial</h1>" in page and 'aria-live="polite"' in page


def test_names_cannot_break_out_of_the_page(tmp_path):
    name, volume = "</script><script>alert(1)</script>", CTVolume(np.zeros((3, 20, 20), np.int16), (10.0, 5.0, 5.0))
    marked, look = LinkedScans(volume, {name: volume.hu == 0}), Look(masks=(name,))
    written = write_stack_page(tmp_path / "p.html", marked, "axial", {name: (0, 100)}, look, name).read_text()
    assert written.count("<script>") == 1 and written.count("</script>") == 2
    assert name in data_of(written)["names"][0] and any(name in text for text in data_of(written)["texts"][0])


def test_a_second_scan_lies_beside_the_first_at_the_same_scale_and_place(tmp_path):
    first, second = np.zeros((9, 40, 40), np.int16), np.zeros((5, 30, 30), np.int16)
    first[6], second[3] = 300, 300  # the same place
    pair = LinkedScans(CTVolume(first, (10.0, 2.0, 2.0)), None, CTVolume(second, (20.0, 2.0, 2.0)), ("thin", "thick"))
    path = write_stack_page(tmp_path / "p.html", pair, "axial", {"soft": (150, 300)}, Look(), "Two")
    written = path.read_text()
    data = data_of(written)
    assert data["there"] == [0, 0, 1, 2, 2, 2, 3, 4, 4], "the nearest slice"
    (thin,), (thick,) = data["scans"]
    assert [image(slices[0]).size for slices in (thin, thick)] == [(448, 448), (336, 336)]
    bright = [[np.asarray(image(url).convert("L")).mean() > 128 for url in slices] for slices in (thin, thick)]
    assert bright == [[i == 6 for i in range(9)], [i == 3 for i in range(5)]]
    assert [of[6] for of in data["texts"]] == [
        "thin: axial slice 6 of 0 to 8, S 60 mm", "thick: axial slice 3 of 0 to 4, S 60 mm"
    ]  # fmt: skip
    assert [image["alt"].partition(":")[0] for image in Page(written).all("img")] == ["thin", "thick"]
    assert "The two scans are\nlinked by the distance from the middle of each scan." in written
    assert [attributes["src"] for attributes in Page(written).all("img")] == [thin[4], thick[2]]


def test_where_a_second_scan_does_not_reach_nothing_is_shown(tmp_path):
    whole, part = (CTVolume(np.zeros((n, 20, 20), np.int16), (10.0, 4.0, 4.0)) for n in (9, 5))
    pair = LinkedScans(whole, None, part, ("whole", "part"))
    data = data_of(write_stack_page(tmp_path / "p.html", pair, "axial", {"soft": (0, 300)}, Look(), "Two").read_text())
    assert data["there"] == [None, None, 0, 1, 2, 3, 4, None, None]
    assert data["texts"][1][6].startswith("part: axial slice 4 of 0 to 4")
    assert data["texts"][1][7] == "part: does not reach this place"


def test_bad_input_leaves_no_file(linked, tmp_path):
    with pytest.raises(ValueError, match="unknown plane 'oblique'"):
        write_stack_page(tmp_path / "p.html", linked, "oblique", WINDOWS, Look(), "CT")
    assert not list(tmp_path.iterdir())
