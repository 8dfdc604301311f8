"""Embeddings in a file: to the last bit, of one model and one data set only, and never computed twice."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from several import in_two_processes
from tiny import randomise_adapter, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from medctkit.cli import app
from medctkit.cohort.dataset import CTReportDataset
from medctkit.cohort.manifest import load_manifest, write_manifest
from medctkit.findings import FINDINGS
from medctkit.lora.adapter import add_lora, load_adapter, save_adapter
from medctkit.model.base_model import load_mini_base
from medctkit.model.fingerprint import digest_of_tensors
from medctkit.scans.preprocessing import PreprocessConfig
from medctkit.zero_shot.classifier import Embedded, ZeroShotClassifier
from medctkit.zero_shot.embeddings import (
    describe,
    embed_manifest,
    load_embeddings,
    same_studies,
    save_embeddings,
)

CONFIG = PreprocessConfig((10.0, 10.0, 10.0), (8, 32, 32))
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture
def embedded():
    generator = torch.Generator().manual_seed(0)
    labels = np.zeros((5, 18), np.float32)
    labels[2, 3] = np.nan
    names = [np.array([f"{kind}{i}" for i in range(5)]) for kind in ("patient ", "süd_")]
    return Embedded(torch.randn(5, 16, generator=generator), labels, *names)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A manifest of seven test studies; their volumes, prepared, are noise of the tiny model's size."""
    folder = tmp_path_factory.mktemp("few")
    table = load_manifest(ROOT / "data_manifest.csv")
    write_manifest(table[(table["hospital"] == "target") & (table["split"] == "test")].head(7), folder / "manifest.csv")
    return folder / "manifest.csv"


class Noise(CTReportDataset):
    """The rows of a manifest with volumes that cost nothing; counts how often each is read."""

    def __init__(self, manifest):
        super().__init__(manifest, CONFIG)
        self.read = []

    def _pixels(self, row):
        self.read.append(row["study"])
        if len(self.read) == getattr(self, "stop_at", None):
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(len(row["study"]) + row["seed"])
        return torch.rand(1, 8, 32, 32, generator=generator) * 2 - 1


@pytest.fixture
def classifier():
    return ZeroShotClassifier(tiny_model().eval(), tiny_tokenizer())


# --- the file ----------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_to_the_last_bit(embedded, tmp_path):
    save_embeddings(
        embedded, tmp_path / "new" / "e.safetensors", {"base model": "a", "preprocessing": {"spacing": (1, 2)}}
    )
    found = load_embeddings(tmp_path / "new" / "e.safetensors", {"preprocessing": {"spacing": (1, 2)}})
    assert torch.equal(found.embeddings, embedded.embeddings)
    np.testing.assert_array_equal(found.labels, embedded.labels)
    assert found.studies.tolist() == embedded.studies.tolist() and found.patients.tolist() == embedded.patients.tolist()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["e.safetensors"]


def test_a_mismatch_says_which_entry_and_what_to_do(embedded, tmp_path):
    path = tmp_path / "e.safetensors"
    save_embeddings(embedded, path, {"base model": "a", "adapter": "none", "precision": "float32"})
    with pytest.raises(ValueError, match=r"something else. adapter: 'none' there, 'b' here. Use the model, adapter,"):
        load_embeddings(path, {"base model": "a", "adapter": "b", "precision": "float32"})
    with pytest.raises(ValueError, match=r"base model: 'a' there, 'c' here; studies: 'nothing' there, '5' here"):
        load_embeddings(path, {"base model": "c", "studies": "5"})


