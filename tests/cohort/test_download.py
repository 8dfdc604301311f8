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
from ct_rate_imitation import row_of, write_tables
from hub_imitation import COMMIT, HubImitation
from hypothesis import given
from hypothesis import strategies as st
from ports import free_port
from typer.testing import CliRunner

from medctkit import cli
from medctkit.cohort import contents, hub_repository
from medctkit.cohort import download as module
from medctkit.cohort.ct_rate import TABLES, volume_path
from medctkit.cohort.download import CT_RATE, TEXT_ENCODER, WEIGHTS, download, plan_files
from medctkit.cohort.hub_repository import HubRepository
from medctkit.cohort.selection import select, study_names
from medctkit.common.atomic import alone
from medctkit.findings import FINDINGS

VOLUMES = [
    *("train_1_a_1", "train_2_a_1", "valid_1_a_1", "valid_1_a_2"),
    *("valid_1_b_1", "valid_2_a_1", "valid_2_b_1", "valid_10_a_1"),
]
NO_CHEST = ["valid_2_b_1"]
ONE, TWO = (volume_path(name, 2) for name in ("valid_1_a_1", "valid_1_a_2"))
TEN = volume_path("valid_10_a_1", 2)
REPORTS = TABLES["valid"]["reports"]
SIZE = 50_000
HUNDRED = [f"train_{i}_a_1.nii.gz" for i in range(1, 101)]


def noise(name):
    """The same bytes for the same name: a stand-in for a compressed scan."""
    return hashlib.shake_128(name.encode()).digest(SIZE)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """An imitation of CT-RATE, with weights, and of the text encoder's repository."""
    folder = tmp_path_factory.mktemp("served") / "ct-rate"
    write_tables(folder, [row_of(name, dict.fromkeys(FINDINGS, 0), "Invented.") for name in VOLUMES], NO_CHEST)
    files = [volume_path(name, version) for version in (1, 2) for name in VOLUMES]
    for path in [folder / name for name in (*files, f"{WEIGHTS}/CT-CLIP_v2.pt")]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise(path.name))
    encoder = folder.parent / "encoder"
    encoder.mkdir()
    for name in ("vocab.txt", "tokenizer_config.json", "modeling_cxrbert.py", "pytorch_model.bin", "config.json"):
        (encoder / name).write_text(name)
    return folder


@pytest.fixture
def server(served, monkeypatch):
    """The imitation, a token for it, no waiting, and neither token nor proxy of the machine that runs the tests."""
    monkeypatch.setattr(hub_repository, "WAIT", 0)
    monkeypatch.setattr(module, "MARGIN", 10**6)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/no/such/token")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HubImitation() as imitation:
        imitation.add(CT_RATE, served, gated=True)
        imitation.add(TEXT_ENCODER, served.parent / "encoder", repo_type="model")
        monkeypatch.setenv("HF_ENDPOINT", imitation.url)
        monkeypatch.setenv("HF_TOKEN", imitation.token)
        yield imitation


@pytest.fixture
def plan(server, tmp_path):
    """Make a plan for some files, in the folder `there`."""
    return lambda *files, repo_id=CT_RATE: plan_files(HubRepository(repo_id), files or [ONE], tmp_path / "there")


@pytest.fixture
def disk(monkeypatch):
    """Set how many bytes are free."""
    usage = namedtuple("Usage", "total used free")
    return lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, free))


def files_in(folder):
    """Sizes of all files but the records that huggingface_hub keeps."""
    inside = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    records = (".metadata", ".lock", ".gitignore", "CACHEDIR.TAG", "verified.csv")
    return {name: path.stat().st_size for name, path in inside.items() if not name.endswith(records)}


# --- which files -----------------------------------------------------------------------------------------


def chosen(**choice):
    return [Path(name).name.removesuffix(".nii.gz") for name in select(VOLUMES[2:], **choice).files]


