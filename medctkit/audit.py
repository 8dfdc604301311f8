"""The known defects of the public CT-CLIP evaluation: each done both ways, and what that does to the numbers.

Every function does one step of an evaluation the public way and the right way, on the same data, and says why they
differ. `audit` needs scores only, `audit_model` a model and scans too. What the public evaluation does was read off the
repository ibrahimethemhamamci/CT-CLIP and is done here in our own words; nothing else in the package works like this.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from medctkit.findings import FINDINGS
from medctkit.hounsfield import check_hu
from medctkit.metrics import LEVEL, evaluate, thresholds_from_validation
from medctkit.mini import BaseModel
from medctkit.preprocessing import HU_LIMIT, PreprocessConfig, preprocess
from medctkit.volumes import CTVolume
from medctkit.zero_shot import Embedded, ZeroShotClassifier, prompt_pair

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

REPOSITORY = "repository ibrahimethemhamamci/CT-CLIP"
INTERCEPTS = (-1024.0, -8192.0)  # HU, of CT-RATE's metadata
SHARE_8192 = 850 / 3039  # volumes of CT-RATE's validation split with the second one
WIDTH = "width of the 95 % interval of the mean AUROC"
PUBLIC_COLOUR, RIGHT_COLOUR = "#D55E00", "#0072B2"  # Okabe and Ito: the colour-blind can tell them apart
_WHOLE = {"AUROC": 1.0, "accuracy": 1.0, "F1": 1.0, "%": 100.0}  # where the scale of a unit ends
_BATCH = 32  # volumes in memory at a time

# For each defect: what the public evaluation does; what to do instead; why it matters.
DEFECTS = {
    "unused bootstrap": (
        "draws rows for each resample, then scores all studies again",
        "score the studies of the patients that were drawn",
        "An interval without width calls every difference between two models real.",
    ),
    "thresholds chosen on the test labels": (
        "takes for each finding the threshold that does best on the test studies",
        "take thresholds from validation studies",
        "The threshold has seen the answers: even scores without information look better than a coin.",
    ),
    "weighted F1": (
        "averages the F1 of absent and of present, weighted by their numbers of studies",
        "F1 of the positive class, averaged over findings (macro F1); say which F1 it is",
        "Most findings are absent in most studies, so that weighted F1 mostly says how well absence is found.",
    ),
    "volumes counted as patients": (
        "treats every reconstruction of every scan as an independent case",
        "split and resample by patient, with all volumes of the patient",
        "Copies of a scan are no new evidence: they narrow the interval and not the uncertainty.",
    ),
    "prompts other than in training": (
        'trains with "There is X." and asks "X is present."',
        "ask with the sentences of training, or choose them on validation studies, and say which they are",
        "Another wording moves every score: two models are then compared by their prompts.",
    ),
    "rescaled twice": (
        "applies slope and intercept of the metadata to files that hold HU already (CT-RATE version 2)",
        "check that the values are HU, and refuse what is not",
        "Nothing fails: the model sees the lungs and more as one flat -1, and its scores mean less.",
    ),
    "clipped after or before resizing": (
        "clips to [-1000, 1000] HU after resampling in training, before it in evaluation",
        "one path from scan to input for both; this package clips before",
        "A model should be tested on what it was trained on; they differ at metal and in air.",
    ),
    "a pass of the encoder for each finding": (
        "encodes the volume anew for every finding",
        "encode it once, and compare it with all prompts",
        "The scores are the same and the time is not: the encoder is nearly all of the work.",
    ),
}


@dataclass(frozen=True)
class Defect:
    """One number of an evaluation, the public way and the right way.

    Attributes:
        name: of the defect; one defect may show in several numbers.
        quantity: what the two numbers are.
        public: the number the public way.
        right: the number the right way.
        unit: of both.
        public_way: what the public evaluation does.
        right_way: what to do instead.
        why: it matters.
        source: where it is known from.
    """

    name: str
    quantity: str
    public: float
    right: float
    unit: str
    public_way: str
    right_way: str
    why: str
    source: str


# --- defects that scores alone show ----------------------------------------------------------------------


def unused_bootstrap(labels, scores, patients, findings=FINDINGS, resamples: int = 1000, seed: int = 0) -> list[Defect]:
    """Resamples that are drawn and never used, against a bootstrap over patients.

    Args:
        labels: (n, k) of 0 and 1; NaN where unknown.
        scores: (n, k) probabilities.
        patients: (n,) names.
        findings: k names.
        resamples: of the patient bootstrap; the public way, whose resamples are all the same, gets 20 at most.
        seed: of both.

    Raises:
        ValueError: see `medctkit.metrics.evaluate`; no finding with both classes.
    """
    right = _mean(labels, scores, patients, findings, resamples=resamples, seed=seed)
    rng, values = np.random.default_rng(seed), []
    for _ in range(min(resamples, 20)):
        _rows = rng.integers(0, len(labels), len(labels))  # drawn, and left lying there
        values.append(_mean(labels, scores, patients, findings, resamples=1)["auroc"])
    defect = Defect(
        name="unused bootstrap",
        quantity=WIDTH,
        public=float(np.ptp(np.percentile(values, LEVEL))),
        right=float(right["auroc_high"] - right["auroc_low"]),
        unit="AUROC",
        public_way="draws rows for each resample, then scores all studies again",
        right_way="score the studies of the patients that were drawn",
        why="An interval without width calls every difference between two models real.",
        source=REPOSITORY,
    )
    return [defect]


def thresholds_on_test(labels, scores, patients, valid_labels, valid_scores, findings=FINDINGS) -> list[Defect]:
    """Thresholds chosen on the test labels, against thresholds from validation studies.

    Means are over the findings that have both classes among the validation and among the test studies.

    Args:
        labels: (n, k) of the test studies.
        scores: (n, k) of the test studies.
        patients: (n,) of the test studies.
        valid_labels: (m, k) of validation studies.
        valid_scores: (m, k) of validation studies.
        findings: k names.

    Raises:
        ValueError: see `medctkit.metrics.evaluate`; no finding with both classes in both.
    """
    _mean(labels, scores, patients, findings, resamples=1)
    try:
        honest = thresholds_from_validation(valid_labels, valid_scores, findings)
    except ValueError as error:
        raise ValueError(f"validation studies: {error}") from error
    both = _both_classes(labels) & _both_classes(valid_labels)
    if not both.any():
        raise ValueError(
            "no finding has positive and negative studies both in validation and in test, so there are no thresholds "
            "to compare; give more studies"
        )
    labels, scores = np.asarray(labels, float)[:, both], np.asarray(scores, float)[:, both]
    names = [name for name, used in zip(findings, both, strict=True) if used]
    limits = {"public": thresholds_from_validation(labels, scores, names), "right": honest[both]}
    found = {}
    for way, limit in limits.items():
        mean = _mean(labels, scores, patients, names, thresholds=limit, resamples=1)
        found[way] = (_balanced_accuracy(labels, scores, limit).mean(), mean["accuracy"], mean["f1"])
    return [
        Defect(
            name="thresholds chosen on the test labels",
            quantity=quantity,
            public=float(public),
            right=float(right),
            unit=unit,
            public_way="takes for each finding the threshold that does best on the test studies",
            right_way="take thresholds from validation studies",
            why="The threshold has seen the answers; on new patients it does worse.",
            source=REPOSITORY,
        )
        for quantity, unit, public, right in zip(
            ("balanced accuracy", "accuracy", "F1 of the positive class"),
            ("accuracy", "accuracy", "F1"),
            *found.values(),
            strict=True,
        )
    ]


def thresholds_on_noise(studies: int = 100, prevalence: float = 0.1, repeats: int = 500, seed: int = 0) -> list[Defect]:
    """The same where there is nothing to find: random scores, whose balanced accuracy is 0.5 whatever the threshold.

    Args:
        studies: of the simulated test, and as many for validation.
        prevalence: share of positive studies, above 0 and below 1.
        repeats: simulated findings.
        seed: of labels and scores.

    Raises:
        ValueError: numbers that leave nothing to simulate.
    """
    positives = round(studies * prevalence)
    if not 0 < positives < studies or repeats < 1:
        raise ValueError(
            f"studies={studies}, prevalence={prevalence}, repeats={repeats}: expected at least one positive and one "
            "negative study, and one repeat"
        )
    rng = np.random.default_rng(seed)
    sick = np.tile((np.arange(studies) < positives).astype(float)[:, None], repeats)
    test, valid = rng.random((2, studies, repeats))
    names = range(repeats)
    public, right = (
        _balanced_accuracy(sick, test, thresholds_from_validation(sick, chosen_on, names)).mean()
        for chosen_on in (test, valid)
    )
    defect = Defect(
        name="thresholds chosen on the test labels",
        quantity=f"balanced accuracy of random scores ({positives} of {studies} studies positive)",
        public=float(public),
        right=float(right),
        unit="accuracy",
        public_way="takes for each finding the threshold that does best on the test studies",
        right_way="take thresholds from validation studies",
        why="Scores without any information look better than a coin; the rarer the finding, the better.",
        source=f"simulation, seed {seed}, {repeats} repeats",
    )
    return [defect]


def f1_weighted_by_class(labels, scores, patients, thresholds=0.5, findings=FINDINGS) -> list[Defect]:
    """Weighted F1 against the F1 of the positive class, of the same answers; and of a model that always says no.

    Weighted F1 is the mean of the F1 of "absent" and of "present", each weighted by how many studies it has.

    Args:
        labels: (n, k) of 0 and 1; NaN where unknown.
        scores: (n, k) probabilities.
        patients: (n,) names.
        thresholds: one, or one for each finding.
        findings: k names.

    Raises:
        ValueError: see `medctkit.metrics.evaluate`; no finding with both classes.
    """
    from sklearn.metrics import f1_score

    labels, scores = np.asarray(labels, float), np.asarray(scores, float)
    defects = []
    for quantity, said in (
        ("mean F1 of these answers", scores),
        ("mean F1 of a model that always says no", np.zeros(scores.shape)),
    ):
        limits = thresholds if said is scores else 0.5
        right = _mean(labels, said, patients, findings, thresholds=limits, resamples=1)["f1"]
        weighted, known = [], ~np.isnan(labels)
        for k in np.flatnonzero(_both_classes(labels)):
            label, answer = labels[known[:, k], k], (said >= limits)[known[:, k], k]
            weighted.append(f1_score(label, answer, average="weighted", zero_division=0))
        defect = Defect(
            name="weighted F1",
            quantity=quantity,
            public=float(np.mean(weighted)),
            right=float(right),
            unit="F1",
            public_way="averages the F1 of absent and of present, weighted by their numbers of studies",
            right_way="F1 of the positive class, averaged over findings (macro F1); say which F1 it is",
            why="Most findings are absent in most studies, so that weighted F1 mostly says how well absence is found.",
            source=REPOSITORY,
        )
        defects.append(defect)
    return defects


def counted_by_volume(
    labels, scores, patients, reconstructions: int = 2, findings=FINDINGS, resamples: int = 1000, seed: int = 0
) -> list[Defect]:
    """Volumes counted as if each were another patient, against patients.

    Args:
        labels: (n, k) of 0 and 1; NaN where unknown.
        scores: (n, k) probabilities.
        patients: (n,) names.
        reconstructions: how often each row is repeated, as the reconstructions of a scan repeat its labels and very
            nearly its scores (CT-RATE has about two for each scan); 1: the rows are volumes already.
        findings: k names.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: see `medctkit.metrics.evaluate`; no finding with both classes; less than one reconstruction.
    """
    if reconstructions < 1:
        raise ValueError(f"reconstructions={reconstructions}: expected at least 1, the scan itself")
    labels, scores, patients = (np.repeat(np.asarray(a), reconstructions, axis=0) for a in (labels, scores, patients))
    right = _mean(labels, scores, patients, findings, resamples=resamples, seed=seed)
    public = _mean(labels, scores, np.arange(len(labels)), findings, resamples=resamples, seed=seed)
    widths = (float(row["auroc_high"] - row["auroc_low"]) for row in (public, right))
    return [
        Defect(
            name="volumes counted as patients",
            quantity=quantity,
            public=by_volume,
            right=by_patient,
            unit=unit,
            public_way="treats every reconstruction of every scan as an independent case",
            right_way="split and resample by patient, with all volumes of the patient",
            why="Copies of a scan are no new evidence: they narrow the interval and not the uncertainty.",
            source=REPOSITORY,
        )
        for quantity, unit, by_volume, by_patient in (
            ("independent cases", "cases", float(len(labels)), float(len(np.unique(patients)))),
            (WIDTH, "AUROC", *widths),
        )
    ]


def audit(
    labels, scores, patients, valid_labels, valid_scores, findings=FINDINGS, resamples: int = 1000, seed: int = 0
) -> list[Defect]:
    """All defects that scores alone show; see `thresholds_on_test` for the arguments."""
    by_patient = dict(findings=findings, resamples=resamples, seed=seed)
    return [
        *unused_bootstrap(labels, scores, patients, **by_patient),
        *thresholds_on_test(labels, scores, patients, valid_labels, valid_scores, findings),
        *thresholds_on_noise(seed=seed),
        *f1_weighted_by_class(
            labels, scores, patients, thresholds_from_validation(valid_labels, valid_scores, findings), findings
        ),
        *counted_by_volume(labels, scores, patients, **by_patient),
    ]


# --- defects that take a model, or scans -----------------------------------------------------------------


def prompt_mismatch(
    base: BaseModel, test: Embedded, evaluated_with="paper", trained_with="training-style"
) -> list[Defect]:
    """Prompts worded otherwise than in training, against those of training; image embeddings are the same.

    Args:
        base: model and tokenizer.
        test: embeddings and labels of test studies.
        evaluated_with: see `medctkit.zero_shot.prompt_pair`.
        trained_with: see `medctkit.zero_shot.prompt_pair`.

    Raises:
        ValueError: see `prompt_pair`; no finding with both classes.
    """
    found = {}
    for way, prompts in (("public", evaluated_with), ("right", trained_with)):
        scores = ZeroShotClassifier(base.model, base.tokenizer, prompts).scores_from_embeddings(test.embeddings)
        auroc = _mean(test.labels, scores, test.patients, FINDINGS, resamples=1)["auroc"]
        found[way] = (auroc, 100 * np.mean(scores >= 0.5))
    asked, trained = (prompt_pair(prompts)[0] for prompts in (evaluated_with, trained_with))
    return [
        Defect(
            name="prompts other than in training",
            quantity=quantity,
            public=float(public),
            right=float(right),
            unit=unit,
            public_way=f"trains with sentences like {trained!r} and asks {asked!r}",
            right_way="ask with the sentences of training, choose them on validation studies, and say which they are",
            why="Another wording moves every score: the model differs by its prompts as others do by their weights.",
            source=REPOSITORY,
        )
        for quantity, unit, public, right in zip(
            ("mean AUROC", "answers above 0.5"), ("AUROC", "% of answers"), *found.values(), strict=True
        )
    ]


def rescaled_again(volume: CTVolume, intercept: float, slope: float = 1.0) -> CTVolume:
    """A scan in HU with slope and intercept applied once more: wrong, on purpose.

    `read_volume` refuses to do this (`medctkit.hounsfield.check_hu`); a `CTVolume` made by hand is not checked.
    """
    hu = volume.hu.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    note = f"spoiled for the audit: value * {slope:g} + {intercept:g} on values in HU"
    return CTVolume(hu, volume.spacing, volume.orientation, volume.affine, (*volume.provenance, note))


def double_rescale(base: BaseModel, volumes: Sequence[CTVolume], labels, seed: int = 0) -> list[Defect]:
    """Slope and intercept of the metadata applied to scans that are in HU already.

    Args:
        base: model, tokenizer and what the model wants to see.
        volumes: n scans in HU; a sequence that reads them one by one will do.
        labels: (n, 18) of 0 and 1; NaN where unknown.
        seed: draws which scans have which intercept.

    Raises:
        ValueError: see `medctkit.metrics.evaluate`; as many labels as scans; no finding with both classes.
    """
    _check_volumes(volumes, labels)
    ways = {0.0: lambda v: v} | {i: lambda v, i=i: rescaled_again(v, i) for i in INTERCEPTS}
    classifier = ZeroShotClassifier(base.model, base.tokenizer)
    scores, floor, passed = ({way: [] for way in ways} for _ in range(3))
    for chunk in _prepared(volumes, ways):
        for way, scans in chunk.items():
            inputs = torch.stack([preprocess(scan, base.preprocess_config) for scan in scans])
            scores[way].append(_scores(classifier, inputs))
            floor[way].append((inputs == -1).float().mean((1, 2, 3, 4)).numpy())
            passed[way] += [_plausible(scan.hu) for scan in scans]
    scores, floor = ({way: np.concatenate(parts) for way, parts in each.items()} for each in (scores, floor))
    rare = np.random.default_rng(seed).permutation(len(volumes)) < round(SHARE_8192 * len(volumes))
    mixed = np.where(rare[:, None], scores[INTERCEPTS[1]], scores[INTERCEPTS[0]])
    patients = np.arange(len(volumes))
    auroc = {
        way: float(_mean(labels, found, patients, FINDINGS, resamples=1)["auroc"])
        for way, found in (scores | {"mixed": mixed}).items()
    }
    numbers = []
    for i in INTERCEPTS:
        shares = (100 * float(floor[way].mean()) for way in (i, 0.0))
        numbers += [(f"voxels at -1, the lowest value, intercept {i:g}", *shares, "% of voxels")]
        numbers += [(f"mean AUROC, intercept {i:g}", auroc[i], auroc[0.0], "AUROC")]
    shown = f"mean AUROC, intercept {INTERCEPTS[1]:g} in {SHARE_8192:.0%} of the scans (as in CT-RATE), else -1024"
    numbers += [(shown, auroc["mixed"], auroc[0.0], "AUROC")]
    through = 100 * float(np.mean([passed[i] for i in INTERCEPTS]))
    numbers += [("spoiled scans that reach the model", 100.0, through, "% of scans")]
    return [
        Defect(
            name="rescaled twice",
            quantity=quantity,
            public=public,
            right=right,
            unit=unit,
            public_way="applies slope and intercept of the metadata to files that hold HU already (CT-RATE version 2)",
            right_way="check that the values are HU, and refuse what is not",
            why="Nothing fails: the model sees lungs and more as one flat -1, and its scores drop.",
            source=f"{REPOSITORY}, issue 50",
        )
        for quantity, public, right, unit in numbers
    ]


def clipped_after_resizing(volume: CTVolume, config: PreprocessConfig) -> torch.Tensor:
    """Model input (1, z, x, y) as `preprocess` makes it, but with HU clipped after resampling, not before.

    Resampling is linear: scaled down until nothing is clipped, resampled, and scaled up again.
    """
    hu = volume.hu.astype(np.float32)
    scale = max(1.0, float(np.abs(hu).max()) / HU_LIMIT)
    small = CTVolume(hu / np.float32(scale), volume.spacing, volume.orientation, volume.affine, volume.provenance)
    return (preprocess(small, config) * scale).clamp_(-1, 1)


def clip_order(base: BaseModel, volumes: Sequence[CTVolume], labels) -> list[Defect]:
    """HU clipped after resampling in training and before it in evaluation, against one way for both.

    Args:
        base: model, tokenizer and what the model wants to see.
        volumes: n scans in HU.
        labels: (n, 18) of 0 and 1; NaN where unknown.

    Raises:
        ValueError: see `double_rescale`.
    """
    _check_volumes(volumes, labels)
    config, classifier = base.preprocess_config, ZeroShotClassifier(base.model, base.tokenizer)
    ways = {"training": lambda v: clipped_after_resizing(v, config), "evaluation": lambda v: preprocess(v, config)}
    scores, largest, total = {way: [] for way in ways}, 0.0, 0.0
    for chunk in _prepared(volumes, ways):
        inputs = {way: torch.stack(found) for way, found in chunk.items()}
        for way, found in inputs.items():
            scores[way].append(_scores(classifier, found))
        off = HU_LIMIT * (inputs["training"] - inputs["evaluation"]).abs()
        largest, total = max(largest, float(off.max())), total + float(off.mean((1, 2, 3, 4)).sum())
    training, evaluation = (
        float(_mean(labels, np.concatenate(found), np.arange(len(labels)), FINDINGS, resamples=1)["auroc"])
        for found in scores.values()
    )
    return [
        Defect(
            name="clipped after or before resizing",
            quantity=quantity,
            public=public,
            right=right,
            unit=unit,
            public_way="clips to [-1000, 1000] HU after resampling in training, before it in evaluation",
            right_way="one path from scan to input for both; this package clips before",
            why="A model should be tested on what it was trained on; they differ at metal and at the scan's edge.",
            source=REPOSITORY,
        )
        for quantity, public, right, unit in (
            ("largest difference between training and evaluation", largest, 0.0, "HU"),
            ("mean difference between training and evaluation", total / len(volumes), 0.0, "HU"),
            ("mean AUROC, clipped after (public) or before (right)", training, evaluation, "AUROC"),
        )
    ]


def encoder_per_finding(base: BaseModel, volume: CTVolume) -> list[Defect]:
    """Forward passes of the vision encoder for one volume: one for each finding, against one for all.

    Args:
        base: model, tokenizer and what the model wants to see.
        volume: a scan in HU.
    """
    inputs = preprocess(volume, base.preprocess_config)[None]
    counts = []
    for groups in ([[name] for name in FINDINGS], [FINDINGS]):
        passes = []
        handle = base.model.visual_transformer.register_forward_hook(lambda *_, seen=passes: seen.append(1))
        try:
            for names in groups:
                ZeroShotClassifier(base.model, base.tokenizer, findings=names).scores(inputs)
        finally:
            handle.remove()
        counts.append(float(len(passes)))
    defect = Defect(
        name="a pass of the encoder for each finding",
        quantity="passes of the vision encoder for one volume",
        public=counts[0],
        right=counts[1],
        unit="passes",
        public_way="encodes the volume anew for every finding",
        right_way="encode it once, and compare it with all prompts",
        why="The scores are the same and the time is not: the encoder is nearly all of the work.",
        source=REPOSITORY,
    )
    return [defect]


def audit_model(
    base: BaseModel, test: Embedded, valid: Embedded, volumes: Sequence[CTVolume], resamples: int = 1000, seed: int = 0
) -> list[Defect]:
    """All defects, for a model and test studies.

    Args:
        base: model, tokenizer and what the model wants to see.
        test: test studies seen through the model; see `ZeroShotClassifier.embed`.
        valid: validation studies seen through the model.
        volumes: scans of the test studies in HU, in their order; gone through twice.
        resamples: of the bootstrap over patients.
        seed: of the bootstrap and the simulation.

    Raises:
        ValueError: see the functions for single defects.
    """
    _check_volumes(volumes, test.labels)
    classifier = ZeroShotClassifier(base.model, base.tokenizer)
    scores, valid_scores = (classifier.scores_from_embeddings(seen.embeddings) for seen in (test, valid))
    return [
        *audit(test.labels, scores, test.patients, valid.labels, valid_scores, resamples=resamples, seed=seed),
        *prompt_mismatch(base, test),
        *double_rescale(base, volumes, test.labels, seed),
        *clip_order(base, volumes, test.labels),
        *encoder_per_finding(base, volumes[0]),
    ]


# --- to look at ------------------------------------------------------------------------------------------


def audit_table(defects: Sequence[Defect]) -> "pd.DataFrame":
    """A row for each number: the attributes of `Defect`, and the difference, public minus right."""
    import pandas as pd

    table = pd.DataFrame([asdict(defect) for defect in defects], columns=list(Defect.__dataclass_fields__))
    table.insert(4, "difference", table["public"] - table["right"])
    return table


def audit_figure(defects: Sequence[Defect]) -> "Figure":
    """Each number the public way and the right way, one above the other, each on its own scale.

    Raises:
        ValueError: no defects.
    """
    from matplotlib.figure import Figure

    if not defects:
        raise ValueError("no defects to draw; give what audit() or audit_model() returned")
    figure = Figure(figsize=(11, 1 + 0.62 * len(defects)), layout="constrained")
    rows = figure.subplots(len(defects), 1, squeeze=False)[:, 0]
    marks = {
        "right": dict(marker="o", s=95, facecolor="none", edgecolor=RIGHT_COLOUR, linewidth=2, label="the right way"),
        "public": dict(marker="x", s=45, color=PUBLIC_COLOUR, linewidth=2, label="the public way"),
    }
    before = None
    for axes, defect in zip(rows, defects, strict=True):
        if defect.name != before:
            axes.set_title(defect.name, loc="left", fontsize=10, fontweight="bold")
        before = defect.name
        end = _SCALES.get(defect.unit) or max(defect.public, defect.right) or 1.0
        axes.plot([defect.public, defect.right], [0, 0], color="#999999", linewidth=1.5, zorder=1)
        for way, mark in marks.items():
            axes.scatter(getattr(defect, way), 0, zorder=2, clip_on=False, **mark)
        axes.set(xlim=(-0.02 * end, 1.02 * end), ylim=(-1, 1), xticks=[0, end / 2, end])
        axes.set_yticks([0], [defect.quantity.replace(", ", ",\n", 1)], fontsize=9)
        axes.tick_params(axis="x", labelsize=7, length=2)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        for x, way, colour in ((1.04, "public", PUBLIC_COLOUR), (1.14, "right", RIGHT_COLOUR)):
            text = f"{getattr(defect, way):.4g}"
            axes.text(x, 0.5, text, transform=axes.transAxes, color=colour, va="center", fontsize=10)
        axes.text(1.24, 0.5, defect.unit, transform=axes.transAxes, va="center", fontsize=9)
    figure.legend(*rows[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return figure


# --- shared ----------------------------------------------------------------------------------------------


def _mean(labels, scores, patients, findings, **options) -> "pd.Series":
    """The mean over findings as `evaluate` gives it; an error where no finding can be scored."""
    mean = evaluate(labels, scores, patients, findings=findings, **options).loc["mean"]
    if np.isnan(mean["auroc"]):
        raise ValueError("no finding has both positive and negative studies, so nothing can be scored; give more")
    return mean


def _both_classes(labels) -> np.ndarray:
    labels = np.asarray(labels, float)
    return (labels == 1).any(0) & (labels == 0).any(0)


def _balanced_accuracy(labels, scores, limits) -> np.ndarray:
    """Mean of sensitivity and specificity for each column (n, k) -> (k,)."""
    said, sick, well = scores >= limits, labels == 1, labels == 0
    return ((said & sick).sum(0) / sick.sum(0) + (~said & well).sum(0) / well.sum(0)) / 2


def _check_volumes(volumes: Sequence[CTVolume], labels) -> None:
    if not hasattr(volumes, "__getitem__"):
        raise ValueError(f"volumes: got a {type(volumes).__name__}, expected a list or another sequence of CTVolume")
    if len(volumes) != len(labels) or not len(volumes):
        raise ValueError(f"{len(volumes)} volumes and labels of {len(labels)} studies; expected as many, at least one")


def _prepared(volumes: Sequence[CTVolume], ways: Mapping[Hashable, Callable]) -> Iterator[dict]:
    """What each way makes of the volumes, some at a time, each read once."""
    for start in range(0, len(volumes), _BATCH):
        scans = [volumes[i] for i in range(start, min(start + _BATCH, len(volumes)))]
        yield {name: [way(scan) for scan in scans] for name, way in ways.items()}


def _scores(classifier: ZeroShotClassifier, inputs: torch.Tensor) -> np.ndarray:
    """Scores without their last digits, in which even equal volumes differ when they sit in unequal batches."""
    return classifier.scores(inputs).round(5)


def _plausible(hu: np.ndarray) -> bool:
    try:
        check_hu(hu)
    except ValueError:
        return False
    return True
