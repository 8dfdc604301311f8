"""The reproduction report on made-up measurements: verdicts, tables, figures, and the page itself."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
from written_pages import Page

from medctkit.experiments.adapt import Origin
from medctkit.experiments.audit import Defect
from medctkit.experiments.measure import Home, Measurement
from medctkit.experiments.report import claims as report
from medctkit.experiments.report import figures as report_figures
from medctkit.findings import FINDINGS
from medctkit.metrics.scores import compare, evaluate

MADE = {"seed": 3, "device": "CPU, 2 threads", "versions": {"torch": "2.0"}, "commit": "abc1234", "data": "phantom"}
MADE |= {"command": "medctkit evaluate runs/<a> --seed 3"}


def measurement(gain=0.3, one_class=False, **changes):
    rng = np.random.default_rng(0)
    labels = (rng.random((120, 18)) < 0.3).astype(float)
    if one_class:
        labels[:, 4] = 0
    noise = rng.random((120, 18))
    scores = {"base": noise, "adapted": np.clip(noise + gain * (labels - 0.5), 0, 1)}
    patients = np.array([f"p{i // 2}" for i in range(120)])
    tables = {name: evaluate(labels, s, patients, 0.5, resamples=100) for name, s in scores.items()}
    rows = [
        {"set": kind, "model": m, "auroc": 0.6, "auroc_low": 0.5, "auroc_high": 0.7} for kind in "ab" for m in scores
    ]
    difference = compare(labels, scores["base"], scores["adapted"], patients, resamples=100)
    made = Measurement(
        labels=labels,
        patients=patients,
        studies=np.array([f"s{i}" for i in range(120)]),
        scores=scores,
        tables=tables,
        difference=difference,
        prompts=pd.DataFrame(rows),
        retrieval=pd.DataFrame(
            [("recall@5", model, 0.25, 0.2, 0.3, 0.0417) for model in scores],
            columns=["search", "model", "value", "low", "high", "chance"],
        ),
        adapter={"vision": 8, "text": 6, "trainable": 100, "bytes": 500, "base_parameters": 1000},
        defects=[
            Defect("unused bootstrap", "width", "of AUROC", 0.0, 0.0471, "draws", "use", "why", "source"),
            Defect("weighted | F1", "mean F1", "F1", 0.6, 0.3, "averages", "macro", "why", "source"),
        ],
        origin=Origin(),
        made_with=MADE,
        home=Home("source", tables, difference),
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def measured():
    return measurement()


def by_claim(measured):
    return {claim.claim: claim for claim in report.claims(measured)}


def test_every_claim_of_the_paper_has_a_row_and_a_verdict(measured):
    found = by_claim(measured)
    assert list(found) == [
        "size of the model", "trainable parameters", "share that is trained", "both encoders are adapted",
        "size of a checkpoint", "mean AUROC, base -> LoRA", "mean AUROC on CT-RATE", "accuracy, base -> LoRA",
        "accuracy on CT-RATE", "macro-F1, base -> LoRA", "macro-F1 on CT-RATE",
    ]  # fmt: skip
    assert {c.verdict for c in found.values()} == {report.EXACT, report.MINIATURE, report.GATED, report.INCOMPARABLE}
    gain = found["accuracy, base -> LoRA"]
    assert gain.verdict == report.INCOMPARABLE and "; always no: " in gain.here and "alone shows nothing" in gain.why
    assert all(claim.why and claim.command for claim in found.values())
    assert "438,148,761 + 1,671,168 = 439.8 M" in found["size of the model"].here
    assert "154,447,184 of them never take part" in found["size of the model"].why
    assert found["trainable parameters"].here == "1,671,168" and found["share that is trained"].here == "0.380 %"
    assert found["size of a checkpoint"].here.startswith("262 times: 6.68 MB against 1.75 GB")
    assert "74 times 6.68 MB are 495 MB" in found["size of a checkpoint"].why
    assert "medctkit download" in found["mean AUROC on CT-RATE"].command


def test_the_verdict_follows_the_measurement():
    assert by_claim(measurement(gain=0.0))["mean AUROC, base -> LoRA"].verdict == report.NOT
    worse = by_claim(measurement(gain=-0.3))["mean AUROC, base -> LoRA"]
    assert worse.verdict == report.NOT and "holds 0 or lies below it" in worse.why
    one_side = measurement(adapter={"vision": 0, "text": 6, "trainable": 1, "bytes": 1, "base_parameters": 1})
    assert by_claim(one_side)["both encoders are adapted"].verdict == report.NOT
    own = measurement(made_with=MADE | {"data": "real CT"}, origin=Origin("weights.pt", "words", "north"))
    found = by_claim(own)["mean AUROC, base -> LoRA"]
    assert (found.verdict, found.why) == (report.INCOMPARABLE, "other patients than the paper's")


@pytest.mark.parametrize(
    ("gain", "low", "verdict", "why"),
    [
        (0.3, None, report.NOT, "outside the interval of ours"),
        (0.08, None, report.COMPATIBLE, "inside the interval of ours"),
        (0.08, -0.01, report.COMPATIBLE, "inside the interval of ours, and so does 0"),
    ],
)
def test_on_ct_rate_the_papers_gain_has_to_lie_in_the_interval_which_may_hold_much_else(gain, low, verdict, why):
    there = measurement(gain, made_with=MADE | {"data": "CT-RATE"}, origin=Origin("CT-CLIP_v2.pt", "words", None))
    if low is not None:
        there.difference.loc["mean", "auroc_low"] = low
    found = by_claim(there)
    claim = found["mean AUROC, base -> LoRA"]
    assert claim.verdict == verdict and claim.why.endswith(why)
    assert "mean AUROC on CT-RATE" not in found


def test_published_results_of_different_labels_are_in_different_tables():
    tables = dict(report.published())
    assert set(tables) == {"18 labels, CT-RATE", "16 labels, RAD-ChestCT", "16 labels, CT-RATE"}
    assert sum(map(len, tables.values())) == 8
    assert {"0.707 (weighted)", "0.369 (macro)"} <= set(tables["18 labels, CT-RATE"]["f1"])


@pytest.mark.slow
def test_the_page_is_self_contained_and_says_where_numbers_come_from(measured, tmp_path):
    path = report.write_report(measured, tmp_path / "new")
    text = path.read_text()
    tags = Page(text).tags
    sources = [attributes[name] for _, attributes, _ in tags for name in ("src", "href") if name in attributes]
    assert len(sources) == 6 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(len(attributes["alt"]) > 30 for tag, attributes, _ in tags if tag == "img")
    assert "PHANTOM" in text and "12 points under" in text
    assert text.count("medctkit evaluate runs/&lt;a&gt; --seed 3") > 8 and "<a>" not in text
    assert "commit abc1234, CPU, 2 threads" in text
    markdown = (tmp_path / "new" / "report.md").read_text()
    for name in re.findall(r"\]\((report_figures/.*?)\)", markdown):
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")
    for row in [line for line in markdown.splitlines() if line.startswith("| size of the model")]:
        assert row.count(" | ") == 6
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["report.html", "report.md", "report_figures"]
    assert report.write_report(measured, tmp_path / "again").read_text() == text, "the same measurement, the same page"


def test_a_finding_with_one_class_is_named_in_tables_and_figures():
    measured = measurement(one_class=True)
    table = report.metrics_table(measured, "base").set_index("finding")
    assert table.loc[FINDINGS[4], "AUROC"].startswith("no value: one class only")
    assert (report.difference_table(measured).set_index("finding").loc[FINDINGS[4]] == "-").all()
    panel = report_figures.roc_curves(measured).axes[4]
    assert [text.get_text() for text in panel.texts] == ["one class only"]
    report_figures.forest(measured), report_figures.score_histograms(measured), report_figures.calibration(measured)


def test_optimistic_thresholds_are_marked(measured):
    flattered = evaluate(
        measured.labels, measured.scores["base"], measured.patients, "roc-corner-on-test", resamples=50
    )
    marked = dataclasses.replace(measured, tables=measured.tables | {"base": flattered})
    texts = [block.text for block in report.blocks(marked) if block.kind == "table"]
    assert sum("OPTIMISTIC" in text for text in texts) == 1


def test_the_audit_is_a_figure_and_a_table_of_the_page(measured):
    table = report.defects_table(measured)
    assert table["name"].tolist() == ["unused bootstrap", "weighted | F1"]
    assert table.loc[0, ["public", "right"]].tolist() == ["0 of AUROC", "0.0471 of AUROC"]
    page = report.blocks(measured)
    assert r"weighted \| F1" in report.to_markdown(page)
    assert [block.name for block in page if block.kind == "figure"][-1] == "audit"


def test_retrieval_is_beside_chance_and_left_out_where_there_is_none(measured):
    row = report.retrieval_table(measured).iloc[0].tolist()
    assert row == ["recall@5", "0.250 [0.200, 0.300]", "0.250 [0.200, 0.300]", "0.042"]
    without = dataclasses.replace(measured, retrieval=measured.retrieval.iloc[:0])
    headings = [[block.text for block in report.blocks(m) if block.kind == "heading"] for m in (measured, without)]
    assert "Retrieval" in headings[0] and "Retrieval" not in headings[1]


def test_what_it_cost_at_home_is_a_section_with_a_verdict_and_p_values_at_their_floor_are_bounds(measured):
    shown = report.home_table(measured.home).set_index("mean over findings")
    assert shown.index.tolist() == ["mean AUROC", "calibration error", "Brier score"]
    mean = measured.difference.loc["mean"]
    ends = f"{mean['brier']:+.3f} [{mean['brier_low']:+.3f}, {mean['brier_high']:+.3f}]"
    assert shown.loc["Brier score", "adapted minus base"] == ends and shown.loc["mean AUROC", "p"] == "<= 0.02"
    assert "<= 0.36" in report.difference_table(measured)["p, Holm"].tolist(), "18 tests"
    page = report.blocks(measured)
    texts = [block.text for block in page]
    place = texts.index("What it cost at home")
    assert "hospital source" in texts[place + 1] and "it gained there too" in texts[place + 1]
    assert "What it cost at home" not in [b.text for b in report.blocks(dataclasses.replace(measured, home=None))]
    worse = measurement(gain=-0.3)
    assert "it lost there" in [block.text for block in report.blocks(worse)][place + 1]


def test_figures_draw_what_was_measured(measured):
    left, right = report_figures.forest(measured).axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names[-1] == "mean of findings" and len(names) == 19
    gains = measured.difference.drop(index="mean")["auroc"].sort_values()
    assert names[0].startswith(gains.index[0]) and names[-2].startswith(gains.index[-1])
    assert len(right.containers[0].lines[0].get_xdata()) == 19
    panels = report_figures.roc_curves(measured).axes
    assert [axes.get_title() for axes in panels] == list(FINDINGS)
    value = measured.tables["adapted"].loc[FINDINGS[0], "auroc"]
    assert f"{value:.2f}" in [text.get_text() for text in panels[0].texts]
