"""How the measuring programs print what they found, write it down, and put it on a page."""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from medctkit.common.provenance import write_json

HERE = Path(__file__).resolve().parent
PAGES = HERE.parent / "docs"


def block(name, lines):
    """Lines of Markdown between the marks that a page has for them."""
    return "\n".join([f"<!-- {name}: begin -->", "", *lines, "", f"<!-- {name}: end -->"])


def write_block(page, name, lines):
    """Put the lines where a page of docs/ has the marks."""
    path, begin, end = PAGES / page, f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    path.write_text(before + block(name, lines) + rest.partition(end)[2], encoding="utf-8")


def peak_bytes():
    """The most memory that this process has had."""
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def made_with(command, packages, **more):
    """What a number needs beside it; the `packages` have spaces between them."""
    return {"command": command, **more, "versions": {name: version(name) for name in packages.split()}}


def this_machine():
    """Its processor, its system and its Python."""
    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    return {"cpu": cpu, "system": platform.system(), "python": platform.python_version()}


def publish(name, found, page, lines, output=None):
    """Print the lines and write what was found: to bench/<name>.json and the page, or to `output` alone."""
    print(*lines, sep="\n")
    write_json(found, output or HERE / f"{name}.json")
    if output is None:
        write_block(page, name, lines)


def show(name, values, indent=0):
    """Print nested figures, a line each."""
    print(f"{'  ' * indent}{name}")
    for key, value in values.items():
        if isinstance(value, dict):
            show(key, value, indent + 1)
        else:
            print(f"{'  ' * (indent + 1)}{key.replace('_', ' '):40} {value:,.4g}")


def all_met(bars):
    """Print whether each bar, (met, what), is met; returns whether all are."""
    bars = list(bars)
    for met, what in bars:
        print("met   " if met else "MISSED", what)
    return all(met for met, _ in bars)
