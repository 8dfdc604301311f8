"""Each variant is measured against the model; what changes too much is marked, and not left behind."""

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import PROMPTS, randomise_adapter, tiny_ct_clip, tiny_tokenizer
from typer.testing import CliRunner

from medctkit.common.kept import kept
from medctkit.deploy import deploy_table as tables
from medctkit.deploy.deploy_table import BASE, Limits, as_text, deploy_table
from medctkit.deploy.exported import FACTS, Exported
from medctkit.deploy.quantise import KINDS, quantise
from medctkit.deploy.trial import Variant, outputs, peak_bytes, trial
from medctkit.findings import FINDINGS
from medctkit.lora.adapter import add_lora, save_adapter
from medctkit.model.base_model import BaseModel

BENCH, STUDIES = Path(__file__).resolve().parents[2] / "bench", 12
FINE = {"auroc_low": 0.0, "finding_change": 0.0, "score": 0.0, "answers": 0.0, "ratio_1": 1.0}


class Studies:
    """A data set of noise; says when it is read."""

    def __init__(self, seed, events):
        generator = torch.Generator().manual_seed(seed)
        self.volumes = torch.rand(STUDIES, 1, 8, 32, 32, generator=generator) * 2 - 1
        labels = (torch.rand(STUDIES, len(FINDINGS), generator=generator) > 0.5).float().tolist()
        self.rows = [
            {"study": f"{seed}_{i}", "patient": f"p{i // 2}"} | dict(zip(FINDINGS, row, strict=True))
            for i, row in enumerate(labels)
        ]
        self.events = events

    def __len__(self):
        return STUDIES

    def __getitem__(self, i):
        self.events.append("read")
        return {"pixel_values": self.volumes[i]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The table of a tiny model, its folder, and what was done in which order; a score may change by 0.001."""
    folder, events = tmp_path_factory.mktemp("run"), []
    save_adapter(randomise_adapter(add_lora(tiny_ct_clip(), "paper", r=4)), folder / "adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "quantise", lambda *given: events.append("quantised") or quantise(*given))
        table = deploy_table(
            BaseModel(tiny_ct_clip().eval(), tiny_tokenizer()), folder / "adapter", Studies(1, events),
            Studies(2, events), folder / "deploy", Limits(1, 1, 0.001, 1, np.inf), PROMPTS, resamples=50,
        )  # fmt: skip
    return table, folder / "deploy", events


@pytest.mark.slow
def test_a_process_may_grow(made):
    """joblib's pool ends one that has grown by 300 MB, as activations make it grow, and what it had loaded is gone."""
    volumes = np.random.default_rng(0).uniform(-1, 1, (2, 1, 8, 32, 32)).astype(np.float32)
    with trial(Variant(made[1] / "onnx-float32"), volumes, 1) as do:
        first, process = do(outputs, volumes), do(os.getpid)
        do(exec, "import builtins, numpy; builtins.kept = numpy.ones(60_000_000)")
        time.sleep(1.1)  # it looks once a second
        do(exec, "pass")
        time.sleep(1.0)
        assert do(os.getpid) == process
        assert all(np.array_equal(a, b) for a, b in zip(first, do(outputs, volumes), strict=True))


@pytest.mark.slow
class TestTable:
    def test_what_computes_the_same_changes_nothing_and_what_is_rounded_does(self, made):
        table, _, _ = made
        assert {BASE, "merged float32", "merged bf16", "onnx float32", "onnx int8 dynamic"} <= set(table.index)
        base = table.loc[BASE]
        assert base["verdict"] == "base" and base["ratio_1"] == base["ratio_16"] == 1
        assert base[["codes", "auroc", "score", "answers"]].eq(0).all()
        exact = table.loc[["merged float32", "onnx float32"]]
        assert exact["score"].max() < 1e-4 and exact["codes"].max() < 0.01 and exact["verdict"].eq("ship").all()
        rounded = table.loc[["merged bf16", "onnx int8 dynamic", "onnx int8 weights"]]
        assert (rounded["score"] > 1e-4).all() and (rounded["asked"] == STUDIES * len(FINDINGS)).all()
        assert (table["auroc_low"] <= table["auroc"]).all() and (table["auroc"] <= table["auroc_high"]).all()
        assert (table[["bytes", "ms_1", "ms_16", "peak_1"]] > 0).all(axis=None)
        assert table.loc["onnx float32", "peak_16"] < 0.7 * base["peak_16"]  # no torch in its process

    def test_what_falls_through_is_not_left_there_and_the_others_say_what_was_measured(self, made):
        table, folder, _ = made
        falls = table["score"] > 0.001
        assert falls.any() and not falls.all()
        assert table.index[table["verdict"].str.startswith("do not ship")].equals(table.index[falls])
        left = {path.name for path in folder.iterdir() if path.is_dir()}
        exports = {name for name in table.index[~falls] if name.startswith(("onnx", "openvino"))}
        assert left == {tables.slug(name) for name in exports}  # no models for PyTorch, nothing half measured
        for name in exports - {"onnx float32"}:
            assert "flip" in (folder / tables.slug(name) / "README.md").read_text()
        found = json.loads((folder / "table.json").read_text())
        assert found["limits"]["score"] == 0.001 and found["studies"] == {"valid": STUDIES, "test": STUDIES}
        written = pd.read_csv(folder / "table.csv", index_col=0)
        assert list(written.index) == list(found["rows"]) == list(table.index)
        assert as_text(table).count("\n") == len(table) + 1

    def test_no_study_is_seen_before_every_variant_is_made(self, made):
        _, _, events = made
        assert events.index("read") == events.count("quantised") == len(KINDS)

    def test_a_process_that_ends_or_fails_is_told_and_none_is_left(self, made, tmp_path):
        volumes, variant, ids = Studies(3, []).volumes.numpy(), Variant(made[1] / "onnx-float32"), []
        with pytest.raises(RuntimeError, match="onnx-float32 ended"):
            with trial(variant, volumes, 1) as do:
                ids.append(do(os.getpid))
                do(os._exit, 3)
        with trial(variant, volumes, 1) as do:
            ids.append(do(os.getpid))
            with pytest.raises(ValueError, match="expected float32"):
                do(outputs, volumes[:, 0])
            assert len(do(outputs, volumes)[0]) == STUDIES  # it goes on
        assert not any(Path(f"/proc/{number}").exists() for number in ids)

    @pytest.mark.parametrize("kind", KINDS)
    def test_another_export_of_an_export(self, made, tmp_path, kind):
        if kind.startswith("openvino"):
            pytest.importorskip("nncf")
        out, volumes = quantise(made[1] / "onnx-float32", tmp_path / "out", kind), Studies(3, []).volumes.numpy()
        before, after = Exported(made[1] / "onnx-float32"), Exported(out, threads=1)
        off = np.abs(after.scores(volumes) - before.scores(volumes)).max()
        assert off < 1e-5 if kind == "openvino float32" else 1e-5 < off < 0.5
        assert after.facts["base"] == before.facts["base"] and after.facts["digest"] != before.facts["digest"]
        card = (out / "README.md").read_text()
        assert kind in card and "not yet" in card and ("OpenVINO" in card) == kind.startswith("openvino")
        with pytest.raises(ValueError, match=f"is {kind} already"):
            quantise(out, tmp_path / "again", kind)
        (out / FACTS).write_bytes((made[1] / "onnx-float32" / FACTS).read_bytes())
        with pytest.raises(ValueError, match="is not as it was written"):
            Exported(out)

    def test_what_cannot_be_quantised_is_refused(self, made, tmp_path, monkeypatch):
        source = made[1] / "onnx-float32"
        with pytest.raises(ValueError, match="int4.*onnx int8 dynamic"):
            quantise(source, tmp_path, "int4")
        with pytest.raises(ValueError, match="another folder"):
            quantise(source, source, "onnx int8 weights")
        with pytest.raises(FileNotFoundError, match="vision.onnx"):
            quantise(tmp_path, tmp_path / "out", "onnx int8 weights")
        monkeypatch.setitem(sys.modules, "openvino", sys)  # as if it were there, which it need not be
        monkeypatch.setitem(sys.modules, "nncf", None)
        with pytest.raises(ImportError, match=r"nncf.*pip install 'medctkit\[openvino\]'"):
            quantise(source, tmp_path / "out", "openvino float32")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"auroc_low": -0.006}, "mean AUROC"),
        ({"auroc_low": float("nan")}, "mean AUROC"),
        ({"finding_change": -0.021}, "a finding loses"),
        ({"score": 0.11}, "a score changes"),
        ({"answers": 0.011}, "1% of the answers"),
        ({"ratio_1": 1.6}, "times slower"),
    ],
)
def test_each_limit_is_held_by_itself(change, said):
    assert Limits().broken(FINE) == []
    (found,) = Limits().broken(FINE | change)
    assert said in found


