"""The HU guard: are these values the Hounsfield units of a chest?

Nothing fails when a model gets values that are off by 1024: it just sees air. The trap is real: the files of CT-RATE
version 1 hold stored values, those of version 2 hold HU already, and rescaling them once more makes a wall of -1 of
the chest. So every scan is checked by what any chest shows: gas, soft tissue at its place, nothing below gas.
"""

import numpy as np

HU_RANGE = (-8192, 32767)  # scanners fill what they did not see with values down to -8192; metal reaches 30,000
MODEL_FLOOR = -1000  # HU that becomes -1, the lowest value a model sees

_GAS, _LEAST_GAS = (-1200, -600), 0.005  # lungs, windpipe, the air around the patient
_TISSUE, _LEAST_TISSUE = (-300, 300), 0.03
# Noise and streaks go below gas, but not with a tenth of the scan. The value outside the reconstruction
# circle (-2000, -3024, -8192) does not count: it is one and the same everywhere.
_MOST_BELOW_GAS = 0.1
# Of what is denser than lung, most is fat, muscle or blood (with contrast medium: up to 500); measured on real
# scans and phantoms: at least 0.68. Where soft tissue was shifted into the lung's place: at most 0.33.
_DENSER_THAN_LUNG, _SOFT, _LEAST_SOFT = -450, (-200, 500), 0.4
_MOST_OTHERS = 0.001  # of the voxels, where all the rest has one value
_USUAL_INTERCEPTS = (-1024.0, -1000.0, -8192.0)
_SAMPLE = 1_000_000
_AIR = -1024  # what most scanners write outside of the reconstruction circle
_LEAST_OUTSIDE, _MOST_OUTSIDE = 0.01, 0.75  # a circle leaves out 21 %, one of 500 mm in a picture of 800 mm 69 %
_LEAVE_OUT = "leave out rescale_slope and rescale_intercept if the file is in HU already"


def fill_outside(hu: np.ndarray) -> list[str]:
    """Put air, in place, where a file marks what was not scanned with NaN or one value below all HU; returns notes.

    What was scanned is a disc, or a box that lies askew, so that along each axis it is one piece; a hole in a patient
    is left as it is, for `check_hu` to refuse.
    """
    notes = []
    for value in (np.nan, None):
        value = hu.min() if value is None else value  # NaN, where there is a NaN
        outside = np.isnan(hu) if np.isnan(value) else hu == value if value < HU_RANGE[0] else None
        if outside is None or not _LEAST_OUTSIDE <= outside.mean() <= _MOST_OUTSIDE:
            continue
        edge = np.ones((), bool)
        starts = (np.diff(outside, axis=axis, prepend=edge) & ~outside for axis in range(hu.ndim))
        if all(np.count_nonzero(start, axis).max() <= 1 for axis, start in enumerate(starts)):
            hu[outside] = _AIR
            notes.append(f"{outside.mean():.1%} of the voxels, not scanned and marked {value:g}, taken for {_AIR} HU")
    return notes