def test_the_version_decides_the_folder_and_no_name_leads_elsewhere():
    assert select(["train_12_c_3.nii.gz"]).files == ("dataset/train_fixed/train_12/train_12_c/train_12_c_3.nii.gz",)
    assert select(["valid_1_a_2"], version=1).files == ("dataset/valid/valid_1/valid_1_a/valid_1_a_2.nii.gz",)
    with pytest.raises(ValueError, match="version=3: .* 1 and 2"):
        select(["valid_1_a_1"], version=3)
    with pytest.raises(ValueError, match=r"'\.\./valid_1_a_1' is not the name of a CT-RATE volume"):
        select(["../valid_1_a_1.nii.gz"])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({}, VOLUMES[2:]),
        # first patients are counted by number and come whole
        ({"patients": 2}, ["valid_1_a_1", "valid_1_a_2", "valid_1_b_1", "valid_2_a_1", "valid_2_b_1"]),
        # a list may name patients, scans and volumes
        (
            {"studies": ["valid_10", "valid_1_a", "valid_1_a_2", "valid_2_a_1.nii.gz"]},
            ["valid_1_a_1", "valid_1_a_2", "valid_2_a_1", "valid_10_a_1"],
        ),
    ],
)
def test_what_is_chosen(choice, expected):
    assert chosen(**choice) == expected


@given(seed=st.integers(), few=st.integers(1, 50), more=st.integers(0, 50))
def test_a_seed_draws_the_same_patients_and_keeps_them_when_more_are_asked_for(seed, few, more):
    drawn = select(HUNDRED, patients=few, seed=seed).patients
    assert len(drawn) == few == len(set(drawn))
    assert drawn == select(reversed(HUNDRED), patients=few, seed=seed).patients
    assert set(drawn) <= set(select(HUNDRED, patients=few + more, seed=seed).patients)


def test_another_seed_draws_other_patients():
    first, *others = (select(HUNDRED, patients=10, seed=seed).patients for seed in (None, 0, 1))
    assert first == tuple(f"train_{i}" for i in range(1, 11))
    assert len({first, *others}) == 3
    four = select(HUNDRED, patients=4, seed=0).patients
    assert four == ("train_34", "train_39", "train_68", "train_76"), "a choice that was made before can't be made again"


def test_volumes_that_are_no_chest_are_left_out_and_this_is_said():
    selection = select(VOLUMES, studies=["valid_2"], no_chest=["valid_2_b_1.nii.gz", "valid_99_a_1"])
    assert selection.left_out == ("valid_2_b_1",)
    assert str(selection) == "1 patient, 1 volume; left out, because not a chest: 1 volume"
    assert str(select(VOLUMES, studies=["valid_2"])) == "1 patient, 2 volumes"
    assert select(VOLUMES[-2:], patients=1, no_chest=NO_CHEST).patients == ("valid_10",), "an empty patient"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (dict(patients=4), "4 patients were asked for; there are 3"),
        (dict(patients=0), "0 patients were asked for"),
        (dict(patients=1, studies=["valid_1"]), "patients and studies were both given"),
        (dict(seed=1), "a seed draws patients: give their number"),
        (dict(studies=[]), "the list of studies is empty"),
        (dict(studies=["valid_2_b"], no_chest=NO_CHEST), "1 volume asked for, none of which is a chest"),
        (dict(studies=["valid1_b_1", "valid_1", "zebra"]), r"2 names .*\nvalid1_b_1, perhaps valid_1_b_1\nzebra$"),
    ],
)
def test_impossible_choices_are_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        chosen(**choice)


def test_names_come_from_files_or_the_command_line(tmp_path):
    (tmp_path / "names.txt").write_text("# my cohort\nvalid_1\n\nvalid_2_a  # a scan\n")
    (tmp_path / "table.csv").write_text('\ufeffVolumeName,Cardiomegaly\n"valid_1_a_1.nii.gz",0\n')
    names = study_names([str(tmp_path / "names.txt"), "valid_3, valid_4"])
    assert names == ["valid_1", "valid_2_a", "valid_3", "valid_4"]
    assert study_names([str(tmp_path / "table.csv")]) == ["valid_1_a_1.nii.gz"]
    assert study_names([",".join(HUNDRED)]) == HUNDRED, "longer than the name of a file can be"
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt: there is no such file of names"):
        study_names(["nowhere.txt"])
    (tmp_path / "names.txt").write_bytes("valid_1".encode("utf-16"))
    with pytest.raises(ValueError, match=r"names\.txt is not text in UTF-8"):
        study_names([str(tmp_path / "names.txt")])