def test_a_mean_that_stays_does_not_hide_an_answer_that_flips():
    rows = Studies(4, [])
    before = np.linspace(0.1, 0.9, STUDIES * len(FINDINGS)).reshape(STUDIES, -1)
    after, at = before.copy(), (3, 5)
    thresholds = np.full(len(FINDINGS), 0.0)
    thresholds[5] = before[at] + 1e-9
    after[at] += 2e-9
    found = tables.changes(rows, before, after, thresholds, 20, 0)
    assert found["auroc"] == found["finding_change"] == 0 and found["answers"] == 1 / before.size
    assert found["score"] == pytest.approx(2e-9)


def test_what_was_measured_is_not_measured_again_unless_it_is_of_something_else(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"ms_1": 2.5, "codes": np.arange(3)}

    for key, times in (("a", 1), ("a", 1), ("b", 2)):
        found = kept(tmp_path / "measured" / "one.npz", key, make)
        assert len(made) == times and found["ms_1"] == 2.5 and list(found["codes"]) == [0, 1, 2]


def test_bytes_are_those_of_the_weights(tmp_path):
    for place, size in (("base", 100), ("adapter", 10)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "x.safetensors").write_bytes(bytes(size))
    whole = Variant(tmp_path / "base", tmp_path / "adapter")
    assert whole.bytes == 110 and Variant(tmp_path / "base", bf16=True).bytes == 50
    assert peak_bytes() > 1e7


