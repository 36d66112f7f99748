"""The group of a process that nobody launched."""

import os
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from launcher.errors import StartError
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


def test_a_collective_may_take_longer_than_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    given, join = [], dist.init_process_group

    def joining(*arguments: Any, timeout: timedelta, **options: Any) -> None:
        given.append(timeout.total_seconds())
        join(*arguments, timeout=timeout, **options)

    monkeypatch.setattr(dist, "init_process_group", joining)
    for options in ({}, {"collective_seconds": 86_400}):
        with process_group(60, **options):
            pass
    assert given == [60, 86_400]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_PORT and MASTER_ADDR: not in the environment, but RANK is; whoever"),
        ({"RANK": "0"}, "WORLD_SIZE and MASTER_PORT and MASTER_ADDR: not in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "abc"}, "MASTER_PORT: is 'abc'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "70000"}, "must be below 65536"),
        (
            {"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            "RANK: is 'one' in the environment; must be",
        ),
        ({"RANK": "1", "WORLD_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK: is 1 .* WORLD_SIZE is 1;"),
    ],
)
def test_an_environment_that_cannot_be_is_one_sentence(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StartError, match=said), process_group(60):
        pass
