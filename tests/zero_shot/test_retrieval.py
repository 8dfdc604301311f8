"""Retrieval against slow ways of counting, scikit-learn, and what a random order gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from tiny import tiny_model, tiny_tokenizer

from medctkit.zero_shot import retrieval
from medctkit.zero_shot.classifier import Embedded
from medctkit.zero_shot.retrieval import (
    EmbeddedReports,
    embed_reports,
    report_ranks,
    report_to_volume,
    volume_to_volume,
)


def unit(values):
    return torch.nn.functional.normalize(torch.as_tensor(values, dtype=torch.float32), dim=-1)


def random_volumes(n=24, p=8, seed=0, patients=None):
    rng = np.random.default_rng(seed)
    names = np.array([f"s{i}" for i in range(n)])
    patients = np.array([f"p{i}" for i in range(n)]) if patients is None else patients
    labels = (rng.random((n, 18)) < 0.4).astype(np.float32)
    return Embedded(unit(rng.normal(size=(n, p))), labels, patients, names)


def reports_of(volumes, embeddings=None, texts=None):
    embeddings = volumes.embeddings if embeddings is None else embeddings
    return EmbeddedReports(embeddings, texts or tuple(f"report {s}" for s in volumes.studies), volumes.studies, 0)


# --- report to volume ------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 10))
def test_ranks_are_those_of_counting_one_by_one(seed, n, different):
    rng = np.random.default_rng(seed)
    volumes = random_volumes(n, seed=seed)
    texts = tuple(f"report {i}" for i in rng.integers(different, size=n))
    reports = reports_of(volumes, unit(rng.normal(size=(n, 8))), texts)
    similarity = (reports.embeddings @ volumes.embeddings.T).numpy()
    for i, rank in enumerate(report_ranks(reports, volumes)):
        places = [j for j in sorted(range(n), key=lambda j: -similarity[i, j])]
        assert rank == 1 + next(place for place, j in enumerate(places) if texts[j] == texts[i])


def test_recall_by_hand():
    # cosines of report 0 with volumes 0, 1, 2: 1, 0.8, 0; of report 1: 0.6, 0, 0.8 (third); of report 2: 0, 0.6, 1
    volumes = Embedded(
        unit([[1, 0], [0.8, 0.6], [0, 1]]), np.zeros((3, 18)), np.array(list("abc")), np.array(list("xyz"))
    )
    reports = reports_of(volumes, unit([[1, 0], [0.6, -0.8], [0, 1]]))
    assert report_ranks(reports, volumes).tolist() == [1, 2, 1]
    table = report_to_volume(reports, volumes, ks=(1, 2))
    assert table["recall"].tolist() == pytest.approx([2 / 3, 1])
    assert table["chance"].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert table.loc[1, "low"] <= 2 / 3 <= table.loc[1, "high"] and table.loc[2, "low"] == table.loc[2, "high"] == 1


def test_two_reconstructions_with_one_report_are_right_for_each_other():
    volumes = random_volumes(4)
    volumes = replace(volumes, embeddings=unit([[1, 0, 0], [0, 1, 0], [0, 0.9, 0.1], [0, 0, 1]]))
    reports = reports_of(volumes, unit([[0, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]]), ("scan a", "scan a", "b", "c"))
    assert report_ranks(reports, volumes).tolist() == [1, 1, 4, 1]  # ties come first
    assert report_ranks(replace(reports, reports=tuple("abcd")), volumes)[0] > 1
    chance = report_to_volume(reports, volumes, ks=(1, 2))["chance"]
    assert chance.tolist() == pytest.approx([(2 + 2 + 1 + 1) / 16, (2 * 5 / 6 + 2 * 1 / 2) / 4])


def test_a_model_that_sees_no_difference_finds_nothing():
    volumes = replace(random_volumes(12), embeddings=unit(np.ones((12, 4))))
    assert (report_ranks(reports_of(volumes), volumes) == 12).all()


def test_a_k_that_is_too_large_is_left_out_and_named():
    volumes = random_volumes(30)
    table = report_to_volume(reports_of(volumes), volumes)
    assert table.index.tolist() == [5, 10]
    assert table.attrs["gaps"] == {f"@{k}": "only 30 volumes can be found; left out" for k in (50, 100)}
    with pytest.raises(ValueError, match=r"ks=\[50\], but only 30 volumes can be found; give a smaller k"):
        report_to_volume(reports_of(volumes), volumes, ks=[50])
    with pytest.raises(ValueError, match=r"expected whole numbers of at least 1, got 0"):
        report_to_volume(reports_of(volumes), volumes, ks=[0])


def test_chunks_change_nothing(monkeypatch):
    volumes = random_volumes(50)
    reports = reports_of(volumes, random_volumes(50, seed=1).embeddings)
    whole = report_ranks(reports, volumes), volume_to_volume(volumes, resamples=20)
    monkeypatch.setattr(retrieval, "AT_A_TIME", 170)
    np.testing.assert_array_equal(report_ranks(reports, volumes), whole[0])
    np.testing.assert_allclose(volume_to_volume(volumes, resamples=20), whole[1])


def test_intervals_draw_patients_with_all_their_scans():
    patients = np.repeat([f"p{i}" for i in range(10)], 20)
    volumes = random_volumes(200, patients=patients)
    texts = tuple(f"report of {p}" for p in patients)
    embeddings = volumes.embeddings.clone()
    embeddings[:100] *= -1  # the reports of five patients point away from their volumes
    table = report_to_volume(reports_of(volumes, embeddings, texts), volumes, ks=(1,))
    assert table.loc[1, "high"] - table.loc[1, "low"] > 0.4, "as wide as ten patients are, not 200 scans"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, v: (replace(r, studies=r.studies[::-1]), v), r"row 0: the report is of study s23, the volume of "
            r"study s0 \(the same studies, in another order\); make both from the same rows"),
        (lambda r, v: (replace(r, studies=np.array(["other", *r.studies[1:]])), v), r"row 0: .* \(other studies\)"),
        (lambda r, v: (r, replace(v, embeddings=v.embeddings[1:], studies=v.studies[1:])),
            "one report for each volume is needed, but they are 24 and 23"),
        (lambda r, v: (r, replace(v, embeddings=v.embeddings[1:])), r"volume embeddings have shape \(23, 8\); expected "
            r"\(24, p\)"),
        (lambda r, v: (replace(r, embeddings=2 * r.embeddings), v), r"report embedding of study s0 \(row 0\) has "
            "length 2; expected 1"),
        (lambda r, v: (r, replace(v, embeddings=v.embeddings.index_fill(0, torch.tensor([3]), torch.nan))),
            r"volume embedding of study s3 \(row 3\) has length nan"),
        (lambda r, v: (r, replace(v, embeddings=unit(torch.ones(24, 5)))), "reports have 8 numbers each, volumes 5"),
        (lambda r, v: (r, replace(v, patients=np.array(["p"] * 24))), "of one patient; .* at least two"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused_and_named(change, message):
    volumes = random_volumes()
    with pytest.raises(ValueError, match=message):
        report_to_volume(*change(reports_of(volumes), volumes), ks=(5,))


# --- volume to volume ------------------------------------------------------------------------------------


def map_one_by_one(volumes, f, k):
    """AP of each query by scikit-learn (all) or place by place (first k)."""
    similarity, found = (volumes.embeddings @ volumes.embeddings.T).numpy(), []
    for q in np.flatnonzero(volumes.labels[:, f] == 1):
        keep = (volumes.patients != volumes.patients[q]) & ~np.isnan(volumes.labels[:, f])
        relevant, score = volumes.labels[keep, f], similarity[q, keep]
        if not relevant.any():
            continue
        if k is None:
            found.append(average_precision_score(relevant, score))
            continue
        ordered = relevant[np.argsort(-score)][:k]
        places = np.flatnonzero(ordered)
        found.append(sum(ordered[: i + 1].mean() for i in places) / min(k, relevant.sum()))
    return np.mean(found)


def test_average_precision_is_that_of_scikit_learn_without_the_patients_own_scans():
    patients = np.array([f"p{i // 2}" for i in range(40)])
    volumes = random_volumes(40, patients=patients)
    volumes.labels[3:9, 1] = np.nan
    table = volume_to_volume(volumes, ks=(5, 10), resamples=50)
    for f, name in enumerate(table.index[:-1]):
        for column, k in (("map@5", 5), ("map@10", 10), ("map", None)):
            assert table.loc[name, column] == pytest.approx(map_one_by_one(volumes, f, k), abs=1e-6), (name, column)
    assert table.loc["mean", "map"] == pytest.approx(table["map"][:-1].mean())
    assert table.loc["mean", "queries"] == (volumes.labels == 1).any(1).sum()


def test_two_scans_of_one_patient_do_not_find_each_other():
    labels = np.zeros((4, 18), np.float32)
    labels[:, 0] = [1, 1, 0, 1]
    embeddings = unit([[1, 0], [1, 0.01], [0.9, 0.2], [0, 1]])
    volumes = Embedded(embeddings, labels, np.array(["a", "a", "b", "c"]), np.array(list("wxyz")))
    table = volume_to_volume(volumes, ks=(1,), resamples=10)
    # both scans of a: b (without it) comes first, then c; c: b first, then the two scans of a
    assert table["map"].iloc[0] == pytest.approx(np.mean([1 / 2, 1 / 2, (1 / 2 + 2 / 3) / 2]))
    assert table["map@1"].iloc[0] == 0


def test_volumes_that_cluster_by_finding_are_all_found():
    labels = np.zeros((20, 18), np.float32)
    labels[np.arange(20), np.arange(20) % 4] = 1
    near = np.eye(4)[np.arange(20) % 4] + np.random.default_rng(0).normal(scale=0.01, size=(20, 4))
    names = np.array([f"s{i}" for i in range(20)])
    table = volume_to_volume(Embedded(unit(near), labels, names, names), ks=(3,), resamples=10)
    assert table["map"].dropna().to_numpy() == pytest.approx(1) and table.loc["mean", "map@3_low"] == 1
    assert table.loc["mean", "queries"] == 20 and table["map"].isna().sum() == 14
    assert table.attrs["gaps"]["Bronchiectasis"] == "not in two patients, so nothing to find; left out"
    assert volume_to_volume(Embedded(unit(near), labels, names, names)).attrs["gaps"]["@50"].startswith("only 19")


def test_chance_is_what_shuffled_relevance_gives():
    rng = np.random.default_rng(0)
    relevant = np.argsort(rng.random((20_000, 12)), axis=1) < 5
    known = np.ones_like(relevant)
    values, chance = retrieval._average_precision(relevant, known, [3, 12])
    assert chance[:, 0] == pytest.approx(values.mean(1), abs=0.005)
    alike = replace(random_volumes(200, seed=4), embeddings=unit(np.ones((200, 3))))
    table = volume_to_volume(alike, ks=(10,), resamples=10)
    assert table.loc["mean", "map"] == pytest.approx(table.loc["mean", "map_chance"], abs=0.02), "ties: by chance"


def test_labels_that_do_not_fit_are_refused():
    volumes = random_volumes()
    with pytest.raises(ValueError, match=r"labels have shape \(24, 17\); expected \(24, 18\)"):
        volume_to_volume(replace(volumes, labels=volumes.labels[:, 1:]))
    volumes.labels[4, 2] = 2
    with pytest.raises(ValueError, match="study s4, finding 'Cardiomegaly' is 2.0; expected 0, 1 or NaN"):
        volume_to_volume(volumes)
    with pytest.raises(ValueError, match="takes at least two patients"):
        volume_to_volume(random_volumes(patients=np.array(["p"] * 24)))


# --- reports through the text encoder ----------------------------------------------------------------------


def rows(*reports):
    return [{"study": f"s{i}", "report": report} for i, report in enumerate(reports)]


def test_reports_are_embedded_once_each_and_cut_ones_are_counted(monkeypatch):
    model, tokenizer, long = tiny_model().eval(), tiny_tokenizer(), "there is no bronchiectasis " * 12
    encoded, encode = [], model.base_model.model.encode_text
    monkeypatch.setattr(
        model.base_model.model,
        "encode_text",
        lambda ids, mask: (encoded.append(tuple(ids.shape)), encode(ids, mask))[1],
    )
    found = embed_reports(model, tokenizer, rows("scan 1", long, "no scan seen 2", "scan 1"), 2, progress=False)
    assert encoded == [(2, 4), (1, 32)] and found.cut == 1
    assert found.reports[1] == long and found.studies.tolist() == ["s0", "s1", "s2", "s3"]
    assert torch.equal(found.embeddings[0], found.embeddings[3])
    for report, embedding in zip(found.reports, found.embeddings, strict=True):
        words = tokenizer([report], return_tensors="pt", truncation=True, max_length=32)
        expected = encode(words["input_ids"], words["attention_mask"])[0]
        assert torch.allclose(embedding, expected, atol=1e-5)


def test_a_study_without_a_report_is_named():
    with pytest.raises(ValueError, match="study s1 has no report"):
        embed_reports(tiny_model(), tiny_tokenizer(), rows("scan", "  "), progress=False)
    with pytest.raises(ValueError, match="no reports to embed"):
        embed_reports(tiny_model(), tiny_tokenizer(), [])
