"""Measure the slice viewer on this machine: a step of a slider until the new picture is ready, and memory.

`make bench` runs it. The volume has the size a model sees, 480 x 480 x 240; beside the milliseconds stands how much
faster a step is than drawing the same three slices with matplotlib, measured in the same run, in turns. The bars of the
project are checked. Writes bench/viewers.json.
"""

import argparse
import gc
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from printing import all_met, made_with, show, this_machine

from medctkit.common.provenance import write_json

HERE = Path(__file__).resolve().parent
COARSE, FACTOR, SPACING = (80, 160, 160), 3, (1.5, 0.75, 0.75)  # a phantom, each voxel made to 3 x 3 x 3; mm
SEED, STEPS, LONG = 3, 20, 300
MILLISECONDS, MEGABYTES, PAGE_MEGABYTES = 50, 8, 6


def study(coarse, factor):
    """A volume in float32, as `read_volume` gives it, with noise of 20 HU; a mask of a finding, and a heat map."""
    from medctkit.phantom.study import generate
    from medctkit.scans.heat_map import HeatMap
    from medctkit.scans.volumes import CTVolume

    phantom = generate(SEED, findings=["Pleural effusion"], shape=coarse)

    def fine(array):
        for axis in range(3):
            array = array.repeat(factor, axis)
        return array

    hu = fine(phantom.volume.hu.astype(np.float32))
    hu += np.random.default_rng(SEED).normal(0, 20, hu.shape).astype(np.float32)
    volume = CTVolume(hu, SPACING)
    masks = {name: fine(mask) for name, mask in phantom.masks.items()}
    values = np.random.default_rng(SEED).random((24, 24, 24))
    affine = volume.affine @ np.diag([*(n / 24 for n in volume.shape), 1])
    return volume, masks, {"attention": HeatMap(values, affine, "attention")}


def straightforward(volume, index):
    """Three slices in a matplotlib figure of the viewer's size, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), dpi=100)
    for axis, ax in enumerate(figure.subplots(1, 3)):
        ax.imshow(volume.hu.take(index % volume.shape[axis], axis), cmap="gray", vmin=-1350, vmax=150)
    figure.savefig(io.BytesIO(), format="png")


def viewer_of(volume, masks, heat_maps, canvas):
    from medctkit.viewers import SliceViewer

    viewer = SliceViewer(volume, masks, heat_maps=heat_maps, canvas=canvas)
    if canvas == "ipympl":
        viewer.canvas.widget.syncing_data_url = False  # as when a page shows it
    return viewer


def steps_of(viewer, plane, steps):
    """Seconds of each step of a slider from the middle on."""
    slider, times = viewer.sliders[plane], []
    slider.value = slider.max // 2
    for step in range(steps):
        started = time.perf_counter()
        slider.value += 1 if step % 2 else -1 - step
        times.append(time.perf_counter() - started)
    return times


def summary(times):
    return {
        "milliseconds": 1e3 * statistics.median(times),
        "slowest_of_ten_milliseconds": 1e3 * float(np.quantile(times, 0.9)),
    }


def bench_steps(volume, masks, heat_maps, steps):
    found, plain_drawing = {}, []
    for canvas in ("plain", "ipympl"):
        viewer, rows = viewer_of(volume, masks, heat_maps, canvas), {}
        for name, mask, heat in (
            ("slices only", False, False), ("with a mask", True, False), ("with a heat map", False, True),
            ("with both", True, True),
        ):  # fmt: skip
            for box in viewer.mask_boxes.values():
                box.value = mask
            viewer.heat_map.value = next(iter(heat_maps)) if heat else "none"
            for plane in viewer.sliders:
                started = time.perf_counter()
                straightforward(volume, len(plain_drawing))
                plain_drawing.append(time.perf_counter() - started)
                rows[f"{name}, {plane}"] = summary(steps_of(viewer, plane, steps))
        viewer.set_volume(volume, masks, heat_maps, other=volume)
        rows["two volumes, heat map, axial"] = summary(steps_of(viewer, "axial", steps))
        found[canvas] = rows
        viewer.close()
    reference = 1e3 * statistics.median(plain_drawing)
    slowest = max(row["milliseconds"] for rows in found.values() for row in rows.values())
    return found | {
        "slowest_step_milliseconds": slowest,
        "matplotlib_milliseconds": reference,
        "times_faster_than_matplotlib": reference / slowest,
    }


def megabytes_now():
    """The memory that this process has now, MB."""
    import psutil

    gc.collect()
    return psutil.Process().memory_info().rss / 1e6


def bench_memory(volume, masks, heat_maps, steps):
    """How much more memory the process has after many steps through all planes than after a few."""
    growth = {}
    for canvas in ("plain", "ipympl"):
        viewer = viewer_of(volume, masks, heat_maps, canvas)
        for box in viewer.mask_boxes.values():
            box.value = True
        sliders = list(viewer.sliders.values())

        def walk(first, last, sliders=sliders):
            for step in range(first, last):
                slider = sliders[step % 3]
                slider.value = step * 7 % slider.max

        walk(0, 60)
        before = megabytes_now()
        walk(60, 60 + steps)
        growth[canvas] = megabytes_now() - before
        viewer.close()
    return {"steps": steps, "growth_mb": growth}


def bench_page(volume, masks, heat_maps):
    """A stack of all axial slices in two windows, with a mask and a heat map, as one HTML file."""
    viewer = viewer_of(volume, masks, heat_maps, "plain")
    for box in viewer.mask_boxes.values():
        box.value = True
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        size = viewer.to_html(Path(folder) / "stack.html").stat().st_size
        return {"slices": volume.shape[0], "megabytes": size / 1e6, "seconds": time.perf_counter() - started}


def bars(found):
    """(met, what) for each bar that the project sets itself."""
    growth = max(found["memory"]["growth_mb"].values())
    slowest, page = found["steps"]["slowest_step_milliseconds"], found["stack_page"]
    return [
        (slowest <= MILLISECONDS, f"a step takes {slowest:.1f} ms in the slowest case, at most {MILLISECONDS}"),
        (growth <= MEGABYTES, f"memory grows by {growth:.1f} MB over {found['memory']['steps']} steps: at most noise"),
        (
            page["megabytes"] <= PAGE_MEGABYTES,
            f"{page['slices']} slices as HTML take {page['megabytes']:.1f} MB, at most {PAGE_MEGABYTES}",
        ),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small volume and few steps: is the program whole?")
    parser.add_argument("--output", type=Path, default=HERE / "viewers.json")
    chosen = parser.parse_args()
    coarse, factor, steps, long = ((16, 32, 32), 1, 4, 12) if chosen.tiny else (COARSE, FACTOR, STEPS, LONG)
    volume, masks, heat_maps = study(coarse, factor)
    found = {
        "steps": bench_steps(volume, masks, heat_maps, steps),
        "memory": bench_memory(volume, masks, heat_maps, long),
        "stack_page": bench_page(volume, masks, heat_maps),
    }
    for name, values in found.items():
        show(name, values)
    met = all_met(bars(found))
    packages, shape = "medctkit numpy pillow matplotlib ipywidgets ipympl", " x ".join(map(str, volume.shape))
    found["made_with"] = made_with("make bench", packages, volume=shape, **this_machine(), seed=SEED)
    write_json(found, chosen.output)
    sys.exit(not met)


if __name__ == "__main__":
    main()
