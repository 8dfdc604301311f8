"""What is right and what is wrong in the exercises of notebooks 00 and 01."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from medctkit.course.exercises import Wrong, checks, expect, number
from medctkit.findings import FINDINGS
from medctkit.phantom.study import generate
from medctkit.viewers.drawing.rendering import window

FAT, VESSEL = -100, 200  # HU: what exercise 01.1 wants black, and what white
_STORED_AT_ZERO = 1312  # stored value of 0 HU in exercise 01.3: neither of the usual 1024 and 8192


@checks("00.1")
def highest_score(answer: str, table: pd.DataFrame) -> str:
    """The finding with the highest score in the table of a `Classified`."""
    if not isinstance(answer, str):
        raise Wrong(f"Give the name of the finding as a text, such as {FINDINGS[0]!r}; got {answer!r:.80}.")
    rows = table.set_index("finding")
    if answer not in rows.index:
        raise Wrong(f"{answer!r:.60} is none of the 18 findings; copy the name from `result.table`.")
    best, score = rows["score"].idxmax(), rows["score"].max()
    if answer != best:
        here = rows.loc[answer, "score"]
        first = "place" in rows and rows["place"].idxmax() == answer
        raise Wrong(
            f"{answer} has a score of {here:.2f}, and {(rows['score'] > here).sum()} other findings have a higher one. "
            + "Its bar is the longest because its *place* is the highest. " * first
            + "`idxmax` gives the label of the row with the highest value."
        )
    truth = {"present": "It is there.", "absent": "It isn't there: a high score alone is no finding."}
    return f"{best}, {score:.2f}. {truth.get(rows.loc[best, 'truth'], 'Whether it is there is unknown.')}"


@checks("00.2")
def auroc_of_pairs(auroc: Callable[[np.ndarray, np.ndarray], float]) -> str:
    """The share of pairs, one study with and one without the finding, that scores put in the right order."""

    def share(present: np.ndarray, absent: np.ndarray) -> float:
        return number(auroc(present, absent), "the share of pairs in the right order")

    found = share(np.array([0.9, 0.8]), np.array([0.3, 0.2, 0.1]))
    slips = {
        6: "Where all 6 pairs are in the right order you give 6: divide by the number of pairs.",
        0: "Where every study with the finding scores higher than all without you give 0: is the order swapped?",
    }
    otherwise = (
        "With scores 0.9, 0.8 (present) and 0.3, 0.2, 0.1 (absent) all 6 pairs are in the right order, so the share is "
        f"1; you give {found:g}. Compare each study of the one group with each of the other."
    )
    expect(found, 1, slips, otherwise)
    tied = share(np.full(2, 0.5), np.full(3, 0.5))
    expect(tied, 0.5, {}, f"Where all scores are equal you give {tied:g}: a pair with equal scores counts half.")
    rng = np.random.default_rng(0)
    present, absent = rng.normal(0.5, 1, 40).round(1), rng.normal(0, 1, 60).round(1)
    found, right = share(present, absent), roc_auc_score([1] * 40 + [0] * 60, [*present, *absent])
    otherwise = f"With 40 scores and 60 scores drawn at random you give {found:.4f}; scikit-learn gives {right:.4f}."
    expect(found, right, {}, otherwise, tolerance=1e-9)
    return (
        "That is the area under the ROC curve (AUROC), to the last digit what scikit-learn computes. Guessing gives "
        "0.5, however rare the finding is."
    )


@checks("01.1")
def window_from_fat_to_vessel(answer: tuple[float, float]) -> str:
    """A window (centre, width) in which -100 HU is just black and 200 HU is just white."""
    if np.shape(answer) != (2,):
        raise Wrong(f"Expected a pair (centre, width) in HU; got {answer!r:.80}.")
    centre, width = (number(one, "a number of HU") for one in answer)
    if (centre, width) == (FAT, VESSEL):
        raise Wrong(f"({FAT}, {VESSEL}) are the two ends; a window is given as (centre, width).")
    if width <= 0:
        raise Wrong(f"The width is {width:g} HU; it is the distance from black to white, above 0.")
    low, high = centre - width / 2, centre + width / 2
    if (low, high) != (FAT, VESSEL):
        grey_of_fat, grey_of_vessel = window([FAT, VESSEL], centre, width)
        raise Wrong(
            f"Your window is black up to {low:g} HU and white from {high:g} HU: fat has grey value {grey_of_fat:.2f}, "
            f"the vessel {grey_of_vessel:.2f}. Black should end at {FAT} HU and white begin at {VESSEL} HU; the centre "
            "lies in the middle between them, and the width is the whole distance."
        )
    return (
        "Muscle (50 HU) is now in the middle of the grey scale. Radiologists look at the mediastinum through nearly "
        "this window, of centre 40 and width 400."
    )


@checks("01.2")
def model_values(to_model: Callable[[np.ndarray], np.ndarray]) -> str:
    """HU to the values a model sees: clipped to [-1000, 1000], then divided by 1000."""
    hu = np.array([-2000, -1024, -1000, -500, 0, 50, 1000, 3071], dtype=np.int16)
    given = hu.copy()
    found = np.asarray(to_model(given))
    if found.shape != hu.shape or found.dtype.kind not in "iuf":
        raise Wrong(f"Eight values in HU should give eight numbers; got shape {found.shape}, type {found.dtype}.")
    if (given != hu).any():
        raise Wrong("Your function changes the scan that it is given: work on a copy, as `np.clip` does.")
    clipped = hu.clip(-1000, 1000)
    right = clipped / 1000
    slips = {
        tuple(hu / 1000): "-2000 HU becomes -2 and 3071 HU becomes 3.071: the values are not clipped to [-1000, 1000].",
        tuple(clipped): "The values are clipped, but still in HU: divide by 1000.",
    }
    worst = int(np.abs(found - right).argmax())
    otherwise = f"{hu[worst]} HU becomes {found[worst]:g}; expected {right[worst]:g}."
    if found.min() >= 0 and found.max() <= 1:
        otherwise = "Your values lie in [0, 1]. CT-CLIP was trained on values in [-1, 1], with water at 0."
    expect(found, right, slips, otherwise)
    return (
        "Air is -1, water 0, dense bone 1. What lies beyond, metal or the outside of the scan circle, is cut off, so "
        "that it cannot outweigh the patient."
    )


def stored_values() -> np.ndarray:
    """A phantom (d, h, w) as a scanner might store it: HU = stored value + intercept, with an unusual intercept."""
    return generate(21, findings=()).volume.hu.astype(np.int32) + _STORED_AT_ZERO


@checks("01.3")
def intercept_of_stored_values(intercept: float) -> str:
    """What has to be added to `stored_values()` to get HU."""
    found = number(intercept, "the intercept in HU")
    air = float(np.median(stored_values()[:, :4])) + found
    if abs(found + _STORED_AT_ZERO) <= 15:
        return "Air is -1000 HU on every scanner: a scan carries its own yardstick, and `read_volume` looks at it too."
    if abs(found - _STORED_AT_ZERO) <= 15:
        raise Wrong(f"The size is right, the sign is not: HU = value + intercept would put air at {air:.0f} HU.")
    if abs(air) <= 15:
        raise Wrong("With your intercept the air around the patient lies near 0 HU. 0 is water; what is air?")
    raise Wrong(
        f"With your intercept the air around the patient lies at {air:.0f} HU. Read the stored value of air off the "
        "scan (its front rows, `stored[:, :4]`, are air), and think of what air is in HU."
    )


@checks("01.4")
def patients_on_both_sides(answer: int, cohort: pd.DataFrame, in_test: np.ndarray) -> str:
    """How many patients have scans on both sides; `in_test`, shape (scans,), was drawn for every scan by itself."""
    found = number(answer, "how many patients are on both sides")
    sides = cohort.assign(side=np.asarray(in_test)).groupby("patient")["side"].agg(["nunique", "size"])
    both, patients = sides["nunique"] == 2, len(sides)
    slips = {
        sides.loc[both, "size"].sum(): f"{found:,.0f} is the number of their scans; count each patient once.",
        (sides["size"] > 1).sum(): f"{found:,.0f} patients have several scans; only some of them lie on both sides.",
    }
    otherwise = (
        f"You count {found:,.0f} of {patients:,}. Group by patient: on how many of the two sides has each scans?"
    )
    if 0 < found < 1:
        otherwise = "Expected a number of patients, not a share of them."
    expect(found, both.sum(), slips, otherwise, tolerance=0)
    return (
        f"{found:,.0f} of {patients:,} patients would be trained on and tested on. A model that recognises people "
        "would look as if it recognised diseases, and the splits of the manifest go by patient for that."
    )