# --- before the download ---------------------------------------------------------------------------------


def test_a_plan_says_how_much_is_there_to_fetch_and_free(plan, tmp_path, disk):
    disk(3 * 10**9)
    found = plan(ONE, TWO, ONE)
    assert (len(found.files), found.bytes_total, found.bytes_there, found.revision) == (2, 2 * SIZE, 0, COMMIT)
    assert download(plan(ONE)).fetched == [ONE]
    assert str(plan(ONE, TWO)) == (
        f"ibrahimhamamci/CT-RATE -> {tmp_path / 'there'}: 2 files, 100 kB; 50 kB there, 50 kB to fetch, "
        "3 GB free on the disk"
    )


PAGE = "/datasets/ibrahimhamamci/CT-RATE: "


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", f"{PAGE}there is no Hugging Face token.*accept the terms.*Read.* at .*/settings/tokens.*hf auth login"),
        ("hf_yesterday", f"{PAGE}the hub refuses the token: expired.*Make a new one at .*HF_TOKEN"),
        ("hf_schlüssel", "the Hugging Face token has blanks or letters in it that no token has; copy it anew$"),
    ],
)
def test_a_token_that_is_missing_expired_or_impossible(plan, monkeypatch, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PermissionError, match=message):
        plan()


def test_terms_that_are_not_accepted_are_told_from_a_token_without_rights(plan, server):
    server.accepted = False
    with pytest.raises(PermissionError, match=f"{PAGE}the account of this token has not accepted the terms"):
        plan()
    server.fine_grained = True
    with pytest.raises(PermissionError, match="the token may not read gated repositories. Tick 'Read access to con"):
        plan()


def test_a_repository_or_file_that_does_not_exist(plan):
    with pytest.raises(FileNotFoundError, match="/datasets/someone/else: there is no such dataset repository"):
        plan(repo_id="someone/else")
    with pytest.raises(FileNotFoundError, match=r"CT-RATE has no file\nmodels/CT-CLIP-Related/CT-CLIP_v3\.pt$"):
        plan(ONE, f"{WEIGHTS}/CT-CLIP_v3.pt")


def test_no_network(plan, monkeypatch):
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(ConnectionError, match=rf"no connection to {address} \(\[Errno 111\] .*HTTPS_PROXY.*login node"):
        plan()


