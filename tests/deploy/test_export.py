"""An export computes what the model computes, for every batch, without torch; or is not written."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import PROMPTS as TINY_PROMPTS
from tiny import randomise_adapter, tiny_ct_clip, tiny_tokenizer
from typer.testing import CliRunner

from medctkit.cli import app
from medctkit.deploy import export as exporting
from medctkit.deploy.export import ExportDiffers, export
from medctkit.deploy.exported import FACTS, PROMPTS, VISION, Exported
from medctkit.experiments.adapt import Origin
from medctkit.lora.adapter import add_lora, save_adapter
from medctkit.model.base_model import load_mini_base
from medctkit.model.fingerprint import digests, vocabulary_of
from medctkit.zero_shot.classifier import ZeroShotClassifier


@pytest.fixture(scope="module")
def adapted():
    mini = load_mini_base()
    torch.manual_seed(0)
    return randomise_adapter(add_lora(mini.model, "paper", r=4), 0.1), mini.tokenizer


@pytest.fixture(scope="module")
def folder(adapted, tmp_path_factory):
    return export(*adapted, tmp_path_factory.mktemp("out") / "export", text=True)


@pytest.fixture
def traced_before(folder, monkeypatch):
    """The same model gives the same graph: it is copied, for to trace it takes the longest."""

    def copied(module, example, sizes, outputs, path):
        shutil.copy(folder / VISION, path)

    monkeypatch.setattr(exporting, "_save", copied)


@pytest.fixture(scope="module")
def volumes(adapted):
    shape = adapted[0].preprocess_config.shape
    return torch.randn(5, 1, *shape, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_scores_are_the_models(adapted, folder, volumes, batch):
    scores = ZeroShotClassifier(*adapted).scores(volumes[:batch])
    np.testing.assert_allclose(Exported(folder).scores(volumes[:batch].numpy()), scores, atol=1e-5)


@pytest.mark.slow
def test_it_runs_where_there_is_no_torch(folder, volumes, tmp_path):
    np.save(tmp_path / "volumes.npy", volumes.numpy())
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'transformers', 'monai', 'peft', 'scipy', 'pandas']))\n"
        "import numpy as np\n"
        "from medctkit.deploy.exported import Exported\n"
        f"print(Exported({str(folder)!r}).scores(np.load({str(tmp_path / 'volumes.npy')!r})).tolist())"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    np.testing.assert_allclose(json.loads(said), Exported(folder).scores(volumes.numpy()), atol=1e-6)


@pytest.mark.slow
def test_the_text_tower_answers_other_prompts(adapted, folder):
    import onnxruntime

    model, tokenizer = adapted
    session = onnxruntime.InferenceSession(folder / "text" / "text.onnx")
    for texts in (["Emphysema is seen."], ["One.", "Two nodules are seen.", "Three small nodules in both lungs."]):
        words = tokenizer(texts, padding=True, return_tensors="pt")
        given = {name: words[name].numpy() for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            expected = model.encode_text(words["input_ids"], words["attention_mask"]).numpy()
        np.testing.assert_allclose(session.run(None, given)[0], expected, atol=1e-5)


@pytest.mark.slow
def test_it_says_what_it_is(adapted, folder):
    model, tokenizer = adapted
    facts = json.loads((folder / FACTS).read_text())
    assert (facts["base"], facts["adapter"]) == digests(model) and facts["vocabulary"] == vocabulary_of(tokenizer)
    assert facts["input"]["shape"] == list(model.preprocess_config.shape)
    card = (folder / "README.md").read_text()
    assert facts["adapter"] in card and "not a medical device" in card


@pytest.mark.slow
@pytest.mark.usefixtures("traced_before")
def test_what_differs_is_not_written(adapted, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(ExportDiffers, match="a batch of 1: 0 of .* codes flipped"):
        export(*adapted, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_code_may_be_another_only_where_two_are_as_near(monkeypatch):
    vision = exporting.Vision(tiny_ct_clip()).eval()
    shape = (1, *vision.model.preprocess_config.shape)

    class Other:  # one token of each first volume has another code
        def embeds_and_codes(self, volumes):
            with torch.no_grad():
                embeds, codes = (y.numpy().copy() for y in vision(torch.from_numpy(volumes)))
            embeds[0] += 0.1
            codes[0, 3] += 1 if codes[0, 3] == 0 else -1
            return embeds, codes

    with pytest.raises(ExportDiffers, match="a batch of 1: 1 of .* codes flipped"):
        exporting.prove(Other(), vision, shape)
    monkeypatch.setattr(exporting, "TIE", 2.0)  # now any two are
    assert exporting.prove(Other(), vision, shape)["ties"] == 3
    assert exporting.prove(Other(), vision, shape)["largest"] == 0


@pytest.mark.slow
def test_an_export_with_a_fixed_batch_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_sizes", lambda: None)
    with pytest.raises(ExportDiffers, match="a batch of 1 does not run"):
        export(tiny_ct_clip(), tiny_tokenizer(), tmp_path / "out", TINY_PROMPTS)


@pytest.mark.slow
def test_folders_are_not_mixed_or_taken(adapted, folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="something else"):
        export(*adapted, tmp_path)
    other = tmp_path / "copy"
    other.mkdir()
    for name in (VISION, PROMPTS):
        (other / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(FileNotFoundError, match=FACTS):
        Exported(other)


@pytest.mark.slow
@pytest.mark.parametrize("name", [VISION, PROMPTS, FACTS])
def test_a_changed_byte_of_any_file_is_found(folder, tmp_path, name):
    other = shutil.copytree(folder, tmp_path / "copy")
    for at in np.random.default_rng(0).integers(0, (other / name).stat().st_size, 3):
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 1
        (other / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not as it was written"):
            Exported(other)


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    lambda facts: facts | {"digest": "0"},
    lambda facts: facts | {"findings": facts["findings"][::-1]},
    lambda facts: {name: facts[name] for name in facts if name != "files"},
    lambda facts: facts | {"files": {}},
    lambda facts: [],
])  # fmt: skip
def test_facts_of_another_export_are_found(folder, tmp_path, change):
    other = shutil.copytree(folder, tmp_path / "copy")
    (other / FACTS).write_text(json.dumps(change(json.loads((folder / FACTS).read_text()))))
    with pytest.raises(ValueError, match=f"{FACTS} is not as it was written"):
        Exported(other)


@pytest.mark.slow
def test_wrong_input_is_refused(folder, volumes):
    exported = Exported(folder)
    with pytest.raises(ValueError, match="expected float32"):
        exported.scores(volumes.double().numpy())
    with pytest.raises(ValueError, match=r"\(batch, 1, "):
        exported.scores(volumes[:, 0].numpy())
    with pytest.raises(FloatingPointError, match="not finite"):
        exported.scores(np.full_like(volumes[:1].numpy(), np.nan))
    with pytest.raises(ValueError, match="expected -1 to 1: HU / 1000, cut"):
        exported.scores(1000 * volumes[:1].numpy())


@pytest.mark.slow
@pytest.mark.usefixtures("traced_before")
def test_the_command_exports_a_finished_run(adapted, tmp_path, monkeypatch):
    save_adapter(adapted[0], tmp_path / "run" / "adapter")
    monkeypatch.setattr(Origin, "of", lambda folder: Origin())  # what a run leaves behind is tested elsewhere
    done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / FACTS).read_text())["adapter"] == digests(adapted[0])[1]


def test_a_missing_extra_is_told_in_one_line_before_anything_is_done(adapted, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"needs onnxscript.*pip install 'medctkit\[deploy\]'$"):
        export(*adapted, tmp_path / "out")
    assert not list(tmp_path.iterdir())
