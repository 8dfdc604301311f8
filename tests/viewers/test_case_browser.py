"""The case browser: its numbers are those of the classifier, bad files and sentences leave it alive."""

import re
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scan_files import to_nifti
from tiny import randomise_adapter, tiny_model, tiny_tokenizer

from medctkit.cohort.dataset import CTReportDataset
from medctkit.cohort.manifest import load_manifest, study_from_row, write_manifest
from medctkit.findings import FINDINGS
from medctkit.scans.preprocessing import PreprocessConfig
from medctkit.viewers import case_browser
from medctkit.viewers.case_browser import CaseBrowser, probability_table
from medctkit.viewers.cases import Cases, Sentence
from medctkit.zero_shot.classifier import ZeroShotClassifier

MANIFEST = Path(__file__).resolve().parents[2] / "data_manifest.csv"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def rows():
    """Five phantoms."""
    return load_manifest(MANIFEST)[:5]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def models():
    """A tiny model before and after some training, which here is noise in its adapter."""
    return {"base": tiny_model().eval(), "adapted": randomise_adapter(tiny_model().eval(), std=1, seed=1)}


@pytest.fixture(scope="module")
def config(models):
    return models["base"].preprocess_config


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def cases(rows, models, tokenizer, config, cache):
    found = Cases(rows, models, tokenizer, config, cache)
    found.embed(batch_size=2)
    return found


@pytest.fixture(scope="module")
def mixed(rows, tmp_path_factory):
    """The phantoms, a real scan whose labels are partly unknown, and two files that cannot be read."""
    folder = tmp_path_factory.mktemp("scans")
    scan = study_from_row(rows.iloc[0], (40, 60, 60)).volume
    to_nifti(folder / "real.nii.gz", scan)
    (folder / "broken.nii.gz").write_bytes(b"no scan")
    extra = []
    for name in ("real", "broken", "missing"):
        row = rows.iloc[0].to_dict() | {"study": name, "patient": name, "hospital": "mine <b>", "seed": None}
        row |= {"path": str(folder / f"{name}.nii.gz"), "checksum": None, "Lung nodule": None, "Emphysema": 1}
        extra.append(row | {"report": "No <script> here."})
    table = pd.concat([rows, pd.DataFrame(extra)], ignore_index=True)
    return load_manifest(write_manifest(table, folder / "manifest.csv"))


# --- numbers ----------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_classifier(cases, rows, models, tokenizer, config, cache):
    dataset = CTReportDataset(rows, config, cache)
    for name, model in models.items():
        classifier = ZeroShotClassifier(model, tokenizer)
        seen = classifier.embed(dataset, progress=False)
        np.testing.assert_allclose(cases.embeddings[name], seen.embeddings, atol=1e-6)
        expected = classifier.scores_from_embeddings(seen.embeddings)
        np.testing.assert_allclose(cases.probabilities[name], expected, atol=1e-6)
    assert not cases.failures
    np.testing.assert_array_equal(cases.labels, rows[list(FINDINGS)])


def test_studies_are_sorted_by_how_much_the_models_disagree(cases, rows):
    base, adapted = (cases.probabilities[name].astype(float) for name in ("base", "adapted"))
    found = cases.ordered()
    expected = np.abs(base - adapted).mean(1)
    assert found.index.tolist() == np.argsort(-expected).tolist()
    np.testing.assert_allclose(found.sort_index(), expected, rtol=1e-5)
    assert (expected > 1e-4).all()
    one = cases.ordered(finding="Emphysema")
    np.testing.assert_allclose(one.sort_index(), np.abs(base - adapted)[:, FINDINGS.index("Emphysema")], rtol=1e-5)
    wrong = cases.ordered("error of adapted")
    np.testing.assert_allclose(wrong.sort_index(), np.abs(adapted - rows[list(FINDINGS)]).mean(axis=1), rtol=1e-5)
    named = cases.ordered("study")
    assert [cases.rows[i]["study"] for i in named.index] == sorted(rows["study"])


def test_a_filter_keeps_the_studies_with_that_label(cases, rows):
    finding = next(name for name in FINDINGS if 0 < rows[name].sum() < len(rows))
    for presence, label in (("present", 1), ("absent", 0)):
        kept = cases.ordered("study", finding, presence).index
        assert sorted(kept) == np.flatnonzero(rows[finding] == label).tolist()
    assert not len(cases.ordered("study", finding, "unknown"))


