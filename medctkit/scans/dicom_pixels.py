"""Stored values of one DICOM slice, compressed or not.

Compressed pixels are decoded by GDCM (SimpleITK) or OpenJPEG (pylibjpeg) in a process of its own, which gets just
the checked header and the compressed picture: on a damaged one it may crash or ask for gigabytes, and a notebook has to
survive that.
"""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
from pydicom import Dataset, uid
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import pixel_array
from pydicom.uid import UID, CTImageStorage

from medctkit.scans.dicom_files import Slice, load
from medctkit.scans.stored import damaged, decode

MOST_ROWS = 4096  # and columns; CT slices have 256 to 2048
_UNCOMPRESSED = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)
_LOSSY = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit)
_MAYBE_LOSSY = (uid.JPEGLSNearLossless, uid.JPEG2000, uid.HTJ2K)
_HTJ2K = (uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)
_LOSSLESS = (uid.RLELossless, uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless)
_COMPRESSED = {*_LOSSY, *_MAYBE_LOSSY, *_LOSSLESS, *_HTJ2K}
_BITS = ("BitsAllocated", "BitsStored", "PixelRepresentation")
_SLICE = "slice.dcm"  # what the decoding process decodes
_DONE = "done"  # answer of the decoding process; else what went wrong
_MEMORY, _SECONDS = 2 << 30, 60  # of the decoding process; seconds for each slice


def check_pixels(dataset: Dataset) -> None:
    """Refuse a slice, a whole DICOM file, whose pixels can't be read or are not one value in each voxel."""
    if "PixelData" not in dataset:
        raise damaged("it has no pixels")
    syntax = _syntax(dataset)
    if syntax not in _COMPRESSED.union(_UNCOMPRESSED):
        name = syntax.name if syntax.name != syntax else "an unknown transfer syntax"
        found = f"is compressed as {name} ({syntax}), which can't be read here"
        raise ValueError(f"{found}; export it again uncompressed or as JPEG Lossless, or try `gdcmconv --raw`")
    packed = dataset["PixelData"].is_undefined_length
    if packed != (syntax in _COMPRESSED):
        raise damaged(f"its header says {syntax.name}, its pixels are {'' if packed else 'not '}compressed")
    samples, photometric = _number(dataset, "SamplesPerPixel", 1), str(dataset.get("PhotometricInterpretation"))
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):  # how it is to be shown: HU are the same
        found = f"{photometric} with {samples} value(s) in a pixel"
        raise ValueError(f"holds {found}, a CT MONOCHROME2 with 1: a picture of a CT? Get the original slices")
    rows, columns = _number(dataset, "Rows"), _number(dataset, "Columns")
    if not (0 < rows <= MOST_ROWS and 0 < columns <= MOST_ROWS):
        raise damaged(f"its header says {rows} Rows and {columns} Columns, a CT slice has up to {MOST_ROWS} of each")
    allocated, stored, signed = (_number(dataset, tag) for tag in _BITS)
    highest = _number(dataset, "HighBit", stored - 1)
    if allocated not in (8, 16, 32) or not 0 < stored <= allocated or highest != stored - 1 or signed not in (0, 1):
        found = f"BitsAllocated {allocated}, BitsStored {stored}, HighBit {highest}, PixelRepresentation {signed}"
        raise ValueError(f"is damaged, or no CT: {found}; a CT has 12 to 16 of 16 bits, signed (1) or not (0)")
    frames = _number(dataset, "NumberOfFrames", 1)
    expected = frames * rows * columns * allocated // 8
    line = min(rows, columns) * allocated // 8  # a line more is of a larger picture; a few bytes more fill the file up
    if not packed and not expected <= (size := len(dataset.PixelData)) < expected + line:
        times = f"{frames} x " * (frames > 1)
        raise damaged(f"{size} bytes of pixels, its header says {expected} ({times}{rows} x {columns})")


def loss(item: Slice) -> str:
    """Which lossy compression a slice has been through, with the ratio where given; empty for none."""
    syntax, flag = _syntax(item.header), item.text("LossyImageCompression")
    if flag != "01" and syntax not in _LOSSY + (() if flag == "00" else _MAYBE_LOSSY):
        return ""
    ratio = item.text("LossyImageCompressionRatio") or "not given"
    how = syntax.name if syntax in _LOSSY + _MAYBE_LOSSY else "before it was stored"
    return f"{'lossy' if flag == '01' or syntax in _LOSSY else 'possibly lossy'} compression, ratio {ratio} ({how})"


