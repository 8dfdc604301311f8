"""Reports: true to the labels, varied, and never the prompts of the evaluation."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medctkit.findings import FINDINGS
from medctkit.phantom.places import told
from medctkit.phantom.registry import UNTRUE_WITH
from medctkit.phantom.report_text import PREDICATES, finding_sentences, write_report
from medctkit.phantom.study import draw_labels, generate

HOSPITALS = ("source", "target")
DETAILS = {
    name: dict(side="left", location="lower lobe", size_mm=14, count=2, severity="moderate", kind="linear")
    for name in FINDINGS
}
VERB = re.compile(rf"\b({'|'.join(PREDICATES)})\b")  # the source hospital's reports use them by turns
EVALUATION = [t.format(f).lower() for f in FINDINGS for t in ("{} is present.", "{} is not present.")]


def sentences(report):
    return {VERB.sub("seen", s) + "." for s in report.rstrip(".").split(". ")}


def wordings(finding, present, hospital):
    return {VERB.sub("seen", s) for s in finding_sentences(finding, present, hospital)}


@given(st.integers(0, 10**6), st.sampled_from(HOSPITALS), st.booleans())
@settings(max_examples=150, deadline=None)
def test_no_report_holds_an_evaluation_prompt_or_an_open_slot(seed, hospital, with_details):
    labels = draw_labels(seed, str(seed))
    report = write_report(labels, DETAILS if with_details else {}, hospital, np.random.default_rng(seed))
    assert not any(prompt in report.lower() for prompt in EVALUATION)
    assert not set("{}") & set(report) and "  " not in report and " ." not in report and " ," not in report
    assert len(report.split()) <= 190


@pytest.mark.parametrize("hospital", HOSPITALS)
@pytest.mark.parametrize("finding", FINDINGS)
def test_wordings_are_many_and_none_is_an_evaluation_prompt(finding, hospital):
    stated, denied = (finding_sentences(finding, present, hospital) for present in (True, False))
    assert len(set(stated)) >= 4 and len(set(denied)) >= 3 and not set(stated) & set(denied)
    assert not any("present" in sentence for sentence in stated + denied)  # a word of the prompts of the evaluation


@given(st.integers(0, 10**6), st.sampled_from(HOSPITALS))
@settings(max_examples=150, deadline=None)
def test_a_report_never_contradicts_the_labels(seed, hospital):
    labels = draw_labels(seed, str(seed))
    report = write_report(labels, {}, hospital, np.random.default_rng(seed))
    for name in FINDINGS:
        assert not sentences(report) & wordings(name, not labels[name], hospital), name


@pytest.mark.parametrize("hospital", HOSPITALS)
def test_present_findings_are_mentioned_and_some_absences_too(hospital):
    mentioned, present, denied = 0, 0, 0
    for seed in range(300):
        labels = draw_labels(seed, str(seed))
        report = write_report(labels, {}, hospital, np.random.default_rng(seed))
        said = sentences(report)
        for name in FINDINGS:
            if labels[name]:
                present += 1
                mentioned += bool(said & wordings(name, True, hospital))
            else:
                denied += bool(said & wordings(name, False, hospital))
    assert 0.88 < mentioned / present <= 1
    assert denied / 300 > (2.5 if hospital == "source" else 1.2)


def test_reports_vary_and_the_same_generator_writes_the_same():
    labels = draw_labels(3, "3")
    reports = [write_report(labels, DETAILS, "source", np.random.default_rng(s)) for s in range(300)]
    assert len(set(reports)) > 290
    assert reports[5] == write_report(labels, DETAILS, "source", np.random.default_rng(5))


@pytest.mark.slow
def test_hospitals_share_a_language_but_not_a_habit():
    words, lengths = {}, {}
    for hospital in HOSPITALS:
        reports = [generate(s, hospital, shape=(8, 16, 16)).report for s in range(150)]
        words[hospital] = set(" ".join(reports).lower().replace(".", "").replace(",", "").split())
        lengths[hospital] = np.mean([len(r.split()) for r in reports])
    shared = len(words["source"] & words["target"]) / len(words["source"] | words["target"])
    assert 0.25 < shared < 0.8
    assert lengths["target"] < 0.7 * lengths["source"]


def drawn_details(labels, rng):
    """What the painters tell, without drawing."""
    details = {}
    for name in (n for n, present in labels.items() if present):
        count = int(rng.integers(1, 5))
        lobes = [int(lobe) for lobe in rng.integers(1, 6, count)]
        details[name] = dict(told(lobes), count=count, size_mm=int(rng.integers(5, 30)))
    return details


@pytest.mark.parametrize("hospital", HOSPITALS)
def test_a_thousand_reports_agree_with_what_was_drawn_and_with_themselves(hospital):
    """One is not called two, nothing is bilateral that is not, nothing is denied that another sentence states."""
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        labels = draw_labels(seed, str(seed))
        details, contrast = drawn_details(labels, rng), bool(rng.random() < 0.5)
        report = write_report(labels, details, hospital, rng, contrast=contrast)
        said = report.rstrip(".").split(". ")
        found = {name: detail["count"] for name, detail in details.items()}
        words = report.lower()
        assert not re.search(r"\bis (not )?present\b", words), report  # the prompts of the evaluation
        if found.get("Lung nodule") == 1:
            assert not re.search(r"(two|three|four|several) pulmonary nodules|nodules (are|x)", words), report
        elif "Lung nodule" in found:
            number = re.search(r"(two|three|four) pulmonary nodules|nodules x(\d)", words)
            if number:
                assert (number[1] or number[2]) in (
                    str(found["Lung nodule"]),
                    {2: "two", 3: "three", 4: "four"}[found["Lung nodule"]],
                )
            assert not re.search(r"\b(an? (lung )?nodule|a solid nodule|spn)\b", words), report
        assert not re.search(r"(both|bilateral) (lingula|middle lobe)", words), report
        if labels["Coronary artery wall calcification"] or labels["Arterial wall calcification"]:
            assert "vessels free of calcium" not in words
        for sentence, others in UNTRUE_WITH.items():
            assert sentence.rstrip(".") not in said or not any(labels[name] for name in others), report
        assert contrast or "contrast opacification" not in words
        for name in FINDINGS:
            assert not sentences(report) & wordings(name, not labels[name], hospital), name


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="hospital='mars' is unknown"):
        finding_sentences("Emphysema", True, "mars")
    with pytest.raises(ValueError, match="unknown finding 'Broken rib'"):
        finding_sentences("Broken rib", True, "source")
    with pytest.raises(ValueError, match="18 findings as keys.*Emphysema"):
        write_report({f: 0 for f in FINDINGS if f != "Emphysema"}, {}, "source", np.random.default_rng(0))
