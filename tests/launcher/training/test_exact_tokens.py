"""The exact same tokens: any ranks and any stops give the global batches of one rank that is never stopped.

Real loaders read real folders. The position in the data is that of the plan, as in training.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mixtures import LENGTH, write_text
from plans import TREE
from rank_pool import RankPool

from data.config import PrepareConfig
from data.shards import prepare
from launcher.config.file import parse_config
from launcher.plan.plan import Plan, make_plan
from launcher.process.ranks import Ranks
from launcher.training.step import data_for, open_data

WORLD_SIZES = (1, 2, 3, 4, 8)
UNIT = 24
"""Sequences of a global batch; all of the world sizes divide it."""
NUM_LINES = (150, 60, 40)
WEIGHTS = (0.5, 1.0, 3.0)

Step = list[bytes]
"""The rows of one step, with the token that follows the last one that is seen."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[bytes]]:
    """Three prepared folders, and the rows of each; no row is there twice."""
    root, tokenizer = tmp_path_factory.mktemp("sources"), "bpe:400"
    found = {}
    for seed, num_lines in enumerate(NUM_LINES):
        text = write_text(root / f"{seed}.jsonl", seed, num_lines)
        prepare(PrepareConfig(inputs=(text,), tokenizer=tokenizer), LENGTH, root / str(seed))
        tokenizer = str(root / "0" / "tokenizer.model")
        found[str(root / str(seed))] = set(stored_rows(root / str(seed)))
    assert not set.intersection(*found.values())
    return found


def stored_rows(folder: Path) -> list[bytes]:
    """The rows as they lie in the folder, by a reader of MDS without the loader."""
    from streaming import LocalDataset

    rows = [row["tokens"].astype(np.int64).tobytes() for row in LocalDataset(str(folder / "train"))]
    assert len(rows) == len(set(rows))
    return rows


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(rank_reads) as ranks:
        yield ranks


def rank_reads(rank: int, world_size: int, tree: dict[str, Any], start: int, end: int) -> list[tuple[Step, Counter]]:
    """This rank's rows of each step, and the rows that it counted by source, through the phases' boundaries."""
    plan, ranks = make_plan(parse_config(tree), world_size), Ranks(rank, world_size, rank, torch.device("cpu"))
    data, steps = open_data(plan, ranks, start), []
    for step in range(start, end):
        phase = plan.phase_of(step)
        if step == phase.start > start:
            data = data_for(plan, ranks, phase, data)
        micro_batches = list(itertools.islice(data, plan.micro_batches_at(step)))
        rows = np.concatenate([torch.cat([tokens, labels[:, -1:]], 1).numpy() for tokens, labels in micro_batches])
        counts = data.drawn(len(micro_batches)).tolist()
        drawn = Counter({source.path: count for source, count in zip(phase.sources, counts, strict=True)})
        steps.append(([row.tobytes() for row in rows], drawn))
    data.close()
    return steps


@st.composite
def trees(draw: st.DrawFn, paths: list[str], most_workers: int) -> dict[str, Any]:
    """Configurations of a few phases, each with a mixture of its own or one of those before."""
    mixture = st.lists(st.sampled_from(paths), min_size=1, max_size=3, unique=True).flatmap(
        lambda chosen: st.tuples(*(st.sampled_from(WEIGHTS) for _ in chosen)).map(
            lambda weights: [
                {"path": path, "weight": weight if len(chosen) > 1 else 1.0}
                for path, weight in zip(chosen, weights, strict=True)
            ]
        )
    )
    mixtures = draw(st.lists(mixture, min_size=1, max_size=3))
    phases = [{"precision": "16-bit", "steps": draw(st.integers(1, 9))}]
    for _ in range(draw(st.integers(0, 3))):
        phase: dict[str, Any] = {"precision": "16-bit", "steps": draw(st.integers(1, 6))}
        if draw(st.booleans()):
            phase["sources"] = draw(st.sampled_from(mixtures))
        if draw(st.integers(0, 4)) == 0:
            phase["transition"] = {"data": "restart"}
        phases.append(phase)
    data = {"sources": mixtures[0], "sequence_length": LENGTH, "shuffle": draw(st.booleans())}
    data |= {"workers": draw(st.integers(0, most_workers))}
    data |= {"canonical_nodes": draw(st.sampled_from((1, 2))), "shuffle_seed": draw(st.integers(0, 3))}
    training: dict[str, Any] = {"global_batch_sequences": draw(st.sampled_from((1, 2))) * UNIT}
    training["micro_batch_sequences"] = 1
    if training["global_batch_sequences"] > UNIT:
        training["batch_warmup"] = [{"sequences": UNIT, "until_tokens": 2 * UNIT * LENGTH}]
    model = TREE["model"] | {"vocab_size": 400, "max_sequence_length": LENGTH}
    schedule = {"shape": "constant", "warmup_steps": 0}
    total = sum(phase["steps"] for phase in phases)
    if "batch_warmup" in training and total < 4:
        phases[0]["steps"] += 4
    return TREE | {"model": model, "data": data, "training": training, "schedule": schedule, "phases": phases}


