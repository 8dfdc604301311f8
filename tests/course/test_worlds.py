"""The phantom world opens anywhere; the released one says what it lacks, and how to come by it."""

import json
import shlex
import shutil
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from ct_rate_imitation import write_ct_rate

from medctkit import cli
from medctkit.cohort.ct_rate import manifest_from_ct_rate, volume_path
from medctkit.cohort.manifest import load_manifest, study_from_row, write_manifest
from medctkit.cohort.open_data import manifest_row
from medctkit.course import worlds
from medctkit.experiments.adapt import DEFAULT, FULL_SIZE, Origin
from medctkit.scans.preprocessing import PreprocessConfig
from medctkit.scans.volumes import read_volume

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_network_and_no_token(monkeypatch, tmp_path):
    """Whoever opens a connection fails the test; no token is found."""

    def refuse(*arguments, **named):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))


@pytest.fixture(scope="module")
def ct_rate(tmp_path_factory):
    """A data folder as `medctkit download` and `medctkit prepare` leave it, but for the prepared volumes."""
    data = tmp_path_factory.mktemp("data")
    write_ct_rate(data / "ct-rate", versions=(2,), shape=(20, 40, 40))
    table, _ = manifest_from_ct_rate(data / "ct-rate", valid_share=0.5, seed=0)
    write_manifest(table, data / "prepared" / "manifest.csv")
    (data / "prepared" / "prepared").mkdir()
    weights = data / "ct-rate" / "models" / "CT-CLIP-Related" / "CT-CLIP_v2.pt"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"not opened here")
    vocabulary = data / "ct-rate" / "BiomedVLP-CXR-BERT-specialized" / "vocab.txt"
    vocabulary.parent.mkdir()
    vocabulary.write_text("[PAD]\n")
    return data


def commands_in(steps):
    """The medctkit commands in a text, each with what its arguments mean; options that don't exist are refused."""
    known = typer.main.get_command(cli.app).commands
    lines = [shlex.split(line) for line in map(str.strip, steps.splitlines()) if line.startswith("medctkit ")]
    return [(name, known[name].make_context(name, arguments).params) for _, name, *arguments in lines]


def test_the_phantom_world_is_that_of_the_default_experiment(tmp_path):
    world = worlds.open_world("phantom", output_dir=tmp_path)
    assert (world.name, world.hospital, world.settings, world.origin) == ("phantom", "target", DEFAULT, Origin())
    assert world.cache_dir == tmp_path / "prepared"
    assert world.manifest.equals(load_manifest(ROOT / "data_manifest.csv"))
    base = world.load_base()
    assert world.preprocess_config == base.preprocess_config
    assert str(world) == world.said
    assert f"{sum(p.numel() for p in base.model.parameters()) / 1e6:.1f} M parameters" in world.said


def test_a_phantom_to_look_at_is_fine_and_of_the_target_hospital(tmp_path, monkeypatch):
    assert min(worlds.TO_LOOK_AT) >= 80
    monkeypatch.setattr(worlds, "TO_LOOK_AT", (16, 24, 24))  # quick
    world = worlds.open_world(output_dir=tmp_path)
    volume, row = world.sample("valid", 3)
    rows = world.manifest[(world.manifest["hospital"] == "target") & (world.manifest["split"] == "valid")]
    assert row["study"] == rows["study"].iloc[3]
    assert volume.hu.shape == worlds.TO_LOOK_AT
    np.testing.assert_array_equal(volume.hu, study_from_row(row, worlds.TO_LOOK_AT).volume.hu)
    with pytest.raises(ValueError, match="study 222 of split 'valid': the manifest has 222 there, counted from 0"):
        world.sample("valid", 222)
    sick = rows[rows["Lung nodule"] == 1]
    assert 1 < len(sick) < len(rows)
    assert world.sample("valid", 1, having="Lung nodule")[1]["study"] == sick["study"].iloc[1]
    with pytest.raises(ValueError, match=f"split 'valid' with Lung nodule: the manifest has {len(sick)} there"):
        world.sample("valid", len(sick), having="Lung nodule")


