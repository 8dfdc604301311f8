"""Exercises come from solutions; outputs are committed as a code host shows them and compared by kind."""

import asyncio
import base64
import copy
import io
import os
import runpy
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import zmq.asyncio
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.session import Session
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from typer.testing import CliRunner

from medctkit.cohort.manifest import load_manifest
from tools import notebooks as course
from tools.notebook_outputs import VIEW, cleaned, differences, kinds, noise, picture_of

SOLVED = """# Exercise 88.1: halve
def half(x):
    \"\"\"Half of x.\"\"\"
    # <solution>
    y = x / 2
    return y
    # </solution>


check("88.1", half)"""
STUDENTS = """# Exercise 88.1: halve
def half(x):
    \"\"\"Half of x.\"\"\"
    ...  # your code


check("88.1", half)"""


# --- exercises ------------------------------------------------------------------------------------------------


def test_students_get_a_gap_where_the_solution_stands():
    assert course.students(SOLVED) == STUDENTS
    own = course.students("# Exercise 88.2: two\n# <solution> rank = ...\nrank = 24\n# </solution>\nprint(rank)\n")
    assert own.strip() == "# Exercise 88.2: two\nrank = ...\nprint(rank)"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("# Exercise 88.1: a\nx = 1", "expected # <solution> and # </solution> around"),
        ("# Exercise 88.1: a\n# <solution>\nx = 1", "expected # <solution> and # </solution> around"),
        ("# Exercise 88.1: a\nx = 1\n# </solution>", "'# </solution>' without its other half"),
        ("# Exercise 88.1: a\n# <solution>\n# <solution>\n# </solution>", "'# <solution>' without its other half"),
    ],
)
def test_marks_that_would_give_a_solution_away_are_refused(source, message):
    with pytest.raises(ValueError, match=f"exercise 88.1: .*{message}"):
        course.students(source)


def test_solutions_are_read_cell_by_cell(tmp_path):
    file = tmp_path / "88_tiny.py"
    file.write_text(f'"""Solutions."""\n\n# %%\n{SOLVED}\n\n# %% [markdown]\n# Exercise 88.2: other\nx = 1\n')
    assert course.read_solutions(file) == {"88.1": SOLVED, "88.2": "# Exercise 88.2: other\nx = 1"}
    assert course.read_solutions(tmp_path / "none.py") == {}
    file.write_text(f"# %%\n{SOLVED}\n# %%\n{SOLVED}\n")
    with pytest.raises(ValueError, match="88_tiny.py: exercise 88.1 a second time"):
        course.read_solutions(file)
    file.write_text("# %%\nx = 1\n")
    with pytest.raises(ValueError, match="a cell that begins with 'x = 1'; expected cells that begin with"):
        course.read_solutions(file)


def exercise_cell(source=STUDENTS):
    return new_code_cell(source, id="exercise", metadata={"tags": ["exercise"]})


def test_a_notebook_gets_the_cell_for_colab_and_its_exercises():
    before = new_notebook(cells=[new_markdown_cell("# T", id="title"), exercise_cell("# Exercise 88.1: old\n1")])
    before.cells[1].outputs = [new_output("stream", text="old")]
    for solved, source in ((False, STUDENTS), (True, SOLVED)):
        after = course.assembled(before, {"88.1": SOLVED}, solved)
        assert [cell.id for cell in after.cells] == ["title", "colab", "exercise"]
        assert after.cells[1].source == course.COLAB_CELL.read_text().strip()
        assert after.cells[2].source == source and not after.cells[2].outputs, "outputs of other code"
    assert before.cells[1].source == "# Exercise 88.1: old\n1", "the notebook given stays"
    again = course.assembled(after, {"88.1": SOLVED}, solved)
    assert again == after


def test_an_exercise_without_a_solution_is_named_and_the_other_way_round():
    notebook = new_notebook(cells=[new_markdown_cell("# T"), exercise_cell()])
    with pytest.raises(ValueError, match="exercises 88.1, 88.2: expected .* cells: 88.1; solutions: 88.2"):
        course.assembled(notebook, {"88.2": SOLVED})


