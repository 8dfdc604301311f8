"""Pages to judge phantoms by: a finding beside its healthy twin, a phantom beside a real scan."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medctkit.common.atomic import replacing
from medctkit.findings import CT_RATE
from medctkit.phantom.study import generate
from medctkit.scans.volumes import CTVolume, read_volume
from medctkit.viewers.drawing.rendering import PLANES, render

if TYPE_CHECKING:
    from PIL.Image import Image

SHAPE = (160, 256, 256)


def page(scans: Sequence[CTVolume], places: Sequence[Sequence[int]], height: int = 300) -> "Image":
    """Scans side by side: three planes each, lung windows above mediastinal ones (PIL image).

    Args:
        scans: in SPL orientation.
        places: for each scan the voxel (z, y, x) that the planes pass through.
        height: of a slice, pixels.
    """
    from PIL import Image

    rows = []
    for window in ("lung", "mediastinum"):
        rows.append([
            render(scan, plane, int(place[axis]), window, height=height)
            for scan, place in zip(scans, places, strict=True)
            for plane, axis in PLANES.items()
        ])  # fmt: skip
    wide, tall = sum(picture.width + 4 for picture in rows[0]), 2 * (height + 4)
    sheet = Image.new("RGB", (wide, tall))
    for j, row in enumerate(rows):
        at = 0
        for picture in row:
            sheet.paste(picture, (at, j * (height + 4)))
            at += picture.width + 4
    return sheet


def draw_twins(folder: Path, seed: int = 30) -> list[Path]:
    """Write a page for each finding: three planes through its mask, beside the same patient without it.

    Args:
        folder: made if it is not there.
        seed: of the first finding; the next has the next.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for i, name in enumerate(CT_RATE):
        sick, twin = (generate(seed + i, findings=f, shape=SHAPE) for f in ([name], []))
        mask = sick.masks[name]
        place = [int(mask.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in PLANES.values()]
        written.append(folder / f"{name.lower().replace(' ', '_')}.png")
        with replacing(written[-1]) as temporary:
            page([sick.volume, twin.volume], [place, place]).save(temporary, format="png")
    return written


def draw_beside_real(picture: Path, scan: Path, seed: int = 30) -> Path:
    """Write one page: a healthy phantom and a real scan in the same planes, half way up, back and left in each.

    Args:
        picture: to write.
        scan: as `read_volume` takes it.
        seed: of the phantom.
    """
    real = read_volume(scan).reoriented()
    drawn = generate(seed, findings=[], shape=SHAPE).volume
    at = (0.6, 0.5, 0.35)
    places = [[int(share * n) for share, n in zip(at, volume.hu.shape, strict=True)] for volume in (drawn, real)]
    picture.parent.mkdir(parents=True, exist_ok=True)
    with replacing(picture) as temporary:
        page([drawn, real], places).save(temporary, format="png")
    return picture