def test_studies_of_a_split_are_the_cohort_of_the_experiment(tmp_path, monkeypatch):
    shutil.copy(ROOT / "data_manifest.csv", tmp_path)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")  # the manifest beside the folder of the notebook is the one
    asked = []
    monkeypatch.setattr(worlds, "load_split", lambda *arguments: asked.append(arguments) or "studies")
    world = worlds.open_world(output_dir="out")
    assert world.manifest_path.resolve() == tmp_path / "data_manifest.csv"
    assert world.dataset("valid") == "studies"
    ((table, *rest),) = asked
    assert table is world.manifest and rest == ["target", "valid", world.preprocess_config, Path("out/prepared")]
    with pytest.raises(ValueError, match="split 'validation': expected one of train, valid, test"):
        world.dataset("validation")


def test_another_world_is_refused_and_without_a_manifest_near_it_says_where_it_comes_from(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="world='real': expected phantom, released, open"):
        worlds.open_world("real")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worlds, "__file__", str(tmp_path / "site-packages" / "medctkit" / "worlds.py"))
    with pytest.raises(FileNotFoundError, match="no data_manifest.csv in .* or above. It comes with a clone"):
        worlds.open_world()


def test_without_files_it_says_every_step_and_asks_no_network(tmp_path):
    with pytest.raises(worlds.NotReady) as caught:
        worlds.open_world("released", tmp_path / "data")
    said = str(caught.value)
    assert said.startswith("The released world lacks: weights, tokenizer, manifest.")
    for step in (
        "missing  Hugging Face token",
        "open https://huggingface.co/datasets/ibrahimhamamci/CT-RATE and accept its terms",
        "`hf auth login` in a terminal; in Colab, the key at the left, a secret named HF_TOKEN",
        "1,529 volumes of 12 to 162 MB, 18 to 248 GB in all; 1.8 GB of weights; at most 89 GB prepared",
        '`world = "phantom"` needs nothing',
    ):
        assert step in said
    assert caught.value._render_traceback_() == [f"NotReady: {said}"], "in a notebook the steps, not a stack"
    assert not (tmp_path / "data").exists(), "nothing is made"


def test_the_commands_it_shows_exist_and_the_token_itself_is_never_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret123")
    steps = worlds.released_steps(tmp_path / "my data", seed=3)
    assert "there    Hugging Face token (HF_TOKEN)" in steps and "secret123" not in steps
    commands = commands_in(steps)
    assert [name for name, _ in commands] == ["download", "download", "download", "prepare"]
    assert all(asked.get("seed", 3) in (3, 0) for _, asked in commands)
    prepare = commands[-1][1]
    assert prepare["source"] == tmp_path / "my data" / "ct-rate"
    assert prepare["output_dir"] == tmp_path / "my data" / "prepared"


def test_what_it_tells_of_disk_and_time_is_what_make_bench_measured():
    data, model, memory = (
        json.loads((ROOT / "bench" / f"{name}.json").read_text()) for name in ("data", "model", "memory")
    )
    prepare = data["prepare"]
    assert f"{prepare['megabytes_per_volume'] / 1e3:.3f}" == f"{worlds.GIGABYTES_PREPARED:.3f}"
    assert f"{prepare['seconds_of_one_core_per_volume']:.1f}" == str(worlds.SECONDS_TO_PREPARE)
    assert f"{model['parts']['vision encoder']['seconds']:.1f}" == str(worlds.SECONDS_TO_EMBED)
    step = [row for row in memory["bytes_of_a_step"] if (row["batch"], row["volumes_at_a_time"]) == (8, 8)]
    peak = next(row["peak"] for row in step if row["measures"] == "checkpointing and bf16")
    assert f"{peak / 1e9:.1f} GB for 8 volumes" in worlds.released_steps()
    text = cli.WHAT_TO_DOWNLOAD.replace(",", "")
    volumes = {"train": "20000 patients 47149 volumes", "valid": "1304 patients 3039 volumes"}
    for split, said in volumes.items():
        patients, _, number, _ = said.split()
        assert said in text and worlds.VOLUMES_OF_A_PATIENT[split] == int(number) / int(patients)
    assert "volumes of 12 to 162 MB" in text and worlds.GIGABYTES_OF_A_VOLUME == (0.012, 0.162)


