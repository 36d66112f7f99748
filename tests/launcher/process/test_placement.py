"""Which ranks share a host, from what their launchers say or leave out."""

import os

import pytest
from ranks import run_ranks

from launcher.errors import PlacementError
from launcher.process import placement
from launcher.process.placement import Place, check_gpus, check_places, completed, place_rank


def places(*rows: tuple[str, int | None, int | None]) -> list[Place]:
    return [Place(*row) for row in rows]


def test_what_is_left_out_is_counted() -> None:
    found = completed(places(("a", None, None), ("a", None, None), ("b", None, None), ("b", None, None)))
    assert found == places(("a", 0, 2), ("a", 1, 2), ("b", 0, 2), ("b", 1, 2))
    check_places(found)


def test_one_rank_a_host_is_the_first_there() -> None:
    found = completed(places(("a", None, None), ("b", None, None)))
    assert found == places(("a", 0, 1), ("b", 0, 1))
    check_places(found)


def test_what_the_launcher_says_stands_even_where_hosts_have_one_name() -> None:
    said = places(("a", 0, 1), ("a", 0, 1))
    assert completed(said) == said
    check_places(said)


@pytest.mark.parametrize(
    "found",
    [
        [("a", None, None), ("b", None, None), ("a", None, None), ("b", None, None)],  # dealt out in turn
        [("a", None, None), ("a", None, None), ("b", None, None)],  # unequal slots
        [("a", 0, 2), ("a", 1, 2), ("b", 0, 1)],  # the same, said by the launcher
        [("a", 0, None), ("a", 0, None)],  # two in one place
        [("a", 0, 2), ("a", 1, 2), ("b", 0, 2)],  # one is missing
    ],
)
def test_hosts_that_are_not_alike_are_refused(found: list[tuple[str, int | None, int | None]]) -> None:
    with pytest.raises(PlacementError, match="as many ranks as any other") as error:
        check_places(completed(places(*found)))
    assert str(error.value).count("local rank") == len(found)


def place_on_two_hosts(rank: int, world_size: int) -> tuple[str, str]:
    del os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]
    placement.this_host = lambda: f"host{rank // 2}"
    place_rank(rank, world_size)
    return os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]


def test_ranks_tell_each_other_where_they_are() -> None:
    assert run_ranks(4, place_on_two_hosts) == [("0", "2"), ("1", "2"), ("0", "2"), ("1", "2")]


def with_gpus(*rows: tuple[str, int, str]) -> list[Place]:
    """Of hosts, local ranks, and the GPUs that are seen, a letter each."""
    return [Place(host, local_rank, None, tuple(gpus)) for host, local_rank, gpus in rows]


@pytest.mark.parametrize(
    ("found", "taken"),
    [
        ([("a", 0, "xy"), ("a", 1, "xy"), ("b", 0, "zw"), ("b", 1, "zw")], [0, 1, 0, 1]),
        ([("a", 0, "x"), ("a", 1, "y")], [0, 0]),  # Slurm shows each its own
        ([("a", 0, "xyz")], [0]),
        ([("a", 2, "xyz")], [2]),  # alone, with a LOCAL_RANK that says which
        ([("a", 3, "x")], [0]),
        ([("a", 0, ""), ("a", 1, "")], [None, None]),
    ],
)
def test_each_rank_takes_a_gpu_of_its_own(found: list[tuple[str, int, str]], taken: list[int | None]) -> None:
    places = with_gpus(*found)
    check_gpus(places)
    assert [place.gpu for place in places] == taken


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([("a", rank, "xy") for rank in range(4)], "4 ranks on a, where 2 GPUs are seen; .* --ranks 2,"),
        ([("a", 0, "x"), ("a", 1, "x")], "2 ranks on a, where 1 GPU is seen; .* --ranks 1,"),
        ([("a", 0, "xy"), ("a", 1, "xy"), ("b", 0, "z"), ("b", 1, "z")], "2 ranks on b, where 1 GPU is"),
        ([("a", 5, "xy")], "LOCAL_RANK is 5 .* 2 GPUs"),
    ],
)
def test_ranks_without_a_gpu_of_their_own_are_refused(found: list[tuple[str, int, str]], said: str) -> None:
    with pytest.raises(PlacementError, match=said):
        check_gpus(with_gpus(*found))


def place_on_one_gpu(rank: int, world_size: int) -> str:
    placement.visible_gpus = lambda: ["x"]
    try:
        place_rank(rank, world_size)
    except PlacementError as error:
        return str(error)
    return "placed"


def test_ranks_find_that_they_share_a_gpu() -> None:
    first, second = run_ranks(2, place_on_one_gpu)
    assert first == second
    assert "1 GPU is seen" in first