def test_embeddings_are_kept_and_not_computed_again(cases, rows, models, tokenizer, config, cache, monkeypatch):
    monkeypatch.setattr(ZeroShotClassifier, "embed", None)  # would fail when called
    again = Cases(rows[::-1], models, tokenizer, config, cache)  # found by content, whatever the order
    assert "0 of 10 embeddings are to be computed, 0 volumes to be prepared first" in again.cost()
    again.embed()
    for name in models:
        assert torch.equal(again.embeddings[name].flip(0), cases.embeddings[name])
    other = Cases(rows, {"other": tiny_model(preset="vision")}, tokenizer, config, cache, limit=3)
    assert "3 studies, 1 model (other): 3 of 3 embeddings are to be computed, 0 volumes" in other.cost()


def test_an_interrupted_run_goes_on(rows, models, tokenizer, config, tmp_path, monkeypatch):
    cases = Cases(rows, models, tokenizer, config, tmp_path)
    assert "10 of 10 embeddings are to be computed, 5 volumes to be prepared first" in cases.cost()
    whole = CTReportDataset.__getitem__

    def stopped(dataset, index):
        if index == 3:
            raise KeyboardInterrupt
        return whole(dataset, index)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(CTReportDataset, "__getitem__", stopped)
        cases.embed(batch_size=2)
    again = Cases(rows, models, tokenizer, config, tmp_path)
    assert "6 of 10 embeddings are to be computed, 2 volumes" in again.cost()
    again.embed(batch_size=2)
    assert "0 of 10" in again.cost() and not any(e.isnan().any() for e in again.embeddings.values())


def test_a_sentence_with_its_negation_is_a_prompt_pair(cases):
    found = cases.score("Pleural effusion is present.", "Pleural effusion is not present.")
    for name, values in found.values.items():
        expected = cases.probabilities[name][:, FINDINGS.index("Pleural effusion")]
        np.testing.assert_allclose(values, expected, atol=1e-6)


def test_a_sentence_alone_has_a_cosine_and_a_place_among_the_studies(cases, models, tokenizer):
    found = cases.score(" there is emphysema ")
    assert found.tokens == ("there", "is", "emphysema")
    assert found.unknown == () and found.words == 1
    words = tokenizer(["there is emphysema"], return_tensors="pt")
    for name, model in models.items():
        with torch.no_grad():
            text = model.encode_text(words["input_ids"], words["attention_mask"])[0]
        values = (cases.embeddings[name] @ text).numpy()
        np.testing.assert_allclose(found.values[name], values, atol=1e-6)
    told = Sentence("cosine", {"base": np.array([0.3, -0.1, np.nan, 0.7, 0.3])}, ())
    shares = [told.share_below("base", i) for i in range(5)]
    assert shares == pytest.approx([1 / 3, 0, np.nan, 1, 1 / 3], nan_ok=True), "ties are not below; unknown is left out"


def test_bad_input_is_refused(rows, models, tokenizer, config, cases):
    given = dict(manifest=rows, models=models, tokenizer=tokenizer, preprocess_config=config)
    coarse = PreprocessConfig((45, 22.5, 22.5), (8, 16, 16))
    for error, message, changes in (
        (TypeError, r"models: expected a dict such as \{'base': model\}, got \[\]", {"models": []}),
        (ValueError, r"sees volumes of \(8, 32, 32\) voxels", {"preprocess_config": coarse}),
        (FileNotFoundError, "no manifest at nowhere.csv", {"manifest": "nowhere.csv"}),
    ):
        with pytest.raises(error, match=message):
            Cases(**given | changes)
    for message, wrong in (
        ("by='beauty': expected one of disagreement, error of base, error of adapted", {"by": "beauty"}),
        ("finding='Cough': expected one of None, Medical material", {"finding": "Cough"}),
        ("presence='present' needs a finding", {"presence": "present"}),
    ):
        with pytest.raises(ValueError, match=message):
            cases.ordered(**wrong)
    with pytest.raises(ValueError, match="type a sentence"):
        cases.score("  ", "no")


