"""The MONAI transforms: the package's own pipeline, in MONAI's clothes."""

import numpy as np
import pytest
import torch
from scan_files import chest, write_nifti

from medctkit.scans.preprocessing import PreprocessConfig, model_affine, preprocess
from medctkit.scans.volumes import read_volume

monai = pytest.importorskip("monai")
from monai.data import PersistentDataset, list_data_collate  # noqa: E402
from monai.transforms import Compose, RandFlipd  # noqa: E402

from medctkit.scans.monai_transforms import Preprocessd, ReadVolumed  # noqa: E402

SMALL = PreprocessConfig((12.5, 7.7, 8.0), (10, 12, 14))


@pytest.fixture
def item(tmp_path):
    return {"image": str(write_nifti(tmp_path / "scan.nii.gz", chest())), "report": "A report."}


def test_items_are_those_of_the_package(item):
    before = dict(item)
    found = Compose([ReadVolumed("image", orientation="canonical"), Preprocessd("image", SMALL)])(item)
    seen, volume = found["image"], read_volume(item["image"], orientation="canonical")
    assert torch.equal(seen.as_tensor(), preprocess(volume, SMALL)) and seen.dtype == torch.float32
    np.testing.assert_allclose(seen.affine, model_affine(volume, SMALL))
    assert seen.meta["provenance"] == list(volume.provenance)
    assert found["report"] == "A report." and item == before


def test_missing_keys_and_files(item, tmp_path):
    with pytest.raises(KeyError, match="image"):
        ReadVolumed("image")({"report": "A report."})
    assert Compose([ReadVolumed("image", allow_missing_keys=True)])({"report": "r"}) == {"report": "r"}
    with pytest.raises(RuntimeError, match="applying transform"):
        Compose([ReadVolumed("image")])({"image": tmp_path / "none.nii.gz"})


def test_monais_own_transforms_follow(item):
    seen = Compose([ReadVolumed("image"), Preprocessd("image", SMALL), RandFlipd("image", 1.0, 1)])(item)["image"]
    volume = read_volume(item["image"])
    assert torch.equal(seen.as_tensor(), preprocess(volume, SMALL).flip(2))
    # MONAI knows where the flipped voxels lie: column 0 is where column 11 was
    corner = seen.affine @ torch.tensor([0, 0, 0, 1.0], dtype=torch.float64)
    np.testing.assert_allclose(corner.numpy(), model_affine(volume, SMALL) @ [0, 11, 0, 1])


def test_monais_persistent_dataset_keeps_what_is_deterministic(item, tmp_path, monkeypatch):
    calls = []

    def counted(path):
        calls.append(path)
        return read_volume(path)

    monkeypatch.setattr("medctkit.scans.monai_transforms.read_volume", counted)
    steps = [ReadVolumed("image"), Preprocessd("image", SMALL)]
    for keep in ({}, {"track_meta": True, "weights_only": False}):
        data = PersistentDataset([item], steps, cache_dir=tmp_path / str(len(keep)), **keep)
        new, kept = data[0]["image"], data[0]["image"]
        assert torch.equal(torch.as_tensor(new), torch.as_tensor(kept)) and new.shape == (1, *SMALL.shape)
        if keep:  # as the module says
            assert torch.equal(kept.affine, new.affine) and kept.meta["provenance"] == new.meta["provenance"]
            assert list_data_collate([{"image": new}, {"image": kept}])["image"].shape == (2, *new.shape)
    assert len(calls) == 2