def test_the_command_takes_valid_and_test_studies_of_the_run(monkeypatch, tmp_path):
    from medctkit import cli
    from medctkit.cohort import dataset, manifest
    from medctkit.experiments.adapt import Origin

    given = []
    monkeypatch.setattr(Origin, "of", lambda folder: Origin())
    monkeypatch.setattr(manifest, "load_manifest", lambda path: None)
    monkeypatch.setattr(dataset, "load_split", lambda cohort, hospital, split, *_: f"{hospital} {split}")
    monkeypatch.setattr(
        tables,
        "deploy_table",
        lambda *arguments: given.extend(arguments[1:]) or pd.DataFrame({"bytes": [2e6]}, index=["one"]),
    )
    done = CliRunner().invoke(cli.app, ["deploy-table", str(tmp_path)])
    assert done.exit_code == 0 and "| one | 2.00 |" in done.output, done.output
    assert given == [tmp_path / "adapter", "target valid", "target test", tmp_path / "deploy"]


# --- what the pages say --------------------------------------------------------------------------------------


def test_the_page_says_what_was_measured_and_where_the_limits_are(bench):
    text = (BENCH.parent / "docs" / "deploy.md").read_text()
    found = json.loads((BENCH / "deploy.json").read_text()) if (BENCH / "deploy.json").is_file() else {}
    assert bench("deploy").page(found) in text and ("| variant |" in text) == bool(found)
    limits = Limits()
    for said in (
        f"{limits.auroc:g}",
        f"{limits.finding:g}",
        f"{limits.score:g}",
        f"{limits.answers:.0%}".replace("%", " %"),
    ):
        assert f"more than {said}" in text, said
    assert all(kind in text for kind in KINDS)


@pytest.mark.slow
def test_the_full_size_program_measures_time_and_memory_alone(bench, monkeypatch, tmp_path):
    program = bench("deploy")
    monkeypatch.setattr(tables, "KINDS", {})
    monkeypatch.setattr(program, "trial", lambda *_: nullcontext(lambda function, *given: 1.0))  # processes: see above
    found = program.of_size(tiny_ct_clip().config, tmp_path)
    assert list(found["rows"]) == [BASE, "merged float32", "merged bf16", "onnx float32"]
    assert all(row["ms_1"] > 0 and row["ratio_1"] > 0 and "score" not in row for row in found["rows"].values())
    assert "random weights" in program.page({"full_size": found})
