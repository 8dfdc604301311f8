"""The course's machinery: exercises put into notebooks, notebooks run from nothing, outputs committed and compared.

`make render` writes the notebooks with their outputs; `make notebooks` runs them with the exercises solved and fails
where what comes out is of another kind than what is committed.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from queue import Empty
from typing import Annotated
from unittest import mock

import typer

from medctkit.cli import told
from medctkit.common.atomic import write_text
from medctkit.course.exercises import STRICT
from tools.notebook_outputs import cleaned, differences, noise
from tools.offline_pages import with_stacks_kept

ROOT = Path(__file__).resolve().parent.parent
COHORT = "data_manifest.csv"
COLAB_CELL = Path(__file__).parent / "colab_cell.py"
STACKS = "stacks"  # beside the notebooks: their viewers as pages, for the site
LARGEST = 2_000_000  # bytes of a committed notebook
BAR = "{desc:<26} {bar:30} {n}/{total} cells, {elapsed}"
_TITLE = re.compile(r"# Exercise (\d\d\.[1-9]): \S.*")
_OPEN, _CLOSE = "# <solution>", "# </solution>"
_BREAK = ("attr-defined", "call-arg", "name-defined", "import-not-found", "syntax")  # mypy's errors that end a run


# --- exercises ----------------------------------------------------------------------------------------------


def exercise_name(source: str) -> str | None:
    """The name of the exercise, such as "01.1", in whose cell `source` stands; None for other cells."""
    found = _TITLE.fullmatch(source.partition("\n")[0])
    return found[1] if found else None


def read_solutions(path: Path) -> dict[str, str]:
    """The solved cells of a file in percent format, by the name of their exercise; {} where there is no file.

    Raises:
        ValueError: a cell without a title, or two with one name; names file and line.
    """
    cells: dict[str, str] = {}
    if not path.is_file():
        return cells
    parts = re.split(r"^# %%.*\n", path.read_text(encoding="utf-8"), flags=re.M)
    for part in parts[1:]:
        source = part.strip()
        name = exercise_name(source)
        if name is None or name in cells:
            wrong = f"exercise {name} a second time" if name else f"a cell that begins with {source[:60]!r}"
            raise ValueError(f'{path}: {wrong}; expected cells that begin with "# Exercise 01.1: title", each once')
        cells[name] = source
    return cells


def students(source: str) -> str:
    """A solved cell as the student gets it: what stands between the marks is cut out.

    `# <solution>` to `# </solution>` become one line: what follows the opening mark, or `...  # your code`.

    Args:
        source: of the solved cell.

    Raises:
        ValueError: the cell has no marks, or not in pairs.
    """
    lines, marks, inside = [], 0, False
    for line in source.split("\n"):
        text = line.strip()
        if text.startswith(_OPEN) and not inside:
            indent, inside, marks = line[: len(line) - len(line.lstrip())], True, marks + 1
            lines.append(indent + (text.removeprefix(_OPEN).strip() or "...  # your code"))
        elif text == _CLOSE and inside:
            inside = False
        elif text.startswith((_OPEN, _CLOSE)):
            raise ValueError(f"exercise {exercise_name(source)}: {text!r} without its other half")
        elif not inside:
            lines.append(line)
    if inside or not marks:
        raise ValueError(f"exercise {exercise_name(source)}: expected {_OPEN} and {_CLOSE} around what is cut out")
    return "\n".join(lines)


# The cell for Colab, which no lesson is about: folded in JupyterLab, in Colab and on the site.
FOLDED = {"tags": ["colab", "hide-input"], "jupyter": {"source_hidden": True}, "cellView": "form"}
# The cell after a question: its committed outputs, the answer, stay folded until it is run or they are opened.
QUESTION, ANSWER = "**Predict, then run:**", {"tags": ["hide-output"], "jupyter": {"outputs_hidden": True}}


def assembled(notebook, solutions: Mapping[str, str], solved: bool = False):
    """A notebook with the cell for Colab, folded answers and its exercises, as the student gets them or solved.

    Args:
        notebook: of nbformat; left as it is.
        solutions: see `read_solutions`.
        solved: put the solutions in.

    Raises:
        ValueError: an exercise without a solution or a solution without an exercise.
    """
    import nbformat

    notebook = nbformat.from_dict(notebook)
    there = {exercise_name(cell.source): cell for cell in notebook.cells if is_tagged(cell, "exercise")}
    odd = sorted(map(str, set(there) ^ set(solutions)))
    if odd:
        raise ValueError(
            f"exercises {', '.join(odd)}: expected a cell tagged exercise that begins with its title, and a solution, "
            f"of each; cells: {', '.join(map(str, there))}; solutions: {', '.join(solutions)}"
        )
    for name, cell in there.items():
        _set_source(cell, solutions[name] if solved else students(solutions[name]))
    cells = [cell for cell in notebook.cells if is_tagged(cell, "colab")]
    if not cells:
        cells = [nbformat.v4.new_code_cell(id="colab")]
        notebook.cells.insert(1, cells[0])
    cells[0].metadata = nbformat.from_dict(FOLDED)
    for question, answer in pairwise(notebook.cells):
        if QUESTION in question.source and answer.cell_type == "code":
            answer.metadata = nbformat.from_dict(ANSWER)
    _set_source(cells[0], COLAB_CELL.read_text(encoding="utf-8").strip())
    return notebook


def is_tagged(cell, tag: str) -> bool:
    """Whether a cell of a notebook has a tag."""
    return tag in cell.metadata.get("tags", [])


def _set_source(cell, source: str) -> None:
    if cell.source != source:
        cell.update(source=source, outputs=[], execution_count=None)


# --- running ------------------------------------------------------------------------------------------------


@contextmanager
def this_interpreter_as_kernel() -> Iterator[None]:
    """For a while, the kernel name "python3" means the running interpreter.

    A "python3" kernel that someone registered for another environment would otherwise be found first.
    """
    from ipykernel.kernelspec import write_kernel_spec

    with tempfile.TemporaryDirectory() as folder:
        write_kernel_spec(Path(folder) / "kernels" / "python3")
        path = os.pathsep.join(filter(None, [folder, os.environ.get("JUPYTER_PATH")]))
        with mock.patch.dict(os.environ, {"JUPYTER_PATH": path}):
            yield


def export_html(notebook: Path) -> Path:
    """Write an executed notebook as one HTML file beside it, pictures and widget states inside."""
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter().from_filename(str(notebook))
    target = notebook.with_suffix(".html")
    write_text(target, page)
    return target


@contextmanager
def _replies_looked_for() -> Iterator[None]:
    """Each second, look whether a kernel has replied.

    A cell's reply that comes while nbclient sends a widget's answer wakes nobody, and nbclient waits for ever:
    https://github.com/jupyter/nbclient/issues/312.
    """
    from jupyter_client.channels import AsyncZMQSocketChannel as Channel

    get_msg = Channel.get_msg

    async def looking(self: Channel, timeout: float | None = None) -> dict:
        while timeout is None:
            with suppress(Empty):
                return await get_msg(self, 1.0)
        return await get_msg(self, timeout)

    with mock.patch.object(Channel, "get_msg", looking):
        yield


def execute(source: Path, executed: Path, parameters: Mapping | None = None, folder: Path | None = None) -> Path:
    """Run one notebook, from its own folder as JupyterLab does.

    Args:
        source: the notebook.
        executed: the notebook to write.
        parameters: take the place of those in its cell tagged `parameters`.
        folder: to run it in another.

    Returns:
        The HTML page; the executed notebook lies beside it.

    Raises:
        RuntimeError: a cell failed or the kernel died; names the notebook and the cell, with traceback.
    """
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    try:
        with _replies_looked_for():
            execute_notebook(
                str(source),
                str(executed),
                parameters=dict(parameters or {}),
                kernel_name="python3",
                language="python",
                cwd=str(folder or source.parent),
                progress_bar={"desc": source.stem, "bar_format": BAR},
            )
    except PapermillExecutionError as error:
        page = export_html(executed)
        raise RuntimeError(
            f"{source.name} failed in cell {error.cell_index + 1} (In [{error.exec_count}]):\n"
            + re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
            + f"\nThe notebook so far: {page}"
        ) from None
    except DeadKernelError as error:
        raise RuntimeError(
            f"{source.name}: its kernel died. The usual reason is too little memory: close other programs "
            "and try again, or open the notebook in JupyterLab to see which cell it is. "
            f"The notebook so far: {executed}"
        ) from error
    return export_html(executed)


@contextmanager
def workspace(root: Path = ROOT, folder: Path | None = None, every: int = 1) -> Iterator[Path]:
    """A folder like the repository, but without results: notebooks run in it as in a fresh clone.

    Args:
        root: the repository.
        folder: one that is kept, with its results; None: a new one, which is removed.
        every: the cohort keeps one patient in so many of each hospital and split; 1 keeps all.

    Yields:
        Its folder for notebooks, in which their `../data_manifest.csv` and `../runs` lead where they should.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if folder is None else folder.resolve()
        notebooks = folder / "notebooks"
        notebooks.mkdir(parents=True, exist_ok=True)
        linked = [
            path for path in root.iterdir() if path.name not in ("notebooks", "runs", "data") and path.name[0] != "."
        ]
        linked += [path for path in (root / "notebooks").iterdir() if path.is_dir() and path.name[0] != "."]
        for path in linked:
            link, target = folder / path.relative_to(root), path.resolve()
            if every > 1 and path == root / COHORT:
                target = _thinned(path, folder / ".cohort.csv", every)
            if link.is_symlink():  # of an earlier run; what is no link is somebody's own, and stays
                link.unlink()
            link.symlink_to(target)
        yield notebooks


