"""A small CT series, and someone on loopback who sends it and takes answers."""

import time
from contextlib import contextmanager
from functools import cache

from pydicom import dcmread
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt

from medctkit.deploy.series import write_series
from medctkit.phantom.study import generate

PATIENT = {
    "PatientName": "Yılmaz^Ayşe",
    "PatientID": "MRN-4711",
    "PatientBirthDate": "19600230",  # no such day, as it comes
    "PatientSex": "W",
    "StudyDate": "20260102",
    "StudyTime": "101500",
    "StudyID": "S1",
    "AccessionNumber": "A-99",
    "SeriesNumber": 3,
    "SpecificCharacterSet": "ISO_IR 192",
}
SHAPE = (24, 64, 64)


@cache
def phantom():
    return generate(3, shape=SHAPE).volume


def write_phantom(folder, **tags):
    """The volume, and the folder of its slices."""
    return phantom(), write_series(phantom(), folder, PATIENT | tags)


def send(folder, port, calling="SCANNER", called="MEDCTKIT"):
    """Status of each slice; None if the call was not taken."""
    slices = [dcmread(path) for path in sorted(folder.glob("*.dcm"))]
    entity = AE(calling)
    entity.dimse_timeout = 300  # of a busy machine
    entity.add_requested_context(slices[0].SOPClassUID, slices[0].file_meta.TransferSyntaxUID)
    link = entity.associate("127.0.0.1", port, ae_title=called)
    if not link.is_established:
        return None
    try:
        return [link.send_c_store(slice_).get("Status") for slice_ in slices]
    finally:
        link.release()


@contextmanager
def archive(port=0, refused=""):
    """A service that keeps what it is sent: its port, and the objects, in the order of their coming.

    Those about the patient whose number is `refused` it does not take.
    """
    kept = []

    def keep(event):
        dataset = event.dataset
        if dataset.PatientID == refused:
            return 0xA900
        dataset.file_meta = event.file_meta
        kept.append(dataset)
        return 0

    entity = AE("PACS")
    for context in AllStoragePresentationContexts:
        entity.add_supported_context(context.abstract_syntax, ALL_TRANSFER_SYNTAXES)
    server = entity.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, keep)])
    try:
        yield server.socket.getsockname()[1], kept
    finally:
        server.shutdown()


def wait_until(true, seconds=100):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def values_of(report, name):
    """Values of a report's content, by the keyword that holds them."""
    return [element.value for element in report.iterall() if element.keyword == name]