# --- outputs --------------------------------------------------------------------------------------------------


def ran_cell(*outputs, source="x = 1", tags=(), cell="cell"):
    metadata = {"tags": list(tags)} if tags else {}
    return new_code_cell(source, id=cell, outputs=list(outputs), execution_count=1, metadata=metadata)


def shown(**data):
    return new_output("display_data", data={name.replace("_", "/"): value for name, value in data.items()})


def after_cleaning(*outputs, models=None):
    source = new_notebook(cells=[new_code_cell("x = 1", id="cell")])
    ran = new_notebook(cells=[ran_cell(*outputs)])
    state = {"application/vnd.jupyter.widget-state+json": {"state": models or {}}}
    ran.metadata["widgets"] = state
    notebook = cleaned(source, ran)
    assert "widgets" not in notebook.metadata
    return notebook.cells[0].outputs


def test_text_is_joined_and_progress_and_addresses_are_left_out():
    out = [new_output("stream", text=text) for text in ("a\n", "10 %\r20 %\rdone\n", "<o at 0x7f00deadbeef>\n")]
    bar = new_output("stream", name="stderr", text="\r 50%|#####     |\r100%|##########|")
    (output,) = after_cleaning(out[0], bar, *out[1:])
    assert output.text == "a\ndone\n<o>\n"


def test_random_names_of_styled_tables_are_made_plain():
    page = '<style>#T_a1b2c th {}</style><table id="T_{0}"><td id="T_{0}_row0">1</td></table>'
    pages = [page.replace("a1b2c", name).replace("{0}", name) for name in ("a1b2c", "0ff1c")]
    first, second = (after_cleaning(shown(text_html=text, text_plain="x"))[0] for text in pages)
    assert first == second and "T_00000_row0" in first.data["text/html"]


def test_a_widget_becomes_its_first_picture_and_one_without_is_left_out():
    models = {
        "box": {"model_name": "VBoxModel", "state": {"children": ["IPY_MODEL_slider", "IPY_MODEL_row"]}},
        "row": {"model_name": "HBoxModel", "state": {"children": ["IPY_MODEL_row", "IPY_MODEL_image"]}},
        "slider": {"model_name": "IntSliderModel", "state": {"value": 7}},
        "image": {
            "model_name": "ImageModel",
            "state": {"format": "jpeg"},
            "buffers": [{"encoding": "base64", "path": ["value"], "data": "QUJD"}],
        },
        "canvas": {"model_name": "MPLCanvasModel", "state": {"_data_url": "data:image/png;base64,REVG"}},
    }
    assert picture_of("box", models) == ("image/jpeg", "QUJD")
    assert picture_of("canvas", models) == ("image/png", "REVG")
    views = [
        new_output("display_data", data={VIEW: {"model_id": name}, "text/plain": "Box()"}) for name in ("box", "slider")
    ]
    (output,) = after_cleaning(*views, models=models)
    assert output.data == {"text/plain": "Box()", "image/jpeg": "QUJD"}


TABLE = (
    "<table><thead><tr><th></th><th>AUROC</th><th>F1 &amp; more</th></tr></thead><tr><th>0</th><td>1</td></tr></table>"
)


def test_other_numbers_are_no_difference_but_other_kinds_are():
    picture, table = shown(image_png="QUJD"), shown(text_html=TABLE)
    committed = new_notebook(cells=[ran_cell(new_output("stream", text="0.1"), picture, table, source="plot()\nx")])
    fresh = copy.deepcopy(committed)
    fresh.cells[0].outputs[0].text = "0.2\n0.3"
    fresh.cells[0].outputs[2].data["text/html"] = TABLE.replace("<td>1", "<td>2")
    assert differences(committed, fresh) == []
    fresh.cells[0].outputs[2].data["text/html"] = TABLE.replace("AUROC", "AUC")
    was, now = (f"text | image/png | table ({name}, F1 & more)" for name in ("AUROC", "AUC"))
    assert differences(committed, fresh) == [f"cell `plot()`: committed {was}; now {now}"]
    fresh.cells[0].outputs = []
    assert differences(committed, fresh)[0].endswith("; now nothing")