# --- the widget -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Phantoms are made in no time."""
    monkeypatch.setattr("medctkit.viewers.cases.VIEW_SHAPE", (20, 32, 32))


@pytest.fixture
def browser(mixed, models, tokenizer, config, cache):
    made = CaseBrowser(mixed, models, tokenizer, config, cache, height=120)
    yield made
    made.close()


def pick(browser, study):
    browser.study.value = [row["study"] for row in browser.cases.rows].index(study)


def test_the_browser_says_what_it_costs_and_shows_the_study_with_the_largest_disagreement(
    mixed, models, tokenizer, config, cache, capsys
):
    browser = CaseBrowser(mixed, models, tokenizer, config, cache, height=120)
    said = capsys.readouterr().out
    assert "8 studies, 2 models (base, adapted): 6 of 16 embeddings are to be computed, 3 volumes" in said
    assert browser.study.value == browser.cases.ordered().index[0]
    study = browser.cases.rows[browser.study.value]["study"]
    assert study in browser.facts.value and browser.scan.children == (browser.slices.widget,)
    assert browser.study.options[0][0].endswith(study) and browser.study.options[-1][0].startswith("unread")
    assert "application/vnd.jupyter.widget-view+json" in browser._repr_mimebundle_()
    browser.close()
    assert browser.study.comm is None and browser.slices.scans == (), "a control that lives on would keep the models"


def test_picking_a_study_shows_its_scan_report_labels_and_probabilities(browser, rows):
    for row in rows.to_dict("records")[:2]:
        pick(browser, row["study"])
        index = browser.study.value
        assert row["report"].split(".")[0] in browser.facts.value
        shown = browser.slices.scans[0].volume
        study = study_from_row(row, shown.shape)
        np.testing.assert_array_equal(shown.hu, study.volume.hu)
        spoken = re.findall(r'aria-label="([^"]+)"', browser.table.value)
        assert len(spoken) == 18
        for line in spoken:
            finding, label, base, adapted = re.fullmatch(r"(.+), (\w+): base (.+), adapted (.+)", line).groups()
            assert label == ("present" if row[finding] else "absent")
            for name, text in (("base", base), ("adapted", adapted)):
                assert float(text) == pytest.approx(
                    browser.cases.probabilities[name][index, FINDINGS.index(finding)], abs=0.006
                )


def test_the_list_is_walked_by_buttons_and_round_its_ends(browser):
    listed = [i for _, i in browser.study.options]
    browser.next.click()
    assert browser.study.value == listed[1]
    assert browser.cases.rows[listed[1]]["study"] in browser.facts.value
    browser.previous.click()
    browser.previous.click()  # the last one cannot be read
    assert browser.study.value == listed[-1] and "can't be shown" in browser.messages.text
    browser.next.click()
    assert browser.study.value == listed[0] and not browser.messages.text
    browser.finding.value = "Mosaic attenuation pattern"
    browser.presence.value = "unknown"
    browser.next.click()
    assert browser.study.value is None


def test_a_real_scan_with_unknown_labels_is_shown_and_its_text_is_escaped(browser):
    pick(browser, "real")
    assert browser.slices.scans[0].volume.shape == (40, 60, 60) and not browser.messages.text
    assert "mine &lt;b&gt; hospital" in browser.facts.value and "No &lt;script&gt; here." in browser.facts.value
    assert "1 unknown" in browser.facts.value and "Lung nodule, unknown: base" in browser.table.value


@pytest.mark.parametrize(("study", "reason"), [("broken", "broken.nii.gz"), ("missing", "there is no such file")])
def test_a_study_that_cannot_be_read_gives_a_message_and_no_other_studys_scan(browser, rows, study, reason):
    pick(browser, study)
    assert f"study {study} can't be shown" in browser.messages.text and reason in browser.messages.text
    assert browser.scan.children == () and "base ?, adapted ?" in browser.table.value
    browser.stating.value = "there is emphysema"
    assert "<td>?</td><td>no other studies" in browser.scores.value
    pick(browser, rows["study"].iloc[1])
    assert not browser.messages.text and browser.scan.children == (browser.slices.widget,)