def _thinned(cohort: Path, target: Path, every: int) -> Path:
    from medctkit.cohort.manifest import load_manifest, write_manifest

    table = load_manifest(cohort)
    patients = table.groupby(["hospital", "split"])["patient"].unique()
    return write_manifest(table[table["patient"].isin({name for names in patients for name in names[::every]})], target)


# --- make render, make notebooks ------------------------------------------------------------------------------


def render(notebooks: Sequence[Path], keep: Path | None = None) -> None:
    """Write the exercises into notebooks, run them in order, and write them back with their outputs.

    Args:
        notebooks: in the folder `notebooks` of a repository.
        keep: see `workspace`.

    Raises:
        RuntimeError: a cell failed, or its outputs can't be committed: too large, or a folder of this machine in them.
        ValueError: see `assembled`.
    """
    import nbformat

    root = _root_of(notebooks)
    executed = root / "runs" / "render"
    executed.mkdir(parents=True, exist_ok=True)
    with this_interpreter_as_kernel(), workspace(root, keep) as folder:
        for solved in folder.parent.glob("runs/*/solved.txt"):  # of a check in the same place; a student begins at 0
            solved.unlink()
        for path in notebooks:
            source = assembled(nbformat.read(path, as_version=4), _solutions_of(path))
            for stale in executed.glob(f"{path.stem}-stack-*"):
                stale.unlink()
            nbformat.write(source, folder / path.name)
            nbformat.write(with_stacks_kept(folder / path.name, executed), folder / path.name)
            page = execute(folder / path.name, executed / path.name, folder=folder)
            ran = nbformat.read(executed / path.name, as_version=4)
            for said in noise(ran):
                print(f"{path.name}: not committed: {said}")
            text = nbformat.writes(cleaned(source, ran)) + "\n"
            _refuse(path, text, (folder.parent, root, Path.home()))
            stacks = path.parent / STACKS
            stacks.mkdir(exist_ok=True)
            for stale in stacks.glob(f"{path.stem}-stack-*"):
                stale.unlink()
            for stack in executed.glob(f"{path.stem}-stack-*"):
                shutil.copyfile(stack, stacks / stack.name)
            write_text(path, text)
            print(f"{path.name}: {len(text) / 1e6:.2f} MB; with its widgets: {page}")


