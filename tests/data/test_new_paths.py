"""New files and folders: complete under their name or not there, whatever happens, and nothing else is touched."""

import errno
import fcntl
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from places import ROOT

from data import new_paths
from data.new_paths import TakenError, exclusive, is_mount_point, new_file, new_folder, replace_file
from data.processes import began

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
    with pytest.raises(TakenError, match=r"made: is being written by process \d+ on "), new_folder(tmp_path / name):
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


def ended_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("make", [new_folder, new_file])
def test_only_what_a_killed_process_of_this_host_has_left_is_removed(tmp_path, make):
    here, token = socket.gethostname(), "0123456789abcdef.tritrain-tmp"
    parent = os.getppid()
    gone = [f".made.{here}.{ended_process()}.{token}", f".made.{here}.{2**40}.{token}"]
    gone += [f".made.{here}.{ended_process()}-123.{token}", f".made.{here}.{parent}-1.{token}"]  # one of that number
    for name in gone:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").touch()
    others = [f".made.{here}.{parent}.{token}", f".made.{here}-2.{ended_process()}.{token}"]
    others += [f".made.{here}.{parent}-{began(parent)}.{token}", f".made.{here}.{parent}-.{token}"]
    others += [f".made.{token}", f".made.more.{here}.{ended_process()}.{token}"]
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").touch()
    with make(tmp_path / "made") as building:
        (building / "a" if make is new_folder else building).touch()
    assert names(tmp_path) == sorted([*others, "made"])
    assert all((tmp_path / name / "a").exists() for name in others)


@pytest.mark.parametrize("make", [new_folder, new_file])
def test_a_host_that_the_lock_does_not_reach_keeps_what_it_makes(tmp_path, monkeypatch, make):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)

    def write(building: Path, text: str) -> None:
        (building / "a" if make is new_folder else building).write_text(text)

    with pytest.raises(TakenError, match="made: already exists"), make(tmp_path / "made") as first:  # noqa: PT012
        write(first, "first")
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(socket, "gethostname", lambda: "another")
            with make(tmp_path / "made") as second:
                write(second, "second")
        assert first.exists()
    assert names(tmp_path) == ["made"]
    made = tmp_path / "made"
    assert (made / "a" if make is new_folder else made).read_text() == "second"


def test_of_two_that_come_to_the_rename_one_is_first(tmp_path, monkeypatch):
    replace = os.replace

    def after_another(source: Path, target: Path) -> None:
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "a").write_text("of another")
        replace(source, target)

    monkeypatch.setattr(os, "replace", after_another)
    with pytest.raises(TakenError, match="made: already exists"), new_folder(tmp_path / "made"):
        pass
    assert names(tmp_path) == ["made"]


@pytest.mark.parametrize("make", [new_folder, new_file])
def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch, make):
    (tmp_path / "made").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "made")
    with pytest.raises(TakenError, match="made: is a mount point; name a new folder in it"), make(tmp_path / "made"):
        pytest.fail("work was done")
    with make(tmp_path / "made" / "new") as building:
        (building / "a" if make is new_folder else building).touch()
    assert names(tmp_path / "made") == ["new"]