def test_exercises_and_the_reader_s_own_cells_are_not_compared_but_all_must_have_been_run():
    tags = ("exercise", "parameters", "colab")
    cells = [ran_cell(shown(text_html="a"), tags=[tag], cell=tag) for tag in tags]
    committed = new_notebook(cells=cells)
    fresh = copy.deepcopy(committed)
    for cell in fresh.cells:
        cell.outputs = []
    assert differences(committed, fresh) == []
    for cell in committed.cells:
        cell.execution_count = None
    assert differences(committed, fresh) == ["is committed without outputs"]


def test_warnings_are_told_to_whoever_renders():
    said = "UserWarning: beware\n  50%|##   | 1/2\n"
    notebook = new_notebook(cells=[ran_cell(new_output("stream", name="stderr", text=said), source="risky()")])
    assert noise(notebook) == ["risky(): UserWarning: beware"]


# --- make render, make notebooks ------------------------------------------------------------------------------

LESSON = """import base64, sys
from pathlib import Path
import ipywidgets as w
from tqdm.auto import tqdm
from medctkit.course.exercises import Wrong, check, checks

for _ in tqdm(range(3)):
    pass
print(Path("../data_manifest.csv").read_text(), file=sys.stderr)
print(object())
Path(output_dir).mkdir(parents=True)  # fails where results of an earlier run lie about
image = w.Image(value=base64.b64decode("PICTURE"), format="png")
w.VBox([w.IntSlider(7), image])
"""
VIEWER = """import numpy as np
from medctkit.scans.volumes import CTVolume
from medctkit.viewers import SliceViewer
SliceViewer(CTVolume(np.zeros((4, 6, 6), np.int16), (2.0, 2.0, 2.0)))"""
CHECKS = """@checks("88.1")
def halves(half):
    if half(8) != 4:
        raise Wrong("not half")
    return "Exact."
"""


