"""The dataset: items, cache, batches."""

from pathlib import Path

import pytest
import torch
from scan_files import MINI, chest, write_nifti
from torch.utils.data import DataLoader

from medctkit.cohort.cache import STEPS, VolumeCache, content_of, digest_of
from medctkit.cohort.dataset import CTReportDataset, collate, prepared_dir
from medctkit.cohort.manifest import load_manifest, study_from_row
from medctkit.cohort.prepare import prepare
from medctkit.cohort.selection import study_names
from medctkit.findings import FINDINGS
from medctkit.model.base_model import load_mini_base
from medctkit.scans.preprocessing import PreprocessConfig, preprocess

SMALL = PreprocessConfig((30.0, 20.0, 20.0), (12, 18, 18), antialias=True)


@pytest.fixture(scope="module")
def rows():
    table = load_manifest(Path(__file__).resolve().parents[2] / "data_manifest.csv")
    return table[table["hospital"] == "target"].head(5)


def test_items_hold_volume_report_and_labels(rows):
    item = CTReportDataset(rows, MINI)[2]
    row = rows.iloc[2]
    assert item["pixel_values"].shape == (1, *MINI.shape) and item["pixel_values"].dtype == torch.float32
    assert -1 <= item["pixel_values"].min() and item["pixel_values"].max() <= 1
    assert item["report"] == row["report"] and item["study"] == row["study"] and item["patient"] == row["patient"]
    assert item["labels"].tolist() == [float(row[f]) for f in FINDINGS]


def test_the_cache_changes_nothing_a_model_could_see(rows, tmp_path):
    fresh, kept = CTReportDataset(rows, MINI), CTReportDataset(rows, MINI, tmp_path)
    kept.prepare(workers=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(rows)
    for i in range(len(rows)):
        exact = preprocess(study_from_row(rows.iloc[i]).volume, MINI)
        assert torch.equal(fresh[i]["pixel_values"], exact)
        assert (kept[i]["pixel_values"] - exact).abs().max() <= 0.5 / STEPS
    loaded = CTReportDataset(rows, MINI, tmp_path).in_memory()
    assert torch.equal(loaded[1]["pixel_values"], kept[1]["pixel_values"])


def test_prepared_files_are_read_again_damaged_ones_made_again(rows, tmp_path):
    dataset = CTReportDataset(rows.head(2), MINI, tmp_path)
    first = dataset[0]["pixel_values"]
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    assert torch.equal(dataset[0]["pixel_values"], first) and file.stat().st_mtime_ns == stamp
    content = file.read_bytes()
    middle = len(content) // 2
    for damaged in (content[:middle], content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :], b""):
        file.write_bytes(damaged)
        assert torch.equal(dataset[0]["pixel_values"], first)
        assert file.read_bytes() == content


def test_batches_are_padded_to_their_longest_report(rows):
    tokenizer = load_mini_base().tokenizer
    dataset = CTReportDataset(rows, MINI)
    items = [dataset[i] for i in range(3)]
    batch = collate(tokenizer, max_length=128)(items)
    assert batch["pixel_values"].shape == (3, 1, *MINI.shape) and batch["labels"].shape == (3, 18)
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape[1] == lengths.max() <= 128
    assert tokenizer.unk_token_id not in batch["input_ids"]
    assert batch["study"] == [i["study"] for i in items]
    assert collate(tokenizer, max_length=9)(items)["input_ids"].shape[1] == 9


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_may_be_spawned(rows, tmp_path, method):
    """As on macOS and Windows, and on Linux from Python 3.14 on."""
    dataset, to_batch = CTReportDataset(rows.head(2), MINI, tmp_path), collate(load_mini_base().tokenizer)
    loader = DataLoader(dataset, 2, collate_fn=to_batch, num_workers=1, multiprocessing_context=method)
    (batch,) = loader
    expected = to_batch([dataset[0], dataset[1]])
    assert batch["study"] == expected["study"] and torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert torch.equal(batch["report_id"], expected["report_id"])


def test_the_home_folder_is_found(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prepared").mkdir()
    assert (
        prepared_dir("~/m.csv", "out") == tmp_path / "prepared"
        and prepared_dir("m.csv", "~/o", "~/c") == tmp_path / "c"
    )
    assert VolumeCache("~/c").folder == tmp_path / "c"
    write_nifti(tmp_path / "scan.nii", chest())
    row = rows.head(1).assign(path="~/scan.nii", checksum="", seed=None).to_dict("records")[0]
    assert prepare([row], SMALL, "~/c", workers=1).made == 1 and len(list((tmp_path / "c").glob("*.safetensors"))) == 1
    assert content_of(row) == digest_of(tmp_path / "scan.nii")
    (tmp_path / "names.txt").write_text("valid_1\n")
    assert study_names(["~/names.txt"]) == ["valid_1"]


def test_studies_that_cannot_be_prepared_are_listed(rows, tmp_path):
    table = rows.head(3).assign(path=["", str(tmp_path / "none.nii"), ""], checksum=lambda t: t["checksum"])
    table.loc[table.index[1], "checksum"] = ""
    with pytest.raises(ValueError, match=r"1 of 3 studies could not be prepared:\n  target_.*there is no such file"):
        CTReportDataset(table, MINI, tmp_path / "cache").prepare(workers=1)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


def test_bad_input_is_refused(rows):
    with pytest.raises(ValueError, match="no rows"):
        CTReportDataset(rows.head(0), MINI)
    with pytest.raises(ValueError, match="needs a cache_dir"):
        CTReportDataset(rows, MINI).prepare()
