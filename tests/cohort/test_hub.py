"""Fetching from the hub, against an imitation of it on loopback."""

import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import namedtuple
from pathlib import Path

import pytest
from ct_rate_imitation import row_of, write_ct_rate, write_tables
from hub_imitation import COMMIT, HubImitation, closed_port
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from medctkit import cli, read_volume
from medctkit.cohort.ct_rate import TABLES, volume_path
from medctkit.cohort.hub import ct_rate_files as hub
from medctkit.cohort.hub import preflight, repository, transfer
from medctkit.findings import FINDINGS

REPO = hub.CT_RATE
VOLUMES = [
    "train_1_a_1",
    "train_2_a_1",
    "valid_1_a_1",
    "valid_1_a_2",
    "valid_1_b_1",
    "valid_2_a_1",
    "valid_2_b_1",
    "valid_10_a_1",
]
NO_CHEST = ["valid_2_b_1"]
ONE, TWO = (volume_path(name, 2) for name in ("valid_1_a_1", "valid_1_a_2"))
REPORTS = TABLES["valid"]["reports"]
SIZE = 50_000


def noise(name, version=2):
    """The same bytes for the same name: a stand-in for a compressed scan."""
    return hashlib.shake_128(f"{name} {version}".encode()).digest(SIZE)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waiting between attempts, and neither a token nor a proxy of the machine that runs the tests."""
    monkeypatch.setattr(repository, "WAIT", 0)
    monkeypatch.setattr(preflight, "MARGIN", 10**6)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/no/such/token")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """An imitation of CT-RATE, with weights, and of the text encoder's repository."""
    folder = tmp_path_factory.mktemp("served") / "ct-rate"
    write_tables(folder, [row_of(name, dict.fromkeys(FINDINGS, 0), "Invented.") for name in VOLUMES], NO_CHEST)
    for version in (1, 2):
        for name in VOLUMES:
            path = folder / volume_path(name, version)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(noise(name, version))
    (folder / hub.WEIGHTS).mkdir(parents=True)
    for name in ("CT-CLIP_v2.pt", "CT_LiPro_v2.pt"):
        (folder / hub.WEIGHTS / name).write_bytes(noise(name))
    encoder = folder.parent / "encoder"
    encoder.mkdir()
    for name in ("vocab.txt", "tokenizer_config.json", "modeling_cxrbert.py", "pytorch_model.bin", "config.json"):
        (encoder / name).write_text(name)
    return folder


@pytest.fixture
def server(served):
    with HubImitation() as imitation:
        imitation.add(REPO, served, gated=True)
        imitation.add(hub.TEXT_ENCODER, served.parent / "encoder", repo_type="model")
        yield imitation


@pytest.fixture
def plan(server, tmp_path):
    """Make a plan for some files, in the folder `there`."""

    def make(*files, **changes):
        where = dict(token=server.token, endpoint=server.url) | changes
        return hub.preflight(where.pop("repo_id", REPO), files or [ONE], tmp_path / "there", **where)

    return make


def partials(folder):
    return sorted((folder / ".medctkit" / "partial").glob("*"))


# --- which files -----------------------------------------------------------------------------------------


def chosen(**choice):
    return [Path(name).name.removesuffix(".nii.gz") for name in hub.select(VOLUMES[2:], **choice).files]


def test_the_version_decides_the_folder():
    assert hub.select(["train_12_c_3.nii.gz"]).files == ("dataset/train_fixed/train_12/train_12_c/train_12_c_3.nii.gz",)
    assert hub.select(["valid_1_a_2"], version=1).files == ("dataset/valid/valid_1/valid_1_a/valid_1_a_2.nii.gz",)
    with pytest.raises(ValueError, match="version=3: CT-RATE has the versions 1 and 2"):
        hub.select(["valid_1_a_1"], version=3)


def test_a_name_in_the_tables_that_leads_elsewhere_is_refused():
    with pytest.raises(ValueError, match=r"'\.\./valid_1_a_1' is not the name of a CT-RATE volume"):
        hub.select(["../valid_1_a_1.nii.gz"])


