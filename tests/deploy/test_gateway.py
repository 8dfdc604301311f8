"""The gateway: who may call, what waits, what comes back, what a crash costs, and what the log says."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from dicom_peers import PATIENT, archive, send, values_of, wait_until, write_phantom
from ports import free_port
from pydicom import dcmread
from scan_files import change

from medctkit.deploy.answer import answer
from medctkit.deploy.gateway import OUT_OF_RESOURCES, Gateway, Limits, Peer, Series
from medctkit.findings import FINDINGS
from medctkit.scans.volumes import read_volume

FACTS = {"version": "1.2", "base": "b" * 32, "adapter": "none", "vocabulary": "v" * 32, "prompts": "paper"}
QUICK = Limits(quiet=0.3, retry=0.2)


def answering(slices):
    return answer(slices, dict.fromkeys(FINDINGS, 0.25), FACTS, np.zeros((4, 6, 3), np.uint8))


def gateway(folder, port, answering=answering, limits=QUICK, allowed=("SCANNER",)):
    return Gateway(folder, answering, Peer("127.0.0.1", port, "PACS"), allowed, limits=limits)


def states(folder):
    return [json.loads(path.read_text())["state"] for path in sorted(folder.glob("*/*/state.json"))]


def reports(kept):
    """How many slices each report that came refers to."""
    return [len(set(values_of(made, "ReferencedSOPInstanceUID"))) for made in kept if made.Modality == "SR"]


@pytest.fixture
def queue(tmp_path):
    return tmp_path / "queue"


@pytest.fixture
def slices(tmp_path):
    return write_phantom(tmp_path / "study")[1]


def test_series_comes_in_and_its_answer_goes_out_once(queue, slices):
    with archive() as (port, kept), gateway(queue, port).serving(0) as own:
        assert send(slices, own) == [0] * 24
        wait_until(lambda: states(queue) == ["sent"])
        time.sleep(1)
    assert sorted(made.Modality for made in kept) == ["OT", "SR"]
    assert {str(made.PatientName) for made in kept} == {PATIENT["PatientName"]}
    (of_study,) = (path for path in queue.iterdir() if path.is_dir())
    assert os.name == "nt" or of_study.stat().st_mode & 0o077 == 0  # nobody else looks into it


@pytest.mark.parametrize("call", [{"calling": "STRANGER"}, {"called": "OTHER"}])
def test_unknown_callers_and_wrong_numbers_are_refused(queue, slices, call):
    with gateway(queue, free_port()).serving(0) as own:
        assert send(slices, own, **call) is None
    assert not list(queue.glob("*/*"))


def test_everyone_may_call_only_when_said_so(queue, slices):
    with pytest.raises(ValueError, match="allow"):
        gateway(queue, 1, allowed=())
    with gateway(queue, free_port(), allowed=None).serving(0) as own:
        assert send(slices, own, calling="STRANGER") == [0] * 24


@pytest.mark.slow
def test_full_queue_refuses_another_series_and_takes_it_later(queue, slices, tmp_path):
    _, other = write_phantom(tmp_path / "other")
    go_on = threading.Event()

    def slowly(path):
        assert go_on.wait(60)
        return answering(path)

    with archive() as (port, kept), gateway(queue, port, slowly, Limits(1, 0.3)).serving(0) as own:
        assert set(send(slices, own)) == {0}
        assert set(send(other, own)) == {OUT_OF_RESOURCES}
        assert set(send(slices, own)) == {0}  # what waits already may go on
        go_on.set()
        wait_until(lambda: states(queue) == ["sent"])
        assert set(send(other, own)) == {0}
        wait_until(lambda: reports(kept) == [24, 24])


@pytest.mark.slow
def test_answer_waits_for_its_destination_and_is_made_once(queue, slices):
    made, port = [], free_port()

    def counting(path):
        made.append(path)
        return answering(path)

    with gateway(queue, port, counting, Limits(quiet=2, retry=0.2)).serving(0) as own:  # however busy the machine is
        send(slices, own)
        wait_until(lambda: states(queue) == ["ready"])
        with archive(port) as (_, kept):
            wait_until(lambda: len(kept) == 2)
    assert len(made) == 1


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"no DICOM"), lambda path: path.unlink()])
def test_an_answer_that_cannot_be_read_any_more_is_made_again(queue, slices, spoil):
    nobody = free_port()
    with gateway(queue, nobody).serving(0) as own:
        send(slices, own)
        wait_until(lambda: states(queue) == ["ready"])
    for made in queue.glob("*/*/answer/*.dcm"):
        spoil(made)
    with archive() as (port, kept), gateway(queue, port).serving(0):
        wait_until(lambda: states(queue) == ["sent"])
    assert sorted(made.Modality for made in kept) == ["OT", "SR"]


@pytest.mark.slow
def test_late_slices_are_a_new_answer(queue, slices, tmp_path):
    late = tmp_path / "late"
    late.mkdir()
    for name in ("0022.dcm", "0023.dcm"):
        (slices / name).rename(late / name)
    with archive() as (port, kept), gateway(queue, port).serving(0) as own:
        send(slices, own)
        wait_until(lambda: states(queue) == ["sent"])
        send(late, own)
        wait_until(lambda: reports(kept) == [22, 24])
        wait_until(lambda: states(queue) == ["sent"])
    assert len({made.SOPInstanceUID for made in kept}) == 4


@pytest.mark.slow
def test_slices_that_come_again_are_a_new_answer_if_they_differ(queue, slices):
    header = dcmread(slices / "0003.dcm")
    change(slices / "0003.dcm", PixelSpacing=[2, 3])

    def reading(path):
        read_volume(path)
        return answering(path)

    with archive() as (port, kept), gateway(queue, port, reading).serving(0) as own:
        send(slices, own)
        wait_until(lambda: states(queue) == ["failed"])  # a damaged slice, which its sender mends
        header.save_as(slices / "0003.dcm")
        for number in ("MRN-4711", "MRN-4711", "MRN-1"):
            for path in slices.iterdir():
                change(path, PatientID=number)
            send(slices, own)
            wait_until(lambda: states(queue) == ["sent"])
            time.sleep(1)
            wait_until(lambda: states(queue) == ["sent"])
    assert [made.PatientID for made in kept] == ["MRN-4711", "MRN-4711", "MRN-1", "MRN-1"]
    assert len({made.SOPInstanceUID for made in kept}) == 4


@pytest.mark.slow
def test_an_answer_refers_to_no_slice_that_came_while_it_was_made(queue, slices, tmp_path):
    late, seen = tmp_path / "late", []
    late.mkdir()
    (slices / "0023.dcm").rename(late / "0023.dcm")

    def meanwhile(path):
        seen.append(len(list(path.iterdir())))
        if len(seen) == 1:
            assert send(late, own) == [0]
        return answering(path)

    with archive() as (port, kept), gateway(queue, port, meanwhile).serving(0) as own:
        send(slices, own)
        wait_until(lambda: states(queue) == ["sent"])
    assert (seen, reports(kept)) == ([23, 24], [24])


@pytest.mark.slow
def test_an_answer_that_is_refused_keeps_no_other_waiting(queue, slices, tmp_path):
    _, other = write_phantom(tmp_path / "other", PatientID="MRN-1")
    with archive(refused=PATIENT["PatientID"]) as (port, kept), gateway(queue, port).serving(0) as own:
        send(slices, own)
        wait_until(lambda: states(queue) == ["ready"])
        send(other, own)
        wait_until(lambda: sorted(states(queue)) == ["ready", "sent"])
    assert {made.PatientID for made in kept} == {"MRN-1"}


def test_what_goes_wrong_with_one_series_stops_no_other_and_a_gateway_may_serve_again(queue, monkeypatch):
    seen, service = [], gateway(queue, 1, limits=Limits(quiet=0))
    monkeypatch.setattr(service, "_settle", lambda one: 1 / (seen.append(one.folder.name) or 0))
    for name in ("one", "two"):
        (queue / "study" / name / "slices").mkdir(parents=True)
    for _ in range(2):
        seen.clear()
        with service.serving(0):
            wait_until(lambda: {*seen} == {"one", "two"}, 20)


def test_folder_is_one_gateways_and_what_else_is_in_it_stays(queue):
    other = queue / "other" / "work.tmp"
    other.parent.mkdir(parents=True)
    other.touch()
    with gateway(queue, 1).serving(0):
        with pytest.raises(ValueError, match="another process is at work"), gateway(queue, 1).serving(0):
            pass
    with gateway(queue, 1).serving(0):
        assert other.exists()


def test_series_that_ends_the_process_each_time_is_given_up(queue, slices, caplog):
    def out_of_memory(path):
        raise MemoryError

    with gateway(queue, free_port(), out_of_memory).serving(0) as own:
        send(slices, own)
        wait_until(lambda: states(queue) == ["failed"])
    state = json.loads(next(queue.glob("*/*/state.json")).read_text())
    assert state["tries"] == 3 and state["reason"].startswith("MemoryError")


@pytest.mark.parametrize("content", ["[]", "null", "{", '{"slices": "%s", "state": "sent", "tries": "x", "reason": 1}'])
def test_a_damaged_state_is_that_of_a_new_series(tmp_path, content):
    (tmp_path / "slices").mkdir()
    (tmp_path / "state.json").write_text(content.replace("%s", Series(tmp_path).slices))
    assert (Series(tmp_path).state, Series(tmp_path).tries, Series(tmp_path).reason) == ("", 0, "")


@pytest.mark.slow
def test_answered_series_are_taken_away_in_the_end(queue, slices):
    with archive() as (port, kept), gateway(queue, port, limits=Limits(quiet=0.3, keep=1)).serving(0) as own:
        send(slices, own)
        wait_until(lambda: len(kept) == 2 and [path.name for path in queue.iterdir()] == [".lock"])


def test_no_name_and_no_number_of_a_patient_is_in_the_log(queue, slices, tmp_path, caplog, capfd):
    secrets = ["Ayşe", "Yılmaz", "MRN-4711", "Hans", "MRN-0815", "A-99"]
    caplog.set_level(logging.DEBUG)
    for path in sorted(slices.glob("*.dcm"))[:12]:  # slices of two patients: the error quotes both
        change(path, PatientID="MRN-0815", PatientName="Hans")

    with gateway(queue, free_port(), read_volume).serving(0) as own:
        caplog.clear()
        assert set(send(slices, own)) == {0}
        wait_until(lambda: states(queue) == ["failed"])
    assert "MRN-0815" in json.loads(next(queue.glob("*/*/state.json")).read_text())["reason"]
    told = [record.getMessage() for record in caplog.records]
    assert any("no answer: ValueError" in line for line in told)
    told = "\n".join(told) + "".join(capfd.readouterr())
    assert not [secret for secret in secrets if secret in told]
    assert not [path for path in queue.rglob("*") if any(secret in str(path) for secret in secrets)]


SERVICE = """
import sys, time
from pathlib import Path
sys.path[:0] = {path!r}
from test_gateway import answering, gateway, Limits
def slowly(path):
    Path({mark!r}).touch()
    time.sleep({seconds})
    return answering(path)