def test_a_mount_of_the_same_file_system_is_seen_in_the_list_of_mounts(tmp_path, monkeypatch):
    """A container's folder may be another one of the disk that it is in; to rename something to it fails."""
    mounted = tmp_path / "two words"
    (mounted / "in it").mkdir(parents=True)
    line = "56 34 0:29 /a{} {}{} rw,relatime shared:1 - ext4 /dev/sda1 rw"
    place = str(mounted).replace(" ", "\\040")
    mounts = [line.format("", "/", ""), line.format(" ", place, "/in"), line.format(place, "/elsewhere", "")]
    (tmp_path / "mountinfo").write_text("\n".join(mounts) + "\n")
    monkeypatch.setattr(new_paths, "MOUNTS", tmp_path / "mountinfo")
    assert not is_mount_point(mounted)
    with (tmp_path / "mountinfo").open("a") as file:
        file.write(line.format("", place, "") + "\n")
    assert is_mount_point(mounted)
    with pytest.raises(TakenError, match="words: is a mount point; name a new folder in it"), new_folder(mounted):
        pytest.fail("work was done")
    monkeypatch.setattr(new_paths, "MOUNTS", tmp_path / "none")  # as on macOS
    assert not is_mount_point(mounted)
    assert is_mount_point(Path("/"))


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to mount")
def test_a_folder_that_is_mounted_is_one(tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "c").mkdir()
    code = "import pathlib, sys; from data.new_paths import *; print(is_mount_point(pathlib.Path(sys.argv[1])))"
    script = 'mount --bind c "a b" && cd "$1" && exec "$2" -c "$3" "$0/a b"'
    command = ["unshare", "--mount", "sh", "-c", script, tmp_path, ROOT, sys.executable, code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if "denied" in done.stderr or "not permitted" in done.stderr:
        pytest.skip("may not mount here")
    assert done.stdout == "True\n", done.stderr


@contextmanager
def in_a_shared_folder(mode: int) -> Iterator[Path]:
    """A folder with a lock of this user's; if that is root, this process is another user's for a while."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(tempfile.gettempdir(), 0o711)
        os.chmod(name, mode)
        (Path(name) / ".made.tritrain-lock").write_text("process 1 on elsewhere")
        if os.geteuid():
            yield Path(name)
            return
        os.seteuid(12345)
        try:
            yield Path(name)
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_lock_that_another_user_has_left_keeps_nobody_out(mode):
    with in_a_shared_folder(mode) as folder:
        if os.getuid():
            (folder / ".made.tritrain-lock").chmod(0o444)
        with new_file(folder / "made") as building:
            building.write_text("whole")
            with pytest.raises(TakenError, match="is being written by"), new_file(folder / "made"):
                pytest.fail("work was done")
        assert (folder / "made").read_text() == "whole"


def test_a_lock_that_may_not_be_read_is_named_with_its_owner():
    with in_a_shared_folder(0o777) as folder:
        lock = folder / ".made.tritrain-lock"
        os.seteuid(os.getuid())
        lock.chmod(0)
        if os.getuid() == 0:
            os.seteuid(12345)
        owner = "root" if os.getuid() == 0 else lock.owner()
        message = (
            rf"made: its lock .*/\.made\.tritrain-lock belongs to user {owner}, and you may not lock it\. If .* removed"
        )
        with pytest.raises(TakenError, match=message), new_file(folder / "made"):
            pytest.fail("work was done")


def test_a_folder_where_nothing_may_be_written():
    with in_a_shared_folder(0o755) as folder:
        if os.getuid():
            pytest.skip("the folder is this user's own")
        with pytest.raises(PermissionError) as caught, new_file(folder / "another"):
            pytest.fail("work was done")
        assert caught.value.filename == str(folder / "another")


@pytest.mark.parametrize("make", [new_folder, new_file])
@pytest.mark.parametrize("letter", ["a", "ä", "語"])
def test_the_longest_name(tmp_path, make, letter):
    size = len(letter.encode())
    longest = letter * (255 // size) + "b" * (255 % size)
    sibling = longest[: -1 - 255 % size] + "c" * (size + 255 % size)  # begins alike, and is another
    with make(tmp_path / longest) as building:
        (building / "a" if make is new_folder else building).touch()
        assert building.name.encode().decode()  # a character is not cut in two
        with make(tmp_path / sibling) as another:
            (another / "a" if make is new_folder else another).touch()
    assert names(tmp_path) == sorted([longest, sibling])
    with pytest.raises(OSError, match="File name too long") as caught, make(tmp_path / f"{longest}b"):
        pytest.fail("work was done")
    assert caught.value.filename == str(tmp_path / f"{longest}b")


def test_a_replaced_file_keeps_its_permissions_and_a_new_one_has_the_umask_s(tmp_path):
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "new", "1")
        (tmp_path / "old").touch()
        (tmp_path / "secret").touch(0o600)
        (tmp_path / "old").chmod(0o666)
        for name in ("old", "secret"):
            replace_file(tmp_path / name, b"2")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"new": 0o640, "old": 0o666, "secret": 0o600}
    assert (tmp_path / "new").read_text() + (tmp_path / "old").read_text() == "12"


def test_a_replaced_link_is_not_written_through(tmp_path):
    (tmp_path / "thesis").write_text("words")
    (tmp_path / "state").symlink_to("thesis")
    replace_file(tmp_path / "state", "{}")
    assert (tmp_path / "thesis").read_text() == "words"
    assert not (tmp_path / "state").is_symlink()
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == stat.S_IMODE((tmp_path / "thesis").stat().st_mode)


def test_a_file_that_need_not_be_durable_waits_for_no_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("waited"))
    replace_file(tmp_path / "beats", "{}", durable=False)
    assert names(tmp_path) == ["beats"]


@pytest.mark.parametrize("make", [new_folder, new_file])
def test_errors_name_what_the_user_named(tmp_path, make):
    def fail(number: int, name: str) -> None:
        with make(tmp_path / "made") as building:
            raise OSError(number, os.strerror(number), *([name.replace("PRIVATE", str(building))] if name else []))

    made = str(tmp_path / "made")
    for number, name, shown in (
        (errno.ENOSPC, "", made),
        (errno.EIO, "PRIVATE/part", f"{made}/part"),
        (errno.EIO, "/a/source", "/a/source"),
        (errno.EIO, "", None),  # of reading something, perhaps
    ):
        with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
            fail(number, name)
        assert caught.value.filename == shown
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 768 vs 662"), OSError("20 requested and 11 written")])
def test_a_full_disk_is_named_where_a_library_hides_it(tmp_path, monkeypatch, error):
    """As torch and NumPy do."""
    with pytest.raises(type(error), match=str(error)), new_file(tmp_path / "made"):
        raise error
    room = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result([*room[:4], 0, *room[5:10]]))
    with pytest.raises(OSError, match="No space left on device") as caught, new_file(tmp_path / "made"):
        raise error
    assert caught.value.filename == str(tmp_path / "made")
    assert names(tmp_path) == []


def test_a_lock_on_a_full_disk_is_removed(tmp_path, monkeypatch):
    def full(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with new_folder(tmp_path / "made"):
        pass
    assert names(tmp_path) == ["made"]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TakenError, match="file is a file, not a folder"), new_file(tmp_path / "file" / "made"):
        pytest.fail("work was done")