def check(notebooks: Sequence[Path], output_dir: Path, keep: Path | None = None, every: int = 1) -> list[str]:
    """Run notebooks in order with their exercises solved, and compare with the outputs that are committed.

    Args:
        notebooks: what to run.
        output_dir: gets the executed notebooks, also as HTML.
        keep: see `workspace`.
        every: see `workspace`.

    Returns:
        What differs in structure, a line for each; see `tools.notebook_outputs.differences`.

    Raises:
        RuntimeError: a cell failed, or an exercise's solution is not right.
        ValueError: see `assembled`.
    """
    import nbformat

    found: list[str] = []
    output_dir.mkdir(parents=True, exist_ok=True)
    strict = mock.patch.dict(os.environ, {STRICT: "1"})
    with this_interpreter_as_kernel(), workspace(_root_of(notebooks), keep, every) as folder, strict:
        for path in notebooks:
            committed = nbformat.read(path, as_version=4)
            solved = assembled(committed, _solutions_of(path), solved=True)
            nbformat.write(solved, folder / path.name)
            page = execute(folder / path.name, output_dir / path.name, folder=folder)
            fresh = cleaned(solved, nbformat.read(output_dir / path.name, as_version=4))
            found += [f"{path.name}: {line}" for line in differences(committed, fresh)]
            print(page)
    return found


