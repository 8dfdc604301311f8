"""The documentation: links that lead somewhere, a glossary that the course uses, and docstrings that say enough."""

import importlib
import importlib.util
import inspect
import json
import pydoc
import re
from functools import cache
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from markdown_it import MarkdownIt

import medctkit

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "medctkit/assets/mini/README.md"]
GLOSSARY = ROOT / "docs" / "glossary.md"


def module_from(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(path):
    """The Markdown of a page, or of each Markdown cell of a notebook."""
    if path.suffix != ".ipynb":
        return [path.read_text(encoding="utf-8")]
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]


def parsed(path):
    for text in texts(path):
        yield from MarkdownIt("commonmark").enable("table").parse(text)


# --- links -----------------------------------------------------------------------------------------------


def links(path):
    for token in parsed(path):
        for part in token.children or ():
            target = part.attrGet("href") if part.type == "link_open" else part.attrGet("src")
            if target and not target.startswith(("data:", "attachment:")):
                yield target


@cache
def anchors(path):
    """What `#...` may follow: each heading in lower case, without punctuation, with hyphens for blanks."""
    tokens, found = list(parsed(path)), []
    for before, token in zip(tokens, tokens[1:], strict=False):
        if before.type == "heading_open":
            plain = "".join(part.content for part in token.children if part.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
            found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


def broken(path, root=ROOT):
    """Links of a page or notebook that lead nowhere, each with the reason."""
    for target in links(path):
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if re.match(r"[a-z]+:", target):
            if not re.match(r"https://[\w.-]+\.[a-z]+(/\S*)?$", target):
                yield f"{target}: expected https"
        elif not there.is_relative_to(root):
            yield f"{target}: leads out of the repository"
        elif not there.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in anchors(there):
            yield f"{target}: no such heading"


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_that_exist(path):
    assert list(broken(path)) == []


# --- the glossary ----------------------------------------------------------------------------------------


def entries():
    """Term -> (its part of the glossary, what is said of it)."""
    found, part = {}, None
    for level, title, text in re.findall(r"^(##+) (.+)\n((?:(?!#).*\n)*)", GLOSSARY.read_text(), re.M):
        part = title if level == "##" else part
        if level == "###":
            assert title not in found, f"{title} is explained twice"
            found[title] = part, text
    return found


def test_the_glossary_explains_every_finding_in_its_order_and_one_sentence():
    found = {term: text for term, (part, text) in entries().items() if part == "The 18 findings"}
    assert list(found) == list(medctkit.FINDINGS)
    for text in found.values():
        assert re.fullmatch(r"[A-Z][^.]+\.", text.strip())


@pytest.mark.parametrize("term", [term for term, (part, _) in entries().items() if part != "The 18 findings"])
def test_a_term_of_the_glossary_links_to_a_notebook_that_uses_it(term):
    numbers = re.findall(r"→\u00a0\[(\d\d)\]", entries()[term][1])
    assert len(numbers) == 1, "expected one arrow with the number of a notebook"
    (notebook,) = [path for path in NOTEBOOKS if path.name.startswith(numbers[0])]
    used = " ".join(cell.source for cell in nbformat.read(notebook, as_version=4).cells).lower()
    words = re.findall(r"[\w-]{4,}", term.lower()) or [term.lower()]
    assert [word for word in words if re.sub(r"(t?ing|s)$", "", word) not in used] == [], f"not in {notebook.name}"


def test_the_prevalences_of_the_glossary_are_those_of_ct_rate():
    shares = medctkit.findings.PREVALENCE
    for name in (min(shares, key=shares.get), max(shares, key=shares.get)):
        assert f"{100 * shares[name]:.1f} % ({name.lower()})" in entries()["Prevalence"][1]


# --- pages that quote ------------------------------------------------------------------------------------


def test_the_map_of_the_course_says_what_the_notebooks_say():
    course_map = module_from(ROOT / "docs" / "course_map.py")
    for page in course_map.PAGES:
        text = (ROOT / page).read_text()
        assert course_map.with_map(text) == text, "run: python docs/course_map.py"
    assert course_map.course_map("x").count("\n") == 1 + len(NOTEBOOKS)


def test_the_exercises_that_the_page_for_teachers_names_exist():
    cells = [cell.source for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells]
    there = {found[1] for source in cells if (found := re.match(r"# Exercise (\d\d\.\d):", source))}
    named = set(re.findall(r"\b(0\d\.\d)\b", (ROOT / "docs" / "teaching.md").read_text().partition("## Common")[0]))
    assert len(named) > 10 and named <= there, f"no exercise {sorted(named - there)}"


def test_the_front_door_is_short_and_says_what_is_wrong():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 150
    assert "CHANGELOG.md#known-faults" in readme.partition("## The course")[0]


def test_the_front_door_shows_what_notebook_04_measured():
    cells = nbformat.read(ROOT / "notebooks" / "04_zero_shot_evaluation.ipynb", as_version=4).cells
    printed = " ".join("".join(o.get("text", "") for cell in cells for o in cell.get("outputs", ())).split())
    rows = re.findall(r"^\| (?:mean AUROC|accuracy|macro-F1) .*$", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) == 3
    assert [row for row in rows if " ".join(re.sub(r"[|*]", " ", row).split()) not in printed] == []


def test_what_prose_says_of_the_comparison_is_what_it_found():
    from medctkit.experiments.compare.results import load_results, method_table, pooled, rivals_table

    over = pd.concat([rivals_table(load_results()), method_table(load_results(), "placement")]).set_index("method")
    said = {method: f"{over.loc[[method], 'over_base'].iloc[0]:.3f}" for method in over.index}
    quoted = {
        "README.md": ("lora", "home-wording", "full", "hu-boxes"),
        "CHANGELOG.md": ("lora", "home-wording", "hu-boxes"),
        "docs/reproduction.md": ("lora", "home-wording", "hu-boxes"),
    }
    few = pooled(load_results(), "studies").set_index(["studies", "method"])["auroc"]
    lora, boxes = (f"{few[64, method]:.3f}" for method in ("lora", "hu-boxes"))
    assert f"LoRA has {lora}, the regression {boxes}" in (ROOT / "README.md").read_text()
    lacking = [(page, m) for page, of in quoted.items() for m in of if said[m] not in (ROOT / page).read_text()]
    assert lacking == [], said


def test_the_front_door_says_what_was_measured_of_maps():
    means = json.loads((ROOT / "bench" / "localisation.json").read_text())["means"]
    hits = {row["method"]: row for row in means if row["score"] == "pointing game"}
    before, after = hits["base, relevance"], hits["adapted, relevance"]
    said = f"{after['value']:.2f} of findings, before {before['value']:.2f}, by chance {after['chance']:.2f}"
    assert said in " ".join((ROOT / "README.md").read_text().split())


def measured():
    """Page -> what it quotes of bench/*.json."""
    names = ("data", "model", "memory", "viewers")
    data, model, memory, viewers = (json.loads((ROOT / "bench" / f"{name}.json").read_text()) for name in names)
    seconds = {part: row["seconds"] for part, row in model["parts"].items()}
    shares = {name: row["share_of_public_seconds"] for name, row in model["against_the_public_code"].items()}
    vision, pairs = "vision encoder", "one volume against 18 prompt pairs"
    preprocessing, cache, prepare = data["preprocessing"], data["cache"], data["prepare"]
    whole = prepare["all_of_ct_rate"]
    minutes = {cores: 60 * whole[f"hours_on_{cores}_cores"] for cores in (16, 64, 256)}
    steps = {(row["batch"], row["volumes_at_a_time"], row["measures"]): row for row in memory["bytes_of_a_step"]}
    kept, again, cached = (
        f"{steps[key]['peak'] / 1e9:.1f} GB"
        for key in ((8, 8, "float32 weights"), (8, 8, "checkpointing and bf16"), (32, 2, "checkpointing and bf16"))
    )
    slowest = max(
        step["milliseconds"]
        for steps in viewers["steps"].values()
        if isinstance(steps, dict)
        for step in steps.values()
    )
    megabytes, core = f"{prepare['megabytes_per_volume']:.0f} MB", prepare["seconds_of_one_core_per_volume"]
    return {
        "data": (
            f"a `.nii.gz` of {cache['megabytes_of_nifti']:.0f} MB",
            f"{core:.1f} s of one core, {megabytes}",
            f"reading it back | {cache['load_seconds']:.2f} s",
            f"{preprocessing['times_faster']:.1f} times faster",
            f"with {100 * preprocessing['share_of_peak_memory']:.0f} % of its memory",
            f"{whole['terabytes']:.1f} TB; {minutes[16] / 60:.1f} h on 16 cores, {minutes[64]:.0f} min on 64, "
            f"{minutes[256]:.0f} min on 256",
            f"{seconds[vision]:.1f} s for the embedding of a volume, "
            f"{seconds[pairs]:.1f} s against all 18 prompt pairs",
            f"{shares[vision]:.2f} and {shares[pairs]:.3f} of the public code's time",
        ),
        "training": (
            f"weights in float32 | {kept} |",
            f"frozen weights in bf16 | **{again}** |",
            f"batch 32, two volumes at a time | {cached} |",
        ),
        "released": (
            f"| {megabytes} | {core:.1f} s of one core |",
            f"| {whole['terabytes']:.1f} TB | {whole['hours_on_16_cores']:.1f} h on 16 cores |",
            f"| {seconds[vision]:.1f} s on two cores |",
            *(f"| {peak} |" for peak in (kept, again, cached)),
        ),
        "viewing": (f"{slowest:.0f} ms at the most",),
    }


@pytest.mark.parametrize("page", measured())
def test_a_page_quotes_what_make_bench_measured(page):
    text = " ".join((ROOT / "docs" / f"{page}.md").read_text().split())
    assert [quoted for quoted in measured()[page] if quoted not in text] == []


def test_the_reproduction_page_counts_hospitals_as_notebook_07_does():
    import torch

    with torch.device("meta"):
        adapted = medctkit.add_lora(medctkit.CTCLIPModel(medctkit.CTCLIPConfig()), "paper")
    counted = medctkit.lora.parameter_table(adapted).iloc[-1]
    base, adapter = 4 * counted["live"], counted["adapter bytes"]
    one, twenty = ((n * base + 20 * adapter) / 1e9 for n in (1, 20))
    quoted = f"{one:.2f} GB as one base with twenty adapters, {twenty:.2f} GB as twenty models"
    assert quoted in (ROOT / "docs" / "reproduction.md").read_text()


@pytest.mark.slow
def test_the_page_of_the_comparison_is_written_from_the_results_that_come_with_the_package():
    from medctkit.experiments.compare.results import load_results
    from medctkit.experiments.compare.tables import TABLES
    from tools.comparison import MARK, PAGE, written

    page = PAGE.read_text()
    assert written(page, load_results()) == page, "python -m tools.comparison"
    assert {found[1] for found in MARK.finditer(page)} == {"runs", *TABLES}


def test_every_type_of_peft_is_compared_or_left_out_with_a_reason():
    from peft import PeftType

    named = re.findall(r"`([A-Z0-9_]+)`", (ROOT / "docs" / "comparison.md").read_text())
    assert set(named) == {kind.value for kind in PeftType}


def commands(path):
    """Every `medctkit ...` of a page's code: the name of the command, and its options."""
    code = "\n".join(re.findall(r"```sh\n(.*?)```", path.read_text(), re.S))
    code += "\n" + "\n".join(re.findall(r"`(medctkit [^`\n]+)`", path.read_text()))
    for line in re.sub(r"\\\n\s*", " ", code).splitlines():
        words = re.sub(r"\s#.*", "", line)
        if found := re.match(r"\s*(?:accelerate launch .*-m medctkit\.cli|medctkit) ([a-z][a-z-]+)(.*)", words):
            yield found[1], re.findall(r"--[a-z-]+", found[2])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_options_that_a_page_shows_exist(path):
    import typer

    from medctkit.cli import app

    known = {
        name: {o for p in command.params for o in p.opts}
        for name, command in typer.main.get_command(app).commands.items()
    }
    for name, options in commands(path):
        assert name in known, f"no command `medctkit {name}`"
        assert set(options) <= known[name], f"medctkit {name}: no option {sorted(set(options) - known[name])}"


# --- the API ---------------------------------------------------------------------------------------------

DOCUMENTED = [
    name
    for path in sorted((ROOT / "docs/api").glob("*.md"))
    for name in re.findall(r"automodule:: (\S+)", path.read_text())
]
PACKAGE = ROOT / "medctkit"
FILES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if path.stem not in ("__init__", "cli", "cli_deploy", "cli_maintain", "cli_measure")
)
PUBLIC = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
UNNAMED = 5  # up to so many arguments, names and types may say it
SAID = re.compile(r"\b(args|arguments)\b[^.]*\bthose of\b", re.I)
SHAPE = re.compile(r"\((\.\.\.|[\w+]+( [\w+]+)*),[^()]*\)|\b(shape|scalar|HU|Hounsfield|mm)\b")
ARRAY = re.compile(r"(torch\.|np\.|numpy\.)?(Tensor|ndarray)( \| None)?$")


