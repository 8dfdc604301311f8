"""Makes `medctkit/assets/anatomy/chest.npz`: shapes of real chests, for the drawn ones to be warped from.

    python tools/make_anatomy.py LUNG_ATLAS CT_64

LUNG_ATLAS is the folder `Resources/LungLobeAtlasData` of the Chest Imaging Platform (acil-bwh/ChestImagingPlatform),
its files numbered as `fissure_points_NNN.csv` and `transform_to_reference_NNN.tfm` beside
`left_right_lung_labels.nrrd`; CT_64 is `Testing/Data/Input/ct-64.nrrd` of the same repository, a coarse scan of
the subject of the label map. Both come under its BSD-style licence, whose text lies beside what is made here.

Everything is put into one frame: mm along (z up, y back, x left) from the middle of the label map's lungs,
stretched to the mean size of the atlas's 100 subjects. What is kept: signed distances to lungs, soft tissue, bone and
skin on coarse grids, the surfaces of the fissures and how they vary, and how sizes vary.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

OUT = Path(__file__).resolve().parents[1] / "medctkit" / "assets" / "anatomy"
LUNG_GRID = dict(spacing=3.0, low=(-126, -105, -147), high=(129, 105, 147))  # mm
BODY_GRID = dict(spacing=4.0, low=(-134, -148, -196), high=(122, 144, 196))
STEP = 0.25  # mm to one unit of a stored distance
REACH = dict(lung=31.0, skin=31.0, soft=16.0, bone=6.0)  # mm: farther away it is not kept
VERTEBRA_FRONT = np.array([  # (z, y) mm
    (-140, -20), (-106, -14), (-88, -8), (-70, -2), (-61, 12), (-43, 20), (-25, 24), (-7, 30), (11, 31), (29, 27),
    (47, 20), (65, 13), (83, 5), (92, -3), (120, -13),
])  # fmt: skip


def transforms(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices (100, 3, 3) and shifts (100, 3) from the reference to each subject, and their centres; x, y, z."""
    matrices, shifts, centres = [], [], []
    for number in range(1, 101):
        lines = (folder / f"transform_to_reference_{number:03d}.tfm").read_text().splitlines()
        values = {key: np.array(rest.split(), float) for key, _, rest in (line.partition(": ") for line in lines[3:5])}
        matrices.append(values["Parameters"][:9].reshape(3, 3))
        shifts.append(values["Parameters"][9:])
        centres.append(values["FixedParameters"])
    return np.array(matrices), np.array(shifts), np.array(centres)


