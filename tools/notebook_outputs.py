"""Outputs of notebooks: what of them is committed, and whether two runs gave outputs of the same kinds.

Committed are pictures, tables and text as a code host shows them; not widgets, which need a kernel, nor what changes
from run to run though nothing has changed: addresses, progress bars, random names. Measured times stay as measured.
"""

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from html import unescape

VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
# Their outputs depend on who runs the notebook, and where.
NOT_COMPARED = {"exercise", "parameters", "injected-parameters", "colab"}


# --- what is committed --------------------------------------------------------------------------------------


def cleaned(source, ran):
    """The notebook `source` with the outputs of its run, as they are committed.

    Cells are those of `source`, with their metadata; of `ran` come outputs and execution counts. A widget becomes the
    first picture in it; one without a picture is left out.

    Args:
        source: notebook (nbformat 4) that was run.
        ran: what came of it, cell by cell, with the state of its widgets.
    """
    notebook = deepcopy(source)
    notebook.metadata.pop("widgets", None)
    models = ran.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    cells = {cell.id: cell for cell in ran.cells}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            found = cells[cell.id]
            cell.execution_count = found.execution_count
            cell.outputs = _joined(filter(None, (_output(output, models) for output in found.outputs)))
    return notebook


def noise(ran) -> list[str]:
    """What the cells of a notebook said on stderr, progress bars apart: not committed, but someone should read it."""
    said = []
    for cell in ran.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream" and output.name == "stderr":
                lines = [line for line in re.split(r"[\r\n]+", output.text) if line.strip() and "%|" not in line]
                said += [f"{_first_line(cell)}: {line.strip()}" for line in lines[:3]]
    return said


def _output(output, models: Mapping):
    output = deepcopy(output)
    if output.output_type == "stream":
        output.text = _steady(re.sub(r"[^\n]*\r(?!\n)", "", output.text))
        return output if output.name == "stdout" and output.text.strip() else None
    if output.output_type == "error":
        return output
    data = output.data
    view = data.pop(VIEW, None)
    if view is not None:
        output.metadata.pop(VIEW, None)
        shown = data.get("image/png") or data.get("image/jpeg")
        data.pop("text/html", None)  # ipympl's has the picture once more
        if not shown:
            picture = picture_of(view["model_id"], models)
            if picture is None:
                return None
            data[picture[0]] = picture[1]
    for mime in ("text/plain", "text/html", "text/markdown"):
        if mime in data:
            data[mime] = _steady(data[mime])
    return output


def picture_of(model_id: str, models: Mapping) -> tuple[str, str] | None:
    """Mime type and base64 text of the first picture in a widget: an image, or the canvas of a figure."""
    seen: set[str] = set()

    def look(name: str) -> tuple[str, str] | None:
        if name in seen or name not in models:
            return None
        seen.add(name)
        model = models[name]
        state = model.get("state", {})
        url = state.get("_data_url") or ""
        if url.startswith("data:image/"):
            mime, _, text = url.removeprefix("data:").partition(";base64,")
            return mime, text
        if model.get("model_name") == "ImageModel":
            for buffer in model.get("buffers", ()):
                if buffer["path"] == ["value"] and buffer["data"]:
                    return f"image/{state.get('format', 'png')}", buffer["data"]
        return next(filter(None, map(look, _children(state))), None)

    return look(model_id)


def _children(state: Mapping) -> Iterator[str]:
    for value in state.values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str) and item.startswith("IPY_MODEL_"):
                yield item.removeprefix("IPY_MODEL_")


def _steady(text: str) -> str:
    """Text without addresses in memory, and with the names that pandas draws for styled tables made plain."""
    text = re.sub(r" at 0x[0-9a-f]{6,}", "", text)
    drawn = dict.fromkeys(re.findall(r'<table id="T_([0-9a-f]{5,})"', text))
    for number, name in enumerate(drawn):
        text = text.replace(f"T_{name}", f"T_{number:05d}")
    return text


def _joined(outputs) -> list:
    """Text that was printed in one go comes in pieces; where it is cut depends on the machine."""
    found: list = []
    for output in outputs:
        if found and found[-1].output_type == output.output_type == "stream":
            found[-1].text += output.text
        else:
            found.append(output)
    return found


# --- comparing ----------------------------------------------------------------------------------------------


def kinds(cell) -> list[str]:
    """Kinds of a cell's outputs: that it prints, then what it shows, in order; never how much, or which numbers."""
    outputs = cell.get("outputs", ())
    printed = ["text"] if any(output.output_type == "stream" for output in outputs) else []
    return printed + [_kind(output) for output in outputs if output.output_type != "stream"]


def _kind(output) -> str:
    if output.output_type == "error":
        return f"error {output.ename}"
    mimes = sorted(set(output.data) - {"text/plain"})
    columns = _columns(output.data["text/html"]) if "text/html" in mimes else []
    kind = " + ".join(mimes) or "value"
    return f"table ({', '.join(columns)})" if columns else kind


def _columns(page: str) -> list[str]:
    """Headings of the tables in a page that pandas wrote."""
    heads = re.findall(r"<th\b[^>]*>(.*?)</th>", "".join(re.findall(r"<thead.*?</thead>", page, re.S)), re.S)
    names = [unescape(re.sub("<[^>]+>", "", head)).strip() for head in heads]
    return [name for name in names if name]


def differences(committed, fresh) -> list[str]:
    """Where a run gave outputs of other kinds than those that are committed, a line for each cell.

    Exercises are left out (here they are solved, there they are not), as are parameters and the cell for Colab.

    Args:
        committed: notebook, its outputs as `cleaned` leaves them.
        fresh: the same notebook, cleaned, of another run.
    """
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    if not any(cell.execution_count for cell in code):
        return ["is committed without outputs"]
    there = {cell.id: cell for cell in fresh.cells}
    found = []
    for cell in code:
        if NOT_COMPARED & set(cell.metadata.get("tags", ())):
            continue
        before, now = kinds(cell), kinds(there[cell.id]) if cell.id in there else None
        if before != now:
            came = "the cell is not there" if now is None else " | ".join(now) or "nothing"
            found.append(f"cell `{_first_line(cell)}`: committed {' | '.join(before) or 'nothing'}; now {came}")
    return found


def _first_line(cell) -> str:
    return cell.source.strip().partition("\n")[0][:80]