def test_every_public_module_is_on_one_page_of_the_api():
    assert len(DOCUMENTED) == len(set(DOCUMENTED))
    assert set(PUBLIC) == set(DOCUMENTED)
    for name in DOCUMENTED:
        importlib.import_module(name)


def public_names(module):
    """Classes and functions of a module, and the methods that its classes define themselves."""
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(thing):
            yield name, thing
            for inner, method in vars(thing).items():
                method = getattr(method, "__func__", method)
                if inspect.isfunction(method) and not inner.startswith("_"):
                    yield f"{name}.{inner}", method
        elif inspect.isfunction(thing):
            yield name, thing


def complaint(thing):
    """What a docstring lacks, or None."""
    doc = inspect.cleandoc(thing.__doc__ or "")
    if not doc:
        return "no docstring"
    if inspect.isclass(thing):
        return None
    parameters = [p for p in inspect.signature(thing).parameters.values() if p.name not in ("self", "cls")]
    silent = [p.name for p in parameters if not re.search(rf"\b{p.name}\b", doc)]
    if silent and not SAID.search(doc) and ("Args:" in doc or len(parameters) > UNNAMED):
        return f"says nothing of {', '.join(silent)}"
    hints = [p.annotation for p in parameters] + [inspect.signature(thing).return_annotation]
    arrays = [hint for hint in hints if ARRAY.match(getattr(hint, "__qualname__", str(hint)))]
    if arrays and not SHAPE.search(doc):
        return "arrays without a shape or unit"
    return None


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_name_arguments_and_shapes(name):
    module = importlib.import_module(name)
    assert {name: said for name, thing in public_names(module) if (said := complaint(thing))} == {}


def test_names_in_docstrings_and_comments_exist():
    for path in sorted((ROOT / "medctkit").rglob("*.py")):
        for name in re.findall(r"`(medctkit(?:\.\w+)+)`", path.read_text()):
            assert pydoc.locate(name) is not None, f"{path.name}: there is no {name}"


# --- how the site is built -------------------------------------------------------------------------------


def test_the_site_takes_nothing_from_the_network_and_runs_nothing():
    conf = module_from(ROOT / "docs" / "conf.py")
    assert conf.nb_execution_mode == "off" and conf.nb_ipywidgets_js == {}
    assert "sphinx-mathjax-offline" in conf.extensions
    for path in (ROOT / "docs" / "static").iterdir():
        assert "//" not in path.read_text(), f"{path.name} names a server"
