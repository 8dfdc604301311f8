"""Where the browser tests get their Chromium from."""

import chromium
import pytest


def program(path, status=0):
    path.write_text(f"#!/bin/sh\nexit {status}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder that is all of PATH, on a machine without playwright's own browser."""
    monkeypatch.delenv(chromium.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(chromium, "NAMES", chromium.NAMES[:4])
    monkeypatch.setattr(chromium, "playwrights_own", lambda: None)
    return tmp_path


def test_the_systems_browser_is_found_and_one_that_does_not_start_is_passed_over(machine):
    assert chromium.find() is None
    chrome = program(machine / "google-chrome")
    assert chromium.find() == chrome
    program(machine / "chromium-browser", status=1)
    assert chromium.find() == chrome


def test_the_variable_goes_first_and_must_name_what_starts(machine, monkeypatch):
    program(machine / "chromium")
    named = program(machine / "my browser")
    monkeypatch.setenv(chromium.VARIABLE, named)
    assert chromium.find() == named
    monkeypatch.setenv(chromium.VARIABLE, str(machine / "gone"))
    with pytest.raises(SystemExit, match="MEDCTKIT_CHROMIUM is '.*gone', which does not start"):
        chromium.find()


def test_playwrights_own_browser_is_the_last_choice(machine, monkeypatch):
    monkeypatch.setattr(chromium, "playwrights_own", lambda: "/own")
    assert chromium.find() == "/own"
    assert chromium.find() != program(machine / "chromium") == chromium.find()


def test_only_root_with_apt_installs_the_systems_package():
    debian, own = chromium.ways_to_install(is_root=True, has_apt=True)
    assert debian[0][-1] == "update" and debian[1][-2:] == ["--no-install-recommends", "chromium"]
    assert own[0][1:] == ["-m", "playwright", "install", "--with-deps", "chromium"]
    for is_root, has_apt in ((False, True), (True, False), (False, False)):
        ((only,),) = chromium.ways_to_install(is_root, has_apt)
        assert only[1:] == ["-m", "playwright", "install", "chromium"]


def test_the_second_way_is_tried_where_the_first_fails_and_where_none_works_it_says_what_to_do(machine, monkeypatch):
    broken = ["/bin/sh", "-c", "echo no network; exit 1"]
    monkeypatch.setattr(chromium, "ways_to_install", lambda *_: [[broken]])
    with pytest.raises(SystemExit, match=r"(?s)no network.*apt-get install chromium\).*MEDCTKIT_CHROMIUM"):
        chromium.install()
    second = ["/bin/sh", "-c", f"/bin/ln -s /bin/true {machine}/chromium"]
    monkeypatch.setattr(chromium, "ways_to_install", lambda *_: [[["/bin/false"], ["/bin/never"]], [second]])
    assert chromium.install() == str(machine / "chromium")
