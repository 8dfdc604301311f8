"""Pages to judge phantoms by."""

import nibabel
import numpy as np
from PIL import Image
from typer.testing import CliRunner

from medctkit.cli import app
from medctkit.phantom.study import generate
from medctkit.viewers import gallery


def picture(path):
    with Image.open(path) as opened:
        return np.array(opened.convert("L"))


def test_a_page_for_each_finding_and_one_beside_a_scan(tmp_path, monkeypatch):
    scan = tmp_path / "scan.nii.gz"
    hu = generate(2, findings=[], shape=(20, 30, 30)).volume.hu
    nibabel.save(nibabel.Nifti1Image(np.asarray(hu).transpose(2, 1, 0).copy(), np.diag([8.0, 8, 12, 1])), scan)
    monkeypatch.setattr(gallery, "SHAPE", (16, 32, 32))
    monkeypatch.setattr(gallery, "CT_RATE", ("Lung nodule", "Pleural effusion"))
    result = CliRunner().invoke(app, ["gallery", str(tmp_path / "pages"), "--real", str(scan)])
    assert result.exit_code == 0, result.output
    pages = {path.name: picture(path) for path in (tmp_path / "pages").iterdir()}
    assert set(pages) == {"lung_nodule.png", "pleural_effusion.png", "beside_real.png"}
    assert all(page.shape[0] == 608 and page.shape[1] > 1200 for page in pages.values())
    assert len(np.unique(pages["lung_nodule.png"])) > 50  # something is drawn
