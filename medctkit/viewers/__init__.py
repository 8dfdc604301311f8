"""Looking at CT in a notebook: the one place to import viewers from.

`SliceViewer` looks through a volume: three linked planes, windows, masks, heat maps, a second volume.
`render` draws one slice, `finding_gallery` one for each phantom.
`AttentionViewer` lays over it what a model looks at; `CaseBrowser` goes through the studies of a manifest.
`TrainingPlot` and `training_figure` show a fine-tuning run; `UploadPage` takes a zip of DICOM and shows its scores.
"""

from medctkit.viewers.attention_viewer import AttentionViewer
from medctkit.viewers.case_browser import CaseBrowser
from medctkit.viewers.drawing.rendering import PLANES, WINDOWS, finding_gallery, render, window, window_of
from medctkit.viewers.slice_viewer import SliceViewer
from medctkit.viewers.training_plot import TrainingPlot, training_figure
from medctkit.viewers.upload_page import UploadPage

__all__ = [
    "PLANES",
    "WINDOWS",
    "AttentionViewer",
    "CaseBrowser",
    "SliceViewer",
    "TrainingPlot",
    "UploadPage",
    "finding_gallery",
    "render",
    "training_figure",
    "window",
    "window_of",
]
