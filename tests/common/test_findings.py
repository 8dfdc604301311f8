"""A list of findings of your own: its table, and the whole way from a manifest to a report with it."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from scan_files import chest, write_nifti
from tiny import TEXT, VISION
from typer.testing import CliRunner

from medctkit import cli
from medctkit.findings import CT_RATE, FINDINGS, VARIABLE, read_findings, refuse_other_findings
from medctkit.model.base_model import FOLDER
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel
from medctkit.zero_shot.embeddings import load_embeddings

OWN = ["Tuberculosis", "Pneumothorax", "Rib fracture"]
TABLE = """finding,train_percent,stated,denied
Tuberculosis,2.5,,
Pneumothorax,,Pneumothorax on the left. | Air in the pleural space.,No air in the pleural space.
Rib fracture,11,,
"""


def test_a_table_of_your_own(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text("\ufeff" + TABLE, encoding="utf-8")
    found = read_findings(file)
    assert list(found) == OWN
    assert [found[name].prevalence for name in OWN] == pytest.approx([0.025, np.nan, 0.11], nan_ok=True)
    assert found["Pneumothorax"].stated == ("Pneumothorax on the left.", "Air in the pleural space.")
    assert found["Pneumothorax"].denied == ("No air in the pleural space.",)
    assert found["Rib fracture"].stated[0] == "Rib fracture is seen."
    assert found["Rib fracture"].denied[0] == "No Rib fracture is seen."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a header with the column 'finding'"),
        ("finding\n", "expected a header with the column 'finding', commas, and a row for each finding"),
        ("name\nTuberculosis\n", "expected a header with the column 'finding'"),
        ("finding;stated\nTuberculosis;x\n", "expected a header with the column 'finding'"),
        ("finding,stated\nA,x\n,x\n", "finding 2 '': expected a name"),
        ("finding\nCyst, large\n", "finding 1 'Cyst': expected a name, and no more cells .* quote what has commas"),
        ("finding\nRib fracture\nrib-fracture\n", "finding 2 'rib-fracture' has the name of finding 1"),
        ("finding\nMean\n", "finding 1 'Mean' has the name of the row of the means"),
        ("finding,train_percent\nA,many\n", "finding 1 'A': train_percent is 'many'; expected a number from 0 to 100"),
        ("finding,train_percent\nA,101\n", "train_percent is '101'"),
        ("finding,stated\nA,Yes. | a is present\n", "'a is present' is a prompt of the evaluation"),
        ("finding,denied\nA,A is not present.\n", "'A is not present.' is a prompt of the evaluation"),
    ],
)
def test_a_table_that_cannot_be_right_says_why(tmp_path, text, said):
    file = tmp_path / "own.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        read_findings(file)
    assert str(error.value).startswith(str(file))
    with pytest.raises(FileNotFoundError, match=f"there is no such table of findings; {VARIABLE} names it"):
        read_findings(tmp_path / "none.csv")
    file.write_bytes(b"finding\n\xff\xfe\n")
    with pytest.raises(ValueError, match="not CSV in UTF-8"):
        read_findings(file)


def test_what_has_other_findings_is_refused_with_both_lists():
    refuse_other_findings("this", CT_RATE)
    with pytest.raises(ValueError, match=f"^this: made with the findings A, B; in use are {FINDINGS[0]}, .*{VARIABLE}"):
        refuse_other_findings("this", ["A", "B"])


def in_process(folder, code, *arguments):
    """Run Python with the list of your own."""
    environment = os.environ | {VARIABLE: str(folder / "own.csv"), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=folder)


REFUSED = """
import sys, numpy as np, pandas as pd, medctkit
from medctkit.cohort.manifest import COLUMNS, build_default_manifest, validate_manifest
from medctkit.experiments.compare.run_all import compare_methods
from medctkit.phantom import generate

def said(do):
    try:
        do()
    except ValueError as error:
        print(error)

