"""Browse the studies of a manifest: the scan, its report, what two models say of it, and what they say of any sentence.

The numbers come from `medctkit.viewers.cases`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ipywidgets as w
import numpy as np
import pandas as pd

from medctkit.common.templates import filled
from medctkit.findings import FINDINGS
from medctkit.scans.preprocessing import PreprocessConfig
from medctkit.viewers.drawing.messages import Messages
from medctkit.viewers.slice_viewer import SliceViewer, close_with_children

if TYPE_CHECKING:
    from medctkit.viewers.cases import Sentence

ALL = "all findings"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # of the models, told apart by colour-blind people
LABELS = {1.0: ("\N{BLACK CIRCLE}", "present"), 0.0: ("\N{WHITE CIRCLE}", "absent")}
WIDTH = 180  # of the drawing of a probability, pixels


class CaseBrowser:
    """Pick a study and see its scan, report and labels, and its 18 probabilities by each model.

    Studies are sorted by how much the models disagree: the mean absolute difference of the 18 probabilities, or the one
    of a single finding. A sentence of your own is scored at Enter. Every volume is embedded once, before the widget
    shows; what that costs is said first. The widget is `.widget`, the numbers behind it are `.cases`.

    Arguments are those of `Cases`; `batch_size` volumes are embedded at a time (1 or 2 for the full-size model), and
    `height` is the picture's, in pixels.

    Raises:
        ValueError: more than four models; for the rest see `Cases`.
    """

    def __init__(
        self,
        manifest: pd.DataFrame | str | os.PathLike,
        models: Mapping[str, Any],
        tokenizer: Any,
        preprocess_config: PreprocessConfig,
        cache_dir: str | os.PathLike | None = None,
        limit: int | None = None,
        *,
        prompts: Any = "paper",
        batch_size: int = 8,
        height: int = 240,
    ):
        from medctkit.viewers.cases import Cases

        if isinstance(models, Mapping) and len(models) > len(COLOURS):
            raise ValueError(f"{len(models)} models; the browser tells {len(COLOURS)} apart")
        self.cases = Cases(manifest, models, tokenizer, preprocess_config, cache_dir, limit, prompts)
        self.height = height
        self.slices: SliceViewer | None = None
        self._sentence: Sentence | None = None
        self._shown: int | None = None
        print(self.cases.cost(), flush=True)
        self.cases.embed(batch_size)
        self._build()
        self._list()

    def _build(self) -> None:
        from medctkit.viewers.cases import PRESENCE

        wide = {"width": "290px"}
        self.sorting = w.Dropdown(options=self.cases.sortings, description="sort by", layout=wide)
        self.finding = w.Dropdown(options=[ALL, *FINDINGS], description="finding", layout=wide)
        self.presence = w.Dropdown(options=PRESENCE, description="label", layout=wide, disabled=True)
        self.study = w.Select(layout={"width": "290px", "height": f"{self.height + 40}px"})
        self.previous = w.Button(description="previous study", layout={"width": "142px"})
        self.next = w.Button(description="next study", layout={"width": "142px"})
        self.count, self.facts, self.table, self.scores = w.HTML(), w.HTML(), w.HTML(), w.HTML()
        text = {"continuous_update": False, "layout": {"width": "98%"}, "style": {"description_width": "50px"}}
        self.stating = w.Text(description="states", placeholder="any sentence, then Enter", **text)
        self.denying = w.Text(description="denies", placeholder="its negation, or nothing", **text)
        self.messages, self.typing = Messages(), Messages()
        self.scan = w.VBox()
        for control in (self.sorting, self.finding, self.presence):
            self.messages.observe(control, self._list)
        self.messages.observe(self.study, self._show)
        for button, step in ((self.previous, -1), (self.next, 1)):
            button.on_click(self.messages.guarded(lambda step=step: self._step(step)))
        for control in (self.stating, self.denying):
            self.typing.observe(control, self._score)
        steps = w.HBox([self.previous, self.next])
        controls = [self.sorting, self.finding, self.presence, self.study, steps, self.count]
        asked = [w.HTML("<b>Score any sentence</b>"), self.stating, self.denying, self.typing.widget, self.scores]
        left, right = w.VBox(controls, layout={"width": "300px"}), w.VBox([self.messages.widget, self.scan])
        told = w.VBox([self.facts, *asked])
        for column, width in ((right, 560), (told, 380)):  # takes the room that is left, or goes below
            column.layout.flex, column.layout.min_width = f"1 1 {width}px", "0"
        rows = ([left, right], [self.table, told])
        self.widget = w.VBox([w.HBox(row, layout={"flex_flow": "row wrap", "grid_gap": "16px"}) for row in rows])

    # --- what happens when ---

    def _list(self) -> None:
        """Sort and filter the studies; the one that is shown stays, where the filter lets it."""
        finding = None if self.finding.value == ALL else self.finding.value
        chosen = self.study.value
        with self.messages.quietly():
            self.presence.disabled = finding is None
            if finding is None:
                self.presence.value = "any"
            found = self.cases.ordered(self.sorting.value, finding, self.presence.value)
            self.study.options = [(self._line(i, value), i) for i, value in found.items()]
            self.study.value = chosen if chosen in found.index else next(iter(found.index), None)
        shown = self.sorting.value if self.sorting.value != "study" else "disagreement"
        of = "mean of the findings" if finding is None else finding
        self.count.value = f"{len(found):,} of {len(self.cases.rows):,} studies, with their {shown} ({of})"
        if self.study.value != self._shown or not self.scan.children:
            self._show()

    def _step(self, step: int) -> None:
        """Go on in the list, at its end to its start; JupyterLab keeps the arrow keys for its cells."""
        if self.study.options:
            self.study.index = (self.study.index + step) % len(self.study.options)

    def _line(self, index: int, value: float) -> str:
        study = self.cases.rows[index]["study"]
        if study in self.cases.failures:
            return f"unread  {study}"
        return f"{value:.3f}  {study}" if value == value else f"   ?   {study}"

    def _show(self) -> None:
        index, self._shown = self.study.value, None  # another may be picked while this one is made
        self.scan.children = ()
        if index is None:
            self.facts.value = self.table.value = self.scores.value = ""
            self.messages.say("no study passes this filter; choose another label or finding")
            return
        self._show_scan(index)
        self.facts.value = facts(self.cases.rows[index])
        probabilities = {name: values[index] for name, values in self.cases.probabilities.items()}
        self.table.value = probability_table(probabilities, self.cases.labels[index])
        self._show_scores()
        self._shown = index

    def _show_scan(self, index: int) -> None:
        """The scan; or the reason why it can't be shown."""
        study = self.cases.rows[index]["study"]
        if study in self.cases.failures:
            self.messages.say(f"study {study} has no probabilities: {self.cases.failures[study]}")
        try:
            volume, masks = self.cases.view(index)
        except (OSError, ValueError) as error:
            self.messages.say(f"study {study} can't be shown: {error}")
            return
        if self.slices is None:
            self.slices = SliceViewer(volume, masks, height=self.height, folded=True)
        else:
            self.slices.set_volume(volume, masks)
        self.scan.children = (self.slices.widget,)

    def _score(self) -> None:
        self._sentence = None
        if self.stating.value.strip() or self.denying.value.strip():
            try:
                self._sentence = self.cases.score(self.stating.value, self.denying.value)
            except ValueError as error:  # empty or too long
                self.typing.say(str(error))
        self._show_scores()

    def _show_scores(self) -> None:
        index, studies = self.study.value, [row["study"] for row in self.cases.rows]
        told = None if index is None else self._sentence
        self.scores.value = "" if told is None else sentence_table(told, index, studies)

    def close(self) -> None:
        """Free the widgets."""
        if self.slices is not None:
            self.slices.close()
        close_with_children(self.widget)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.widget._repr_mimebundle_(**kwargs)


