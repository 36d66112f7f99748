"""New files and folders: complete under their name or not there, whatever happens, and nothing else is touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.new_paths import TakenError, exclusive, new_file, new_folder

MAKES_AND_WAITS = """
import sys, time
from pathlib import Path
from data.new_paths import exclusive, new_folder
with new_folder(Path(sys.argv[1])) as building:
    (building / "a").write_text("half")
    print("making", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that is making `made`."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAKES_AND_WAITS, str(tmp_path / "made")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "making\n"
    yield process
    process.kill()
    process.wait()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "above" / "made") as building:
        (building / "inside").mkdir()
        (building / "inside" / "a").write_text("whole")
        assert not (tmp_path / "above" / "made").exists()
        assert building.parent == tmp_path / "above"  # on the same file system
    assert names(tmp_path / "above") == ["made"]
    assert (tmp_path / "above" / "made" / "inside" / "a").read_text() == "whole"


def test_a_file_appears_when_it_is_complete(tmp_path):
    with new_file(tmp_path / "made") as building:
        building.write_text("whole")
        assert not (tmp_path / "made").exists()
    assert names(tmp_path) == ["made"]
    assert (tmp_path / "made").read_text() == "whole"


def test_the_user_s_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "made"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("make", [new_folder, new_file])
def test_nothing_is_left_of_one_that_fails(tmp_path, make):
    for name in ("made.tmp", ".made.tmp", ".made.lock", ".made.0123456789abcdef.tritrain-tmp.mine"):
        (tmp_path / name).write_text("of the user")
    before = names(tmp_path)
    with pytest.raises(ZeroDivisionError), make(tmp_path / "made") as building:  # noqa: PT012
        if make is new_folder:
            building = building / "a"
        building.write_text("half")
        _ = 1 / 0
    assert names(tmp_path) == before
    assert {(tmp_path / name).read_text() for name in before} == {"of the user"}


@pytest.mark.parametrize("make", [new_folder, new_file])
def test_a_name_that_is_taken_before_or_meanwhile(tmp_path, make):
    (tmp_path / "made").write_text("of another")
    with pytest.raises(TakenError, match="made: already exists; choose another name"), make(tmp_path / "made"):
        pytest.fail("work was done")
    (tmp_path / "made").unlink()
    with pytest.raises(TakenError, match="made: already exists"), make(tmp_path / "made") as building:  # noqa: PT012
        if make is new_file:
            building.write_text("whole")
        (tmp_path / "made").write_text("of another")
    assert names(tmp_path) == ["made"]
    assert (tmp_path / "made").read_text() == "of another"


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "made").mkdir()
    with new_folder(tmp_path / "made") as building:
        (building / "a").touch()
    assert names(tmp_path / "made") == ["a"]
    with pytest.raises(TakenError, match="already exists"), new_folder(tmp_path / "made"):
        pytest.fail("work was done")


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(tmp_path, exists):
    (tmp_path / "disk").mkdir()
    if exists:
        (tmp_path / "disk" / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "target")
    with new_folder(tmp_path / "link") as building:
        assert building.parent == tmp_path / "disk"
        (building / "a").touch()
    assert names(tmp_path) == ["disk", "link"]
    assert names(tmp_path / "disk") == ["target"]
    assert names(tmp_path / "link") == ["a"]


@pytest.mark.parametrize("name", ["made", "link"])
def test_two_at_once_do_not_meet(tmp_path, other, name):
    (tmp_path / "link").symlink_to(tmp_path / "made")
    with pytest.raises(TakenError, match=r"made: process \d+ on .* is writing it"), new_folder(tmp_path / name):
        pytest.fail("work was done")
    with new_folder(tmp_path / "another") as building:
        (building / "a").touch()
    other.kill()
    other.wait()
    with new_folder(tmp_path / name) as building:
        assert names(building) == []
    assert names(tmp_path) == ["another", "link", "made"]  # nor is anything left of the one that was killed


def test_who_waits_comes_after(tmp_path):
    order = tmp_path / "order"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom data.new_paths import exclusive\n"
        "with exclusive(Path(sys.argv[1]), wait=True):\n"
        "    with open(sys.argv[2], 'a') as file:\n"
        "        for _ in range(5):\n"
        "            file.write(sys.argv[3]); file.flush(); time.sleep(0.02)\n"
    )
    with exclusive(tmp_path / "made", wait=True):
        processes = [
            subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "made"), str(order), letter])
            for letter in "abcd"
        ]
        with pytest.raises(subprocess.TimeoutExpired):
            processes[0].wait(0.3)
        assert not order.exists()
    assert [process.wait(30) for process in processes] == [0] * 4
    written = order.read_text()
    assert sorted(written[start : start + 5] for start in range(0, 20, 5)) == [letter * 5 for letter in "abcd"]
    assert names(tmp_path) == ["order"]


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "thesis").write_text("words")
    (tmp_path / ".made.tritrain-lock").symlink_to(tmp_path / "thesis")
    with pytest.raises(OSError, match=r"is a link to .*thesis, which would be written"), new_folder(tmp_path / "made"):
        pytest.fail("work was done")
    assert (tmp_path / "thesis").read_text() == "words"
