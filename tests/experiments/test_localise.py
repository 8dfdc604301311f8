"""Maps against masks, as one command on a hospital's test phantoms."""

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from medctkit.cli import app
from medctkit.common.provenance import write_json
from medctkit.experiments.adapt import ORIGIN, Origin
from medctkit.lora.adapter import add_lora, save_adapter
from medctkit.model.base_model import load_mini_base
from medctkit.training.checkpoints import RECORD

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """An adapter that does something, as a finished run leaves it."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    save_adapter(add_lora(load_mini_base().model, "paper", r=4, init_lora_weights=False), folder / "adapter")
    write_json({"state": "finished", "files": {}}, folder / RECORD)
    write_json(asdict(Origin()), folder / ORIGIN)
    return folder


def test_the_command_writes_what_it_prints(few, adapted):
    done = CliRunner().invoke(app, ["localise", str(adapted), "--manifest", str(few), "--studies", "6"])
    assert done.exit_code == 0, done.output
    table = pd.read_csv(adapted / "localisation.csv")
    means = table[table["finding"] == "mean"]
    assert set(means["score"]) == {"pointing game", "AUPRC", "in-mask mass"}
    assert len(means) == 21 and (means["low"] <= means["value"]).all() and (means["value"] <= means["high"]).all()
    found = json.loads((adapted / "localisation.json").read_text())
    assert found["made_with"]["studies"] <= 6 and found["made_with"]["command"].endswith("--seed 0 --studies 6")
    assert found["made_with"]["data"] == "phantom"
    own = ["base: own minus another prompt", "adapted: own minus another prompt"]
    assert {row["difference"] for row in found["differences"]} == {"adapted minus base", *own}
    untouched = [row for row in found["sanity"] if row["shuffled"] == "nothing"]
    assert [row["relevance"] for row in untouched] == pytest.approx([1, 1])
    assert (adapted / "localisation.png").read_bytes().startswith(b"\x89PNG")
    assert "adapted, relevance" in done.output and "shuffled" in done.output


def test_the_page_on_localisation_quotes_what_was_measured():
    found = json.loads((ROOT / "bench" / "localisation.json").read_text())
    page = (ROOT / "docs" / "localisation.md").read_text()
    assert found["made_with"]["command"].startswith("medctkit localise runs/")
    by_method = pd.DataFrame(found["means"]).groupby("method", sort=False)
    for method, rows in by_method:
        cells = [f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in rows.itertuples()]
        assert f"| {method} | {' | '.join(cells)} |" in page
    for row in found["means"]:
        assert f"{row['score']} ({row['chance']:.3f} by chance)" in page
    difference = found["differences"][0]
    quoted = f"{difference['value']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
    assert difference["difference"] == "adapted minus base" and quoted in page
    projection = next(row for row in found["sanity"] if row["shuffled"] == "projection" and row["model"] == "base")
    assert f"from 1 to {projection['relevance']:.2f}" in page
