"""The reproduction report: what the paper says, what was measured here, and how far the two can be compared.

One self-contained HTML page, and the same as Markdown with its figures beside it. Every claim of the paper gets a row
with a verdict; every number says how it was made. Figures are in `figures`, the page itself in `page`.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from medctkit.common.atomic import replacing, write_text
from medctkit.experiments.audit import audit_figure
from medctkit.experiments.measure import Home, Measurement
from medctkit.experiments.report import figures
from medctkit.experiments.report.clinical import clinical_blocks
from medctkit.experiments.report.page import Block, png, to_html, to_markdown, with_ends
from medctkit.findings import FACTS
from medctkit.lora.counting import search_placements
from medctkit.metrics.scores import BLIND, COLUMN_OF, HOME_ROWS, METRICS, ROWS, p_texts, without_a_look
from medctkit.model.ct_clip import CTCLIPConfig, released_layout

PAPER = "arXiv 2512.00597"
EXACT = "reproduced exactly"  # arithmetic, and what can be counted
COMPATIBLE = "compatible with the paper"  # an interval holds the paper's number, and many others
MINIATURE = "shown in miniature"
NOT = "not reproduced"
GATED = "needs the gated files"
INCOMPARABLE = "not comparable"
ON_CT_RATE = (
    "medctkit download data/ct-rate --weights --tokenizer --split train; medctkit download data/ct-rate --split valid; "
    "medctkit prepare data/ct-rate data/prepared --one-reconstruction; "
    "medctkit finetune and evaluate as in docs/training.md"
)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and what became of it."""

    claim: str
    paper: str  # what the paper says
    here: str  # what was computed or measured here
    world: str  # "any" for what is arithmetic, else "phantom", "real CT" or "CT-RATE"
    verdict: str  # one of the six above
    why: str
    command: str  # what makes the number anew


@cache
def _counts() -> tuple[int, int, int]:
    """Parameters of the released checkpoint, those that never take part, and an adapter's of rank 24 on q, k, v."""
    sizes = [(math.prod(e.shape), e.live) for e in released_layout(CTCLIPConfig()).values() if e.kind == "parameter"]
    searched = search_placements(ranks=(24,))
    adapter = int(searched.loc[searched["exactly q, k, v"], "trainable"].item())
    return sum(n for n, _ in sizes), sum(n for n, live in sizes if not live), adapter


def claims(measured: Measurement) -> list[Claim]:
    """The claims of the paper, one by one."""
    total, idle, adapter = _counts()
    share, times, megabytes = 100 * adapter / (total + adapter), total / adapter, 4 * adapter / 1e6

    def counted(claim: str, paper: str, here: str, verdict: str | bool, why: str) -> Claim:
        verdict = verdict if isinstance(verdict, str) else (EXACT if verdict else NOT)
        return Claim(claim, paper, here, "any", verdict, why, "medctkit.lora.counting.search_placements()")

    found = [
        counted(
            "size of the model", "440 M parameters", f"{total:,} + {adapter:,} = {(total + adapter) / 1e6:.1f} M",
            round((total + adapter) / 1e6) == 440,
            f"the released checkpoint with the adapter; {idle:,} of them never take part",
        ),
        counted(
            "trainable parameters", "1.67 M", f"{adapter:,}", round(adapter / 1e6, 2) == 1.67,
            "rank 24 on q, k, v of both encoders; the placement is inferred, notebook 02 shows the search",
        ),
        counted(
            "share that is trained", "0.38 %", f"{share:.3f} %", round(share, 2) == 0.38,
            "of all parameters, adapter included",
        ),
        _encoders(measured),
        counted(
            "size of a checkpoint", "74 times smaller",
            f"{times:.0f} times: {megabytes:.2f} MB against {4 * total / 1e9:.2f} GB, both float32", INCOMPARABLE,
            f"74 times {megabytes:.2f} MB are {74 * megabytes:.0f} MB: a secondary source reads the paper's Table 3 as "
            "a float32 adapter of 6.7 MB, as ours is, against a checkpoint of about 500 MB; the released weights in "
            "float32 are larger, and what 500 MB would hold we do not know",
        ),
    ]  # fmt: skip
    paper = {"auroc": (61.3, 68.9), "accuracy": (67.2, 73.6), "macro_f1": (32.1, 36.9)}
    for row, (before, after) in paper.items():
        found += _result(measured, row, before, after)
    return found