def test_sorting_and_filtering_change_the_list_and_keep_the_study_where_they_can(browser, monkeypatch):
    pick(browser, "real")
    with monkeypatch.context() as patched:
        patched.setattr(browser.cases, "view", None)  # fails when called: the scan is there already
        browser.sorting.value = "error of base"
    assert browser.cases.rows[browser.study.value]["study"] == "real"
    assert [i for _, i in browser.study.options] == browser.cases.ordered("error of base").index.tolist()
    assert "8 of 8 studies, with their error of base (mean of the findings)" in browser.count.value
    browser.finding.value = "Lung nodule"
    browser.presence.value = "unknown"
    assert {browser.cases.rows[i]["study"] for _, i in browser.study.options} == {"real", "broken", "missing"}
    browser.finding.value = "Mosaic attenuation pattern"  # known everywhere
    assert browser.study.value is None and "no study passes this filter" in browser.messages.text
    assert browser.scan.children == () and not browser.table.value
    browser.finding.value = case_browser.ALL
    assert browser.presence.value == "any" and len(browser.study.options) == 8 and browser.table.value
    assert not browser.messages.text


def test_a_sentence_is_scored_at_once_and_for_every_study_picked(browser, rows):
    pick(browser, rows["study"].iloc[0])
    browser.stating.value = "there is emphysema"
    first = browser.scores.value
    assert "cosine" in first and "% of the other 5 studies" in first and "there is emphysema</code>" in first
    browser.denying.value = "no emphysema"
    assert "probability" in browser.scores.value
    pick(browser, rows["study"].iloc[1])
    assert "probability" in browser.scores.value
    browser.denying.value = ""
    pick(browser, rows["study"].iloc[0])
    assert browser.scores.value == first
    browser.stating.value = "scan " * 40
    assert "has 40 tokens, the text encoder takes 32" in browser.typing.text and not browser.scores.value
    browser.stating.value = ""
    assert not browser.scores.value and not browser.typing.text


def test_words_that_the_model_does_not_know_are_told(browser):
    browser.stating.value = "lung nodule is there, zebra"
    assert "read in pieces: zebra." in browser.scores.value and "means little" not in browser.scores.value
    browser.denying.value = "no <b>giraffe</b> okapi"
    assert "zebra, b, giraffe, okapi." in browser.scores.value
    browser.stating.value = "there is a zebra in the lung"
    assert "words that the model does not know: the score means little" in browser.scores.value
    browser.stating.value, browser.denying.value = "there is emphysema", ""
    assert "medctkit-unknown" not in browser.scores.value


def test_a_study_picked_while_another_is_made_is_shown_whole(browser, rows, monkeypatch):
    """JupyterLab hands events to two threads."""
    first, second = [study for study in rows["study"] if study not in browser.facts.value][:2]
    made, picked, view = threading.Event(), threading.Event(), browser.cases.view

    def slow(index):
        found = view(index)
        if browser.cases.rows[index]["study"] == first:
            made.set()
            picked.wait(5)
        return found

    monkeypatch.setattr(browser.cases, "view", slow)
    worker = threading.Thread(target=pick, args=(browser, first))
    worker.start()
    made.wait(5)
    other = threading.Thread(target=pick, args=(browser, second))
    other.start()
    threading.Timer(0.2, picked.set).start()
    worker.join()
    other.join()
    assert second in browser.facts.value and not browser.messages.text
    index = browser.study.value
    assert browser.cases.rows[index]["study"] == second
    np.testing.assert_array_equal(browser.slices.scans[0].volume.hu, view(index)[0].hu)


def test_the_table_puts_the_largest_disagreement_first_and_marks_unknown():
    base, adapted, labels = np.full(18, 0.5), np.full(18, 0.5), np.zeros(18)
    base[3], adapted[3], labels[3], labels[5] = 0.2, 0.9, 1, np.nan
    shown = re.findall(r'aria-label="([^"]+)"', probability_table({"base": base, "adapted": adapted}, labels))
    assert shown[0] == "Pericardial effusion, present: base 0.20, adapted 0.90"
    assert "Hiatal hernia, unknown: base 0.50, adapted 0.50" in shown


def test_more_models_than_the_browser_tells_apart_are_refused():
    with pytest.raises(ValueError, match="5 models; the browser tells 4 apart"):
        CaseBrowser(None, dict.fromkeys("abcde"), None, None)
