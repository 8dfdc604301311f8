"""Maps against masks, as one command on a hospital's test phantoms."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from medctkit.attention import faithfulness
from medctkit.cli import app
from medctkit.common.csv_tables import write_table
from medctkit.common.provenance import write_json
from medctkit.experiments import localise
from medctkit.experiments.adapt import ORIGIN
from medctkit.lora.adapter import add_lora, save_adapter
from medctkit.model.base_model import load_mini_base
from medctkit.model.fingerprint import digests
from medctkit.training.checkpoints import RECORD

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def adapted(origin, tmp_path_factory):
    """An adapter that does something, as a finished run leaves it."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    save_adapter(add_lora(origin.load().model, "paper", r=4, init_lora_weights=False), folder / "adapter")
    finished = {"state": "finished", "made_of": {}, "files": {}, "step": 1, "best_step": 1, "best_score": 0.5}
    finished |= {"history": [], "seconds": 1.0}
    write_json(finished, folder / RECORD)
    write_json(asdict(origin), folder / ORIGIN)
    return folder


@pytest.fixture(scope="module", autouse=True)
def little_to_do():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(localise, "EACH", 1)
        patch.setattr(localise, "FEW", 4)
        patch.setattr(faithfulness, "FRACTIONS", (0.1,))
        yield


@pytest.fixture(scope="module")
def measured(few, adapted):
    """What the command prints and writes; in `left`, what is there when it begins to write."""

    def write(*given):
        shutil.copytree(adapted / "localisation_work", adapted / "left")
        write_table(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(localise, "write_table", write)
        done = CliRunner().invoke(app, ["localise", str(adapted), "--manifest", str(few), "--studies", "6"])
    assert done.exit_code == 0, done.output
    return done.output, json.loads((adapted / "localisation.json").read_text())


def test_one_study_alone_is_refused_before_any_map(few, adapted, monkeypatch):
    monkeypatch.setattr(localise, "relevance_of_regions", None)
    done = CliRunner().invoke(app, ["localise", str(adapted), "--manifest", str(few), "--studies", "1"])
    assert done.exit_code == 1 and "expected two of each at least" in done.stderr


@pytest.mark.slow
def test_the_command_writes_what_it_prints(adapted, measured):
    printed, found = measured
    table = pd.read_csv(adapted / "localisation.csv")
    means = table[table["finding"] == "mean"]
    assert set(means["score"]) == {"pointing game", "AUPRC", "in-mask mass"}
    assert len(means) == 21 and (means["low"] <= means["value"]).all() and (means["value"] <= means["high"]).all()
    assert found["made_with"]["studies"] <= 6 and found["made_with"]["command"].endswith("--seed 0 --studies 6")
    assert found["made_with"]["data"] == "phantom"
    own = ["base: own minus 17 other prompts", "adapted: own minus 17 other prompts"]
    assert {row["difference"] for row in found["differences"]} == {"adapted minus base", *own}
    untouched = [row for row in found["sanity"] if row["shuffled"] == "nothing"]
    assert [row["relevance"] for row in untouched] == pytest.approx([1, 1])
    measures = {row["measure"] for row in found["faithfulness"]}
    assert measures >= {"deletion", "insertion", "stability under noise", "fall of the probability"}
    assert (adapted / "localisation.png").read_bytes().startswith(b"\x89PNG")
    assert "adapted, relevance" in printed and "shuffled" in printed and "deletion" in printed
    page = (adapted / "localisation.md").read_text()
    assert "## Is it faithful to the model?" in page and all(
        f"- {line}" in page for line in localise.conclusions(found)
    )
    assert not (adapted / "localisation_work").exists(), "an unfinished run's work is left"


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(few, adapted, measured, monkeypatch):
    """Of what is left before the first file is written nothing is done again, and the result is the same."""
    (adapted / "left").rename(adapted / "localisation_work")
    for name in ("find_regions", "relevance_of_regions", "faithfulness", "sanity_check"):
        monkeypatch.setattr(localise, name, lambda *_, **__: pytest.fail("done again"))
    localise.measure_localisation(few, adapted, 0, None, 6)
    after = json.loads((adapted / "localisation.json").read_text())
    assert after["means"] == measured[1]["means"] and after["faithfulness"] == measured[1]["faithfulness"]


@pytest.mark.parametrize(
    ("measure", "low", "high", "word"),
    [
        ("insertion", 0.1, 0.3, "better"),
        ("deletion", 0.1, 0.3, "worse"),
        ("deletion", -0.3, -0.1, "better"),
        ("insertion", -0.1, 0.3, "no difference"),
    ],
)
def test_words_follow_from_intervals(measure, low, high, word):
    row = {"model": "base", "measure": measure, "value": 0.5, "low": 0.4, "high": 0.6, "difference": None}
    middle = {"difference": (low + high) / 2, "difference_low": low, "difference_high": high}
    rows = [row | {"map": "relevance"}, row | {"map": "random"} | middle]
    said = localise.conclusions({"differences": [], "faithfulness": rows})
    assert (
        len(said) == 1 and said[0].startswith(f"base, {measure}, relevance minus random: ") and f", {word}" in said[0]
    )


def test_the_page_on_localisation_is_made_of_what_was_measured():
    saved = json.loads((ROOT / "bench" / "localisation.json").read_text())
    page = (ROOT / "docs" / "localisation.md").read_text()
    assert page == localise.localisation_page(saved), (
        "after `medctkit localise`: copy its .json to bench, its .md to docs"
    )
    assert saved["made_with"]["command"].startswith("medctkit localise runs/")
    shipped = digests(load_mini_base().model)[0]
    assert saved["made_with"].get("base") == shipped or "not on the one that is shipped" in page
