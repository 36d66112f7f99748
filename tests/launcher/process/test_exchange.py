"""Values that ranks exchange: what every rank gives, and nothing that comes over the network is unpickled."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from jobs import Job, job_tree
from ranks import run_ranks

from data.errors import DataError
from launcher.checkpoint.reader import DamageError
from launcher.errors import ConfigError, LogError
from launcher.process.exchange import array_of_first, failing_alike, gather_values, value_of_first


def exchange(rank: int, world_size: int) -> list[Any]:
    group = dist.new_group(list(range(world_size)))
    return [
        gather_values({"of": rank, "list": [1.5] * rank, "none": None, "text": "ü" * 100 * rank}, group),
        value_of_first([rank, "longer" * rank, float("inf")]),
    ]


def test_every_rank_gets_what_every_rank_gives() -> None:
    expected = [{"of": rank, "list": [1.5] * rank, "none": None, "text": "ü" * 100 * rank} for rank in range(3)]
    assert run_ranks(3, exchange) == [[expected, [0, "", float("inf")]]] * 3


ERRORS = [ConfigError("key: wrong"), DamageError("cut"), DataError("no data"), LogError("line 3"), OSError(28, "full")]


def exchange_arrays(rank: int, world_size: int) -> list[Any]:
    arrays = np.array([b"a", b"bc\0"][: rank + 1], "S3"), np.arange(3.0) / (rank + 7), np.zeros(rank, np.int64)
    return [array_of_first(array).tolist() for array in arrays]


def test_every_rank_gets_the_arrays_of_the_first() -> None:
    assert run_ranks(3, exchange_arrays) == [[[b"a"], [0, 1 / 7, 2 / 7], []]] * 3


def fail_alike(rank: int, world_size: int) -> list[str]:
    raised = []
    for error in [*ERRORS, None]:
        try:
            with failing_alike():
                if rank == 0 and error is not None:
                    raise error
            raised.append("nothing")
        except Exception as caught:
            raised.append(f"{type(caught).__name__}: {caught}")
    return raised


def test_what_fails_on_the_first_rank_fails_on_all() -> None:
    first, other = run_ranks(2, fail_alike)
    assert first == [*(f"{type(error).__name__}: {error}" for error in ERRORS), "nothing"]
    told = ["ConfigError: key: wrong", "CheckpointError: cut", "DataError: no data", "UserError: line 3"]
    assert other == [*told, "FirstRankError: [Errno 28] full", "nothing"]


def refuse_pickles(rank: int) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("something from another rank would have been unpickled")

    dist.distributed_c10d._tensor_to_object = refuse


def unpickles(rank: int, world_size: int) -> str:
    refuse_pickles(rank)
    with pytest.raises(AssertionError) as error:
        dist.all_gather_object([None] * world_size, rank)
    return str(error.value)


@pytest.mark.parametrize("engine", [{"name": "fsdp2"}, {"name": "deepspeed", "zero_stage": 2}])
def test_a_run_unpickles_nothing_of_other_ranks(shards: Path, tmp_path: Path, engine: dict[str, Any]) -> None:
    tree = job_tree(shards, tmp_path / "run", engine=engine)
    tree["phases"] = [{"precision": "16-bit", "steps": 2}, {"precision": "ternary", "steps": 2}]
    for _ in range(2):  # from the start, and from a checkpoint
        job = Job(tree, at_start=refuse_pickles)
        assert job.wait() == [0, 0], job.output
        (tmp_path / "run" / "state.json").unlink()


def test_such_a_run_would_fail_if_it_did() -> None:
    assert run_ranks(2, unpickles) == ["something from another rank would have been unpickled"] * 2
