"""A zip goes in; a picture and scores come out, or words; and nothing stays on disk."""

import io
import tempfile
import zipfile
from types import SimpleNamespace

import pandas as pd
import pytest
from dicom_peers import write_phantom

from medctkit.viewers.upload_page import UploadPage

TABLE = pd.DataFrame({"finding": ["Emphysema"], "score": [0.25]})


def zipped(files):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def slices(folder, **tags):
    return {f"{folder.name}/{path.name}": path.read_bytes() for path in write_phantom(folder, **tags)[1].iterdir()}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page, and what it asked its model; temporary files go to a folder that has to be empty at the end."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    asked = []

    def classify(volume, adapter):
        asked.append((volume, adapter))
        return SimpleNamespace(table=TABLE, _repr_png_=lambda: (b"png", {}))

    yield UploadPage(classify, ["north", "south"]), asked
    assert not list((tmp_path / "temporary").iterdir())


def give(page, content):
    file = {"type": "", "size": len(content), "last_modified": pd.Timestamp(0).to_pydatetime()}
    page.upload.value = (file | {"name": "../<b>study.zip", "content": memoryview(content)},)


def test_a_scan_is_read_scored_and_scored_again_with_another_adapter(page, tmp_path):
    page, asked = page
    give(page, zipped(slices(tmp_path / "study")))
    assert page.messages.text == "" and page.upload.value == ()
    assert page.picture.value == b"png" and "0.250" in page.table.value and "&lt;b&gt;study.zip" in page.said.value
    page.adapter.value = "south"
    assert [adapter for _, adapter in asked] == ["north", "south"]
    assert (asked[0][0].hu == write_phantom(tmp_path / "again")[0].hu).all() and asked[1][0] is asked[0][0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not a zip", "scan.zip: not a zip archive"),
        ({"../../etc/x.dcm": b""}, "leads out of its folder"),
        ({"letter.txt": b"Dear colleague"}, "no slice of a scan"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_scan_is_said_and_takes_the_scan_before_away(page, tmp_path, content, said):
    page, asked = page
    give(page, zipped(slices(tmp_path / "study")))
    give(page, content if isinstance(content, bytes) else zipped(content))
    assert said in page.messages.text and str(tmp_path) not in page.messages.text
    assert page.picture.value == b"" and page.table.value == page.said.value == ""
    page.adapter.value = "south"
    assert len(asked) == 1


def test_of_several_series_one_is_named_and_what_nobody_expected_is_raised_too(page, tmp_path):
    page, asked = page
    content = zipped(slices(tmp_path / "a", SeriesNumber=3) | slices(tmp_path / "b", SeriesNumber=4))
    give(page, content)
    assert "choose one by" in page.messages.text and not asked
    page.series.value = "4"
    give(page, content)
    assert page.messages.text == "" and len(asked) == 1
    page._classify = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        give(page, content)
    assert "ZeroDivisionError" in page.messages.text and page.picture.value == b""
