"""A page for a person: upload a zip of DICOM, choose an adapter, see a picture and 18 scores."""

import html
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as w

from medctkit.scans.volumes import CTVolume, read_volume
from medctkit.viewers.drawing.messages import Messages


class UploadPage:
    """Takes a zip archive with a CT series, and shows what a model says about it.

    The archive is a file for as long as it takes to read it, in a temporary folder (`TMPDIR=/dev/shm` keeps it in
    memory); the scan stays in memory until the next one. What can't be read is said on the page, and takes the scan
    before it away. The widget is `.widget`; `.messages` says what went wrong.

    `classify` is called with a volume and one of the names in `adapters`, and gives `quickstart.Classified`.
    """

    def __init__(self, classify: Callable[[CTVolume, str], Any], adapters: Sequence[str]):
        self.messages, self._classify, self._name = Messages(), classify, ""
        self._volume: CTVolume | None = None
        self.upload = w.FileUpload(accept=".zip", description="zip of DICOM ...", icon="", layout={"width": "180px"},
                                   tooltip="choose a zip archive with one CT series")  # fmt: skip
        self.adapter = w.Dropdown(options=adapters, description="adapter")
        self.series = w.Text(description="series", placeholder="of several: UID, number or description")
        self.said, self.table = w.HTML(), w.HTML()
        self.picture = w.Image(format="png", layout={"display": "none", "max_width": "1200px"})
        self.messages.observe(self.upload, self._take)
        self.messages.observe(self.adapter, self._score)
        controls = w.HBox([self.upload, self.adapter, self.series], layout={"flex_flow": "row wrap"})
        self.widget = w.VBox([controls, self.messages.widget, self.said, self.picture, self.table])

    def _take(self) -> None:
        if not self.upload.value:
            return
        (file,) = self.upload.value
        with self.messages.quietly():
            self.upload.value = ()  # the same archive may come again
        self._volume, self._name = None, html.escape(file["name"])
        self._show(f"Reading {self._name} ...")
        try:
            self._volume = self._read(file["content"])
        except (ValueError, OSError, MemoryError) as error:
            self._show("")
            self.messages.say(_without_folders(str(error)))
        self._score()

    def _read(self, content: Any) -> CTVolume:
        with tempfile.TemporaryDirectory(prefix="medctkit-") as folder:
            archive = Path(folder, "scan.zip")  # never by the name that came with it
            archive.write_bytes(content)
            return read_volume(archive, series=self.series.value.strip() or None)

    def _score(self) -> None:
        if self._volume is not None:
            self._show(f"Asking about {self._name} ...")
            found = self._classify(self._volume, self.adapter.value)
            table = found.table[["finding", "score"]].to_html(index=False, float_format="{:.3f}".format, border=0)
            said = f"{self._name}, adapter {html.escape(self.adapter.value)}: research use only, not for diagnosis."
            self._show(said, found._repr_png_()[0], table)

    def _show(self, said: str, picture: bytes = b"", table: str = "") -> None:
        self.said.value, self.picture.value, self.table.value = said, picture, table
        self.picture.layout.display = None if picture else "none"


def _without_folders(text: str) -> str:
    """A message without the temporary folders in it, which mean nothing to the reader."""
    return re.sub(rf"{re.escape(tempfile.gettempdir())}[/\\]medctkit-[^{re.escape(os.sep)}\s:'\"]+[/\\]?", "", text)
