"""Embeddings of a data set in one file, with what they were made from.

A volume is encoded once (seconds on a CPU, 0.3 s on a GPU at full size); prompts, thresholds and retrieval can then be
tried in no time. A file of embeddings says which base model, adapter, pre-processing, precision and studies it is of,
and is refused for any other: scores of mixed origin look like any others.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data import Subset

from medctkit.atomic import replacing
from medctkit.cache import STEPS
from medctkit.dataset import CTReportDataset
from medctkit.findings import FINDINGS
from medctkit.prepare import content_of
from medctkit.zero_shot import Embedded, ZeroShotClassifier, embed

if TYPE_CHECKING:
    from medctkit.preprocessing import PreprocessConfig

BLOCK = 32  # volumes between two writes: 10 s of a GPU, 3 minutes of a CPU at full size
