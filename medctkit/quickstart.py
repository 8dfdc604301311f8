"""One call from nothing to a result: a chest CT in, 18 scores and a picture out.

`classify()` asks the mini CT-CLIP that comes with the package about all 18 findings of a phantom. It downloads nothing
and takes seconds on a CPU. The same call takes a scan of your own, with a model that knows patients.
"""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from pydicom import Dataset

from medctkit.attention.maps import patch_map, relevance
from medctkit.deploy import predict
from medctkit.findings import CT_RATE_PREVALENCE, FINDINGS, PREVALENCE
from medctkit.model.base_model import FOLDER, BaseModel, load_mini_base
from medctkit.phantom.study import PhantomStudy, generate
from medctkit.scans.preprocessing import preprocess
from medctkit.scans.volumes import CTVolume, read_volume
from medctkit.viewers.drawing.rendering import Scan, largest_slice, render
from medctkit.zero_shot.classifier import ZeroShotClassifier
from medctkit.zero_shot.prompts import Prompts, prompt_sentences
from medctkit.zero_shot.reference import places

# Of the first seeds, one whose drawn findings are several, some of which the mini model sees and some not.
SAMPLE_SEED, SAMPLE_SHAPE = 33, (96, 224, 224)
TRUTH = {1: "present", 0: "absent"}
COLOURS = {"present": "#E69F00", "absent": "#56B4E9", "unknown": "#999999"}


@dataclass(frozen=True, eq=False)
class Classified:
    """What a model says about one scan; shown in a notebook as a picture, printed as a table.

    Attributes:
        volume: the scan, in HU.
        table: one row for each of the 18 findings: `finding`, `score` (0 to 1), `truth` ("present", "absent" or
            "unknown"), `usual`, the share of CT-RATE's training scans that have it (or what your own table of findings
            says), and, of the mini model, `place`: how many of 100 other phantoms score lower.
        title: what was classified, in a few words.
        masks: where findings are, boolean arrays (d, h, w), as far as that is known.
    """

    volume: CTVolume
    table: pd.DataFrame
    title: str
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, float]:
        """Score of each finding."""
        return dict(zip(self.table["finding"], self.table["score"], strict=True))

    def figure(self) -> Figure:
        """Slices of the scan in two windows, and the 18 scores as bars that show the truth by colour and in words."""
        figure = Figure(figsize=(15, 6.6), layout="constrained")
        slices, bars = figure.subfigures(1, 2, width_ratios=(1, 1.15), squeeze=False)[0]
        self._draw_slices(slices.subplots(2, 2))
        self._draw_bars(bars.subplots())
        figure.suptitle(self.title.encode("utf-8", "backslashreplace").decode(), fontsize=12)  # of a file's name
        return figure

    def _draw_slices(self, axes: np.ndarray) -> None:
        scan = Scan.of(self.volume, self.masks)
        filled = sum((mask.astype(np.uint8) for mask in scan.masks.values()), np.zeros(scan.volume.shape, np.uint8))
        depth, rows, _ = scan.volume.shape
        cuts = {"axial": largest_slice(filled) if filled.any() else depth // 2, "coronal": rows // 2}
        for row, (plane, index) in zip(axes, cuts.items(), strict=True):
            for ax, window in zip(row, ("lung", "mediastinum"), strict=True):
                ax.imshow(render(scan.volume, plane, index, window))
                ax.set_title(f"{plane}, {window} window", fontsize=10)
                ax.axis("off")

    def _draw_bars(self, ax: Axes) -> None:
        placed = "place" in self.table
        what, most = ("place", 100) if placed else ("score", 1)
        table = self.table.sort_values(what, ascending=False, ignore_index=True)
        ends = table[what]
        ax.barh(table.index, ends, color=table["truth"].map(COLOURS))
        said = set(table["truth"])
        handles: list[Artist] = [
            Patch(color=of, label=f"truth: {name}") for name, of in COLOURS.items() if name in said
        ]
        if placed:  # a share of scans says nothing on an axis of scores
            usual = 100 * (1 - table["usual"])
            whose = "CT-RATE" if PREVALENCE == CT_RATE_PREVALENCE else "your table"
            handles += ax.plot(usual, table.index, "k|", ms=13, label=f"as many have it in {whose} as lie right of it")
            ends = np.maximum(ends, usual)
        values = table[what].map("{:.0f}".format if placed else "{:.2f}".format)
        ax.set_yticks(
            table.index, [f"{name}  {value:>3}" for name, value in zip(table["finding"], values, strict=True)]
        )
        present = table.index[table["truth"] == "present"]
        for row in present:
            ax.text(ends[row] + 0.02 * most, row, "present", va="center", fontsize=9)
        nearer = "score: nearer to “... is not present.” (0) or to “... is present.” (1)"
        lower = "place of the score: of 100 other phantoms, how many score lower"
        ax.set(xlim=(0, 1.2 * most if len(present) else most), xlabel=lower if placed else nearer)
        ax.invert_yaxis()
        ax.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.02, 1), ncols=3, frameon=False)

    def _repr_png_(self) -> tuple[bytes, dict]:
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png", dpi=80)
        highest = self.table.nlargest(3, "place" if "place" in self.table else "score")
        named = ", ".join(f"{row.finding} {row.score:.2f} ({row.truth})" for row in highest.itertuples())
        bars = f"a bar for each of {len(self.table)} scores; highest are {named}"
        alt = f"{self.title}: axial and coronal slices, and {bars}"
        return buffer.getvalue(), {"alt": alt}

    def __repr__(self) -> str:
        return f"{self.title}\n{self.table.round(3).to_string(index=False)}"


