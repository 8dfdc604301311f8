"""For all experiments, made once: studies with noise in place of their prepared volumes, a quick model, a run of it."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from medctkit.cohort.cache import VolumeCache, content_of, key_of
from medctkit.cohort.manifest import load_manifest, write_manifest
from medctkit.experiments.adapt import DEFAULT, Origin, adapt
from medctkit.experiments.compare.data import Data
from medctkit.model.base_model import FOLDER, preprocess_config_of
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel, released_layout


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Weights in the released layout, unused tensors included, of a quick model: voxels twice as wide as the mini's.

    In `folder` beside it, the model as `save_pretrained` leaves it.
    """
    torch.manual_seed(0)
    vision = dict(dim=16, codebook_size=16, image_size=48, num_frames=32, patch_size=8, temporal_patch_size=8)
    vision |= dict(spatial_depth=1, temporal_depth=1, dim_head=8, heads=2)
    text = dict(vocab_size=395, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = CTCLIPModel(CTCLIPConfig(vision, text, spacing=(10.0, 7.5, 7.5)))
    state = {name: torch.zeros(entry.shape) for name, entry in released_layout(model.config).items()}
    file = tmp_path_factory.mktemp("released") / "tiny.pt"
    torch.save(state | model.state_dict(), file)
    model.save_pretrained(file.parent / "folder")
    return file


@pytest.fixture(scope="session")
def origin(checkpoint):
    """The quick model, to be adapted to the target hospital."""
    return Origin(str(checkpoint.parent / "folder"), str(FOLDER), "target")


def _cohort(folder, counts, *models):
    """A manifest of the first studies of each hospital and split, and noise for these models to read beside it."""
    table = load_manifest(Path(__file__).parents[2] / "data_manifest.csv").groupby(["hospital", "split"])
    rows = pd.concat([table.get_group(part).head(n) for part, n in counts.items()])
    write_manifest(rows, folder / "manifest.csv")
    cache, generator = VolumeCache(folder / "prepared"), torch.Generator().manual_seed(0)
    for config in map(preprocess_config_of, models):
        for row in rows.to_dict("records"):
            noise = torch.rand(1, *config.shape, generator=generator) * 2 - 1
            cache.save(key_of(row, content_of(row), config), noise)
    return folder / "manifest.csv"


@pytest.fixture(scope="session")
def both(tmp_path_factory, origin):
    """A manifest of few studies, with test studies of the source hospital too."""
    counts = {("target", "train"): 8, ("target", "valid"): 12, ("target", "test"): 24, ("source", "test"): 20}
    return _cohort(tmp_path_factory.mktemp("few"), counts, origin.model, "mini")


@pytest.fixture(scope="session")
def few(both):
    """Beside it, a manifest of those of the target hospital alone."""
    table = load_manifest(both)
    write_manifest(table[table["hospital"] == "target"], both.with_name("few.csv"))
    return both.with_name("few.csv")


@pytest.fixture(scope="session")
def quick():
    """Settings of two steps."""
    return replace(DEFAULT, rank=2, steps=2, batch_size=4, evaluate_every=1)


@pytest.fixture(scope="session")
def finished(few, origin, quick, tmp_path_factory):
    """The folder of a run of the quick model that is finished; measure it there, and change nothing else."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        adapt(few, folder, settings=quick, origin=origin)
    return folder


@pytest.fixture(scope="session")
def toy_cohort(tmp_path_factory, origin):
    """The folder of what a comparison needs: few studies of two hospitals."""
    counts = {("target", "train"): 12, ("target", "valid"): 8, ("target", "test"): 8, ("source", "test"): 6}
    return _cohort(tmp_path_factory.mktemp("cohort"), counts, origin.model).parent


@pytest.fixture(scope="session")
def data(toy_cohort, origin):
    """The same, loaded."""
    return Data.load(toy_cohort / "manifest.csv", toy_cohort / "prepared", origin)
