"""What is written down of one scan: scores as a table, as JSON, and in the form of the VLM3D challenge; a picture."""

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from medctkit.common.atomic import replace_all
from medctkit.common.csv_tables import begins_with
from medctkit.common.provenance import as_json
from medctkit.model.base_model import BaseModel
from medctkit.model.fingerprint import digests, vocabulary_of
from medctkit.scans.formats import READERS


def facts_of(base: BaseModel) -> dict[str, str]:
    """What the scores come from: version of the kit, prompts, digests of base model, adapter and vocabulary."""
    own, adapter = digests(base.model)
    model = {"base": own, "adapter": adapter, "vocabulary": vocabulary_of(base.tokenizer)}
    return {"version": version("medctkit"), **model, "prompts": "paper"}


def case_of(path: str | os.PathLike) -> str:
    """The name of a scan: that of its file or folder, without the suffix of a volume."""
    name = Path(path).expanduser().resolve().name
    ends = sorted((end for reader in READERS.values() for end in reader.suffixes), key=len, reverse=True)
    suffix = next((end for end in ends if name.lower().endswith(end)), "")
    return name[: len(name) - len(suffix)]


def write_prediction(
    folder: str | os.PathLike, case: str, scores: Mapping[str, float], facts: Mapping[str, str], picture: bytes
) -> list[Path]:
    """Write scores.csv, scores.json, results.json (for the VLM3D challenge, task abnormality classification) and a PNG.

    The challenge's form is that of github.com/forithmus/VLM3D-Dockers, `abnclass_example_docker`: one entry for each
    volume, the `case` named without .nii.gz, with the 18 probabilities by name. The `facts` are those of `facts_of`,
    the `picture` is a PNG file's bytes; files of these names in `folder` are replaced, all or none.

    Raises:
        ValueError: there is a scores.csv of something else, such as that of a run's test studies.
    """
    challenge = {
        "name": "Generated probabilities",
        "type": "Abnormality Classification",
        "version": {"major": 1, "minor": 0},
        "predictions": [{"input_image_name": case, "probabilities": dict(scores)}],
    }
    table = pd.DataFrame({"finding": list(scores), "score": list(scores.values())})
    there = Path(folder).expanduser() / "scores.csv"
    if there.is_file() and not begins_with(there, table):
        raise ValueError(f"{there} is there and holds something else than scores of one scan; give another folder")
    contents = {
        "scores.csv": table.to_csv(index=False).encode(),
        "scores.json": as_json({"case": case, "scores": dict(scores), "model": dict(facts)}),
        "results.json": as_json(challenge),
        "picture.png": picture,
    }
    return replace_all(contents, there.parent)