def _encoders(measured: Measurement) -> Claim:
    facts = measured.adapter
    both = facts["vision"] > 0 and facts["text"] > 0
    return Claim(
        "both encoders are adapted",
        "attention layers of the vision and the text encoder",
        f"{facts['vision']} attention projections of the vision encoder, {facts['text']} of the text encoder; "
        f"{facts['trainable']:,} parameters",
        measured.made_with["data"],
        (EXACT if measured.origin.model != "mini" else MINIATURE) if both else NOT,
        "counted on the adapter that was measured" + ("" if both else "; it is on one encoder only"),
        measured.made_with["command"],
    )


def _result(measured: Measurement, row: str, before: float, after: float) -> list[Claim]:
    name, column = ROWS[row], COLUMN_OF.get(row, row)
    base, adapted = (measured.tables[model].loc["mean"] for model in ("base", "adapted"))
    gain, world = measured.difference.loc["mean"], measured.made_with["data"]
    value, low, high = (100 * gain[f"{column}{end}"] for end in ("", "_low", "_high"))
    here = f"{100 * base[column]:.1f} -> {100 * adapted[column]:.1f} %, {value:+.1f} [{low:+.1f}, {high:+.1f}] points"
    here += f"; {BLIND[row]}: {100 * without_a_look(measured.tables['base'])[row]:.1f} %"
    paper = f"{before} -> {after} %, {after - before:+.1f} points"
    if world == "phantom":
        verdict, lies = (INCOMPARABLE, "lies above 0") if low > 0 else (NOT, "holds 0 or lies below it")
        why = f"the interval of the gain {lies}, on phantoms with a model of our own. That alone shows nothing: "
        why += "what is free there, and what else the same labels give, `medctkit compare` measures, and "
        why += "docs/comparison.md has it"
    elif FACTS:
        verdict, why = INCOMPARABLE, "other findings than the paper's"
    elif world == "CT-RATE" and measured.origin.model != "mini":
        verdict, lies = (COMPATIBLE, "inside") if low <= after - before <= high else (NOT, "outside")
        why = f"the paper's gain lies {lies} the interval of ours" + (", and so does 0" if low <= 0 <= high else "")
    else:
        verdict, why = INCOMPARABLE, "other patients than the paper's"
    rows = [Claim(f"{name}, base -> LoRA", paper, here, world, verdict, why, measured.made_with["command"])]
    if world != "CT-RATE":
        missing, first = "not measured: CT-RATE and the released weights are gated", "accept the terms on the hub first"
        rows.append(Claim(f"{name} on CT-RATE", paper, missing, "CT-RATE", GATED, first, ON_CT_RATE))
    return rows


def claims_table(measured: Measurement) -> pd.DataFrame:
    """`claims` as a table."""
    return pd.DataFrame(claims(measured))


def published() -> list[tuple[str, pd.DataFrame]]:
    """Published results, a table for each set of labels: means over different labels are not to be compared."""
    table = pd.read_csv(str(files("medctkit") / "assets" / "published_results.csv"))
    table["f1"] = [f"{row.f1:.3f} ({row.f1_kind})" for row in table.itertuples()]
    table["n"] = [f"{n:,.0f}" if n == n else "not given" for n in table["n"]]
    title = table["labels"].astype(str) + " labels, " + table["dataset"].str.removesuffix(" valid")
    shown = ["model", "setting", "n", "auroc", "accuracy", "f1", "source"]
    return [(name, rows[shown].reset_index(drop=True)) for name, rows in table.groupby(title, sort=False)]


APART = (
    "Tables of different labels are kept apart: their means are not comparable. Settings are called as their authors "
    "call them."
)
REMARK = (
    "The paper's base model has a mean AUROC of 0.613. CT-CLIP's authors published 0.731 for the same 18 labels: the "
    "base lies 12 points under it, and the adapted model (0.689) lies 4 points under it. What LoRA gained there may in "
    "part be what the base had lost on the way, for example by rescaling Hounsfield units twice (notebook 01)."
)


