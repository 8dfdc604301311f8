"""Browser tests: `make test-browser`. They start JupyterLab and voila, and click and type in headless Chromium.

Without `tests/browser` on pytest's command line they are skipped, so that `make test` needs no browser.
"""

import re
import shutil
import sys
from pathlib import Path

import chromium as chromium_finder
import nbformat
import pytest
from pages import NotebookPage
from servers import Server

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PICTURES = ROOT / "runs" / "browser"
ARGUMENTS = ("--disable-gpu --disable-quic --no-first-run --disable-background-networking "
             "--disable-component-update --disable-sync").split()  # fmt: skip


@pytest.fixture(scope="session")
def chromium(request):
    """Path of the browser; skips where the browser tests were not asked for."""
    asked = (Path(argument.split("::")[0]).resolve() for argument in request.config.args)
    if not any(path == HERE or HERE in path.parents for path in asked):
        pytest.skip("a browser test: run `make test-browser`")
    path = chromium_finder.find()
    assert path, "no Chromium or Chrome here; `make test-browser` installs one"
    return path


@pytest.fixture(scope="session")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def root(chromium, tmp_path_factory):
    """Folder that the servers serve: copies of the course and its data; tests put their own notebooks there."""
    folder = tmp_path_factory.mktemp("root")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "data_manifest.csv", folder)
    return folder


@pytest.fixture(scope="session", params=["lab", "voila"])
def server(request, browser, root, tmp_path_factory):
    """JupyterLab, then voila."""
    server = Server(request.param, root, tmp_path_factory.mktemp(request.param))
    yield server
    server.close()


@pytest.fixture(scope="session")
def pages(browser, server, root):
    """The open pages by name; tests of the same notebook share one."""
    opened: dict[str, NotebookPage] = {}
    yield opened
    late = [error for page in opened.values() for error in page.new_errors()]
    for page in opened.values():
        page.tab.close()
    assert not late, "behind the pages, after their tests:\n" + "\n".join(late)


@pytest.fixture
def visit(request, browser, server, root, pages):
    """Opens the notebook that is made of some cells, once, and gives its page; what goes wrong there fails the test."""
    visited = []

    def visit(name: str, cells: list[str]) -> NotebookPage:
        new = name not in pages
        if new:
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
            notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
            nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")
            tab = browser.new_page(viewport={"width": 1400, "height": 1200})
            tab.set_default_timeout(15_000)
            pages[name] = NotebookPage(tab, server, f"notebooks/{name}.ipynb", PICTURES)
        page = pages[name]
        visited.append(page)
        page.tab.bring_to_front()
        page.begin(re.sub(r"^test_|\[.*", "", request.node.name))
        if new:
            page.open()
        return page

    yield visit
    errors = [error for page in visited for error in page.new_errors()]
    for page in visited:
        if errors or request.node.stash.get(FAILED, False):
            page.keep_evidence()
    if errors:
        pytest.fail("behind the page:\n" + "\n".join(errors), pytrace=False)


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Tells the page's fixture whether the test failed."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


def pytest_terminal_summary(terminalreporter):
    """Says where to look."""
    if PICTURES.is_dir() and "playwright" in sys.modules:
        pictures = len(list(PICTURES.glob("*.png")))
        terminalreporter.write_line(f"{pictures} screenshots in {PICTURES.relative_to(ROOT)}")