def classify(
    scan: CTVolume | PhantomStudy | str | os.PathLike | None = None,
    base: BaseModel | None = None,
    *,
    labels: Mapping | None = None,
    prompts: Prompts = "paper",
) -> Classified:
    """Ask a CT-CLIP about all 18 findings of a scan.

    Args:
        scan: a phantom study, a CT volume, or the path of a scan as `read_volume` takes it; None: a sample phantom.
        base: model with its tokenizer and pre-processing, as `medctkit.load_base` gives it; None: the mini model,
            which knows phantoms only.
        labels: what is true, where it is known: 0 or 1 for findings, such as a row of a manifest; a phantom study
            brings its own.
        prompts: see `ZeroShotClassifier`.

    Raises:
        ValueError: a scan that is no phantom, without a `base`; see also `read_volume` and `ZeroShotClassifier`.
        TypeError: something else than a scan.
    """
    if scan is None:
        scan = generate(SAMPLE_SEED, shape=SAMPLE_SHAPE)
    given = dict(labels or {})
    wrong = {
        name: value for name, value in given.items() if name in FINDINGS and not (value in (0, 1) or value != value)
    }
    if wrong or (given and not set(given) & set(FINDINGS)):
        raise ValueError(f"labels are {wrong or given}; expected 0, 1 or NaN for names of FINDINGS")
    masks, volume, known = {}, scan, {} if labels is None else labels
    if isinstance(scan, PhantomStudy):
        volume, masks, known = scan.volume, scan.masks, scan.labels if labels is None else labels
    elif isinstance(scan, str | os.PathLike):
        volume = read_volume(scan)
    if not isinstance(volume, CTVolume):
        raise TypeError(f"expected a CT volume, a phantom study or the path of a scan, got {type(volume).__name__}")
    is_phantom = volume.provenance[:1] and volume.provenance[0].startswith("phantom")
    if base is None and not is_phantom:
        raise ValueError(
            f"{', '.join(volume.provenance[:1]) or 'this volume'}: the mini model knows phantoms only, and what it "
            "says about any other scan means nothing. Give the model to ask, for example "
            'base=medctkit.load_base("colipri"), which needs no account, or load_base("CT-CLIP_v2.pt", '
            '"BiomedVLP-CXR-BERT-specialized"); base=load_mini_base() if this is a phantom that was saved to a file'
        )
    base = load_mini_base() if base is None else base
    classifier = ZeroShotClassifier(base.model, base.tokenizer, prompts)
    scores = classifier.scores(preprocess(volume, base.preprocess_config)[None])[0]
    table = pd.DataFrame({"finding": FINDINGS, "score": scores.astype(float)})
    table["truth"] = [TRUTH.get(known.get(name, -1), "unknown") for name in FINDINGS]
    table["usual"] = [PREVALENCE[name] for name in FINDINGS]
    place = places(FOLDER, base.model, base.tokenizer, prompts, scores)
    table = table if place is None else table.assign(place=place)
    what, parameters = ", ".join(volume.provenance[:1]) or "a scan", sum(p.numel() for p in base.model.parameters())
    title = f"{what}; a model of {parameters / 1e6:,.1f} M parameters in use"
    return Classified(volume, table, title, masks)


def predict_study(
    path: str | os.PathLike, folder: str | os.PathLike, base: BaseModel, series: str | None = None
) -> Classified:
    """Classify one scan, and write table, JSON, the VLM3D challenge's form and picture; see `write_prediction`.

    Raises:
        ValueError: see `read_volume` and `ZeroShotClassifier`.
    """
    found = classify(read_volume(path, series=series), base)
    picture = found._repr_png_()[0]
    predict.write_prediction(folder, predict.case_of(path), found.scores, predict.facts_of(base), picture)
    return found


def answer_study(
    path: str | os.PathLike, base: BaseModel, series: str | None = None, with_map: bool = True
) -> list[Dataset]:
    """Classify one DICOM study, and say so in DICOM: report, picture and, `with_map`, a segmentation.

    The map is of what speaks for the finding with the highest score. At full size it needs 8 GB; see
    `attention.relevance`.

    Raises:
        ValueError: see `read_volume` and `deploy.answer`.
        ModuleNotFoundError: the extra [deploy] is not installed.
    """
    from medctkit.deploy.answer import NOTICE, answer, refuse_other_than_dicom

    refuse_other_than_dicom(path)
    volume = read_volume(path, series=series)
    found, facts, heat_map = classify(volume, base), predict.facts_of(base), None
    if with_map:
        at = int(found.table["score"].argmax())
        stating, denying = (side[at][0] for side in prompt_sentences("paper", FINDINGS))
        pixels = preprocess(volume, base.preprocess_config)
        values = relevance(base.model, base.tokenizer, pixels, stating, denying)
        heat_map = patch_map(values, volume, base.preprocess_config, f"Relevance to {FINDINGS[at]}")
    title = f"{NOTICE}. Preliminary, unverified. Base {facts['base']}, adapter {facts['adapter']}"
    png = replace(found, title=title)._repr_png_()[0]
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return answer(path, found.scores, facts, picture, heat_map, series)