def test_damaged_and_other_files_are_refused(embedded, tmp_path):
    path = tmp_path / "e.safetensors"
    with pytest.raises(FileNotFoundError, match="e.safetensors: there is no such file; medctkit embed writes one"):
        load_embeddings(path)
    save_embeddings(embedded, path, {})
    whole = path.read_bytes()
    flipped = whole[:-400] + bytes([whole[-400] ^ 1]) + whole[-399:]
    for content in (whole[:-10], whole[:50], b"", b"PK" + whole, flipped):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged, or no file of embeddings: .* Delete it and embed anew"):
            load_embeddings(path)
    save_embeddings(embedded, path, {})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["medctkit"] = json.dumps(json.loads(metadata["medctkit"]) | {"made_of": 5})
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(ValueError, match="is damaged, or no file of embeddings"):
        load_embeddings(path, {"base model": "c"})
    for metadata in (None, {"medctkit": "{}"}, {"medctkit": "["}):
        save_file({"embeddings": torch.zeros(2, 3), "labels": torch.zeros(2, 18)}, path, metadata=metadata)
        with pytest.raises(ValueError, match="is damaged, or no file of embeddings"):
            load_embeddings(path)
    tensors = {"embeddings": torch.zeros(1, 3), "labels": torch.zeros(1, 18)}
    rest = {"made_of": {}, "findings": FINDINGS[::-1], "studies": ["a"], "patients": ["p"]}
    rest["sha256"] = digest_of_tensors(tensors)
    save_file(tensors, path, metadata={"medctkit": json.dumps(rest)})
    with pytest.raises(
        ValueError, match="made with the findings Interlobular septal thickening, .*; in use are Medical material"
    ):
        load_embeddings(path)
    save_file(tensors, path, metadata={"medctkit": json.dumps(rest | {"findings": FINDINGS, "studies": ["a", "b"]})})
    with pytest.raises(ValueError, match=r"embeddings have shape \(1, 3\), but there are 2 studies"):
        load_embeddings(path)


def test_embeddings_that_do_not_fit_together_are_not_written(embedded, tmp_path):
    wrong = [
        (replace(embedded, labels=embedded.labels[:4]), r"labels have shape \(4, 18\), but there are 5 studies"),
        (replace(embedded, labels=embedded.labels[:, :4]), r"labels have shape \(5, 4\)"),
        (replace(embedded, patients=embedded.patients[1:]), r"patients have shape \(4,\)"),
        (replace(embedded, studies=np.array(list("abcad"))), "study a is there 2 times"),
        (replace(embedded, embeddings=embedded.embeddings / torch.tensor([[1.0]] * 4 + [[0.0]])), "study süd_4 has an"),
    ]
    for broken, message in wrong:
        with pytest.raises(ValueError, match=message):
            save_embeddings(broken, tmp_path / "e.safetensors", {})
    assert not list(tmp_path.iterdir())


# --- what it was made from ---------------------------------------------------------------------------------


def test_every_weight_counts(tmp_path):
    model = tiny_model().eval()
    before = describe(model, CONFIG)
    assert before["precision"] == "float32" and before["preprocessing"]["shape"] == (8, 32, 32)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.numel() or not tensor.is_floating_point():
            continue
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.flatten()[-1].add_(1e-3 + tensor.flatten()[-1].abs())
        found = describe(model, CONFIG)
        changed = {key for key in before if found[key] != before[key]}
        assert changed == {"adapter" if "lora_" in name else "base model"}, name
        with torch.no_grad():
            tensor.copy_(kept)
    assert describe(model, CONFIG) == before


def test_one_base_model_has_one_digest_with_any_adapter_or_none(tmp_path):
    model = randomise_adapter(tiny_model().eval())
    found = describe(model, CONFIG)
    save_adapter(model, tmp_path / "adapter")
    with model.disable_adapter():
        off = describe(model, CONFIG)
    assert off == found | {"adapter": "none"} and found["adapter"] != "none"

    plain = tiny_model().eval().unload()
    assert describe(plain, CONFIG) == off
    loaded = load_adapter(plain, tmp_path / "adapter", name="hospital b")
    assert describe(loaded, CONFIG) == found, "a name changes nothing"
    stronger = add_lora(tiny_model().unload(), "paper", r=4, lora_alpha=80).eval()
    stronger.load_state_dict(model.state_dict())
    assert describe(stronger, CONFIG)["adapter"] != found["adapter"], "alpha is in no tensor"
    merged = describe(load_adapter(tiny_model().eval().unload(), tmp_path / "adapter").merge_and_unload(), CONFIG)
    assert merged["base model"] != found["base model"] and merged["adapter"] == "none"


def test_a_layer_that_the_adapter_trains_whole_belongs_to_the_adapter():
    plain = describe(tiny_model().unload(), CONFIG)
    whole = add_lora(tiny_model().unload(), "paper", r=4, modules_to_save=["to_text_latent"])
    found = describe(whole, CONFIG)
    assert found["base model"] == plain["base model"]
    with torch.no_grad():
        next(p for name, p in whole.named_parameters() if "modules_to_save" in name).add_(1)
    assert describe(whole, CONFIG)["adapter"] != found["adapter"]