with gateway({queue!r}, {port}, slowly, Limits(quiet=0.3, retry=0.2)).serving({own}):
    print("ready", flush=True)
    time.sleep(300)
"""


@contextmanager
def process(queue, port, own, mark, seconds):
    """A gateway in a process of its own, which is killed in the end; answering takes so many seconds."""
    paths = [os.path.dirname(__file__), *sys.path]
    script = SERVICE.format(path=paths, queue=str(queue), port=port, own=own, mark=str(mark), seconds=seconds)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout.readline() == "ready\n"
            yield
        finally:
            running.kill()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["arriving", "answering", "sending"])
def test_kill_costs_nothing(queue, slices, tmp_path, moment):
    """Killed while slices come, while an answer is made, or while it waits: what was taken is answered after all."""
    port, own, mark, last = free_port(), free_port(), tmp_path / "begun", tmp_path / "last"
    last.mkdir()
    if moment == "arriving":
        (slices / "0023.dcm").rename(last / "0023.dcm")
    with process(queue, port, own, mark, 60 if moment == "answering" else 0):
        assert set(send(slices, own)) == {0}
        if moment == "answering":
            wait_until(mark.exists)
        elif moment == "sending":
            wait_until(lambda: states(queue) == ["ready"])
    with gateway(queue, port).serving(own), archive(port) as (_, kept):
        if moment == "arriving":
            assert send(last, own) == [0]
        wait_until(lambda: 24 in reports(kept) and states(queue) == ["sent"])


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_command_serves_until_it_is_told_to_stop(queue, slices):
    port, own = free_port(), free_port()
    command = ["gateway", str(queue), f"PACS@127.0.0.1:{port}", "--model", "mini", "--allow", "SCANNER"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, "-m", "medctkit.cli", *command, "--port", str(own), "--quiet", "0.5"]
    with subprocess.Popen(command, **pipes) as running, archive(port) as (_, kept):
        try:
            assert f"MEDCTKIT@127.0.0.1:{own}" in running.stdout.readline()
            assert set(send(slices, own)) == {0}
            wait_until(lambda: states(queue) == ["sent"])
        finally:
            running.terminate()
        out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert reports(kept) == [24]
    assert "answered" in err
    assert not [value for value in map(str, PATIENT.values()) if len(value) > 3 and value in out + err]


@pytest.mark.parametrize(
    "text", ["Ä@h:1", "P\\X@h:1", "  @h:1", "PACS@ h :12", "PACS@:12", "P@h:0", "P@h:70000", "x" * 17 + "@h:1"]
)
def test_what_cannot_be_called_is_told_at_once(text):
    with pytest.raises(ValueError, match="expected TITLE@HOST:PORT"):
        Peer.of(text)


def test_a_port_that_is_taken_is_named(tmp_path):
    with gateway(tmp_path / "a", 1).serving(0) as port, pytest.raises(OSError, match=f"listen at 127.0.0.1:{port} "):
        with gateway(tmp_path / "b", 1).serving(port):
            pass


def test_an_address_may_be_of_any_kind():
    assert Peer.of("MY PACS@[::1]:104") == Peer("::1", 104, "MY PACS")
    assert Peer.of("PACS@pacs.example.org:11112") == Peer("pacs.example.org", 11112, "PACS")
