"""int8 weights for an exported vision tower: a third of the file, and other numbers. Look at them before you ship.

`quantise` makes another export of an export, which `Exported` reads as well. Nothing here sees a volume: weights are
rounded by themselves, and nothing is calibrated, on test studies or on any. The codebook stays as it is: the quantiser
looks for the nearest code in full precision.
"""

import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path

from medctkit.common.extras import require
from medctkit.deploy.export import replacing_export, write_facts
from medctkit.deploy.exported import OPENVINO, PROMPTS, VISION, Exported


def quantise(folder: str | os.PathLike, out: str | os.PathLike, kind: str) -> Path:
    """Make of an export of ONNX in float32 another one, `out`, which is replaced as a whole or left as it was.

    Of the `KINDS`, "onnx int8 dynamic" rounds what flows between the layers as well, anew for each volume; "onnx int8
    weights" rounds weights only, in blocks of 32; "openvino float32" rounds nothing; "openvino int8 weights" rounds
    weights only, for each output channel.

    Raises:
        ValueError: another kind; an export that is not ONNX in float32; see `replacing_export`.
        FileNotFoundError: no export in `folder`.
        ImportError: what the kind needs is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}; expected one of {', '.join(KINDS)}")
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    require(*(("openvino", "openvino", "nncf") if kind.startswith("openvino") else ("deploy", "onnx", "onnxruntime")))
    facts = Exported(folder).facts
    if "variant" in facts:
        raise ValueError(f"{folder} is {facts['variant']} already; give what `medctkit export` wrote")
    if out.resolve() == folder.resolve():
        raise ValueError(f"{out} is what it is made from; give another folder")
    facts = {name: facts[name] for name in facts if name not in ("checked", "measured")} | {"variant": kind}
    with replacing_export(out) as building:
        with _quiet():
            KINDS[kind](folder / VISION, building)
        shutil.copy(folder / PROMPTS, building)
        if (folder / "text").is_dir():
            shutil.copytree(folder / "text", building / "text")
        write_facts(building, facts)
        Exported(building)
    return out


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what ONNX Runtime and NNCF tell those who develop them, and without NNCF's telemetry."""
    os.environ.setdefault("NNCF_CI", "1")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # NNCF draws tables and bars
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _dynamic(source: Path, folder: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, folder / VISION, op_types_to_quantize=["MatMul"], per_channel=True,
                     weight_type=QuantType.QInt8)  # fmt: skip


def _weights(source: Path, folder: Path) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = ONNXModel(onnx.load(source))
    model.replace_gemm_with_matmul()  # of the projection, at full size most of the weights
    quantiser = MatMulNBitsQuantizer(model.model, bits=8, block_size=32, is_symmetric=True)
    quantiser.process()
    quantiser.model.clean_initializers()
    quantiser.model.save_model_to_file(folder / VISION)


def _openvino(source: Path, folder: Path, int8: bool = False) -> None:
    import openvino

    model = openvino.Core().read_model(source)
    if int8:
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    openvino.save_model(model, folder / OPENVINO, compress_to_fp16=False)


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "onnx int8 dynamic": _dynamic,
    "onnx int8 weights": _weights,
    "openvino float32": _openvino,
    "openvino int8 weights": partial(_openvino, int8=True),
}
