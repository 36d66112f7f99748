"""What ends tests that hang: alarms, and ranks that are looked after."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from ranks import run_ranks


def leave(rank: int, world_size: int) -> None:
    os._exit(3)


def test_a_rank_that_ends_without_a_result_is_an_error_at_once() -> None:
    with pytest.raises(AssertionError, match=r"have ended without a result; their exit codes: \{0: 3\}"):
        run_ranks(1, leave)


HANGS = """
import time
from hypothesis import given, strategies as st

@given(st.integers())
def test_hangs(number):
    time.sleep(600)

def test_waits_again():
    try:
        time.sleep(600)
    finally:
        time.sleep(600)
"""


@pytest.mark.slow
def test_an_alarm_ends_a_test_whatever_it_does(tmp_path: Path) -> None:
    (tmp_path / "test_hangs.py").write_text(HANGS)
    options = [
        "-p",
        "conftest",
        "-n",
        "0",
        "--timeout",
        "0.5",
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        tmp_path,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path / "test_hangs.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "2 failed" in done.stdout, done.stdout
    assert done.stdout.count("conftest.TookTooLong: Timeout") >= 2
