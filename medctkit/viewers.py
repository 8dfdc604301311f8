"""Looking at CT in a notebook: the one place to import viewers from.

`SliceViewer` looks through a volume: three linked planes, windows, masks, heat maps, a second volume.
`render` draws one slice, `montage` many, `finding_gallery` one for each phantom.
`AttentionViewer` lays over it what a model looks at; `CaseBrowser` goes through the studies of a manifest.
`TrainingPlot` and `training_figure` show a fine-tuning run.
"""

from medctkit.attention_viewer import AttentionViewer
from medctkit.case_browser import CaseBrowser
from medctkit.rendering import PLANES, WINDOWS, finding_gallery, montage, render, window, window_of
from medctkit.slice_viewer import SliceViewer
from medctkit.training_plot import TrainingPlot, training_figure

__all__ = [
    "PLANES",
    "WINDOWS",
    "AttentionViewer",
    "CaseBrowser",
    "SliceViewer",
    "TrainingPlot",
    "finding_gallery",
    "montage",
    "render",
    "training_figure",
    "window",
    "window_of",
]