def picture():
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A repository with one small notebook, rendered once."""
    root = tmp_path_factory.mktemp("clone")
    (root / "data_manifest.csv").write_text("study,patient\n")
    (root / "runs" / "notebooks").mkdir(parents=True)
    folder = root / "notebooks"
    (folder / "solutions").mkdir(parents=True)
    (folder / "solutions" / "88_tiny.py").write_text(f"# %%\n{SOLVED}\n")
    parameters = new_code_cell('output_dir = "../runs/notebooks"', metadata={"tags": ["parameters"]}, id="parameters")
    cells = [
        new_markdown_cell("# Tiny", id="title"),
        parameters,
        new_code_cell(LESSON.replace("PICTURE", picture()), id="lesson"),
    ]
    cells += [new_code_cell(VIEWER, id="viewer"), new_code_cell(CHECKS, id="checks")]
    cells += [exercise_cell("# Exercise 88.1: halve")]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "88_tiny.ipynb")
    result = run("render", root)
    assert result.exit_code == 0, result.output
    return root, result.output, (folder / "88_tiny.ipynb").read_bytes()


def run(command, root, *more):
    return CliRunner().invoke(course.app, [command, "--notebooks-dir", str(root / "notebooks"), *map(str, more)])


def test_rendered_notebooks_show_what_a_code_host_can_show(clone):
    root, said, content = clone
    notebook = nbformat.reads(content.decode(), as_version=4)
    assert notebook.metadata == {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    assert [cell.id for cell in notebook.cells] == "title colab parameters lesson viewer checks exercise".split()
    lesson, viewer, exercise = notebook.cells[3], notebook.cells[4], notebook.cells[6]
    assert kinds(lesson) == ["text", "image/png"] and lesson.outputs[0].text == "<object object>\n"
    assert lesson.outputs[1].data["image/png"].strip() == picture()
    assert kinds(viewer) == ["image/jpeg"] and viewer.outputs[0].metadata == {"medctkit-stack": "88_tiny-stack-1.html"}
    assert exercise.source == STUDENTS and "Not done yet." in exercise.outputs[0].data["text/html"]
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells if not course.is_tagged(cell, "colab"))
    assert "not committed: import base64, sys: study,patient" in said
    assert str(root) not in content.decode() and (root / "runs" / "render" / "88_tiny.html").is_file()


def test_rendering_again_gives_the_same_bytes_and_the_site_shows_the_viewers_as_stacks(clone):
    root, _, content = clone
    stacks = root / "notebooks" / "stacks"
    (stacks / "88_tiny-stack-7.html").write_text("of an earlier rendering")
    assert run("render", root).exit_code == 0
    assert (root / "notebooks" / "88_tiny.ipynb").read_bytes() == content
    assert [path.name for path in stacks.iterdir()] == ["88_tiny-stack-1.html"]
    assert "axial slice 2 of 0 to 3" in (stacks / "88_tiny-stack-1.html").read_text()
    source = [content.decode()]
    runpy.run_path(str(course.ROOT / "docs" / "conf.py"))["viewers_are_stacks"](None, "notebooks/88_tiny", source)
    (shown,) = nbformat.reads(source[0], as_version=4).cells[4].outputs
    assert [*shown.data] == ["text/html"] and '<iframe src="../88_tiny-stack-1.html"' in shown.data["text/html"]


def test_a_check_on_some_patients_leaves_the_cohort_as_it_is(tmp_path):
    cohort = course.ROOT / course.COHORT
    there = load_manifest(cohort)
    for every in (3, 1, 3):  # in the same place
        with course.workspace(folder=tmp_path, every=every) as notebooks:
            some = load_manifest(notebooks.parent / course.COHORT)
    pd.testing.assert_frame_equal(load_manifest(cohort), there)
    assert set(some["study"]) < set(there["study"])
    parts = ["hospital", "split"]
    counts, of = (table.groupby(parts)["patient"].nunique() for table in (some, there))
    assert counts.equals((of + 2) // 3)
    assert some.groupby("patient").size().equals(there.groupby("patient").size()[sorted(set(some["patient"]))])


def test_what_is_no_link_in_the_folder_that_is_kept_is_refused_and_stays(clone, tmp_path):
    (tmp_path / course.COHORT).write_text("mine")
    with pytest.raises(FileExistsError, match=course.COHORT), course.workspace(clone[0], tmp_path):
        pass
    assert (tmp_path / course.COHORT).read_text() == "mine"


def test_check_solves_the_exercises_and_compares_with_what_is_committed(clone, monkeypatch):
    root, _, content = clone
    out = root / "runs" / "checked"
    path = root / "notebooks" / "88_tiny.ipynb"
    notebook = nbformat.reads(content.decode(), as_version=4)
    del notebook.cells[3].outputs[1]
    nbformat.write(notebook, path)
    before = path.read_bytes()
    result = run("check", root, "--output-dir", out)
    assert result.exit_code == 1
    assert "88_tiny.ipynb: cell `import base64, sys`: committed text; now text | image/png" in result.output
    assert path.read_bytes() == before, "checking writes nothing to the notebooks"
    solved = nbformat.read(out / "88_tiny.ipynb", as_version=4)
    assert solved.cells[-1].source == SOLVED and "Right." in solved.cells[-1].outputs[0].data["text/html"]
    assert os.environ.get("MEDCTKIT_STRICT_EXERCISES") is None
    path.write_bytes(content)


async def reply_while_sending(patience):
    """Wait for a reply that arrives while something is sent on the same channel, as nbclient does for a widget."""
    with zmq.asyncio.Context() as ours, zmq.Context() as theirs:
        kernel, client = theirs.socket(zmq.ROUTER), ours.socket(zmq.DEALER)
        client.connect(f"tcp://127.0.0.1:{kernel.bind_to_random_port('tcp://127.0.0.1')}")
        session = Session(key=b"")
        channel = AsyncZMQSocketChannel(client, session)
        channel.send(session.msg("kernel_info_request"))
        address = kernel.recv_multipart()[0]
        waiting = asyncio.ensure_future(channel.get_msg(timeout=None))
        await asyncio.sleep(0.1)
        session.send(kernel, "execute_reply", ident=address)
        time.sleep(0.2)  # it is there, and the event loop has not seen it
        channel.send(session.msg("comm_msg"))
        try:
            return (await asyncio.wait_for(waiting, patience))["msg_type"]
        finally:
            kernel.close(linger=0)
            client.close(linger=0)


def test_a_reply_that_wakes_nobody_is_found():
    with pytest.raises(TimeoutError):  # the fault of nbclient that is worked around; where it is gone, this can go
        asyncio.run(reply_while_sending(1.5))
    with course._replies_looked_for():
        assert asyncio.run(reply_while_sending(20)) == "execute_reply"


def test_a_solution_that_is_not_right_fails_the_check(clone):
    root, _, _ = clone
    file = root / "notebooks" / "solutions" / "88_tiny.py"
    before = file.read_text()
    file.write_text(before.replace("x / 2", "x"))
    result = run("check", root, "--output-dir", root / "runs" / "wrong")
    file.write_text(before)
    assert result.exit_code == 1
    assert (
        "88_tiny.ipynb failed in cell 7" in result.output
        and "NotSolved" in result.output
        and "not half" in result.output
    )


def test_committed_notebooks_were_run_in_one_go_with_nothing_solved():
    """Rendered one by one beside a check's results, they told of other runs, and of exercises nobody had solved."""
    said = {}
    for path in sorted((course.ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        said[path.name] = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", ()))
    assert [name for name, text in said.items() if "●" in text] == []
    runs = {line for text in said.values() for line in text.split("\n") if "a run finished after" in line}
    assert len(runs) == 1, runs


def test_what_cannot_be_committed_is_refused():
    path = Path("01_x.ipynb")
    with pytest.raises(RuntimeError, match="01_x.ipynb has 2.1 MB with its outputs; at most 2 MB"):
        course._refuse(path, "x" * 2_100_000, ())
    with pytest.raises(RuntimeError, match="01_x.ipynb shows a folder of this machine: ...written: /home/ann/a"):
        course._refuse(path, "written: /home/ann/a.png", (Path("/home/ann"),))
    course._refuse(path, "/home/anna and /home/ann-2 are others", (Path("/home/ann"), Path("/")))


def test_exercises_are_written_without_running_anything(clone):
    root, _, content = clone
    path = root / "notebooks" / "88_tiny.ipynb"
    path.write_bytes(content.replace(b"...  # your code", b"y = x / 2  # peeked"))
    assert run("exercises", root, "88").exit_code == 0
    assert nbformat.read(path, as_version=4).cells[-1].source == STUDENTS
    path.write_bytes(content)


def test_no_such_notebook_lists_those_there(clone):
    result = run("render", clone[0], "07")
    assert result.exit_code == 1 and "no notebooks 07; there are ['88_tiny.ipynb']" in result.output


@pytest.mark.slow
def test_cells_that_name_what_is_gone_are_found_without_running_them(tmp_path):
    gone = ["lora.parameter_table(1, no_such=2)", "lora.no_such_name"]
    cells = ["from medctkit import lora", "\n".join(gone), "display(1)  # IPython's"]
    path = tmp_path / "notebooks" / "88_tiny.ipynb"
    path.parent.mkdir()
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Tiny"), *map(new_code_cell, cells)]), path)
    found = course.misfits([path])
    assert [line.split("\n")[0] for line in found] == [f"88_tiny.ipynb, cell 4: {line}" for line in gone]