def fissures(folder: Path, centre: np.ndarray, stretch: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and covariance of the quadratic surfaces z(y, x) of the three fissures, over the subjects."""
    fitted: dict[str, list] = {"right_oblique": [], "right_horizontal": [], "left_oblique": []}
    for number, (matrix, shift, middle) in enumerate(zip(*transforms(folder), strict=True), start=1):
        points: dict[str, list] = {name: [] for name in fitted}
        with open(folder / f"fissure_points_{number:03d}.csv") as file:
            for region, kind, *place in list(csv.reader(file))[1:]:
                side = "left" if region.upper().startswith("LEFT") else "right"
                name = f"{side}_{'horizontal' if kind.upper().startswith('HORIZ') else 'oblique'}"
                if name in points and not region.upper().startswith("UNDEF"):
                    points[name].append([float(v) for v in place[:3]])
        for name, found in points.items():
            if len(found) < 12:
                continue
            inside = np.linalg.solve(matrix, (np.array(found) - middle - shift).T).T + middle
            x, y, z = ((inside - centre) * stretch).T
            design = np.stack([np.ones_like(x), y / 100, x / 100, (y / 100) ** 2, x * y / 1e4, (x / 100) ** 2], 1)
            ridge = np.diag([0, 0, 0, 1.0, 1.0, 1.0]) * 2  # few points lie far out: bend no more than they ask for
            for _ in range(3):
                weights = np.linalg.solve(design.T @ design + ridge, design.T @ z)
                near = np.abs(z - design @ weights) < 15
                design, z = design[near], z[near]
            fitted[name].append(weights)
    out = {}
    for name, rows in fitted.items():
        table = np.array(rows)
        middle, spread = np.median(table, 0), np.median(np.abs(table - np.median(table, 0)), 0) * 1.48
        table = table[(np.abs(table - middle) < 3 * spread + 1e-6).all(1)]
        out[f"{name}_mean"], out[f"{name}_cov"] = table.mean(0), np.cov(table.T)
        print(name, len(rows), "subjects,", len(table), "kept", table.mean(0).round(1), table.std(0).round(1))
    return out


def resampled(path: Path, centre: np.ndarray, stretch: np.ndarray, grid: dict, spacing: float, smooth: bool):
    """An image on a grid of the common frame, array (z, y, x)."""
    image = sitk.ReadImage(str(path))
    size = [int(round((high - low) / spacing)) + 1 for low, high in zip(grid["low"], grid["high"], strict=True)][::-1]
    frame = sitk.AffineTransform(3)
    frame.SetMatrix(np.diag(1 / stretch).ravel().tolist())
    frame.SetTranslation(centre.tolist())
    reference = sitk.Image(size, sitk.sitkFloat32)
    reference.SetSpacing([spacing] * 3)
    reference.SetOrigin([float(v) for v in grid["low"][::-1]])
    how = sitk.sitkBSpline if smooth else sitk.sitkNearestNeighbor
    return sitk.GetArrayFromImage(sitk.Resample(sitk.Cast(image, sitk.sitkFloat32), reference, frame, how, -1000.0))


def distance(inside: np.ndarray, spacing: float, blur: float) -> np.ndarray:
    """Signed distance (mm), positive inside, smoothed a little."""
    out = ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)
    return ndimage.gaussian_filter((out - 0.5 * np.sign(out)).astype(np.float32) * spacing, blur / spacing)


def stored(values: np.ndarray, every: int, reach: float) -> np.ndarray:
    """Distances (mm) as whole numbers of `STEP`, up to `reach` mm, as steps along x."""
    values = values[::every, ::every, ::every]
    units = np.rint(np.clip(values, -reach, reach) / STEP).astype(np.int8)
    return np.diff(units, axis=2, prepend=np.int8(0))  # steps from column to column: small numbers are small on disk


def lungs(folder: Path, centre: np.ndarray, stretch: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed distance to the lungs, the surface between left and right, and the lowest lung in each column."""
    labels = resampled(folder / "left_right_lung_labels.nrrd", centre, stretch, LUNG_GRID, 1.0, smooth=False)
    inside = ndimage.binary_closing(labels > 0, iterations=2)
    field = distance(inside, 1.0, 0.8)
    small = labels[::3, ::3, ::3]
    x = LUNG_GRID["low"][2] + 3.0 * np.arange(small.shape[2])
    right = np.where(small == 2, x, -np.inf).max(2)
    left = np.where(small == 3, x, np.inf).min(2)
    both = np.isfinite(right) & np.isfinite(left)
    middle = np.where(both, (np.clip(right, -60, 60) + np.clip(left, -60, 60)) / 2, 0)
    weight = ndimage.gaussian_filter(both.astype(float), 2)
    middle = np.where(weight > 0.02, ndimage.gaussian_filter(middle * both, 2) / np.maximum(weight, 1e-6), 0)
    z = LUNG_GRID["low"][0] + 3.0 * np.arange(small.shape[0])
    floor = np.where((small > 0).any(0), z[np.argmax(small > 0, axis=0)], np.nan)
    known = np.isfinite(floor) & (floor < 10)
    filled, weight = np.where(known, floor, 0.0), known.astype(float)
    for blur in (1, 2, 4, 8, 16, 32):  # from the nearest columns that know it
        spread = ndimage.gaussian_filter(weight, blur)
        guess = ndimage.gaussian_filter(np.where(weight > 0, filled, 0), blur) / np.maximum(spread, 1e-9)
        new = (weight == 0) & (spread > 0.05)
        filled[new], weight[new] = guess[new], 1
    return field, middle, ndimage.gaussian_filter(filled, 1)


def body(scan: Path, lung: np.ndarray, centre: np.ndarray, stretch: np.ndarray) -> dict[str, np.ndarray]:
    """Signed distances to soft tissue, bone and skin, on the body's grid at 2 mm."""
    hu = resampled(scan, centre, stretch, BODY_GRID, 2.0, smooth=True)
    low = np.array(BODY_GRID["low"])
    z, y, x = (low[i] + 2.0 * np.arange(n) for i, n in enumerate(hu.shape))
    within = ndimage.binary_opening(hu > -300, iterations=3)
    pieces, _ = ndimage.label(within)
    within = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    within = np.stack([ndimage.binary_fill_holes(level) for level in within])
    rows = np.abs(x) <= 140  # farther out the scan's field of view may end: the outline is closed there by an ellipse
    for height, level in zip(z, within, strict=True):
        for side in (-1, 1):
            edge = np.flatnonzero(rows)[-1 if side > 0 else 0]
            front, back = (np.flatnonzero(level[:, edge])[i] if level[:, edge].any() else -1 for i in (0, -1))
            if front < 0:
                level[:, (x > 140) if side > 0 else (x < -140)] = False
                continue
            inner = edge - side * 10
            slope = max((level[:, inner].sum() - level[:, edge].sum()) / 20.0, 0.12)
            half, middle = (back - front) / 2, (back + front) / 2
            reach = min(half / slope / 2, 9 + 14 * np.clip((height - 70) / 25, 0, 1)) + 2  # voxels of 2 mm
            for step in range(1, int(reach) + 1):
                tall = half * np.sqrt(1 - (step / reach) ** 2)
                column = edge + side * step
                if 0 <= column < len(x):
                    level[:, column] = np.abs(np.arange(len(y)) - middle) <= tall
            far = np.arange(len(x)) * side > (edge + side * int(reach)) * side
            level[:, far] = False
    within = np.stack([ndimage.binary_fill_holes(level) for level in within])  # once more: now the sides are closed
    places = np.stack(np.meshgrid(z, y, x, indexing="ij")).reshape(3, -1) - np.array(LUNG_GRID["low"])[:, None]
    near_lung = ndimage.map_coordinates(lung, places, order=1, mode="constant", cval=-30.0).reshape(hu.shape)
    skin = distance(within | (near_lung > -6), 2.0, 3.0)
    hu = np.where((hu < -300) & (near_lung < -1) & (skin > 3), 40, hu)  # trachea, bowel: filled, and painted again
    soft = hu > np.where(near_lung > -8, -250, -25)
    outside = (np.abs(x) > 142)[None, None, :] & np.ones(hu.shape, bool)
    soft = np.where(outside, skin > 9, soft) & (skin > 1)
    front = np.interp(z, *VERTEBRA_FRONT.T)[:, None, None]
    yy, xx, zz = y[None, :, None], x[None, None, :], z[:, None, None]
    bone = (hu > 150) & (skin > 3) & ~outside
    inner = (np.abs(xx) < 62) & (yy < front - 1) & (yy > np.where(zz > 70, -58, -72)) & (zz < 78)  # calcified arteries
    deep = (zz < -60) & (np.abs(xx) < 75) & (yy < front - 1)
    bone &= ~(inner | deep) & (near_lung < 1)
    pieces, _ = ndimage.label(bone)
    sizes = np.bincount(pieces.ravel())
    bone &= sizes[pieces] > 30
    for side in (-1, 1):  # the heads of the humeri, outside the field of view of the scan
        bone |= (zz - 116) ** 2 + (yy - 2) ** 2 + (xx - side * 158) ** 2 < 24**2
    return dict(soft=distance(soft, 2.0, 1.2), bone=distance(bone, 2.0, 0.8), skin=skin)


def main() -> None:
    """Make the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lung_atlas", type=Path)
    parser.add_argument("ct_64", type=Path)
    given = parser.parse_args()
    matrices, _, centres = transforms(given.lung_atlas)
    centre = np.median(centres, 0)
    sizes = np.log(np.stack([np.diagonal(m) for m in matrices]))
    kept = (np.abs(sizes - np.median(sizes, 0)) < 3 * sizes.std(0)).all(1)
    stretch = np.exp(sizes[kept].mean(0))
    field, middle, floor = lungs(given.lung_atlas, centre, stretch)
    arrays = {
        name: stored(values, 2, REACH[name]) for name, values in body(given.ct_64, field, centre, stretch).items()
    }
    arrays["lung"] = stored(field, 3, REACH["lung"])
    arrays["middle"], arrays["floor"] = np.rint(middle).astype(np.int8), np.rint(floor).astype(np.int16)
    order = [2, 1, 0]  # x, y, z as ITK has it, to z, y, x
    arrays["size_cov"] = np.cov(sizes[kept].T)[np.ix_(order, order)]
    arrays |= fissures(given.lung_atlas, centre, stretch)
    OUT.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(OUT / "chest.npz", **arrays)
    print(OUT / "chest.npz", (OUT / "chest.npz").stat().st_size // 1024, "kB; mean size of the atlas", stretch)


if __name__ == "__main__":
    main()
