"""A notebook in a browser tab, as a person sees it, and everything that goes wrong behind it."""

import re
import time
from pathlib import Path

import nbformat
from servers import Server

READY = """() => {
    const context = window.jupyterapp?.shell?.currentWidget?.sessionContext;
    const kernel = context?.session?.kernel;
    return context?.isReady && kernel?.connectionStatus === 'connected' && kernel?.status === 'idle';
}"""
PIXELS = """element => {
    if (element.tagName === 'CANVAS') return element.toDataURL();
    const copy = document.createElement('canvas');
    [copy.width, copy.height] = [element.naturalWidth, element.naturalHeight];
    if (copy.width * copy.height === 0) return '';
    copy.getContext('2d').drawImage(element, 0, 0);
    return copy.toDataURL();
}"""
# A request to the outside is refused and reported, but for the icons that voila's own template asks for. Plugins of
# JupyterLab that don't fit voila's older parts say so; widgets are not among them.
NOT_OURS = re.compile(r"fortawesome|ERR_FAILED|shared module|Federation Runtime", flags=re.I)
MESSAGE = ".medctkit-message"
ERRORS = ".medctkit-error, [data-mime-type='application/vnd.jupyter.stderr']:has-text('Traceback')"
TRACEBACK = re.compile(r"Traceback \(most recent call last\)")


def cells_up_to(notebook: Path, words: str) -> list[str]:
    """The code of a notebook up to the first cell that has some words in it."""
    cells = []
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "code":
            cells.append(cell.source)
            if words in cell.source:
                return cells
    raise AssertionError(f"{notebook.name} has no {words}")


class NotebookPage:
    """An open notebook.

    Args:
        tab: playwright's page.
        server: JupyterLab or voila.
        notebook: path from the server's root folder.
        pictures: folder for screenshots.
    """

    def __init__(self, tab, server: Server, notebook: str, pictures: Path):
        self.tab, self.server, self.notebook, self.pictures = tab, server, notebook, pictures
        self.step, self._story, self._console, self._told = 0, "", [], set()
        tab.on("console", lambda message: self._heard(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: self._heard(str(error)))
        tab.route(lambda url: not url.startswith(server.url), self._refuse)

    def _heard(self, text: str) -> None:
        if not NOT_OURS.search(text):
            self._console.append(f"browser: {text}")

    def _refuse(self, route) -> None:
        self._heard(f"a request to {route.request.url}")
        route.abort()

    def open(self) -> None:
        """Load the notebook and run it: in JupyterLab all cells at once the session is ready, in voila by loading."""
        self.tab.goto(self.server.address_of(self.notebook), timeout=120_000)
        if self.server.kind == "lab":
            self.tab.wait_for_function(READY, timeout=60_000)
            self.tab.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
            self.tab.wait_for_function(READY, timeout=120_000)

    def find(self, selector: str, nth: int = 0):
        """What a selector matches in the notebook, as a locator."""
        return self.tab.locator(selector).nth(nth)

    def control(self, description: str):
        """The ipywidget with this description; of several, the first."""
        label = self.tab.locator(".widget-label", has_text=re.compile(rf"^{re.escape(description)}$")).first
        return label.locator("xpath=..")

    def enter(self, description: str, sentence: str) -> None:
        """Type into a field as a person does, then Enter."""
        field = self.control(description).locator("input")
        field.fill(sentence)
        field.press("Enter")

    def pixels(self, picture) -> str:
        """What an <img> or a <canvas> shows."""
        picture.wait_for(state="visible", timeout=30_000)
        return picture.evaluate(PIXELS)

    def changed(self, picture, before: str, seconds: float = 10) -> bool:
        """Whether an <img> or <canvas> comes to show something else; waits until it rests."""
        end, last = time.monotonic() + seconds, before
        while time.monotonic() < end:
            now = self.pixels(picture)
            if now not in ("", before) and now == last:
                return True
            last = now
            self.tab.wait_for_timeout(150)
        return False

    def text_appears(self, pattern: str, seconds: float = 10) -> str:
        """The first visible text of the page's outputs that matches; waits for it."""
        found = self.tab.get_by_text(re.compile(pattern)).locator("visible=true").first
        found.wait_for(timeout=1000 * seconds)
        return found.inner_text()

    def screenshot(self, step: str, full_page: bool = False) -> None:
        """Keep what is seen: runs/browser/<place>-<test>-<number>-<step>.png."""
        self.step += 1
        self.tab.screenshot(path=self._picture(f"{self.step:02d} {step}", ".png"), full_page=full_page)

    def _picture(self, step: str, ending: str) -> Path:
        name = re.sub(r"[^a-z0-9]+", "-", f"{self.server.kind} {self._story} {step}".lower())
        return self.pictures / f"{name.strip('-')}{ending}"

    def begin(self, story: str) -> None:
        """A test begins: screenshots are named after it."""
        self._story, self.step = story, 0

    def new_errors(self) -> list[str]:
        """What went wrong since the last call, anywhere.

        Error outputs of cells, errors that widgets show, errors in the browser's console, requests to the outside, and
        tracebacks in the logs of the server and of its kernels: there are those of callbacks.
        """
        self.tab.wait_for_timeout(400)  # what the last click set off
        found, self._console = self._console, []
        for place in self.tab.locator(ERRORS).locator("visible=true").all():
            text = place.inner_text()
            if text and text not in self._told:
                self._told.add(text)
                found.append(f"on the page: {text}")
        new = self.server.new_lines()
        return found + [f"in {name}: {text}" for name, text in new.items() if TRACEBACK.search(text)]

    def errors_that_come(self, seconds: float = 15) -> list[str]:
        """What goes wrong soon; [] if nothing has by then. For tests that make something go wrong."""
        end, found = time.monotonic() + seconds, []
        while not found and time.monotonic() < end:
            found = self.new_errors()
        return found + self.new_errors()

    def keep_evidence(self) -> None:
        """After a failure: the whole page and the logs, beside the screenshots."""
        self.screenshot("failed", full_page=True)
        for log in self.server.logs:
            text = log.read_text(errors="replace") if log.exists() else ""
            self._picture(f"failed {log.stem}", ".log").write_text(text)