def test_with_everything_there_it_opens(ct_rate, tmp_path):
    world = worlds.open_world("released", ct_rate, tmp_path)
    assert (world.name, world.hospital, world.settings) == ("released", None, FULL_SIZE)
    assert world.origin.model == str(ct_rate / "ct-rate" / "models" / "CT-CLIP-Related" / "CT-CLIP_v2.pt")
    assert world.origin.tokenizer == str(ct_rate / "ct-rate" / "BiomedVLP-CXR-BERT-specialized")
    assert world.cache_dir == ct_rate / "prepared" / "prepared"
    assert world.preprocess_config == PreprocessConfig()
    assert world.said.startswith(f"released: CT-CLIP, 438 M parameters, and {len(world.manifest)} scans of 4 patients")
    assert ("5.4 s for each scan" in world.said) == (not torch.cuda.is_available())
    volume, row = world.sample("test")
    np.testing.assert_array_equal(volume.hu, read_volume(ct_rate / "ct-rate" / volume_path(row["study"], 2)).hu)


def test_what_is_missing_or_of_the_wrong_kind_is_named_before_anything_is_computed(ct_rate, tmp_path):
    copy = Path(shutil.copytree(ct_rate, tmp_path / "copy"))
    file = copy / "prepared" / "manifest.csv"
    table = load_manifest(file)
    write_manifest(table[table["split"] != "test"], file)
    with pytest.raises(worlds.NotReady, match="The released world lacks: test studies."):
        worlds.open_world("released", copy)
    shutil.copy(ROOT / "data_manifest.csv", file)
    with pytest.raises(ValueError, match="manifest.csv: 2,402 of its 2,402 studies are phantoms; .* wants scans only"):
        worlds.open_world("released", copy)
    shutil.rmtree(copy / "ct-rate" / "BiomedVLP-CXR-BERT-specialized")
    with pytest.raises(worlds.NotReady, match=r"lacks: tokenizer.\n\n  there    weights: .*\n  missing  tokenizer: "):
        worlds.open_world("released", copy)


# --- open ------------------------------------------------------------------------------------------------


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(worlds, "_answers", lambda site: True)


def test_the_open_world_lists_packages_licences_disk_and_time_and_commands_that_exist(tmp_path, online, monkeypatch):
    monkeypatch.setattr(worlds, "find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: None)
    with pytest.raises(worlds.NotReady) as caught:
        worlds.open_world("open", tmp_path / "my data", seed=4)
    said = str(caught.value)
    assert said.startswith("The open world lacks: packages, weights, manifest.") and "No network" not in said
    for step in (
        'pip install "medctkit[open]"',
        "CC BY 3.0",
        "COLIPRI MIT",
        "about 13 GB of scans",
        "a token or a secret",
    ):
        assert step in said
    commands = commands_in(said)
    assert [name for name, _ in commands] == ["download", "download", "prepare"]
    assert commands[-1][1]["source"] == tmp_path / "my data" / "idc" / "manifest.csv"
    assert not (tmp_path / "my data").exists()


def test_without_a_network_the_open_world_says_so_first(tmp_path, monkeypatch):
    def refuse(site, timeout):
        raise OSError("no route to host")

    monkeypatch.setattr(worlds, "urlopen", refuse)
    with pytest.raises(worlds.NotReady, match="^No network here: https://huggingface.co, .* did not answer"):
        worlds.open_world("open", tmp_path)


def test_with_everything_there_the_open_world_opens_and_asks_no_network(tmp_path, monkeypatch):
    scans, folder = tmp_path / "idc", tmp_path / "idc-prepared"
    rows = [
        manifest_row(
            split, split, split, "lidc_idri", {"Lung nodule": n % 2}, path=str(scans / f"{split}.nii.gz"), masks=""
        )
        for n, split in enumerate(("train", "valid", "test"))
    ]
    write_manifest(pd.DataFrame(rows), folder / "manifest.csv")
    parts = {"packages": tmp_path, "weights": tmp_path, "manifest": folder / "manifest.csv"}
    monkeypatch.setattr(worlds, "_open_parts", lambda data_dir: parts)
    world = worlds.open_world("open", tmp_path, tmp_path)
    assert (world.name, world.hospital, world.origin.model, world.settings) == ("open", None, "colipri", FULL_SIZE)
    assert world.said.startswith("open: COLIPRI, and 3 scans of 3 patients") and world.knows_where
    assert world.manifest["Lung nodule"].notna().all() and world.manifest["Emphysema"].isna().all()