study = generate(33, shape=(32, 64, 64))
assert len(study.labels) == 18
found = medctkit.classify(study)
assert list(found.table["finding"]) == list(medctkit.FINDINGS) and "place" not in found.table
assert set(found.table["truth"]) == {"unknown"} and found._repr_png_()
said(build_default_manifest)
said(lambda: validate_manifest(pd.DataFrame([dict.fromkeys(COLUMNS, 0)])))
said(lambda: compare_methods("none.csv", "out"))
"""


@pytest.mark.slow
def test_what_only_phantoms_have_works_or_says_so(tmp_path):
    (tmp_path / "own.csv").write_text(TABLE)
    done = in_process(tmp_path, REFUSED)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    lists = f"made with the findings {', '.join(CT_RATE)}; in use are {', '.join(OWN)}."
    assert first.startswith(f"phantoms, of which the default manifest is: {lists}")
    assert second.startswith(f"row 2 of the manifest has no path, so it is a phantom: {lists}")
    assert third.startswith("group unseen holds out Pleural effusion, ")
    (tmp_path / "own.csv").write_text("finding\nRib fracture\nScan\n")
    done = in_process(tmp_path, "from medctkit.cli import app; app()", "prepare", "own.csv", "out")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {VARIABLE}: 'Scan' is a column that manifests have already")


def cohort(folder):
    """Scans of a hospital's own, and a random CT-CLIP that sees them; two thirds of the labels of a scan are known."""
    rng, rows = np.random.default_rng(0), []
    for split, n in {"train": 8, "valid": 8, "test": 8}.items():
        for i in range(n):
            study = f"{split}_{i}"
            write_nifti(folder / f"{study}.nii.gz", chest() + rng.integers(0, 40, chest().shape, dtype=np.int16))
            labels = [str(i % 2), str(i // 2 % 2), ["0", "1", ""][i % 3]]
            where = [study, study, split, "St. Elsewhere", "", "a", 1]
            rows.append([*where, *labels, f"Scan {i}.", "", f"{study}.nii.gz"])
    columns = "study patient split hospital seed scan reconstruction".split() + [*OWN, "report", "checksum", "path"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "mine.csv", index=False)
    torch.manual_seed(0)
    text = TEXT | {"vocab_size": 395, "max_position_embeddings": 64}
    config = CTCLIPConfig(VISION, text, projection_dim=16, spacing=(12.5, 3.0, 3.0))
    CTCLIPModel(config).save_pretrained(folder / "base")
    (folder / "own.csv").write_text(TABLE)


COMMANDS = """
import shlex, sys
from medctkit.cli import app

for line in sys.argv[1:]:
    assert not app(shlex.split(line), standalone_mode=False), line
"""


@pytest.mark.slow
def test_the_whole_way_with_findings_of_your_own(tmp_path, monkeypatch):
    cohort(tmp_path)
    model = f"--model base --tokenizer {FOLDER} --batch-size 4 --steps 2 --evaluate-every 1 --workers 0 --rank 2"
    done = in_process(
        tmp_path,
        COMMANDS,
        "prepare mine.csv data --model base --workers 1",
        f"finetune run --manifest data/manifest.csv {model}",
        "evaluate run --manifest data/manifest.csv",
        f"embed test.safetensors --manifest data/manifest.csv --model base --tokenizer {FOLDER} --adapter run/adapter",
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text())["made_of"]["findings"] == OWN
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["made_with"]["findings"] == OWN
    assert [row["finding"] for row in metrics["clinical"]["DeLong"]] == [*OWN, "mean"]
    told = {row["finding"]: row["prevalence"] for row in metrics["clinical"]["predictive values"]}
    assert told == {"Tuberculosis": 0.025, "Pneumothorax": None, "Rib fracture": 0.11}
    table = pd.read_csv(run / "findings.csv", index_col="finding")
    assert list(table.index) == [*OWN, "mean"]
    assert list(table["base positives"]) == [4, 4, 3, 11] and list(table["base studies"]) == [8, 8, 6, 8]
    scores = pd.read_csv(run / "scores.csv").pivot(index="study", columns="finding", values="label")
    manifest = pd.read_csv(tmp_path / "mine.csv", index_col="study").loc[scores.index, OWN]
    pd.testing.assert_frame_equal(scores[OWN], manifest, check_dtype=False, check_names=False)
    assert "Air in the pleural space." in (run / "run.yaml").read_text()

    lists = f"made with the findings {', '.join(OWN)}; in use are {', '.join(FINDINGS)}. "
    with pytest.raises(ValueError, match=f"test.safetensors: {lists}"):
        load_embeddings(tmp_path / "test.safetensors")
    monkeypatch.chdir(tmp_path)
    for command in ("evaluate run", f"finetune run {model}", "export run out"):
        refused = CliRunner().invoke(cli.app, command.split())
        assert refused.exit_code == 1
        assert f"the run of run: {lists}" in refused.output.replace("\n", " ")