@st.composite
def sessions(draw: st.DrawFn, total_steps: int) -> list[tuple[int, int, int, int]]:
    """Starts of a run: ranks, micro-batch, first step, and the step that it is stopped before.

    Some steps are trained again.
    """
    found, begin = [], 0
    while len(found) < 3 and begin < total_steps:
        end = draw(st.integers(begin + 1, total_steps))
        world_size = draw(st.sampled_from(WORLD_SIZES))
        found.append((world_size, draw(st.sampled_from((1, UNIT // world_size))), begin, end))
        begin = max(0, end - draw(st.integers(0, 2)))
    return found


def check(
    pool: RankPool, sources: dict[str, set[bytes]], tree: dict[str, Any], starts: list[tuple[int, int, int, int]]
) -> None:
    plan = make_plan(parse_config(tree), 1)
    [whole] = pool.ask(1, tree, 0, plan.total_steps)
    for world_size, micro, begin, end in starts:
        training = tree["training"] | {"micro_batch_sequences": micro}
        ranks = pool.ask(world_size, tree | {"training": training}, begin, end)
        for step, (expected, drawn) in enumerate(whole[begin:end], start=begin):
            found = [rank[step - begin] for rank in ranks]
            assert Counter(itertools.chain(*(rows for rows, _ in found))) == Counter(expected), (world_size, step)
            assert sum((counts for _, counts in found), Counter()) == drawn
    for rows, drawn in whole:
        of = {path: sum(row in stored for row in rows) for path, stored in sources.items()}
        assert +Counter(of) == drawn
    for stream in streams(plan, [rows for rows, _ in whole]):
        check_epochs(plan, sources, *stream)


def streams(plan: Plan, steps: list[Step]) -> Iterator[tuple[Any, list[bytes]]]:
    """Each mixture and its rows over all phases that use it, in order; a restart begins another such stream."""
    open_ones: dict[Any, list[bytes]] = {}
    for phase in plan.phases:
        if phase.transition.data == "restart" and phase.sources in open_ones:
            yield phase.sources, open_ones.pop(phase.sources)
        rows = itertools.chain(*steps[phase.start : phase.end])
        open_ones.setdefault(phase.sources, []).extend(rows)
    yield from open_ones.items()


def check_epochs(plan: Plan, sources: dict[str, set[bytes]], mixture: Any, rows: list[bytes]) -> None:
    """Every epoch has each source's share of the rows, and none of its rows more often than another, but for one."""
    total = sum(len(sources[source.path]) for source in mixture) // UNIT * UNIT
    weights = sum(source.weight for source in mixture)
    for begin in range(0, len(rows), total):
        epoch = Counter(rows[begin : begin + total])
        for source in mixture:
            stored = sources[source.path]
            counts = [epoch[row] for row in stored]
            share = total * source.weight / weights
            most = -(-int(share + 1) // len(stored))
            assert max(counts) <= most
            if epoch.total() == total:
                assert abs(sum(counts) - share) < 1
                assert min(counts) >= int(share) // len(stored)
        assert sum(epoch[row] for source in mixture for row in sources[source.path]) == epoch.total()


def examples(pool: RankPool, sources: dict[str, set[bytes]], number: int, most_workers: int) -> None:
    @settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # to look for a smaller case would take minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def some(data: st.DataObject) -> None:
        tree = data.draw(trees(list(sources), most_workers))
        total = sum(phase["steps"] for phase in tree["phases"])
        check(pool, sources, tree, data.draw(sessions(total)))

    some()


def test_every_stop_and_every_number_of_ranks_gives_the_same_global_batches(pool, sources) -> None:
    examples(pool, sources, 4, most_workers=0)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_many_more_stops_and_numbers_of_ranks_do(pool, sources) -> None:
    examples(pool, sources, 150, most_workers=2)


def test_a_mixture_goes_on_where_another_one_interrupted_it(pool, sources) -> None:
    first, second, _ = ([{"path": path}] for path in sources)
    phases = [{"precision": "16-bit", "steps": 2, "sources": each} for each in (first, second, first, first, second)]
    data = {"sources": first, "sequence_length": LENGTH, "workers": 0}
    tree = TREE | {"model": TREE["model"] | {"vocab_size": 400, "max_sequence_length": LENGTH}, "data": data}
    tree |= {"phases": phases, "training": {"global_batch_sequences": UNIT, "micro_batch_sequences": 1}}
    [steps] = pool.ask(1, tree, 0, 10)
    for sources_of, at in ((first, (0, 1, 4, 5, 6, 7)), (second, (2, 3, 8, 9))):
        alone = tree | {"data": data | {"sources": sources_of}, "phases": [{"precision": "16-bit", "steps": len(at)}]}
        [uninterrupted] = pool.ask(1, alone, 0, len(at))
        assert [steps[step] for step in at] == uninterrupted
