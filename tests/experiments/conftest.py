"""Studies for all experiments, prepared once: a few phantoms of the target hospital, and noise of both."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from medctkit.cohort.cache import VolumeCache, content_of, key_of, prepare_row
from medctkit.cohort.manifest import load_manifest, write_manifest
from medctkit.model.base_model import load_mini_base


def _manifest(folder, counts):
    """The first studies of each hospital and split."""
    table = load_manifest(Path(__file__).parents[2] / "data_manifest.csv").groupby(["hospital", "split"])
    rows = pd.concat([table.get_group(part).head(n) for part, n in counts.items()])
    write_manifest(rows, folder / "manifest.csv")
    return rows.to_dict("records")


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A manifest of few studies, with their prepared volumes beside it; one is left to be prepared."""
    folder = tmp_path_factory.mktemp("few")
    rows = _manifest(folder, {("target", "train"): 8, ("target", "valid"): 12, ("target", "test"): 24})
    config, cache = load_mini_base().preprocess_config, VolumeCache(folder / "prepared")
    for row in rows[:-1]:
        prepare_row(row, content_of(row), config, cache)
    return folder / "manifest.csv"


@pytest.fixture(scope="session")
def toy_cohort(tmp_path_factory):
    """What a comparison needs, a manifest of a few studies, with noise in place of their prepared volumes."""
    folder = tmp_path_factory.mktemp("cohort")
    counts = {("target", "train"): 12, ("target", "valid"): 8, ("target", "test"): 8, ("source", "test"): 6}
    config, cache = load_mini_base().preprocess_config, VolumeCache(folder / "prepared")
    generator = torch.Generator().manual_seed(0)
    for row in _manifest(folder, counts):
        noise = torch.rand(1, *config.shape, generator=generator) * 2 - 1
        cache.save(key_of(row, content_of(row), config), noise)
    return folder
