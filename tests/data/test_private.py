"""Files with known names in shared folders: nothing that another user puts there is followed or trusted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data import private
from data.errors import DataError
from data.private import HeldError, locked, no_follow, users_folder


def test_the_folder_is_closed_to_others_and_found_again(tmp_path: Path) -> None:
    folder = users_folder(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert users_folder(tmp_path) == folder


def test_a_folder_where_others_may_have_written_is_refused(tmp_path: Path) -> None:
    place = tmp_path / f"tritrain-{os.getuid()}"
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(DataError, match=r"only you \(user \d+\) can enter; it is drwxrwxrwx"):
        users_folder(tmp_path)
    place.rmdir()
    (tmp_path / "theirs").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "theirs")
    with pytest.raises(DataError, match="can enter; it is l"):
        users_folder(tmp_path)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "tritrain-0"
    place.mkdir(mode=0o700)
    os.chown(place, 12345, 12345)
    with pytest.raises(DataError, match="of user 12345"):
        users_folder(tmp_path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    (tmp_path / "lock").symlink_to(thesis)
    with pytest.raises(OSError, match="which would be written"), locked(tmp_path / "lock", "a test"):
        pass
    with pytest.raises(OSError, match="remove the link"):
        no_follow(str(tmp_path / "lock"), os.O_WRONLY | os.O_TRUNC)
    assert thesis.read_text() == "years of work"


HOLD = """
import sys
from pathlib import Path
from data.private import locked
with locked(Path(sys.argv[1]), "a test"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_who_waits_says_for_whom_and_a_process_that_dies_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdin=-1, stdout=-1, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(private, "SECONDS_BEFORE_MESSAGE", 0.0)
    monkeypatch.setattr(private.time, "sleep", lambda seconds: holder.kill())
    with locked(lock, "jobs start one at a time"):
        pass
    holder.communicate()
    said = capsys.readouterr().err
    assert said.startswith(f"Waiting for process {holder.pid} on {os.uname().nodename}, since 20")
    assert said.endswith(f", which holds {lock}: jobs start one at a time.\n")


def test_who_waits_gives_up_in_the_end_and_names_the_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "MOST_SECONDS", 0.2)
    with (
        locked(tmp_path / "lock", "a test"),
        pytest.raises(HeldError, match=rf"process {os.getpid()} on .*, and this one has waited for .* hours"),
        locked(tmp_path / "lock", "a test"),
    ):
        pass