def facts(row: Mapping[str, Any]) -> str:
    """Whose study it is and its report, as HTML."""
    present = [name for name in FINDINGS if row[name] == 1]
    unknown = sum(row[name] != row[name] for name in FINDINGS)
    return filled("facts.html", row=row, present=present, unknown=unknown)


def probability_table(probabilities: Mapping[str, np.ndarray], labels: np.ndarray) -> str:
    """An HTML table of each model's probabilities (18,), NaN for none, and labels (18,), NaN for unknown.

    What they disagree on most comes first.
    """
    values = np.stack(list(probabilities.values()))  # (models, 18)
    apart, places = values.max(0) - values.min(0), (8 + values * (WIDTH - 16)).round(1)
    rows = [
        {
            "finding": FINDINGS[k],
            "label": LABELS.get(float(labels[k]), ("?", "unknown")),
            "probabilities": values[:, k].tolist(),
            "at": [(model, x) for model, x in enumerate(places[:, k].tolist()) if x == x],
            "apart": apart[k],
        }
        for k in np.argsort(-apart, kind="stable")
    ]
    return filled("probabilities.html", names=[*probabilities], rows=rows, colours=COLOURS, width=WIDTH)


def sentence_table(sentence: "Sentence", index: int, studies: Sequence[str]) -> str:
    """What each model makes of a sentence for one of the `studies`, and which it finds nearest, as an HTML table."""
    rows = {}
    for name, values in sentence.values.items():
        share, known = sentence.share_below(name, index), int((~np.isnan(values)).sum())
        others = "no other studies" if np.isnan(share) else f"{share:.0%} of the other {known - 1:,} studies"
        best = f"{studies[int(np.nanargmax(values))]} ({np.nanmax(values):.2f})" if known else "none"
        rows[name] = ("?" if np.isnan(values[index]) else f"{values[index]:.2f}", others, best)
    strange = sentence.unknown and 2 * len(sentence.unknown) >= sentence.words
    return filled("sentence.html", sentence=sentence, rows=rows, strange=strange)
