"""Pages to judge phantoms by: a finding beside its healthy twin, a phantom beside a real scan."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from medctkit.common.atomic import replacing
from medctkit.findings import CT_RATE
from medctkit.phantom.study import generate
from medctkit.scans.volumes import CTVolume, read_volume
from medctkit.viewers.drawing.rendering import PLANES, render

SHAPE, SEED = (160, 256, 256), 30  # of the first finding; the next has the next
HEIGHT, GAP = 300, 4  # of a slice, and below and beside it, pixels


def page(scans: Sequence[CTVolume], places: Sequence[Sequence[int]]) -> Image.Image:
    """Scans side by side: three planes each, lung windows above mediastinal ones (PIL image).

    Args:
        scans: in SPL orientation.
        places: for each scan the voxel (z, y, x) that the planes pass through.
    """
    rows = []
    for window in ("lung", "mediastinum"):
        row = []
        for scan, place in zip(scans, places, strict=True):
            for plane, axis in PLANES.items():
                picture = np.asarray(render(scan, plane, int(place[axis]), window, height=HEIGHT))
                row.append(np.pad(picture, ((0, HEIGHT + GAP - len(picture)), (0, GAP), (0, 0))))
        rows.append(np.hstack(row))
    return Image.fromarray(np.vstack(rows))


def draw_twins(folder: Path) -> list[Path]:
    """Write a page for each finding: three planes through its mask, beside the same patient without it.

    The `folder` is made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for i, name in enumerate(CT_RATE):
        sick, twin = (generate(SEED + i, findings=f, shape=SHAPE) for f in ([name], []))
        mask = sick.masks[name]
        place = [int(mask.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in PLANES.values()]
        written.append(folder / f"{name.lower().replace(' ', '_')}.png")
        with replacing(written[-1]) as temporary:
            page([sick.volume, twin.volume], [place, place]).save(temporary, format="png")
    return written


def draw_beside_real(picture: Path, scan: Path) -> Path:
    """Write one page: a healthy phantom and a real scan in the same planes, half way up, back and left in each.

    Args:
        picture: to write.
        scan: as `read_volume` takes it.
    """
    real = read_volume(scan).reoriented()
    drawn = generate(SEED, findings=[], shape=SHAPE).volume
    at = (0.6, 0.5, 0.35)
    places = [[int(share * n) for share, n in zip(at, volume.hu.shape, strict=True)] for volume in (drawn, real)]
    picture.parent.mkdir(parents=True, exist_ok=True)
    with replacing(picture) as temporary:
        page([drawn, real], places).save(temporary, format="png")
    return picture
