"""One call from nothing to 18 scores and a picture."""

import io
import re

import numpy as np
import pytest
from IPython.core.formatters import PNGFormatter
from PIL import Image
from scan_files import to_nifti

from medctkit.findings import FINDINGS, PREVALENCE
from medctkit.model.base_model import load_mini_base
from medctkit.phantom.study import generate
from medctkit.quickstart import classify
from medctkit.scans.preprocessing import preprocess
from medctkit.scans.volumes import CTVolume
from medctkit.zero_shot.classifier import ZeroShotClassifier


@pytest.fixture(scope="module")
def study():
    return generate(5, findings=["Pleural effusion", "Emphysema"])


@pytest.fixture(scope="module")
def mini():
    return load_mini_base()


def test_one_call_without_arguments_gives_18_scores_and_a_picture():
    result = classify()
    assert tuple(result.table["finding"]) == FINDINGS
    assert result.table["score"].between(0, 1).all() and result.table["score"].nunique() == 18
    assert set(result.table["truth"]) == {"present", "absent"}
    assert result.title.startswith("phantom, seed 33,") and "2.3 M parameters in use" in result.title
    # as IPython shows it
    data, metadata = PNGFormatter()(result)
    picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert picture.shape[1] == 1200 and picture.std() > 20
    assert result.table["place"].between(0, 100).all()
    names = [label.get_text() for label in result.figure().axes[-1].get_yticklabels()]
    ordered = result.table.sort_values("place", ascending=False)
    assert names == [f"{row.finding}  {row.place:>3.0f}" for row in ordered.itertuples()]
    best = result.table.loc[result.table["place"].idxmax()]
    assert f"{best['finding']} {best['score']:.2f} ({best['truth']})" in metadata["alt"]


def test_scores_are_those_of_the_classifier_for_a_phantom_with_its_truth_and_for_its_file(study, mini, tmp_path):
    result = classify(study, mini)
    table = result.table.set_index("finding")
    pixels = preprocess(study.volume, mini.preprocess_config)[None]
    expected = ZeroShotClassifier(mini.model, mini.tokenizer).scores(pixels)[0]
    np.testing.assert_allclose(table["score"], expected, atol=1e-6)
    assert list(table["usual"]) == [PREVALENCE[name] for name in FINDINGS]
    assert set(table.index[table["truth"] == "present"]) == {"Pleural effusion", "Emphysema"}
    assert "Pleural effusion" in repr(result)
    path = tmp_path / "scan.nii.gz"
    to_nifti(path, study.volume)
    result = classify(path, mini)
    np.testing.assert_allclose(result.table["score"], table["score"], atol=1e-4)
    assert result.title.startswith("read from NIfTI file scan.nii.gz")


def test_labels_that_are_not_known_are_called_unknown(study, mini):
    table = classify(study.volume, mini, labels={"Emphysema": 1.0, "Atelectasis": 0, "Lung nodule": np.nan}).table
    names = ["Emphysema", "Atelectasis", "Lung nodule", "Consolidation"]
    assert table.set_index("finding").loc[names, "truth"].to_list() == ["present", "absent", "unknown", "unknown"]


def test_a_scan_that_is_no_phantom_needs_a_model_that_knows_patients_and_an_array_is_no_scan(study):
    scan = CTVolume(study.volume.hu, study.volume.spacing, provenance=("read from NIfTI file scan.nii.gz",))
    with pytest.raises(ValueError, match=re.escape("scan.nii.gz: the mini model knows phantoms only") + ".*load_base"):
        classify(scan)
    with pytest.raises(TypeError, match="expected a CT volume, a phantom study or the path of a scan, got ndarray"):
        classify(np.zeros((8, 8, 8)))