def metrics_table(measured: Measurement, model: str) -> pd.DataFrame:
    """A row for each finding and the mean: every metric as text, value [95 % interval]."""
    table = measured.tables[model]
    gaps = {f: f"no value: {why}" for f, why in table.attrs["gaps"].items()}
    shown = {"positives": table["positives"].astype(str), "threshold": table["threshold"].map(_number)}
    for name in METRICS:
        words = name.replace("_", " ").replace("auroc", "AUROC").replace("f1", "F1").replace("brier", "Brier score")
        shown[words] = [gaps.get(finding) or with_ends(row, name) for finding, row in table.iterrows()]
    return pd.DataFrame(shown).rename_axis("finding").reset_index()


def _before_and_after(measured: Measurement | Home, rows: Mapping[str, tuple[str, str]]) -> pd.DataFrame:
    """Named rows of (finding or "mean", metric): both models, the paired difference, each with its interval, and p."""
    shown = []
    for name, (finding, metric) in rows.items():
        both = {model: with_ends(table.loc[finding], metric) for model, table in measured.tables.items()}
        difference = with_ends(measured.difference.loc[finding], metric, "+")
        p = p_texts(measured.difference, metric).loc[finding].to_dict()
        shown.append({"": name} | both | {"adapted minus base": difference} | p)
    return pd.DataFrame(shown)


def difference_table(measured: Measurement | Home) -> pd.DataFrame:
    """A row for each finding and the mean: AUROC before and after, paired difference, p-value, and Holm's."""
    table = _before_and_after(measured, {name: (name, "auroc") for name in measured.difference.index})
    return table.rename(columns={"": "finding"})


def home_table(home: Home) -> pd.DataFrame:
    """A row for AUROC, calibration error and Brier score at home, means over findings: before, after, difference, p."""
    table = _before_and_after(home, {name: ("mean", COLUMN_OF.get(row, row)) for row, name in HOME_ROWS.items()})
    return table.drop(columns="p, Holm").rename(columns={"": "mean over findings"})


def retrieval_table(measured: Measurement) -> pd.DataFrame:
    """A row for each kind of search: both models with intervals, and chance."""
    table = measured.retrieval
    table = table.assign(shown=[with_ends(row, "value") for _, row in table.iterrows()])
    shown = table.pivot(index="search", columns="model", values="shown")[["base", "adapted"]]
    shown["chance"] = table.groupby("search")["chance"].mean().map(_number)
    return shown.loc[list(dict.fromkeys(table["search"]))].reset_index()


def defects_table(measured: Measurement) -> pd.DataFrame:
    """A row for each number that a defect of the public evaluation changes."""
    table = pd.DataFrame(measured.defects)
    for column in ("public", "right"):
        table[column] = [f"{value:.3g} {unit}" for value, unit in zip(table[column], table["unit"], strict=True)]
    shown = ["name", "quantity", "public", "right", "public_way", "right_way", "why", "source"]
    return table[shown].rename(columns=lambda name: name.replace("_", " "))


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"


# --- the page ---------------------------------------------------------------------------------------------


def blocks(measured: Measurement) -> list[Block]:
    """The report, piece by piece."""
    made, world = measured.made_with, measured.made_with["data"]
    by = f"{world}; {provenance(made, short=True)}."

    def table(text: str, content: pd.DataFrame) -> Block:
        return Block("table", f"{text} {by}", content)

    def figure(name: str, draw: Callable[[], Figure], text: str) -> Block:
        return Block("figure", f"{text} {by}", draw, name)

    def finding_by_finding(model: str) -> Block:
        note = measured.tables[model].attrs.get("optimistic")
        marked = f"OPTIMISTIC: {note}." if note else "Thresholds from validation patients."
        return table(f"The {model} model. {marked}", metrics_table(measured, model))

    page = [
        Block("title", "MedCT-VLM: what the paper says, and what was measured here"),
        Block("banner", _world_note(world)),
        Block("text", f"Made by: {provenance(made)}."),
        Block("heading", "The claims of the paper"),
        Block("table", f"Claims of {PAPER}, and what became of them here.", claims_table(measured)),
        Block("text", _asked(measured)),
        Block("heading", "What was published"),
        *(Block("table", f"Published, {title}.", results) for title, results in published()),
        Block("text", f"{APART} {REMARK}"),
        Block("heading", "Finding by finding"),
        *(
            figure(name, partial(draw, measured), f"{what}. 95 % intervals over patients.")
            for name, draw, what in FIGURES
        ),
        table("Adapted minus base, the same patients.", difference_table(measured)),
        *map(finding_by_finding, ("base", "adapted")),
    ]
    if home := measured.home:
        page += [
            Block("heading", "What it cost at home"),
            Block("text", _at_home(home)),
            table("Where the base model comes from.", home_table(home)),
            table("AUROC there, finding by finding.", difference_table(home)),
        ]
    if len(measured.retrieval):
        page.append(Block("heading", "Retrieval"))
        page.append(table("Base and adapted model, and a random order.", retrieval_table(measured)))
    page += clinical_blocks(measured, table, figure)
    return page + [
        Block("heading", "What the public evaluation would have made of it"),
        Block("text", "The known defects of the public code, each done both ways on the base model and these studies."),
        figure("audit", partial(audit_figure, measured.defects), "Each number, the public way and the right way."),
        table("Each defect, and what is right.", defects_table(measured)),
    ]


