"""Studies for all experiments, prepared once: a few phantoms of the target hospital, and noise of both."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from medctkit.cohort.cache import VolumeCache, content_of, key_of, prepare_row
from medctkit.cohort.manifest import load_manifest, write_manifest
from medctkit.experiments.adapt import Origin
from medctkit.model.base_model import FOLDER, load_mini_base
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel, released_layout


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
def checkpoint(tmp_path_factory):
    """Weights in the released layout, unused tensors included, of a quick model that reads the mini model's volumes.

    In `folder` beside it, the model as `save_pretrained` leaves it.
    """
    torch.manual_seed(0)
    vision = dict(dim=16, codebook_size=16, image_size=96, num_frames=64, patch_size=16, temporal_patch_size=16)
    vision |= dict(spatial_depth=1, temporal_depth=1, dim_head=8, heads=2)
    text = dict(vocab_size=394, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = CTCLIPModel(CTCLIPConfig(vision, text, spacing=load_mini_base().preprocess_config.spacing))
    state = {name: torch.zeros(entry.shape) for name, entry in released_layout(model.config).items()}
    file = tmp_path_factory.mktemp("released") / "tiny.pt"
    torch.save(state | model.state_dict(), file)
    model.save_pretrained(file.parent / "folder")
    return file


@pytest.fixture(scope="session")
def origin(checkpoint):
    """The quick model, to be adapted to the target hospital."""
    return Origin(str(checkpoint.parent / "folder"), str(FOLDER), "target")


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