def test_first_patients_are_counted_by_number_and_come_whole():
    assert chosen(patients=2) == ["valid_1_a_1", "valid_1_a_2", "valid_1_b_1", "valid_2_a_1", "valid_2_b_1"]
    assert chosen() == VOLUMES[2:]


@given(seed=st.integers(), few=st.integers(1, 50), more=st.integers(0, 50))
def test_a_seed_draws_the_same_patients_and_keeps_them_when_more_are_asked_for(seed, few, more):
    names = [f"train_{i}_a_1.nii.gz" for i in range(1, 101)]
    drawn = hub.select(names, patients=few, seed=seed).patients
    assert len(drawn) == few == len(set(drawn))
    assert drawn == hub.select(reversed(names), patients=few, seed=seed).patients
    assert set(drawn) <= set(hub.select(names, patients=few + more, seed=seed).patients)


def test_another_seed_draws_other_patients():
    names = [f"train_{i}_a_1.nii.gz" for i in range(1, 101)]
    first, *others = (hub.select(names, patients=10, seed=seed).patients for seed in (None, 0, 1))
    assert first == tuple(f"train_{i}" for i in range(1, 11))
    assert len({first, *others}) == 3
    four = hub.select(names, patients=4, seed=0).patients
    assert four == ("train_34", "train_39", "train_68", "train_76"), "a choice that was made before can't be made again"


def test_a_list_may_name_patients_scans_and_volumes():
    assert chosen(studies=["valid_10", "valid_1_a", "valid_1_a_2", "valid_2_a_1.nii.gz"]) == [
        "valid_1_a_1",
        "valid_1_a_2",
        "valid_2_a_1",
        "valid_10_a_1",
    ]


def test_unknown_names_are_listed_with_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"2 names not in the data set.*\nvalid1_b_1, perhaps valid_1_b_1\nzebra$"):
        chosen(studies=["valid1_b_1", "valid_1", "zebra"])


def test_volumes_that_are_no_chest_are_left_out_and_this_is_said():
    selection = hub.select(VOLUMES, studies=["valid_2"], no_chest=["valid_2_b_1.nii.gz", "valid_99_a_1"])
    assert selection.left_out == ("valid_2_b_1",)
    assert str(selection) == "1 patient, 1 volume; left out, because not a chest: 1 volume"
    assert str(hub.select(VOLUMES, studies=["valid_2"])) == "1 patient, 2 volumes"
    assert hub.select(VOLUMES[-2:], patients=1, no_chest=NO_CHEST).patients == ("valid_10",), "an empty patient"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (dict(patients=4), "4 patients were asked for; there are 3"),
        (dict(patients=0), "0 patients were asked for"),
        (dict(patients=1, studies=["valid_1"]), "patients and studies were both given"),
        (dict(seed=1), "a seed draws patients: give their number"),
        (dict(studies=[]), "the list of studies is empty"),
        (dict(studies=["valid_2_b"], no_chest=NO_CHEST), "nothing to fetch: 1 volume asked for, none of which is a"),
    ],
)
def test_impossible_choices_are_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        chosen(**choice)


def test_names_come_from_files_or_the_command_line(tmp_path):
    (tmp_path / "names.txt").write_text("# my cohort\nvalid_1\n\nvalid_2_a  # a scan\n")
    (tmp_path / "table.csv").write_text('\ufeffVolumeName,Cardiomegaly\n"valid_1_a_1.nii.gz",0\n')
    assert hub.study_names([str(tmp_path / "names.txt"), "valid_3, valid_4"]) == [
        "valid_1",
        "valid_2_a",
        "valid_3",
        "valid_4",
    ]
    assert hub.study_names([str(tmp_path / "table.csv")]) == ["valid_1_a_1.nii.gz"]
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt: there is no such file of names"):
        hub.study_names(["nowhere.txt"])


# --- before the download ---------------------------------------------------------------------------------


def test_a_plan_says_how_much_is_there_to_fetch_and_free(plan, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 3 * 10**9))
    found = plan(ONE, TWO, ONE)
    assert (len(found.files), found.bytes_total, found.bytes_there, found.revision) == (2, 2 * SIZE, 0, COMMIT)
    assert transfer.download(plan(ONE)).fetched == (ONE,)
    assert str(plan(ONE, TWO)) == (
        f"ibrahimhamamci/CT-RATE -> {tmp_path / 'there'}: 2 files, 100 kB; 50 kB there, 50 kB to fetch, "
        "3 GB free on the disk"
    )


