"""Many studies: manifest, CT-RATE's tables, preparation, cache and data set."""

from medctkit.cohort.dataset import CTReportDataset, collate
from medctkit.cohort.manifest import load_manifest, study_from_row, volume_from_row, write_manifest
from medctkit.cohort.samples import sample_ct

__all__ = [
    "CTReportDataset",
    "collate",
    "load_manifest",
    "sample_ct",
    "study_from_row",
    "volume_from_row",
    "write_manifest",
]