def test_precision_is_told(tmp_path):
    model = tiny_model().eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert describe(model, CONFIG)["precision"] == "float32, autocast bfloat16"
    assert describe(model.unload().to(torch.bfloat16), CONFIG)["precision"] == "bfloat16"


# --- a whole manifest --------------------------------------------------------------------------------------


def test_a_manifest_is_embedded_once(few, classifier, tmp_path, capsys):
    table, path = load_manifest(few), tmp_path / "e.safetensors"
    data = Noise(table)
    found = embed_manifest(classifier, data, path, batch_size=2, block=3)
    assert data.read == table["study"].tolist() == found.studies.tolist()
    expected = classifier.embed(Noise(table), progress=False)
    assert torch.allclose(found.embeddings, expected.embeddings, atol=1e-6)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert found.patients.tolist() == expected.patients.tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]
    assert "7 volumes, of which 0 are embedded and 7 are left" in capsys.readouterr().out
    again, before = Noise(table), path.stat().st_mtime_ns
    assert torch.equal(embed_manifest(classifier, again, path).embeddings, found.embeddings)
    assert not again.read and path.stat().st_mtime_ns == before


def test_an_interrupted_run_goes_on_and_gives_the_same_bits(few, classifier, tmp_path, capsys):
    table, path = load_manifest(few), tmp_path / "e.safetensors"
    whole = embed_manifest(classifier, Noise(table), tmp_path / "whole.safetensors", batch_size=1, progress=False)
    stopped = Noise(table)
    stopped.stop_at = 6
    with pytest.raises(KeyboardInterrupt):
        embed_manifest(classifier, stopped, path, batch_size=1, block=2, progress=False)
    assert not path.exists() and len(list((tmp_path / "e.safetensors.parts").iterdir())) == 2
    rest = Noise(table)
    found = embed_manifest(classifier, rest, path, batch_size=1, block=3)  # another size of blocks does no harm
    assert rest.read == table["study"].tolist()[4:]
    assert "7 volumes, of which 4 are embedded and 3 are left" in capsys.readouterr().out
    assert torch.equal(found.embeddings, whole.embeddings)
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not (tmp_path / "e.safetensors.parts").exists()


def test_blocks_of_another_adapter_are_refused(few, classifier, tmp_path):
    stopped = Noise(load_manifest(few))
    stopped.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        embed_manifest(classifier, stopped, tmp_path / "e", block=2, batch_size=1, progress=False)
    other = ZeroShotClassifier(tiny_model("vision").eval(), tiny_tokenizer())
    with pytest.raises(ValueError, match=r"adapter: .* was not finished; to start over, delete .*e\.parts"):
        embed_manifest(other, Noise(load_manifest(few)), tmp_path / "e", progress=False)


def test_other_weights_or_studies_are_refused_and_a_corrected_label_is_not(few, classifier, tmp_path):
    table, path = load_manifest(few), tmp_path / "e.safetensors"
    embed_manifest(classifier, Noise(table), path, progress=False)
    corrected = table.copy()
    corrected.loc[corrected.index[1], "Emphysema"] = 1 - corrected["Emphysema"].iloc[1]
    data = Noise(corrected)
    found = embed_manifest(classifier, data, path, progress=False)
    assert not data.read and found.labels[1, FINDINGS.index("Emphysema")] == corrected["Emphysema"].iloc[1]
    np.testing.assert_array_equal(load_embeddings(path).labels, found.labels)
    swapped = table.iloc[[0, 2, 1, *range(3, 7)]]
    first, second = swapped["study"].iloc[2], swapped["study"].iloc[1]
    finer = replace(CONFIG, antialias=True)
    for rows, config, message in (
        (table.head(6), CONFIG, r"one embedding in .*e\.safetensors for each row of the manifest is needed.* 7 and 6"),
        (swapped, CONFIG, f"row 1: the embedding in .* is of study {first}, the row of the manifest of study {second}"),
        (table, finer, r"preprocessing: .*'antialias': True.*} here; studies: '7, \w+' there, '7"),
    ):
        data = Noise(rows)
        data.config = config
        with pytest.raises(ValueError, match=message):
            embed_manifest(classifier, data, path, progress=False)
    rows = table.copy()
    rows.loc[rows.index[3], "checksum"] = "of another scan"
    with pytest.raises(ValueError, match=r"something else. studies: '7, \w+' there, '7, \w+' here"):
        embed_manifest(classifier, Noise(rows), path, progress=False)
    with pytest.raises(ValueError, match="is there 2 times"):
        embed_manifest(classifier, Noise(pd.concat([table, table.head(1)])), tmp_path / "new", progress=False)


