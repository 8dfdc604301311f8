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
from medctkit.viewers.drawing.rendering import WINDOWS, Look, Scan, draw_slice
from medctkit.viewers.drawing.stack_page import write_stack_page


@pytest.fixture(scope="module")
def scan():
    study = generate(4, findings=["Pleural effusion", "Lung nodule"], shape=(32, 64, 64))
    return Scan.of(study.volume, study.masks)


@pytest.fixture(scope="module")
def page(scan, tmp_path_factory):
    values = np.linspace(0, 2, 4 * 8 * 8).reshape(4, 8, 8)
    heat_map = HeatMap(values, scan.volume.affine @ np.diag([8, 8, 8, 1]), "relevance <of> a prompt")
    path = tmp_path_factory.mktemp("stack") / "stack.html"
    windows = {"lung": (-600, 1500), "mediastinum": (40, 400)}
    look = Look(masks=("Lung nodule",), heat_map=heat_map)
    assert write_stack_page(path, scan, "axial", windows, look, "Phantom <4>") == path
    assert [file.name for file in path.parent.iterdir()] == ["stack.html"]
    return path.read_text(encoding="utf-8")


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def image(url):
    assert url.startswith("data:image/webp;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_every_slice_is_there_in_every_window(page, scan):
    data = data_of(page)
    assert [len(slices) for slices in data["windows"]] == [32, 32] and len(data["texts"]) == 32
    for slices, window in zip(data["windows"], ((-600, 1500), (40, 400)), strict=True):
        for index in (0, 13, 31):
            shown = np.asarray(image(slices[index]).convert("L")).astype(float)
            exact = np.asarray(draw_slice(scan, "axial", index, shown.shape[::-1], Look(window)).convert("L"))
            assert np.abs(shown - exact).mean() < 4  # of 255: WebP
    assert data["names"][1] == "mediastinum window, centre 40 HU, width 400 HU"


def test_texts_say_slice_place_and_what_is_marked(page, scan):
    texts, step = data_of(page)["texts"], scan.volume.spacing[0]
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
    assert images[0]["src"] == data_of(page)["windows"][0][16]  # shown before any script runs
    inputs = [(attributes["type"], inside) for tag, attributes, inside in read.tags if tag == "input"]
    assert [kind for kind, _ in inputs] == ["range", "radio", "radio", "range", "range"]
    assert all("label" in inside for _, inside in inputs)
    assert "<h1>Phantom &lt;4&gt;, axial</h1>" in page and 'aria-live="polite"' in page


def test_names_cannot_break_out_of_the_page(tmp_path):
    name, volume = "</script><script>alert(1)</script>", CTVolume(np.zeros((3, 20, 20), np.int16), (10.0, 5.0, 5.0))
    marked, look = Scan.of(volume, {name: volume.hu == 0}), Look(masks=(name,))
    written = write_stack_page(tmp_path / "p.html", marked, "axial", {name: (0, 100)}, look, name).read_text()
    assert written.count("<script>") == 1 and written.count("</script>") == 2
    assert name in data_of(written)["names"][0] and any(name in text for text in data_of(written)["texts"])


def test_bad_input_leaves_no_file(scan, tmp_path):
    with pytest.raises(ValueError, match="unknown plane 'oblique'"):
        write_stack_page(tmp_path / "p.html", scan, "oblique", WINDOWS, Look(), "CT")
    assert not list(tmp_path.iterdir())
