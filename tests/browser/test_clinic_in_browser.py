"""The page for a person, under voila with its own settings: zip in, picture and 18 scores out, nothing on disk."""

import zipfile
from contextlib import closing
from dataclasses import replace

import pytest
from conftest import PICTURES
from dicom_peers import wait_until, write_phantom
from pages import MESSAGE, NotebookPage
from servers import Server

from medctkit import load_mini_base
from medctkit.lora import adapter as lora
from medctkit.quickstart import classify
from medctkit.scans.volumes import read_volume

PICTURE = ".widget-image"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A zip of more than the 10 MB that a websocket takes by default."""
    path = tmp_path_factory.mktemp("study") / "study.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in write_phantom(tmp_path_factory.mktemp("series"))[1].iterdir():
            archive.write(file, file.name)
        archive.writestr("letter.txt", bytes(11 << 20))
    return path


@pytest.fixture(scope="module")
def clinic(browser, root, tmp_path_factory):
    """The open page, and the folder for its temporary files; a hospital has an adapter."""
    model = lora.add_lora(load_mini_base().model, "paper", r=4, init_lora_weights=False)
    lora.save_adapter(model, root / "runs" / "north" / "adapter")
    temporary = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        server = Server("voila", root / "notebooks" / "clinic", tmp_path_factory.mktemp("voila-clinic"))
    with closing(server), closing(browser.new_page(viewport={"width": 1300, "height": 1300})) as tab:
        page = NotebookPage(tab, server, "page.ipynb", PICTURES)
        page.begin("clinic")
        page.open()
        yield page, temporary


def upload(page, path):
    with page.tab.expect_file_chooser() as chooser:
        page.find(".widget-upload, .jupyter-widget-upload, .jupyter-button").click()
    chooser.value.set_files(path)


def scores(page):
    """What the table on the page says."""
    texts = page.tab.locator("table.dataframe td").all_inner_texts()
    return dict(zip(texts[::2], map(float, texts[1::2]), strict=True))


def test_a_zip_of_dicom_is_scored_with_the_adapter_that_is_chosen(clinic, study, root):
    page, temporary = clinic
    page.text_appears("the mini model, which knows phantoms only", seconds=60)
    choice = page.control("adapter").locator("select")
    choice.select_option("north")
    upload(page, study)
    page.text_appears("study.zip, adapter north: research use only, not for diagnosis", seconds=60)
    north, base = scores(page), load_mini_base()
    assert page.find(PICTURE).bounding_box()["width"] > 600
    page.screenshot("scored", full_page=True)
    choice.select_option("none")
    page.text_appears("study.zip, adapter none", seconds=60)
    scan, model = read_volume(study), lora.load_adapter(load_mini_base().model, root / "runs" / "north" / "adapter")
    assert scores(page) != north == pytest.approx(classify(scan, replace(base, model=model)).scores, abs=2e-3)
    assert scores(page) == pytest.approx(classify(scan, base).scores, abs=2e-3)
    assert page.new_errors() == []
    assert not [path for path in temporary.rglob("*") if "medctkit" in path.name or path.suffix in (".dcm", ".zip")]


def test_an_archive_that_leads_out_is_refused_and_the_scan_before_is_gone(clinic, tmp_path):
    page, _ = clinic
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("../../out.dcm", b"")
    upload(page, tmp_path / "bad.zip")
    page.text_appears("leads out of its folder", seconds=30)
    assert page.tab.locator(MESSAGE).locator("visible=true").count() == 1
    assert not page.find(PICTURE).is_visible() and not scores(page)
    page.screenshot("refused")
    assert page.new_errors() == []


def test_the_scan_goes_from_memory_a_minute_after_the_page_was_closed(clinic):
    page, _ = clinic
    page.tab.close()
    wait_until(lambda: "Kernel shutdown" in page.server.logs[0].read_text(), seconds=120)