def share(manifest, folder):
    """What one of two processes does."""
    classifier = ZeroShotClassifier(tiny_model().eval(), tiny_tokenizer())
    data, file, process = Noise(load_manifest(manifest)), folder / "e.safetensors", torch.distributed.get_rank()
    found = embed_manifest(classifier, data, file, batch_size=1, block=2)
    (folder / f"read{process}").write_text(f"{len(data.read)} {found.embeddings.sum().item()}")
    with pytest.raises(ValueError, match="holds embeddings of something else. adapter:"):
        embed_manifest(ZeroShotClassifier(tiny_model("vision"), tiny_tokenizer()), data, file)


@pytest.mark.slow
def test_processes_share_the_work(few, tmp_path):
    in_two_processes(tmp_path, share, few, tmp_path)
    (first, total), (second, same) = ((tmp_path / f"read{i}").read_text().split() for i in (0, 1))
    assert (first, second) == ("4", "3") and total == same
    alone = ZeroShotClassifier(tiny_model().eval(), tiny_tokenizer())
    data = Noise(load_manifest(few))
    found = embed_manifest(alone, data, tmp_path / "e.safetensors", progress=False)  # accepts what the two wrote
    assert not data.read and found.embeddings.sum().item() == float(total)


# --- the command -------------------------------------------------------------------------------------------


def test_the_command_writes_what_scores_like_the_volumes(few, tmp_path):
    table, mini = load_manifest(few).head(2), load_mini_base()
    write_manifest(table, tmp_path / "manifest.csv")
    data = CTReportDataset(table, mini.preprocess_config, tmp_path / "prepared")
    classifier = ZeroShotClassifier(mini.model, mini.tokenizer)
    scores = classifier.scores(torch.stack([data[i]["pixel_values"] for i in range(2)]))

    def run(*arguments):
        command = ["embed", str(tmp_path / "e.safetensors"), "--manifest", str(tmp_path / "manifest.csv")]
        return CliRunner().invoke(app, [*command, *arguments])

    done = run("--batch-size", "1")
    assert done.exit_code == 0 and "2 volumes, 96 numbers each" in done.stdout, done.output
    found = load_embeddings(tmp_path / "e.safetensors", describe(mini.model, mini.preprocess_config))
    np.testing.assert_allclose(classifier.scores_from_embeddings(found.embeddings), scores, atol=1e-5)

    adapted = tmp_path / "adapter"
    save_adapter(add_lora(load_mini_base().model, "paper", r=2), adapted)
    done = run("--adapter", str(adapted))
    assert done.exit_code == 1 and "holds embeddings of something else. adapter: 'none' there" in done.stderr
    save_adapter(tiny_model(), tmp_path / "other")
    done = run("--adapter", str(tmp_path / "other"))
    assert done.exit_code == 1 and "was made for another architecture" in done.stderr
    done = run("--split", "train")
    assert done.exit_code == 1 and "the manifest has no train studies" in done.stderr


def test_two_models_must_have_seen_the_same_studies():
    labels = np.random.default_rng(0).integers(0, 2, (80, 3)).astype(float)
    labels[3, 1] = np.nan
    one = Embedded(torch.zeros(80, 4), labels, np.arange(80), np.array([f"study{i}" for i in range(80)]))
    same_studies(one, replace(one, embeddings=torch.ones(80, 4), labels=labels.copy()))
    for change, message in (
        ({"studies": one.studies[np.r_[:5, 6, 5, 7:80]]}, "row 5: the embedding of one .* study5, .* study study6"),
        ({"patients": np.where(np.arange(80) == 2, 99, one.patients)}, "study study2: patient 2 for one model, 99 for"),
        ({"labels": np.nan_to_num(labels)}, r"study study3: labels \[.*nan.*\] for one model, \[.*0.0.*\] for the"),
        ({"studies": one.studies[1:]}, "one embedding of one model for each .* is needed, but they are 80 and 79"),
    ):
        with pytest.raises(ValueError, match=message):
            same_studies(one, replace(one, **change))