def check_hu(hu: np.ndarray, rescale: tuple[float, float] = (1.0, 0.0)) -> None:
    """Refuse values that can't be the Hounsfield units of a chest.

    Stored values that nobody rescaled lack the gas; in values rescaled twice the lungs lie below gas and the soft
    tissue where lung should be. The rules look at about a million voxels.

    Args:
        hu: values taken for HU, any shape.
        rescale: slope and intercept that the caller asked for and that are in `hu` already.

    Raises:
        ValueError: not finite, constant or nearly so, implausibly low or high, no gas, no soft tissue at its place,
            much below gas. The message says what would make the values plausible, or that `rescale` does the damage.
    """
    limits = np.array([hu.min(), hu.max()], dtype=float)
    if not np.isfinite(limits).all():
        raise ValueError("NaN or infinite values: every voxel needs a value in HU; repair or drop this scan")
    if limits[0] == limits[1]:
        raise ValueError(f"every voxel is {limits[0]:g}: there is no picture in it")
    # an odd stride, so that the sample comes from all columns
    values = hu.reshape(-1)[:: max(1, hu.size // _SAMPLE) | 1]
    problem = _problem(values, limits)
    if problem is None:
        return
    slope, intercept = rescale
    stored, limits = (values - intercept) / slope, (limits - intercept) / slope
    if _problem(stored, limits) is None:
        before, after = (f"median {np.median(a):g}; {np.mean(a <= MODEL_FLOOR):.0%}" for a in (stored, values))
        raise ValueError(
            f"rescaled twice: the file is in HU already ({before} of the voxels at or below {MODEL_FLOOR} HU, which a "
            f"model sees as -1), and value * {slope:g} + {intercept:g} spoils it ({after}). Leave out "
            "rescale_slope and rescale_intercept: in CT-RATE they are meant for version 1, not for version 2 "
            "(folders ending in _fixed)"
        )
    fitting = [f"{i:g}" for i in _USUAL_INTERCEPTS if _problem(stored + i, limits + i) is None]
    undoing = [-i for i in _USUAL_INTERCEPTS if _problem(stored - i, limits - i) is None]
    if fitting:
        problem += f". With a rescale_intercept of {' or '.join(fitting)} these values would be plausible"
        problem += "; the scan's own metadata say which it is" if len(fitting) > 1 else ""
    elif undoing:
        problem += (
            f". With {undoing[0]:g} added they would be plausible: whoever wrote this file subtracted it from values "
            "in HU; get the file from before that step"
        )
    raise ValueError(problem)


def _problem(values: np.ndarray, limits: np.ndarray) -> str | None:
    """What keeps values (n,) with these limits (lowest, highest) from being a chest in HU; None: nothing."""
    low, high = limits
    median = np.median(values)
    others = np.count_nonzero(values != median)
    if others <= values.size * _MOST_OTHERS:
        return f"all but {others} of {values.size} voxels are {median:g}: there is next to no picture in it"
    scanned = values
    if np.mean(values < _GAS[0]) > _MOST_BELOW_GAS:
        below, counts = np.unique(values[values < _GAS[0]], return_counts=True)
        scanned = values[values != below[counts.argmax()]]  # without the outside of the reconstruction circle
    below_gas = np.mean(scanned < _GAS[0])
    gas = np.mean((scanned >= _GAS[0]) & (scanned < _GAS[1]))
    tissue = np.mean((scanned >= _TISSUE[0]) & (scanned <= _TISSUE[1]))
    dense = scanned[scanned > _DENSER_THAN_LUNG]
    soft = np.count_nonzero((dense >= _SOFT[0]) & (dense <= _SOFT[1])) / max(dense.size, 1)
    if low < HU_RANGE[0] or high > HU_RANGE[1]:
        why = f"HU lie in {HU_RANGE}; check rescale_slope and rescale_intercept, and {_LEAVE_OUT}"
    elif below_gas > _MOST_BELOW_GAS:
        why = f"Nothing in a chest is below gas, and {below_gas:.0%} of this are: rescaled twice; {_LEAVE_OUT}"
    elif gas < _LEAST_GAS:
        why = (
            "A chest has air: these look like stored or normalised values; pass the rescale_slope and "
            "rescale_intercept of this scan (often 1 and -1024)"
        )
    elif tissue < _LEAST_TISSUE:
        why = f"A chest has soft tissue: rescaled twice, or a scan of something else; {_LEAVE_OUT}"
    elif soft < _LEAST_SOFT:
        why = (
            f"Of what is denser than lung most is fat, muscle and blood {_SOFT}, here only {soft:.0%}: stored values, "
            "or rescaled with a wrong slope or intercept; check rescale_slope and rescale_intercept"
        )
    else:
        return None
    found = f"values {low:g} to {high:g}, median {median:g}, {gas:.1%} gas {_GAS}, {tissue:.1%} soft tissue {_TISSUE}"
    return f"not in HU: {found}. {why}"