def test_without_a_token_it_says_how_to_get_one(plan, server):
    page = f"{server.url}/datasets/ibrahimhamamci/CT-RATE"
    with pytest.raises(
        PermissionError, match=f"{page}: there is no Hugging Face token on.*accept the terms.*hf auth lo"
    ):
        plan(token=False)
    with pytest.raises(PermissionError, match=f"make a token .type Read. at {server.url}/settings/tokens"):
        plan(token=None)


def test_the_token_of_the_machine_is_used(plan, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert plan(token=None).bytes_total == SIZE


def test_an_expired_token_is_told_from_none(plan, server):
    with pytest.raises(PermissionError, match="refuses the token: expired, revoked or mistyped.*HF_TOKEN, where it is"):
        plan(token="hf_yesterday")


@pytest.mark.parametrize("token", ["hf_with\na_line", "hf_schl\u00fcssel"])
def test_a_token_that_cannot_be_one_is_not_shown(plan, token):
    with pytest.raises(PermissionError, match="token has blanks or letters in it that no token has; copy it anew$"):
        plan(token=token)


def test_terms_that_are_not_accepted_are_told_from_a_wrong_token(plan, server):
    server.accepted = False
    with pytest.raises(PermissionError, match="datasets/ibrahimhamamci/CT-RATE: the account of this token has not acc"):
        plan()
    server.fine_grained = True
    with pytest.raises(
        PermissionError, match="the token may not read gated repositories. Tick 'Read access to contents"
    ):
        plan()


def test_a_repository_or_file_that_does_not_exist(plan):
    with pytest.raises(FileNotFoundError, match="datasets/someone/else: there is no such dataset repository"):
        plan(repo_id="someone/else")
    with pytest.raises(
        FileNotFoundError, match=r"CT-RATE has no file\nmodels/.*/CT-CLIP_v3\.pt; near it are models/CT-CL"
    ):
        plan(f"{hub.WEIGHTS}/CT-CLIP_v3.pt", ONE)
    with pytest.raises(FileNotFoundError, match="has no file\nno/such/folder.txt$"):
        plan("no/such/folder.txt")
    with pytest.raises(ValueError, match="no file of ibrahimhamamci/CT-RATE was asked for"):
        hub.preflight(REPO, [], "nowhere")


def test_no_network(plan):
    address = closed_port()
    with pytest.raises(ConnectionError, match=rf"no connection to {address} \(\[Errno 111\] .*HTTPS_PROXY.*login node"):
        plan(endpoint=address)


def test_offline_mode(server, tmp_path):
    code = f"""from medctkit.cohort.hub import ct_rate_files as hub
try: hub.preflight("a/b", ["c"], {str(tmp_path)!r}, token=False, endpoint={server.url!r})
except ConnectionError as error: print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "HF_HUB_OFFLINE is set, so nothing can be fetched; unset it and run this again\n", done.stderr
    assert not server.requests


def test_something_that_is_not_a_hub(plan, server):
    server.answer("/api", 200)
    with pytest.raises(OSError, match=f"what answers at {server.url} is not a hub; check HF_ENDPOINT"):
        plan()


def test_a_busy_hub_is_asked_again_but_not_for_ever(plan, server):
    server.answer("/api", 500, times=2)
    server.answer("/api", 429, times=2, Retry_After="0")
    assert plan().bytes_total == SIZE
    server.forget()
    server.answer("/api", 503, times=100)
    with pytest.raises(OSError, match="CT-RATE: .* answers 503 .as it was told to.; try again later"):
        plan()
    assert sum(server.requests.values()) == repository.ATTEMPTS


def test_waiting_grows_unless_the_server_says_how_long(monkeypatch):
    from huggingface_hub.errors import HfHubHTTPError

    monkeypatch.setattr(repository, "WAIT", 1)
    assert [repository.pause(n) for n in (1, 2, 5)] == [1, 2, 16]
    for said, seconds in (("7", 7), ("86400", 300), ("tomorrow", 1)):
        response = namedtuple("Response", "status_code headers request")(429, {"Retry-After": said}, None)
        error = HfHubHTTPError.__new__(HfHubHTTPError)
        error.response = response
        assert repository.pause(1, error) == seconds


def test_no_room_on_the_disk(plan, monkeypatch, tmp_path):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1_040_000))
    with pytest.raises(
        OSError, match=f"no room in {tmp_path / 'there'}: 50 kB to fetch and 1 MB to spare, but 1.04 MB"
    ):
        plan()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1_050_000))
    transfer.download(plan())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    assert plan().bytes_left == 0, "nothing is left to fetch, so no room is needed"


def test_a_destination_that_cannot_be_written(plan, tmp_path):
    (tmp_path / "there").write_text("a file")
    with pytest.raises(OSError, match=f"cannot write into {tmp_path / 'there'}: File exists; choose another folder"):
        plan()


@pytest.mark.parametrize(
    "name",
    [
        "../a.nii.gz",
        "a/../../b",
        "/etc/passwd",
        "C:/a",
        "a\\b",
        "a//b",
        "./a",
        "",
        "a\nb",
        "a/",
        ".medctkit/verified.txt",
    ],
)
def test_names_that_lead_out_of_the_destination_are_refused(plan, name, tmp_path):
    with pytest.raises(ValueError, match="expected a path inside the repository"):
        plan(ONE, name)
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_leads_out_of_the_destination_is_refused(plan, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "dataset").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="a link in .*there leads out of it; make the linked folder the destination"):
        plan()


@pytest.mark.parametrize("strange", [{"size": -1}, {"lfs": {"oid": "../../x", "size": 1, "pointerSize": 1}}])
def test_sizes_and_digests_that_cannot_be_are_refused(plan, server, strange):
    server.extra[ONE] = strange
    with pytest.raises(OSError, match=r"valid_1_a_1\.nii\.gz: the hub says size .* and digest .*, which can't be"):
        plan()


# --- the download ----------------------------------------------------------------------------------------


def test_files_arrive_verified_under_their_names_and_once(plan, server, served, tmp_path):
    outcome = hub.download(plan(ONE, TWO, REPORTS))
    assert str(outcome) == "3 files fetched, 0 already there"
    for name in (ONE, TWO, REPORTS):
        assert (tmp_path / "there" / name).read_bytes() == (served / name).read_bytes()
    everything = sum(path.stat().st_size for path in (tmp_path / "there").rglob("*") if path.is_file())
    assert everything < 2 * SIZE + 2_000, "something was stored twice"
    assert set(server.gets.values()) == {1}


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_broken_connection_goes_on_where_it_stopped(plan, server, tmp_path, reset):
    server.drop(ONE, after=20_000, times=2, reset=reset)
    assert hub.download(plan()).fetched == (ONE,)
    assert (tmp_path / "there" / ONE).read_bytes() == noise("valid_1_a_1")
    starts = server.starts[ONE]
    assert starts[0] == 0 < starts[1] < starts[2], "no byte that had arrived was asked for again"
    if not reset:  # a reset throws away what the reader hasn't taken yet
        assert server.sent[ONE] == SIZE


def test_a_later_run_goes_on_where_the_first_stopped(plan, server, tmp_path):
    server.drop(ONE, after=20_000)
    server.answer(ONE, 503, times=repository.ATTEMPTS - 1)
    server.drop(ONE, after=0)
    outcome = hub.download(plan())
    assert list(outcome.failures) == [ONE] and outcome.fetched == ()
    assert outcome.failures[ONE].startswith("broke off at 20 kB of 50 kB; 6 attempts brought no more: ")
    assert not (tmp_path / "there" / ONE).exists(), "half a file under its final name"
    again = plan()
    assert again.bytes_there == 20_000 and again.bytes_left == 30_000
    assert hub.download(again).fetched == (ONE,)
    assert server.starts[ONE] == [0, 20_000, 20_000] and server.sent[ONE] == SIZE
    assert partials(tmp_path / "there") == []


def test_a_half_of_another_version_is_never_continued(plan, server, tmp_path, served):
    server.drop(ONE, after=20_000)
    server.answer(ONE, 404)
    assert hub.download(plan()).failures
    server.extra[ONE] = {"lfs": {"oid": hashlib.sha256(noise("new")).hexdigest(), "size": SIZE, "pointerSize": 1}}
    assert plan().bytes_there == 0


def test_a_server_that_cannot_begin_in_the_middle_sends_all_again(plan, server, tmp_path):
    server.no_ranges = True
    server.drop(ONE, after=20_000)
    assert hub.download(plan()).fetched == (ONE,)
    assert (tmp_path / "there" / ONE).read_bytes() == noise("valid_1_a_1")


@pytest.mark.parametrize("after", [0, 20_000])
def test_attempts_are_bounded_where_nothing_is_gained(plan, server, after):
    server.no_ranges = True
    server.drop(ONE, after=after, times=100)
    assert "attempts brought no more" in hub.download(plan()).failures[ONE]
    assert server.gets[ONE] == repository.ATTEMPTS + (after > 0)


def test_errors_of_the_server_pass(plan, server):
    server.answer(ONE, 500)
    server.answer(ONE, 429, Retry_After="0")
    server.answer(ONE, 403)  # a storage address that is out of date
    assert hub.download(plan()).fetched == (ONE,)


@pytest.mark.parametrize("name", [ONE, REPORTS], ids=["SHA-256", "SHA-1 of git"])
def test_wrong_bytes_are_fetched_once_more(plan, server, served, tmp_path, name):
    server.wrong_bytes(name)
    assert hub.download(plan(name)).fetched == (name,)
    assert (tmp_path / "there" / name).read_bytes() == (served / name).read_bytes()
    assert server.starts[name] == [0, 0]


def test_bytes_that_are_wrong_twice_are_an_error_and_no_file(plan, server, tmp_path):
    server.wrong_bytes(ONE, times=2)
    outcome = hub.download(plan(ONE, TWO))
    digest = hashlib.sha256(noise("valid_1_a_1")).hexdigest()
    assert f"but the hub says {digest}; fetched twice, so the hub itself is wrong" in outcome.failures[ONE]
    assert outcome.fetched == (TWO,), "the failure of one file stopped the other"
    assert not (tmp_path / "there" / ONE).exists() and partials(tmp_path / "there") == []
    assert server.gets[ONE] == 2


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("by", [700, -700])
def test_a_wrong_size_is_an_error(plan, server, tmp_path, by, announced):
    server.wrong_size(ONE, by, times=2 if announced or by > 0 else 100, announced=announced)
    why = hub.download(plan()).failures[ONE]
    expected = f"has {SIZE + by} bytes where it is stored, but the hub says 50000"
    if not announced:
        expected = (
            "goes on after the 50000 bytes that the hub says" if by > 0 else "ends before byte 49300, but the hub"
        )
    assert expected in why
    assert not (tmp_path / "there" / ONE).exists()


def test_a_second_run_fetches_and_reads_nothing(plan, server, monkeypatch):
    hub.download(plan(ONE, REPORTS))
    server.forget()
    monkeypatch.setattr(transfer, "_digest", lambda *_: pytest.fail("a verified file was read again"))
    outcome = hub.download(plan(ONE, REPORTS))
    assert outcome.kept == (REPORTS, ONE) and not server.gets
    assert str(outcome) == "0 files fetched, 2 already there"


def test_verify_finds_and_mends_a_damaged_file(plan, server, tmp_path):
    hub.download(plan(ONE, TWO))
    target = tmp_path / "there" / ONE
    target.write_bytes(bytes(SIZE))
    server.forget()
    assert hub.download(plan(ONE, TWO)).kept == (ONE, TWO), "the size is all that is looked at"
    outcome = hub.download(plan(ONE, TWO), verify=True)
    assert (outcome.fetched, outcome.kept) == ((ONE,), (TWO,))
    assert target.read_bytes() == noise("valid_1_a_1")
    aside = target.with_name("valid_1_a_1.nii.gz.replaced1")
    assert aside.read_bytes() == bytes(SIZE) and outcome.replaced == (aside,)
    assert f"not what the hub has, kept aside: {aside}" in str(outcome)


def test_files_that_another_tool_fetched_are_verified_once_and_kept(plan, server, served, tmp_path, monkeypatch):
    shutil.copytree(served / "dataset", tmp_path / "there" / "dataset")
    assert plan(ONE, TWO).bytes_left == 0
    assert hub.download(plan(ONE, TWO)).kept == (ONE, TWO) and not server.gets
    monkeypatch.setattr(transfer, "_digest", lambda *_: pytest.fail("a verified file was read again"))
    assert hub.download(plan(ONE, TWO)).kept == (ONE, TWO)


def test_a_file_that_is_in_the_way_is_not_lost(plan, tmp_path):
    target = tmp_path / "there" / ONE
    target.parent.mkdir(parents=True)
    for n in (1, 2):
        target.write_text(f"mine {n}")
        assert hub.download(plan()).replaced == (target.with_name(f"{target.name}.replaced{n}"),)
    assert target.with_name(f"{target.name}.replaced1").read_text() == "mine 1"


def test_a_line_half_written_in_the_record_costs_one_more_look(plan, server, tmp_path):
    hub.download(plan(ONE, TWO))
    record = tmp_path / "there" / ".medctkit" / "verified.txt"
    record.write_text(record.read_text()[:-20])
    server.forget()
    assert hub.download(plan(ONE, TWO)).kept == (ONE, TWO) and not server.gets
    lines = record.read_text().splitlines()
    assert sorted(line.split(" ", 2)[2] for line in lines) == [ONE, TWO]


def test_what_is_missing_or_forbidden_is_not_asked_for_again(plan, server):
    server.answer(ONE, 404)
    server.answer(REPORTS, 403)  # from the hub itself, not from its storage
    outcome = hub.download(plan(ONE, TWO, REPORTS))
    assert "there is no such file in" in outcome.failures[ONE]
    assert "answers 403 (as it was told to); check the token's rights" in outcome.failures[REPORTS]
    assert outcome.fetched == (TWO,)
    assert str(outcome).startswith(f"1 file fetched, 0 already there, 2 failed\n  {REPORTS}\n    ")
    assert sum(n for request, n in server.requests.items() if f"GET /datasets/{REPO}/resolve" in request) == 3


def test_a_token_that_expires_on_the_way_stops_the_rest(plan, server):
    files = [volume_path(name, 2) for name in VOLUMES]
    ready = plan(*files)
    server.token = "hf_another"
    outcome = hub.download(ready, workers=1)
    assert "the hub refuses the token" in next(iter(outcome.failures.values()))
    assert len(outcome.failures) + len(outcome.untried) == len(files) and len(outcome.failures) <= 2
    assert f"{len(outcome.untried)} left" in str(outcome)


def test_two_downloads_into_one_folder_do_not_mix(plan, tmp_path):
    from huggingface_hub.utils import WeakFileLock

    ready = plan()
    hub.download(ready)
    with WeakFileLock(tmp_path / "there" / ".medctkit" / "lock"):
        with pytest.raises(
            OSError, match="another download writes into .*there: wait for it, or choose another folder"
        ):
            hub.download(ready)


# --- the token ------------------------------------------------------------------------------------------


def test_the_token_is_shown_to_nobody(plan, server, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    shown, token = [], server.token
    for break_it in (
        lambda: setattr(server, "accepted", False),
        lambda: setattr(server, "token", "hf_another"),
        lambda: server.answer("/api", 400, says=f"what is {token}?"),
        lambda: server.repositories.clear(),
    ):
        ready = plan()
        shown += [repr(ready), str(ready)]
        break_it()
        try:
            plan(token=token)
        except OSError as error:
            shown += [traceback.format_exc(), repr(error)]
        shown += [str(hub.download(ready)), repr(hub.download(ready))]
        server.accepted, server.token = True, token
    assert len(shown) == 4 * 6 and "what is ***?" in "".join(shown)
    written = "".join([*shown, caplog.text, *capfd.readouterr()])
    assert token not in written and "Bearer" not in written
    assert not server.storage_saw_token, "the token went to the storage too"


def test_the_signature_of_a_storage_address_is_not_shown(plan, server):
    server.answer(ONE, 503, times=100)
    why = hub.download(plan()).failures[ONE]
    assert "503" in why and "signature" not in why


# --- weights and tokenizer ----------------------------------------------------------------------------------


def test_weights_are_fetched_by_name(server, tmp_path):
    where = dict(token=server.token, endpoint=server.url)
    path = hub.fetch_weights(tmp_path, **where)
    assert path == tmp_path / "models" / "CT-CLIP-Related" / "CT-CLIP_v2.pt"
    assert path.read_bytes() == noise("CT-CLIP_v2.pt")
    assert hub.fetch_weights(tmp_path, "CT_LiPro_v2.pt", **where).is_file()
    server.wrong_bytes(f"{hub.WEIGHTS}/CT-CLIP_v2.pt", times=2)
    path.unlink()
    with pytest.raises(OSError, match="1 failed\n  models/CT-CLIP-Related/CT-CLIP_v2.pt\n    arrived with digest"):
        hub.fetch_weights(tmp_path, **where)


def test_of_the_text_encoder_only_the_tokenizer_is_fetched_and_no_code(server, tmp_path):
    folder = hub.fetch_tokenizer(tmp_path, token=False, endpoint=server.url)
    assert folder == tmp_path / "BiomedVLP-CXR-BERT-specialized"
    assert {path.name for path in folder.iterdir()} == {"vocab.txt", "tokenizer_config.json", ".medctkit"}


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture
def run(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", server.token)
    return lambda *options: CliRunner().invoke(cli.app, ["download", str(tmp_path / "data"), *map(str, options)])


def volumes_in(folder):
    return [path.name.removesuffix(".nii.gz") for path in sorted((folder / "data").rglob("*.nii.gz"))]


def test_nothing_is_fetched_by_default(run, server):
    result = run()
    assert result.exit_code == 2 and not server.requests
    assert "47,149 volumes" in result.output and "1.77 GB" in result.output


def test_the_command_fetches_patients_with_their_tables(run, tmp_path):
    result = run("--patients", 2, "--weights", "--tokenizer")
    assert result.exit_code == 0, result.output
    assert "2 patients, 4 volumes; left out, because not a chest: 1 volume (the first by number)" in result.output
    assert "5 files, 250 kB; 0 B there, 250 kB to fetch" in result.output
    assert volumes_in(tmp_path) == ["valid_1_a_1", "valid_1_a_2", "valid_1_b_1", "valid_2_a_1"]
    assert (tmp_path / "data" / REPORTS).is_file()
    assert (tmp_path / "data" / hub.WEIGHTS / "CT-CLIP_v2.pt").is_file()
    assert (tmp_path / "data" / "BiomedVLP-CXR-BERT-specialized" / "vocab.txt").is_file()
    again = run("--patients", 2, "--weights")
    assert "0 files fetched, 5 already there" in again.output


def test_a_dry_run_fetches_only_tables(run, tmp_path):
    result = run("--split", "train", "--version", 1, "--tokenizer", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "2 files, 100 kB; 0 B there, 100 kB to fetch" in result.output
    files = [path for path in (tmp_path / "data").rglob("*.*") if path.is_file() and ".medctkit" not in path.parts]
    assert len(files) == 4 and {path.suffix for path in files} == {".csv", ".txt"}


def test_the_command_takes_names_from_both_splits(run, tmp_path):
    (tmp_path / "names.txt").write_text("train_2\nvalid_2\n")
    result = run("--studies", tmp_path / "names.txt", "--studies", "valid_10_a", "--keep-no-chest")
    assert result.exit_code == 0, result.output
    assert volumes_in(tmp_path) == ["train_2_a_1", "valid_10_a_1", "valid_2_a_1", "valid_2_b_1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--patients", 9], "error: 9 patients were asked for; there are 3"),
        (["--split", "test"], "error: split 'test': expected train or valid"),
        (["--studies", "valid_7"], "error: 1 name not in the data set"),
        (["--patients", 1, "--version", 4], "error: version=4"),
    ],
)
def test_errors_of_the_command_are_one_text_without_traceback(run, options, message):
    result = run(*options)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert message in result.output and "Traceback" not in result.output


def test_failures_are_listed_at_the_end_with_an_exit_code(run, server):
    server.wrong_bytes(ONE, times=2)
    result = run("--patients", 1)
    assert result.exit_code == 1
    assert f"2 files fetched, 0 already there, 1 failed\n  {ONE}\n    arrived with digest" in result.output
    assert "Not all was fetched; the same command goes on from here." in result.output


def test_the_doctor_says_where_a_token_is_but_not_which(monkeypatch):
    assert "HF token         none (only CT-RATE" in CliRunner().invoke(cli.app, ["doctor"]).output
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    output = CliRunner().invoke(cli.app, ["doctor"]).output
    assert "HF token         HF_TOKEN" in output and "hf_secret" not in output


# --- in a process of its own ---------------------------------------------------------------------------------


@pytest.fixture
def start(server, tmp_path):
    """Start the command as a user would, with an empty HF_HOME."""

    def go(*options, before=""):
        home = tmp_path / "hf_home"
        changes = {"HF_ENDPOINT": server.url, "HF_TOKEN": server.token, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        # as from a terminal: what a shell starts in the background inherits that Ctrl-C is ignored
        before += "\nimport signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        code = f"{before}\nfrom medctkit import cli\ncli.app()"
        command = [sys.executable, "-c", code, "download", str(tmp_path / "data"), *map(str, options)]
        text = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen(command, env=os.environ | changes, **text)

    return go


def test_nothing_is_stored_in_the_cache_of_huggingface(start, tmp_path):
    done = start("--split", "train")
    output = done.communicate(timeout=60)[0]
    assert done.returncode == 0, output
    assert volumes_in(tmp_path) == ["train_1_a_1", "train_2_a_1"]
    assert [path for path in (tmp_path / "hf_home").rglob("*") if path.is_file() and path.stat().st_size > 1_000] == []


def test_a_disk_that_is_full_is_an_error_and_the_next_run_goes_on(start, run, server, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))"
    full = start("--studies", "valid_10", before=limit)
    output = full.communicate(timeout=60)[0]
    assert full.returncode == 1, output
    assert "valid_10_a_1.nii.gz\n    cannot write " in output and "File too large. Make room" in output
    assert "Traceback" not in output
    assert volumes_in(tmp_path) == [], "half a file under its final name"
    assert [path.stat().st_size for path in partials(tmp_path / "data")] == [30_000]
    assert run("--studies", "valid_10").exit_code == 0
    assert server.starts[volume_path("valid_10_a_1", 2)] == [0, 30_000]


def test_ctrl_c_leaves_what_the_next_run_goes_on_with(start, run, server, tmp_path):
    server.pause = 0.1
    stopped = start("--studies", "valid_10")
    deadline = time.monotonic() + 60
    while server.sent[volume_path("valid_10_a_1", 2)] < 2_000 and time.monotonic() < deadline:
        time.sleep(0.02)
    stopped.send_signal(signal.SIGINT)
    output = stopped.communicate(timeout=60)[0]
    assert stopped.returncode == 130, output
    assert "stopped; the same command goes on from here" in output and "Traceback" not in output
    (partial,) = partials(tmp_path / "data")
    assert 0 < partial.stat().st_size < SIZE and volumes_in(tmp_path) == []
    begun = partial.stat().st_size
    server.pause = 0
    assert run("--studies", "valid_10").exit_code == 0
    assert server.starts[volume_path("valid_10_a_1", 2)] == [0, begun]


def test_a_phantom_arrives_as_the_volume_it_was(tmp_path):
    (study,) = write_ct_rate(tmp_path / "served", {"valid_1": {"a": 1}}).values()
    with HubImitation() as server:
        server.add(REPO, tmp_path / "served")
        ready, chosen = hub.plan_ct_rate(tmp_path / "there", split="valid", token=False, endpoint=server.url)
        hub.download(ready)
    assert (read_volume(tmp_path / "there" / chosen.files[0]).hu == study.volume.hu).all()
