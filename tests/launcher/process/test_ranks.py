"""The group of a process that nobody launched."""

import os

import pytest

from launcher.process.ranks import LAUNCH_VARIABLES, process_group


def test_the_environment_is_a_ranks_while_the_group_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with process_group(60) as ranks:
        assert (ranks.rank, ranks.world_size) == (0, 1)
        assert {name: os.environ[name] for name in LAUNCH_VARIABLES[:4]} == {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
        }
    assert not set(LAUNCH_VARIABLES) & os.environ.keys()
    monkeypatch.setenv("LOCAL_RANK", "3")  # one that is given says which GPU
    with process_group(60):
        assert os.environ["LOCAL_RANK"] == "3"
    assert {name for name in LAUNCH_VARIABLES if name in os.environ} == {"LOCAL_RANK"}