class PixelReader:
    """Reads the pixels of slices; a context manager, for the process that decompresses."""

    def __enter__(self) -> "PixelReader":
        self._decoder: subprocess.Popen[str] | None = None
        self._file: tuple[Path, Dataset] | None = None  # of several frames, the latest
        self._folder = tempfile.TemporaryDirectory(prefix="medctkit-")  # here: a process that crashes leaves its own
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._folder.cleanup()

    def read(self, item: Slice) -> np.ndarray:
        """Stored integers of a slice, shape (rows, columns)."""
        try:
            dataset = self._loaded(item)
            packed = _syntax(dataset) in _COMPRESSED
            if packed:
                return self._decompressed(dataset, item.frame)
            return decode(lambda: pixel_array(dataset, index=item.frame))
        except ValueError as error:
            raise ValueError(f"{item.name} {error}") from error

    def _loaded(self, item: Slice) -> Dataset:
        """The whole file of a slice: again, as the pixels of all slices need not be in memory at one time."""
        if self._file and self._file[0] == item.path:
            return self._file[1]
        self._file = None
        dataset = load(item.path, "")
        if dataset is None:
            raise damaged("it changed meanwhile")
        check_pixels(dataset)
        self._file = item.path, dataset
        return dataset

    def _decompressed(self, dataset: Dataset, frame: int) -> np.ndarray:
        file = Path(self._folder.name, _SLICE)
        file.write_bytes(decode(lambda: _bare_copy(dataset, frame)))
        decoder = self._decoder = self._decoder or self._started()
        assert decoder.stdin and decoder.stdout
        with suppress(BrokenPipeError):  # then there is no answer
            print("pydicom" if _syntax(dataset) in _HTJ2K else "GDCM", file=decoder.stdin, flush=True)
        answer = decoder.stdout.readline().strip()
        if answer.isdecimal():
            raise OSError(int(answer), os.strerror(int(answer)), self._folder.name)
        if not answer and decoder.wait() == -9:  # killed, most often for want of memory
            raise MemoryError("the process that decompresses slices was stopped")
        if answer != _DONE:
            raise damaged(answer or "the decoder broke down")
        pixels, shape = np.load(file.with_suffix(".npy"), allow_pickle=False), (dataset.Rows, dataset.Columns)
        if pixels.shape != shape:
            raise damaged(f"the compressed picture has shape {pixels.shape}, its header says {shape}")
        return pixels

    def _stop(self) -> None:
        if self._decoder is not None:
            self._decoder.kill()
            self._decoder.communicate()
            self._decoder = None

    def _started(self) -> "subprocess.Popen[str]":
        # -P and the path of this process: import what this process would, not what lies in the current folder
        paths = os.pathsep.join(path for path in sys.path if path)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "medctkit.scans.dicom_pixels", self._folder.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env=os.environ | {"PYTHONPATH": paths, "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"},
        )


def _syntax(dataset: Dataset) -> UID:
    return UID(str(dataset.file_meta.TransferSyntaxUID))


def _number(dataset: Dataset, tag: str, default: int | None = None) -> int:
    value = dataset.get(tag)
    value = default if value in (None, "") else value
    if not isinstance(value, int):
        raise damaged(f"{tag} is {value!r}, expected a whole number")
    return value


def _bare_copy(dataset: Dataset, frame: int) -> bytes:
    """A DICOM file of what the decoder needs of a compressed slice: stored values, so no slope or intercept."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = _syntax(dataset)
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, UID("1.2.3")
    bare = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    bare.SOPClassUID, bare.SOPInstanceUID = CTImageStorage, UID("1.2.3")
    bare.SamplesPerPixel, bare.PhotometricInterpretation = 1, "MONOCHROME2"
    for tag in ("Rows", "Columns", *_BITS):
        setattr(bare, tag, dataset[tag].value)
    bare.HighBit = bare.BitsStored - 1
    picture = get_frame(dataset.PixelData, frame, number_of_frames=int(dataset.get("NumberOfFrames") or 1))
    bare.PixelData = encapsulate([picture], has_bot=False)
    bare["PixelData"].VR = "OB"
    file = BytesIO()
    bare.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _serve(folder: str) -> None:
    """Decode the file in `folder` for each line on standard input, until that ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the decoders print must not get between the answers
    file = Path(folder, _SLICE)
    _limit("RLIMIT_AS", _MEMORY)
    for line in sys.stdin:
        _limit("RLIMIT_CPU", int(time.process_time()) + _SECONDS)
        try:
            np.save(file.with_suffix(".npy"), _decoded(file, line.strip()))
            answer = _DONE
        except Exception as error:  # each decoder has its own types
            number = error.errno if isinstance(error, OSError) else None  # of a full disk
            answer = str(number) if number else (str(error).strip().splitlines() or ["out of memory"])[-1]
        print(answer, file=answers, flush=True)


def _decoded(file: Path, decoder: str) -> np.ndarray:
    """The picture, shape (rows, columns)."""
    if decoder == "pydicom":
        return pixel_array(file)
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(sitk.ReadImage(str(file), imageIO="GDCMImageIO"))[0]


def _limit(what: str, most: int) -> None:
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limits, macOS may refuse one
        import resource

        kind = getattr(resource, what)
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


if __name__ == "__main__":
    _serve(sys.argv[1])
