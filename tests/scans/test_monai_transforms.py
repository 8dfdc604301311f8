"""The MONAI transforms: the package's own pipeline, in MONAI's clothes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scan_files import chest, write_nifti

from medctkit.scans.preprocessing import PreprocessConfig, model_affine, preprocess
from medctkit.scans.volumes import read_volume

monai = pytest.importorskip("monai")
from monai.data import PersistentDataset  # noqa: E402
from monai.transforms import Compose, RandFlip, RandFlipd  # noqa: E402

from medctkit.scans.monai_transforms import Preprocess, Preprocessd, ReadVolume, ReadVolumed  # noqa: E402

SMALL = PreprocessConfig((12.5, 7.7, 8.0), (10, 12, 14))


@pytest.fixture
def scan(tmp_path):
    return write_nifti(tmp_path / "scan.nii.gz", chest())


def test_arrays_are_those_of_the_package(scan):
    seen = Compose([ReadVolume(), Preprocess(SMALL)])(scan)
    volume = read_volume(scan)
    assert torch.equal(seen.as_tensor(), preprocess(volume, SMALL)) and seen.dtype == torch.float32
    np.testing.assert_allclose(seen.affine, model_affine(volume, SMALL))
    assert seen.meta["provenance"] == list(volume.provenance)


def test_dictionaries_keep_their_other_entries(scan):
    pipeline = Compose([ReadVolumed("image", orientation="canonical"), Preprocessd("image", SMALL)])
    item = {"image": str(scan), "report": "A report."}
    seen = pipeline(item)
    assert seen["report"] == "A report." and item["image"] == str(scan)
    assert torch.equal(seen["image"].as_tensor(), preprocess(read_volume(scan).reoriented(), SMALL))
    with pytest.raises(KeyError, match="image"):
        ReadVolumed("image")({"report": "A report."})
    assert Compose([ReadVolumed("image", allow_missing_keys=True)])({"report": "r"}) == {"report": "r"}


def test_readers_arguments_reach_the_reader(scan):
    assert ReadVolume(spacing=(10, 9, 8))(scan).spacing == (10, 9, 8)
    with pytest.raises(RuntimeError, match="applying transform"):
        Compose([ReadVolume()])(scan.parent / "none.nii.gz")


def test_monais_own_transforms_follow(scan):
    seen = Compose([ReadVolume(), Preprocess(SMALL), RandFlip(prob=1.0, spatial_axis=1)])(scan)
    assert torch.equal(seen.as_tensor(), preprocess(read_volume(scan), SMALL).flip(2))
    # MONAI knows where the flipped voxels lie: column 0 is where column 11 was
    np.testing.assert_allclose(
        (seen.affine @ torch.tensor([0, 0, 0, 1.0], dtype=torch.float64)).numpy(),
        model_affine(read_volume(scan), SMALL) @ [0, 11, 0, 1],
    )


def test_monais_persistent_dataset_keeps_what_is_deterministic(scan, tmp_path):
    calls = []

    class Counting(ReadVolume):
        def __call__(self, path):
            calls.append(path)
            return super().__call__(path)

    reading = Counting()

    class Countingd(ReadVolumed):
        def __init__(self):
            super().__init__("image")
            self.transform = reading

    steps = [Countingd(), Preprocessd("image", SMALL), RandFlipd("image", prob=0.5)]
    dataset = PersistentDataset([{"image": str(scan)}], steps, cache_dir=Path(tmp_path) / "monai")
    assert dataset[0]["image"].shape == dataset[0]["image"].shape == (1, *SMALL.shape)
    assert len(calls) == 1
