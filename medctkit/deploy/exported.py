"""An exported model: ONNX Runtime or OpenVINO, and NumPy; nothing else of what it was trained with."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medctkit.common.digests import digest_of_facts, sha256_of
from medctkit.common.extras import require

VISION, PROMPTS, FACTS = "vision.onnx", "prompts.npz", "export.json"
LARGEST = 1.01  # of a volume's values, whose limits are -1 and 1
OPENVINO = "vision.xml"  # in place of VISION, with its weights in vision.bin
Facts = dict[str, Any]
Run = Callable[[np.ndarray], list[np.ndarray]]  # volumes to embeddings and codes


class Exported:
    """What `medctkit export` wrote to `folder`, or `quantise` made of it, ready to score on so many `threads`.

    `facts` says what was exported: findings, the volumes it wants, digests of base model, adapter and vocabulary.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not as it was written.
        ImportError: the runtime is not installed.
    """

    def __init__(self, folder: str | os.PathLike, threads: int | None = None):
        folder = Path(folder).expanduser()
        vision = OPENVINO if (folder / OPENVINO).is_file() else VISION
        for name in (vision, PROMPTS, FACTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}; expected a folder that `medctkit export` wrote")
        self.facts: Facts = _read_facts(folder)
        self._run = (_openvino if vision == OPENVINO else _onnx_runtime)(folder / vision, threads)
        with np.load(folder / PROMPTS, allow_pickle=False) as file:
            self._differences, self._scale = file["differences"], float(file["scale"])
        self.findings: tuple[str, ...] = tuple(self.facts["findings"])

    def encode_image(self, volumes: np.ndarray) -> np.ndarray:
        """Embed volumes (b, 1, d, h, w), float32 in [-1, 1]: (b, p), L2-normalised."""
        return self.embeds_and_codes(volumes)[0]

    def embeds_and_codes(self, volumes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings (b, p), and the index of the code of each token (b, t * h * w).

        Raises:
            ValueError: another shape or type.
        """
        expected = (1, *self.facts["input"]["shape"])
        if volumes.ndim != 5 or volumes.shape[1:] != expected or volumes.dtype != np.float32:
            shape = f"(batch, {', '.join(map(str, expected))})"
            raise ValueError(f"volumes are {volumes.dtype} {volumes.shape}; expected float32 {shape}")
        if max(-volumes.min(initial=0), volumes.max(initial=0)) > LARGEST:
            raise ValueError(
                f"volumes go from {volumes.min():g} to {volumes.max():g}; expected -1 to 1: HU / 1000, cut"
            )
        embeds, codes = self._run(volumes)
        return embeds, codes

    def scores(self, volumes: np.ndarray) -> np.ndarray:
        """Probabilities (b, k) of the findings for volumes (b, 1, d, h, w), float32 in [-1, 1].

        Raises:
            ValueError, FloatingPointError: see `embeds_and_codes`; an embedding that is not finite.
        """
        embeds = self.encode_image(volumes)
        if not np.isfinite(embeds).all():
            raise FloatingPointError("an embedding is not finite: a voxel is NaN or infinite; look at the volumes")
        return 1 / (1 + np.exp(-self._scale * embeds @ self._differences.T))


def sealed(facts: Mapping[str, Any], folder: Path) -> Facts:
    """Facts with the SHA-256 of each file that volumes are scored with, and a digest of it all."""
    facts = {**facts, "files": _sums(folder)}
    return facts | {"digest": _digest_of(facts)}


def _sums(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in (*sorted(folder.glob("vision.*")), folder / PROMPTS)}


def _digest_of(facts: Mapping[str, Any]) -> str:
    return digest_of_facts({name: value for name, value in facts.items() if name != "digest"})


def _read_facts(folder: Path) -> Facts:
    """What `sealed` made, of just the files that are there."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        files = dict(facts["files"]) if facts["digest"] == _digest_of(facts) else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        files = {}
    now = _sums(folder)
    if changed := [name for name in now | files if now.get(name) != files.get(name)]:
        path = folder / (changed[0] if files else FACTS)
        raise ValueError(f"{path} is not as it was written there; get the export again, or export anew")
    return facts


def _onnx_runtime(path: Path, threads: int | None) -> Run:
    """What runs a file."""
    require("deploy", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda volumes: session.run(None, {"volumes": volumes})


def _openvino(path: Path, threads: int | None) -> Run:
    """What runs a file, in float32 whatever the processor would rather do."""
    require("openvino", "openvino")
    import openvino

    model = openvino.Core().read_model(path)
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads or 0}
    compiled = openvino.Core().compile_model(model, "CPU", options)
    return lambda volumes: list(compiled(volumes).values())
