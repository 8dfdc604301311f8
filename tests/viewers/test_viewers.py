"""The one place to import viewers from."""

from medctkit import viewers


def test_every_name_that_the_door_lists_is_behind_it_and_is_said_in_its_docstring():
    for name in viewers.__all__:
        assert getattr(viewers, name) is not None
    said = {name for name in viewers.__all__ if f"`{name}`" in viewers.__doc__}
    assert said >= {"SliceViewer", "TrainingPlot", "training_figure", "finding_gallery", "render"}
