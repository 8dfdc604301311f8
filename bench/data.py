"""Measure the data path on this machine: pre-processing, the cache, preparing a data set.

`make bench` runs it. Speed and memory are compared within one run, on one phantom of full size (512 x 512 x 300
voxels, made once), and the bars of the project are checked. Writes bench/data.json.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from printing import all_met, made_with, peak_bytes, show, this_machine

from medctkit.common.provenance import write_json

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "runs" / "bench"
PHANTOM, NIFTI = WORK / "phantom.npy", WORK / "phantom.nii.gz"
SHAPE, SPACING = (300, 512, 512), (1.0, 0.7, 0.7)  # d h w, mm
SEED, REPEATS, VOLUMES = 3, 5, 12
CT_RATE, CORES = 50_188, (16, 64, 256)


def make_phantom():
    """A phantom of full size, with the noise of a scanner: what compresses well must not flatter the cache."""
    import nibabel as nib

    from medctkit.phantom.study import generate

    if not PHANTOM.exists():
        print(f"making a phantom of {SHAPE} voxels, once: about a minute", flush=True)
        WORK.mkdir(parents=True, exist_ok=True)
        study = generate(SEED, findings=["Lung nodule", "Pleural effusion"], shape=SHAPE)
        np.save(WORK / "unfinished.npy", study.volume.hu)
        os.replace(WORK / "unfinished.npy", PHANTOM)
    if not NIFTI.exists():
        image = nib.Nifti1Image(np.load(PHANTOM).transpose(2, 1, 0), np.diag([-0.7, -0.7, 1.0, 1.0]))
        nib.save(image, WORK / "unfinished.nii.gz")
        os.replace(WORK / "unfinished.nii.gz", NIFTI)


def volume():
    from medctkit.scans.volumes import CTVolume

    return CTVolume(np.load(PHANTOM).astype(np.float32), SPACING)


def straightforward(scan):
    """The whole volume, in float64, through torch's trilinear interpolation, and then the crop."""
    import torch
    from torch.nn.functional import interpolate, pad

    from medctkit.scans.preprocessing import PreprocessConfig

    config = PreprocessConfig()
    values = torch.from_numpy(scan.hu.astype(np.float64)).clamp(-1000, 1000).transpose(1, 2)
    size = [int(n * scan.spacing[a] / s) for n, a, s in zip(values.shape, (0, 2, 1), config.spacing, strict=True)]
    values = interpolate(values[None, None], size, mode="trilinear", align_corners=False)[0] / 1000
    for axis, target in enumerate(config.shape, start=1):
        n = values.shape[axis]
        values = values.narrow(axis, max(n - target, 0) // 2, min(n, target))
        before = max(target - n, 0) // 2
        values = pad(values, [0, 0] * (3 - axis) + [before, max(target - n, 0) - before], value=-1)
    return values.float()


def alone(name):
    """In a process of its own: the most memory before and after one call."""
    from medctkit.scans.preprocessing import preprocess

    call, scan = {"straightforward": straightforward, "medctkit": preprocess}[name], volume()
    before = peak_bytes() / 1e6
    call(scan)
    after = peak_bytes() / 1e6
    print(json.dumps({"peak_mb": after, "peak_beside_the_volume_mb": after - before}))


def in_child(name):
    done = subprocess.run([sys.executable, __file__, name], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def bench_preprocessing():
    from medctkit.scans.preprocessing import preprocess

    calls = {"straightforward": straightforward, "medctkit": preprocess}
    found, scan, times = {name: in_child(name) for name in calls}, volume(), {name: [] for name in calls}
    for _ in range(REPEATS):  # in turns, so that whatever else the machine does meets both
        for name, call in calls.items():
            times[name].append(best_of(lambda call=call: call(scan), 1)[0])
    for name, seconds in times.items():
        found[name]["seconds"] = min(seconds)
    slow, fast = found["straightforward"], found["medctkit"]
    memory = "peak_beside_the_volume_mb"
    return found | {
        "times_faster": slow["seconds"] / fast["seconds"],
        "share_of_peak_memory": fast[memory] / slow[memory],
        "largest_difference": float((preprocess(scan) - straightforward(scan)).abs().max()),
    }


def best_of(call, repeats=REPEATS):
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - started)
    return min(times), result


def bench_cache():
    import torch

    from medctkit.cohort.cache import VolumeCache
    from medctkit.scans.preprocessing import preprocess
    from medctkit.scans.volumes import read_volume

    torch.set_num_threads(1)  # as one of several data-loading processes
    again, exact = best_of(lambda: preprocess(read_volume(NIFTI)), 2)
    cache = VolumeCache(WORK / "cache")
    saving, size = best_of(lambda: cache.save("bench", exact), 3)
    loading, found = best_of(lambda: cache.load("bench"))
    return {
        "read_and_preprocess_seconds": again,
        "save_seconds": saving,
        "load_seconds": loading,
        "times_faster": again / loading,
        "load_megavoxels_per_second": exact.numel() / loading / 1e6,
        "megabytes": size / 1e6,
        "share_of_float32": size / (4 * exact.numel()),
        "bytes_per_voxel": size / exact.numel(),
        "megabytes_of_nifti": NIFTI.stat().st_size / 1e6,
        "largest_error": float((found - exact).abs().max()),
    }


def bench_prepare():
    import shutil

    from medctkit.cohort.prepare import prepare
    from medctkit.scans.preprocessing import PreprocessConfig

    shutil.rmtree(WORK / "prepared", ignore_errors=True)
    spacings = [{"spacing_d": 1.0 + i / 1e3, "spacing_h": 0.7, "spacing_w": 0.7} for i in range(VOLUMES)]
    rows = [{"study": f"bench_{i}", "path": str(NIFTI), **spacing} for i, spacing in enumerate(spacings)]
    done = prepare(rows, PreprocessConfig(), WORK / "prepared")
    if done.failures:
        raise SystemExit(f"preparing failed: {done.failures}")
    hours = {cores: CT_RATE * done.seconds_per_volume / cores / 3600 for cores in CORES}
    return {
        "volumes": done.made,
        "processes": min(os.cpu_count(), VOLUMES),
        "seconds_of_one_core_per_volume": done.seconds_per_volume,
        "seconds_with_the_start_of_the_cluster": done.seconds,
        "megabytes_per_volume": done.bytes / done.made / 1e6,
        "all_of_ct_rate": {
            "volumes": CT_RATE,
            "terabytes": CT_RATE * done.bytes / done.made / 1e12,
            **{f"hours_on_{cores}_cores": value for cores, value in hours.items()},
        },
    }


def bars(found):
    """(met, what) for each bar that the project sets itself."""
    preprocessing, cache = found["preprocessing"], found["cache"]
    return [
        (preprocessing["times_faster"] >= 3, "pre-processing at least 3 times faster than the straightforward way"),
        (preprocessing["share_of_peak_memory"] <= 1 / 3, "in at most a third of its peak memory"),
        (preprocessing["largest_difference"] <= 1e-3, "equal to 1e-3"),
        (cache["largest_error"] <= 1e-4, "the cache changes values by at most 1e-4"),
        (cache["times_faster"] >= 1, "reading it is faster than preparing again"),
    ]


def main():
    make_phantom()
    found = {}
    for name, bench in {"preprocessing": bench_preprocessing, "cache": bench_cache, "prepare": bench_prepare}.items():
        found[name] = bench()
        show(name, found[name])
    met = all_met(bars(found))
    packages = "medctkit torch numpy nibabel blosc2 distributed"
    found["made_with"] = made_with("make bench", packages, **this_machine(), seed=SEED)
    write_json(found, HERE / "data.json")
    sys.exit(not met)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        alone(sys.argv[1])
    else:
        main()
