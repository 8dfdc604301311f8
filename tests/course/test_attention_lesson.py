"""Notebook 05 of a base model that has nothing of CT-CLIP's inside: it runs to its end and shows what there is."""

import copy
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from matplotlib_inline import backend_inline
from tiny import PatchesOnly

from medctkit.cohort.manifest import TRAINING_SHAPE, load_manifest, write_manifest
from medctkit.cohort.prepare import prepare
from medctkit.course import worlds
from medctkit.experiments.adapt import FULL_SIZE, Origin
from medctkit.findings import FINDINGS
from medctkit.lora.adapter import add_lora, save_adapter
from medctkit.model.base_model import BASES, BaseModel, load_mini_base
from medctkit.training import checkpoints

pytestmark = pytest.mark.usefixtures("one_thread", "on_the_cpu")
ROOT = Path(__file__).resolve().parents[2]
CELLS = nbformat.read(ROOT / "notebooks" / "05_slices_and_attention.ipynb", as_version=4).cells
LEFT_OUT = ("colab", "real", "two", "progress")  # cells that ask no model


@pytest.fixture
def world(tmp_path, monkeypatch):
    """An open world: phantoms with one nodule each in place of LIDC-IDRI, and an adapter in `tmp_path`."""
    words = load_mini_base().tokenizer
    torch.manual_seed(0)
    plain = PatchesOnly(len(words)).eval()
    monkeypatch.setitem(BASES, "patches only", lambda: BaseModel(copy.deepcopy(plain), words))
    monkeypatch.setattr(worlds, "TO_LOOK_AT", TRAINING_SHAPE)  # that of the masks
    adapted = add_lora(copy.deepcopy(plain), "paper", r=2)
    for name, parameter in adapted.named_parameters():
        torch.nn.init.normal_(parameter) if "lora_B" in name else None
    save_adapter(adapted, tmp_path / "adapter")
    monkeypatch.setattr(checkpoints, "described", lambda folder: f"{folder}: not trained")
    table = load_manifest(ROOT / "data_manifest.csv").query("split == 'test'").head(3)
    nodule = {name: int(name == "Lung nodule") for name in FINDINGS}
    write_manifest(table.assign(**nodule, masks=""), tmp_path / "manifest.csv")
    here = worlds.World(
        "open", Origin("patches only", None, None), tmp_path / "manifest.csv", tmp_path / "prepared", FULL_SIZE, "open"
    )
    prepare(here.manifest.to_dict("records"), plain.preprocess_config, here.cache_dir, workers=1)
    monkeypatch.setattr(worlds, "open_world", lambda *names, **more: here)
    return here


@pytest.mark.slow
def test_it_runs_to_its_end_and_says_what_is_ct_clips_alone(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backend_inline, "set_matplotlib_formats", lambda *formats, **more: None)
    plt.switch_backend("agg")
    plt.close("all")  # other tests may have left some
    names, tables, pictures = {}, {}, {}
    for cell in CELLS:
        if cell.cell_type != "code" or cell.id in LEFT_OUT or "exercise" in cell.metadata.get("tags", ()):
            continue
        names["display"] = tables.setdefault(cell.id, []).append
        exec(compile(cell.source, f"cell {cell.id}", "exec"), names)
        names["output_dir"] = str(tmp_path)
        pictures[cell.id] = [len(plt.figure(number).axes) for number in plt.get_fignums()]
        plt.close("all")
    said = capsys.readouterr().out
    assert said.count("heads and rollout are CT-CLIP's alone") == 1 and "3 findings in 3 studies, 5 maps" in said
    assert {name: axes for name, axes in pictures.items() if axes} == {"relevance-figure": [6]}
    assert names["outlined"].keys() == {"Lung nodule"} == {names["looked_at"].prompt.value}
    assert "times chance" in names["looked_at"].caption.value
    assert len(tables["localised"]) == 2 and list(tables["by-finding"][0].index) == ["Lung nodule"]
    assert list(tables["sanity"][0].index) == ["nothing", "projection", "+ patches"]
    assert "rollout" not in tables["sanity"][0] and len(tables["faithful"]) == 1
