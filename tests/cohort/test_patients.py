"""Sex, age band, scanner and kernel of studies: of phantoms those that were drawn, of real scans the manifest's."""

import numpy as np
import pytest

from medctkit.cohort.patients import characteristics
from medctkit.phantom.study import generate

PHANTOM = {"patient": "p", "hospital": "target", "reconstruction": 1, "path": float("nan")}


def test_a_phantoms_characteristics_are_those_that_were_drawn():
    drawn = generate(5, "target", [], (8, 8, 8), patient="p")
    sex, age, scanner, kernel = characteristics([PHANTOM, PHANTOM | {"reconstruction": 0}]).iloc[0]
    low = int("".join(filter(str.isdigit, age))[:2]) if age[0].isdigit() else 0
    assert sex == drawn.sex and low <= drawn.age and (scanner, kernel) == ("phantom, target", "smooth")


@pytest.mark.parametrize(
    ("years", "band"), [(49, "under 50"), (50, "50 to 64"), (92.0, "80 and over"), (None, ""), ("064Y", "")]
)
def test_real_scans_have_what_their_columns_say_and_nothing_is_made_up(years, band):
    row = {"path": "scan.nii.gz", "PatientSex": " F", "PatientAge": years, "Manufacturer": "GE"}
    assert characteristics([row]).iloc[0].tolist() == ["F", band, "GE", ""]


def test_rare_kernels_stand_together():
    names = [f"k{i}" for i in np.repeat(np.arange(9), np.arange(9, 0, -1))]
    table = characteristics([{"path": "x", "ConvolutionKernel": name} for name in names])
    assert table["kernel"].value_counts()["other"] == 3 + 2 + 1 and table["kernel"].nunique() == 7
    assert (table["sex"] == "").all()
