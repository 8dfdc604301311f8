"""A few phantoms of the target hospital, prepared once for all experiments."""

from pathlib import Path

import pandas as pd
import pytest

from medctkit.cohort.cache import VolumeCache, content_of, prepare_row
from medctkit.cohort.manifest import load_manifest, write_manifest
from medctkit.model.base_model import load_mini_base


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A manifest of few studies, with their prepared volumes beside it; one is left to be prepared."""
    folder = tmp_path_factory.mktemp("few")
    table = load_manifest(Path(__file__).parents[2] / "data_manifest.csv")
    target = table[table["hospital"] == "target"]
    parts = [target[target["split"] == split].head(n) for split, n in (("train", 8), ("valid", 12), ("test", 24))]
    rows = pd.concat(parts)
    write_manifest(rows, folder / "manifest.csv")
    config, cache = load_mini_base().preprocess_config, VolumeCache(folder / "prepared")
    for row in rows.to_dict("records")[:-1]:
        prepare_row(row, content_of(row), config, cache)
    return folder / "manifest.csv"