def misfits(notebooks: Sequence[Path]) -> list[str]:
    """What a type checker finds in the cells, exercises solved: names that are gone, arguments nobody takes.

    No cell is run. Only what breaks a run counts: most of what notebooks do has no types.
    """
    import nbformat
    from mypy import api

    with tempfile.TemporaryDirectory() as temporary:
        where: dict[tuple[str, int], str] = {}  # of each line of a script: notebook, cell and the line
        for path in notebooks:
            solved = assembled(nbformat.read(path, as_version=4), _solutions_of(path), solved=True)
            lines = ["from IPython.display import display"]
            for index, cell in enumerate(solved.cells):
                for line in cell.source.split("\n") if cell.cell_type == "code" else ():
                    lines.append(re.sub(r"^(\s*)[%!].*", r"\1pass", line))
                    where[path.stem, len(lines)] = f"{path.name}, cell {index + 1}: {line.strip()}"
            (Path(temporary) / f"notebook_{path.stem}.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
        options = ["--no-error-summary", "--allow-redefinition-new", "--local-partial-types", "--follow-imports=skip"]
        said, trouble, _ = api.run([*options, str(ROOT / "medctkit"), *map(str, Path(temporary).glob("*.py"))])
    if trouble:
        raise RuntimeError(f"the type checker failed: {trouble.strip()}")
    found = re.findall(rf"notebook_(\w+)\.py:(\d+): error: (.*)  \[(?:{'|'.join(_BREAK)})\]", said)
    return [f"{where[stem, int(number)]}\n    {what}" for stem, number, what in found]


def _solutions_of(path: Path) -> dict[str, str]:
    return read_solutions(path.parent / "solutions" / f"{path.stem}.py")


def _root_of(notebooks: Sequence[Path]) -> Path:
    return notebooks[0].resolve().parent.parent


def _refuse(path: Path, text: str, folders: Sequence[Path]) -> None:
    """Outputs that can't be committed."""
    size = len(text.encode())
    if size > LARGEST:
        raise RuntimeError(f"{path.name} has {size / 1e6:.1f} MB with its outputs; at most 2 MB: make figures smaller")
    for folder in map(str, folders):
        found = re.search(rf".{{0,100}}{re.escape(folder)}(?![\w-]).{{0,100}}", text) if len(folder) > 1 else None
        if found:
            raise RuntimeError(f"{path.name} shows a folder of this machine: ...{found[0]}...")


app = typer.Typer(add_completion=False, help="The course: exercises, outputs, checks.")
Names = Annotated[list[str] | None, typer.Argument(help="Beginnings of names, such as 02; by default all.")]
Keep = Annotated[Path | None, typer.Option(help="Keep results of the run here, and go on from those that are there.")]
Folder = Annotated[Path, typer.Option(help="Where the notebooks are.")]


def _chosen(folder: Path, names: Sequence[str] | None) -> list[Path]:
    there = sorted(folder.glob("*.ipynb"))
    chosen = [path for path in there if not names or path.name.startswith(tuple(names))]
    if not chosen:
        raise ValueError(
            f"{folder}: no notebooks {' '.join(names or ['*.ipynb'])}; there are {[p.name for p in there]}"
        )
    return chosen


@app.command("exercises")
def exercises_command(names: Names = None, notebooks_dir: Folder = ROOT / "notebooks") -> None:
    """Write exercises and the cell for Colab into the notebooks, without running them."""
    import nbformat

    with told():
        for path in _chosen(notebooks_dir, names):
            notebook = assembled(nbformat.read(path, as_version=4), _solutions_of(path))
            write_text(path, nbformat.writes(notebook) + "\n")


@app.command("render")
def render_command(names: Names = None, keep: Keep = None, notebooks_dir: Folder = ROOT / "notebooks") -> None:
    """Run the notebooks from nothing and write them back with their outputs."""
    with told():
        render(_chosen(notebooks_dir, names), keep)


@app.command("check")
def check_command(
    names: Names = None,
    output_dir: Annotated[Path, typer.Option(help="Gets the executed notebooks and HTML.")] = Path("runs/notebooks"),
    keep: Keep = None,
    every: Annotated[
        int, typer.Option(min=1, help="Run on one patient in so many: quicker, and scores are rougher.")
    ] = 1,
    notebooks_dir: Folder = ROOT / "notebooks",
) -> None:
    """Run the notebooks with their exercises solved; fail where outputs differ in structure from the committed ones."""
    with told():
        found = check(_chosen(notebooks_dir, names), output_dir, keep, every)
    if found:
        typer.echo("\n".join(["", *found, "", "If that is meant: make render, look at the figures, commit."]), err=True)
        raise typer.Exit(1)
    typer.echo("Every exercise is solved, and outputs are of the kinds that are committed.")


@app.command("types")
def types_command(names: Names = None, notebooks_dir: Folder = ROOT / "notebooks") -> None:
    """Look for names and arguments that the package does not have (any more); runs nothing."""
    with told():
        found = misfits(_chosen(notebooks_dir, names))
    if found:
        typer.echo("\n".join(found), err=True)
        raise typer.Exit(1)
    typer.echo("Notebooks name what there is.")


if __name__ == "__main__":
    app()
