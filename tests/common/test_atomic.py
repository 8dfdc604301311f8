"""Files are written whole or not at all."""

import threading

import pytest

from medctkit.common.atomic import alone, replacing


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with replacing(target) as temporary:
        temporary.write_text("half")
        assert target.read_text() == "old" and temporary.parent == tmp_path
    assert target.read_text() == "half" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(type(error)), replacing(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_writers_at_once_do_not_mix(tmp_path):
    def write(letter):
        for _ in range(50):
            with replacing(tmp_path / "file.txt") as temporary:
                temporary.write_text(letter * 1000)

    threads = [threading.Thread(target=write, args=letter) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file.txt").read_text() in {letter * 1000 for letter in "abcd"}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_held_by_one_at_a_time_and_left_as_it_was(tmp_path):
    folder = tmp_path / "new"
    with alone(folder):
        with pytest.raises(ValueError, match=f"another process is at work in {folder}"), alone(folder):
            raise AssertionError("it came in")
        (folder / "result").write_text("kept")
    with pytest.raises(ZeroDivisionError), alone(folder):
        raise ZeroDivisionError
    with alone(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["result"]