def test_offline_mode(plan, server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set.*unset it and run this again"):
        plan()
    assert not server.requests


def test_something_that_is_not_a_hub(plan, server):
    server.fault("/api", "status", 200, times=2)
    with pytest.raises(OSError, match=f"what answers at {server.url} is not a hub; check HF_ENDPOINT"):
        plan()


def test_a_busy_hub_is_asked_again_but_not_for_ever(plan, server):
    server.fault("/api", "status", 500)
    assert plan().bytes_total == SIZE
    server.forget()
    server.fault("/api", "status", 503, times=100)
    with pytest.raises(OSError, match="valid_1_a_1.nii.gz: .* answers 503; try again later"):
        plan()
    assert sum(server.requests.values()) == 2


def test_no_room_on_the_disk(plan, disk, tmp_path):
    disk(1_040_000)
    with pytest.raises(OSError, match=f"no room in {tmp_path / 'there'}: 50 kB to fetch and 1 MB .*1.04 MB.*fewer pa"):
        plan()
    disk(1_050_000)
    download(plan())
    disk(0)
    assert plan().bytes_left == 0, "nothing is left to fetch, so no room is needed"


def test_a_destination_that_cannot_be_written(plan, tmp_path):
    (tmp_path / "there").write_text("a file")
    with pytest.raises(OSError, match=f"cannot write into {tmp_path / 'there'}: File exists; choose another folder"):
        plan()


# --- the download ----------------------------------------------------------------------------------------


def test_files_arrive_verified_under_their_names_and_once(plan, server, served, tmp_path):
    assert str(download(plan(ONE, TWO, REPORTS))) == "3 files fetched, 0 already there"
    for name in (ONE, TWO, REPORTS):
        assert (tmp_path / "there" / name).read_bytes() == (served / name).read_bytes()
    assert set(files_in(tmp_path / "there")) == {ONE, TWO, REPORTS}, "something was stored twice"
    assert all(starts == [0] for starts in server.starts.values())


def test_a_second_run_fetches_and_reads_nothing(plan, server, monkeypatch):
    download(plan(ONE, REPORTS))
    server.forget()
    monkeypatch.setattr(module, "_digest", lambda *_: pytest.fail("a verified file was read again"))
    outcome = download(plan(ONE, REPORTS))
    assert outcome.kept == [REPORTS, ONE] and not server.starts
    assert str(outcome) == "0 files fetched, 2 already there"


def test_a_dropped_connection_is_taken_up_where_it_broke(plan, server, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)  # bytes between which it takes up
    server.fault(ONE, "drop", 20_000)
    assert download(plan()).fetched == [ONE]
    assert (tmp_path / "there" / ONE).read_bytes() == noise(Path(ONE).name)
    assert server.starts[ONE] == [0, 20_000] and server.sent[ONE] == SIZE
    assert "Trying to resume" in caplog.text and "signature" not in caplog.text


def test_a_run_that_failed_is_gone_on_with_by_the_next(plan, server, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    server.fault(ONE, "drop", 20_000, times=100)
    outcome = download(plan(ONE, TWO))
    assert outcome.fetched == [TWO], "the failure of one file stopped the other"
    assert f"no connection to {server.url}" in outcome.failures[ONE] and "HTTPS_PROXY" in outcome.failures[ONE]
    assert set(files_in(tmp_path / "there")) == {TWO}, "half a file is left"
    server.forget()
    server.faults.clear()
    again = download(plan(ONE, TWO))
    assert (again.fetched, again.kept) == ([ONE], [TWO]) and list(server.starts) == [ONE]


@pytest.mark.parametrize("name", [ONE, REPORTS], ids=["SHA-256", "SHA-1 of git"])
def test_wrong_bytes_are_fetched_once_more(plan, server, served, tmp_path, name):
    server.fault(name, "wrong bytes")
    assert download(plan(name)).fetched == [name]
    assert (tmp_path / "there" / name).read_bytes() == (served / name).read_bytes()
    assert server.starts[name] == [0, 0]


@pytest.mark.parametrize("how", ["written", "written with an older date", "gone bad on the disk"])
def test_a_damaged_file_is_found_where_it_was_touched_or_by_verify(plan, server, tmp_path, monkeypatch, how):
    if how == "gone bad on the disk":
        for where in (contents, module):
            monkeypatch.setattr(where, "stamp_of", lambda _: "as it was")
    download(plan(ONE, TWO))
    target = tmp_path / "there" / ONE
    target.write_bytes(bytes(SIZE))
    if how == "written with an older date":
        os.utime(target, (1e9, 1e9))
    server.forget()
    outcome = download(plan(ONE, TWO))
    if how == "gone bad on the disk":
        assert outcome.kept == [ONE, TWO], "nothing of it shows but its content"
        outcome = download(plan(ONE, TWO), verify=True)
    assert (outcome.fetched, outcome.kept) == ([ONE], [TWO])
    assert target.read_bytes() == noise(target.name)
    (aside,) = outcome.replaced
    assert aside.read_bytes() == bytes(SIZE)
    assert f"not what the hub has, kept aside: {aside}" in str(outcome)


def test_files_that_another_tool_fetched_are_verified_and_kept(plan, server, served, tmp_path):
    shutil.copytree(served / "dataset", tmp_path / "there" / "dataset")
    assert plan(ONE, REPORTS).bytes_left == 0
    assert download(plan(ONE, REPORTS)).kept == [REPORTS, ONE] and not server.starts


def test_a_file_that_is_in_the_way_is_not_lost(plan, tmp_path):
    target = tmp_path / "there" / ONE
    target.parent.mkdir(parents=True)
    for mine in ("one", "two"):
        target.write_text(mine)
        (aside,) = download(plan()).replaced
        assert aside.read_text() == mine
    assert len(list(target.parent.glob(f"{target.name}.replaced-*"))) == 2


def test_two_downloads_into_one_folder_do_not_mix(plan, tmp_path):
    download(plan())
    with alone(tmp_path / "there"), pytest.raises(ValueError, match="another process is at work in .*there; wait"):
        download(plan())


def test_what_is_missing_or_forbidden_does_not_keep_the_rest_back(plan, server):
    server.fault(ONE, "status", 404)
    server.fault(REPORTS, "status", 403, times=2)
    outcome = download(plan(ONE, TWO, REPORTS))
    assert "there is no such file in" in outcome.failures[ONE]
    assert "answers 403; check the token's rights" in outcome.failures[REPORTS]
    assert outcome.fetched == [TWO]
    assert str(outcome).startswith(f"1 file fetched, 0 already there, 2 failed\n  {REPORTS}\n    ")
    assert not server.starts[ONE] and server.requests[f"GET /datasets/{CT_RATE}/resolve/{COMMIT}/{REPORTS}"] == 2


def test_a_token_that_expires_on_the_way_stops_the_rest(plan, server):
    files = [volume_path(name, 2) for name in VOLUMES]
    ready = plan(*files)
    server.token = "hf_another"
    outcome = download(ready, workers=1)
    assert "the hub refuses the token" in next(iter(outcome.failures.values()))
    assert len(outcome.failures) + len(outcome.untried) == len(files) and len(outcome.failures) <= 2
    assert f"{len(outcome.untried)} left" in str(outcome)


def test_the_token_is_shown_to_nobody(plan, server, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    shown, token = [], server.token
    for break_it in (
        lambda: setattr(server, "accepted", False),
        lambda: setattr(server, "token", "hf_another"),
        lambda: server.fault(ONE, "status", 503, times=100),
        lambda: server.fault("/api", "status", 400, times=2, says=f"what is {token}?"),
        lambda: server.repositories.clear(),
    ):
        ready = plan()
        shown += [repr(ready), str(ready)]
        break_it()
        try:
            plan()
        except OSError as error:
            shown += [traceback.format_exc(), repr(error)]
        shown += [str(download(ready)), repr(download(ready))]
        server.accepted, server.token = True, token
    assert "answers 400" in "".join(shown) and "answers 503" in "".join(shown)
    written = "".join([*shown, caplog.text, *capfd.readouterr()])
    assert token not in written and "Bearer" not in written
    assert "signature" not in "".join(shown)
    assert not server.storage_saw_token, "the token went to the storage too"


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture
def run(server, tmp_path):
    return lambda *options: CliRunner().invoke(cli.app, ["download", str(tmp_path / "data"), *map(str, options)])


def volumes_in(folder):
    return [path.name.removesuffix(".nii.gz") for path in sorted((folder / "data").rglob("*.nii.gz"))]


def test_nothing_is_fetched_by_default(run, server):
    result = run()
    assert result.exit_code == 2 and not server.requests
    assert "47,149 volumes" in result.output and "1.77 GB" in result.output


def test_the_command_fetches_patients_with_their_tables_and_of_the_encoder_no_code(run, tmp_path):
    result = run("--patients", 2, "--weights", "--tokenizer")
    assert result.exit_code == 0, result.output
    assert "2 patients, 4 volumes; left out, because not a chest: 1 volume (the first by number)" in result.output
    assert "5 files, 250 kB; 0 B there, 250 kB to fetch" in result.output
    assert volumes_in(tmp_path) == ["valid_1_a_1", "valid_1_a_2", "valid_1_b_1", "valid_2_a_1"]
    assert (tmp_path / "data" / REPORTS).is_file()
    assert (tmp_path / "data" / WEIGHTS / "CT-CLIP_v2.pt").read_bytes() == noise("CT-CLIP_v2.pt")
    encoder = files_in(tmp_path / "data" / "BiomedVLP-CXR-BERT-specialized")
    assert set(encoder) == {"vocab.txt", "tokenizer_config.json"}
    again = run("--patients", 2, "--weights")
    assert "0 files fetched, 5 already there" in again.output


def test_a_dry_run_fetches_only_tables(run, tmp_path):
    result = run("--split", "train", "--version", 1, "--tokenizer", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "2 files, 100 kB; 0 B there, 100 kB to fetch" in result.output
    files = files_in(tmp_path / "data")
    assert len(files) == 4 and {Path(name).suffix for name in files} == {".csv", ".txt"}


def test_the_command_takes_names_from_both_splits(run, tmp_path):
    (tmp_path / "names.txt").write_text("train_2\nvalid_2\n")
    result = run("--studies", tmp_path / "names.txt", "--studies", "valid_10_a")
    assert result.exit_code == 0, result.output
    assert volumes_in(tmp_path) == ["train_2_a_1", "valid_10_a_1", "valid_2_a_1"]


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


def test_bytes_that_stay_wrong_are_no_file_and_failures_are_listed_with_an_exit_code(run, server, tmp_path):
    server.fault(ONE, "wrong bytes", times=2)
    result = run("--patients", 1)
    digest = hashlib.sha256(noise(Path(ONE).name)).hexdigest()
    assert result.exit_code == 1 and volumes_in(tmp_path) == ["valid_1_a_2", "valid_1_b_1"]
    assert f"2 files fetched, 0 already there, 1 failed\n  {ONE}\n    " in result.output
    assert f"but the hub says {digest}; try again later" in result.output
    assert "Not all was fetched; the same command goes on from here." in result.output


@pytest.mark.slow
def test_the_doctor_says_where_a_token_is_but_not_which(server, monkeypatch):
    output = CliRunner().invoke(cli.app, ["doctor"]).output
    assert "HF token         HF_TOKEN" in output and server.token not in output
    monkeypatch.delenv("HF_TOKEN")
    assert "HF token         none (only CT-RATE" in CliRunner().invoke(cli.app, ["doctor"]).output


# --- in a process of its own ---------------------------------------------------------------------------------


@pytest.fixture
def start(server, tmp_path):
    """Start the command as a user would, with an empty HF_HOME."""

    def go(*options, before=""):
        # as from a terminal: what a shell starts in the background inherits that Ctrl-C is ignored
        before += "\nimport signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        code = f"{before}\nfrom medctkit import cli\ncli.app()"
        command = [sys.executable, "-c", code, "download", str(tmp_path / "data"), *map(str, options)]
        text = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen(command, env=os.environ | {"HF_HOME": str(tmp_path / "hf_home")}, **text)

    return go


@pytest.mark.slow
def test_a_disk_that_is_full_is_an_error_and_the_next_run_goes_on(start, run, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))"
    full = start("--studies", "valid_10", before=limit)
    output = full.communicate(timeout=120)[0]
    assert full.returncode == 1, output
    assert "valid_10_a_1.nii.gz\n    cannot write " in output and "File too large. Make room" in output
    assert "Traceback" not in output
    assert volumes_in(tmp_path) == [], "half a file under its final name"
    assert [path for path in (tmp_path / "hf_home").rglob("*") if path.is_file() and path.stat().st_size > 1_000] == []
    assert run("--studies", "valid_10").exit_code == 0 and volumes_in(tmp_path) == ["valid_10_a_1"]


@pytest.mark.slow
def test_ctrl_c_leaves_what_the_next_run_goes_on_with(start, run, server, tmp_path):
    server.pause = 0.1
    stopped = start("--studies", "valid_10,valid_2_a")
    deadline = time.monotonic() + 120
    while server.sent[TEN] < 2_000 and time.monotonic() < deadline:
        time.sleep(0.02)
    stopped.send_signal(signal.SIGINT)
    output = stopped.communicate(timeout=120)[0]
    assert stopped.returncode == 130, output
    assert "stopped; the same command goes on from here" in output and "Traceback" not in output
    assert volumes_in(tmp_path) == [], "a file was finished after all had been called off"
    server.pause = 0
    assert run("--studies", "valid_10").exit_code == 0 and volumes_in(tmp_path) == ["valid_10_a_1"]