FIGURES = (
    ("forest", figures.forest, "AUROC of base and adapted model for each finding, and the paired difference"),
    ("roc", figures.roc_curves, "ROC curves of base and adapted model, one panel for each finding"),
    ("calibration", figures.calibration, "Observed share of positive studies against predicted probability"),
    ("prompts", figures.prompt_sensitivity, "Mean AUROC with each set of prompts"),
    ("scores", figures.score_histograms, "Scores of studies with and without each finding, adapted model"),
)


def _asked(measured: Measurement) -> str:
    """What is zero-shot here, and what is not."""
    learnt = "learnt from reports alone, and no loss saw a label."
    if measured.supervised:
        learnt = (
            "is not: the per-finding loss taught it these findings from labels of the hospital's training patients, in "
            "other sentences than it is asked. It is prompt-based and supervised, and its gain is owed to labels too."
        )
    return (
        "Both models are asked by prompts. The base model is zero-shot as far as no label took part in its own "
        f"training, see its model card; free fixes, such as other prompts, leave it so. The adapted model {learnt}"
    )


def _at_home(home: Home) -> str:
    """What became of the model where its base comes from, in words."""
    mean = home.difference.loc["mean"]
    said = "no change of AUROC can be told from chance"
    if mean["auroc_high"] < 0 or mean["auroc_low"] > 0:
        said = "it lost there" if mean["auroc_high"] < 0 else "it gained there too"
    return (
        f"The base model comes from hospital {home.hospital}. On the {mean['studies']:.0f} test studies there, the "
        f"adapted model against the base: {said}, {with_ends(mean, 'auroc', '+')} in mean AUROC. Calibration error "
        "and Brier score are better the lower they are. No threshold is chosen there, so there is no accuracy or F1."
    )


def _world_note(world: str) -> str:
    if world == "phantom":
        return (
            "PHANTOM. Everything here was measured on procedural phantoms with a small model of our own. It shows the "
            "mechanism of the paper, and says nothing about patients."
        )
    return "REAL CT. Research only: nothing here is a medical device."


def provenance(made_with: dict, short: bool = False) -> str:
    """Command, seed, commit, device and, if not short, versions, in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in made_with["versions"].items())
    at = f"commit {made_with['commit']}" if made_with.get("commit") else "no commit (installed package)"
    line = f"`{made_with['command']}`, seed {made_with['seed']}, {at}, {made_with['device']}"
    return line if short else f"{line}, {versions}"


def write_report(measured: Measurement, output_dir: str | os.PathLike) -> Path:
    """Write `report.html`, self-contained, whose path it returns, and `report.md` with figures in `report_figures`."""
    output_dir = Path(output_dir).expanduser()
    (output_dir / "report_figures").mkdir(parents=True, exist_ok=True)
    page = blocks(measured)
    pictures = {block.name: png(block.content()) for block in page if block.kind == "figure"}
    for name, picture in pictures.items():
        with replacing(output_dir / "report_figures" / f"{name}.png") as temporary:
            temporary.write_bytes(picture)
    for name, text in (("report.md", to_markdown(page)), ("report.html", to_html(page, pictures))):
        write_text(output_dir / name, text)
    return output_dir / "report.html"
