"""Warm-ups of the batch and of the sequence length in training: the gradient, the data, and runs that are resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import LEARNING_RATE, MODEL, OPTIMIZER, build, gathered
from ranks import run_group
from runs import ENGINES, run
from safetensors.torch import load_file
from tiny import tiny_config
from torch import Tensor

from data.loader import IGNORED_LABEL
from launcher.config.sections import Config
from launcher.engine.adamw import is_decayed
from launcher.engine.compiling import compile_report
from launcher.errors import CheckpointError, ConfigError
from launcher.formats.convert import starting_phase
from launcher.formats.open import open_source
from launcher.plan.plan import make_plan
from launcher.plan.schedule import StepSizes
from launcher.process.console import Console
from launcher.process.ranks import Ranks
from launcher.run.metrics_log import read_metrics
from launcher.training.step import accumulate_gradients, in_pieces, open_data
from launcher.watch.heartbeat import Pulse
from model.init import initialize_
from model.transformer import Transformer

# The gradient

STEPS = ((4, 8), (8, 8), (12, 16), (4, 32), (12, 32))
"""Sequences of a step, and the length of pieces."""
ROWS_AT_ONCE = 2
ON_TWO_RANKS = ["fsdp2", "zero-0", "zero-1", "zero-2", "zero-3"]


PADDED = (1, 3)
"""Steps of which some labels do not count, as of rows that are filled up."""


def rows_of(step: int, num_rows: int) -> tuple[Tensor, Tensor]:
    rows = torch.randint(0, 257, (num_rows, 33), generator=torch.Generator().manual_seed(step))
    labels = rows[:, 1:].clone()
    if step in PADDED:
        labels[0, 20:] = labels[-1, 9:] = IGNORED_LABEL
    return rows[:, :-1], labels


def by_engines(names: list[str]) -> dict[str, Any]:
    """Losses, gradient norms and weights after steps with other numbers of micro-batches than the engine is built for.

    (It is built for two.)
    """
    found = {}
    for name in names:
        engine, curve = build(name, torch.float32), []
        for step, (sequences, length) in enumerate(STEPS):
            own = (part.chunk(dist.get_world_size())[dist.get_rank()] for part in rows_of(step, sequences))
            batches = list(zip(*(part.split(ROWS_AT_ONCE) for part in own), strict=True))
            batch = accumulate_gradients(engine, in_pieces(batches, length), len(batches), uneven=step in PADDED)
            loss = batch.loss.clone()
            dist.all_reduce(loss)
            assert batch.num_tokens * dist.get_world_size() == sequences * 32
            norm, _ = engine.step(StepSizes(LEARNING_RATE))
            curve.append((float(loss) / dist.get_world_size(), float(norm)))
        found[name] = {"curve": curve, "weights": gathered(engine, "weight")}
    return found


def by_hand() -> dict[str, Any]:
    """The same in one process, each step with its whole batch at once."""
    model = Transformer(MODEL)
    initialize_(model, 0)
    named = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {
            "params": [
                parameter for name, parameter in named.items() if is_decayed(name, parameter.ndim, OPTIMIZER) == on
            ],
            "weight_decay": OPTIMIZER.weight_decay if on else 0.0,
        }
        for on in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    curve = []
    for step, (sequences, length) in enumerate(STEPS):
        tokens, labels = rows_of(step, sequences)
        pieces = [part[:, at : at + length] for part in (tokens, labels) for at in range(0, 32, length)]
        half = len(pieces) // 2
        loss = model(torch.cat(pieces[:half]), torch.cat(pieces[half:])).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    return {"curve": curve, "weights": {name: value.detach() for name, value in named.items()}}


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_gradient_is_the_mean_over_the_batch_of_its_step(num_ranks: int) -> None:
    expected = by_hand()
    for name, found in run_group(num_ranks, by_engines, ON_TWO_RANKS)[0].items():
        for ours, theirs in zip(found["curve"], expected["curve"], strict=True):
            assert ours == pytest.approx(theirs, abs=2e-6), name
        for key, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][key], weight, rtol=0, atol=2e-5, msg=f"{name}: {key}")


def test_pieces_of_rows_are_sequences_of_their_own() -> None:
    rows = torch.arange(2 * 13).view(2, 13)
    [(tokens, labels)] = in_pieces([(rows[:, :-1], rows[:, 1:])], 4)
    assert tokens.tolist() == [list(range(start, start + 4)) for start in (0, 4, 8, 13, 17, 21)]
    assert torch.equal(labels, tokens + 1)
    [again] = in_pieces([(tokens, labels)], 4)
    assert all(map(torch.equal, again, (tokens, labels)))


# The data

WARMUPS = {
    "global_batch_sequences": 12,
    "batch_warmup": [{"sequences": 4, "until_tokens": 384}, {"sequences": 8, "until_tokens": 1152}],
    "sequence_warmup": [{"length": 8, "until_tokens": 200}, {"length": 16, "until_tokens": 1200}],
}
"""Steps have 4, 4, 4, 8, 8, 8, 12, 12, ... rows, and pieces of 8 tokens in 2 steps, 16 in 5, and then 32."""
BATCHES, LENGTHS = [4, 4, 4, 8, 8, 8, 12, 12, 12, 12], [8, 8, 16, 16, 16, 16, 16, 32, 32, 32]
TOKENS = [128, 256, 384, 640, 896, 1152, 1536, 1920, 2304, 2688]


def warming_config(shards: Path, out: Path, engine: str = "fsdp2", **sections: Any) -> Config:
    """5 steps in 16 bits, 5 ternary ones, and a boundary after 2, 3, 5, 6 and 7."""
    transition = {"optimizer": "rescale", "rewarm_tokens": 600, "ramp": {"steps": 2}}
    return tiny_config(
        shards,
        out,
        engine=ENGINES[engine],
        training=WARMUPS | sections.pop("training", {}),
        optimizer={"learning_rate": 3e-3, "ternary_learning_rate_factor": {"start": 2.0, "end": 1.0, "steps": 3}},
        phases=[{"precision": "16-bit", "tokens": 800}, {"precision": "ternary", "steps": 5, "transition": transition}],
        **sections,
    )


def test_every_step_reads_the_next_rows_wherever_a_run_resumes(shards: Path, tmp_path: Path) -> None:
    plan, alone = make_plan(warming_config(shards, tmp_path), 1), Ranks(0, 1, 0, torch.device("cpu"))
    assert [plan.sequences_at(step) for step in range(10)] == BATCHES
    data = open_data(plan, alone, 0)
    stream, whole = iter(data), []
    for sequences in BATCHES:
        whole.append(torch.cat([next(stream)[0] for _ in range(sequences // 2)]))
    data.close()
    rows = list(map(bytes, torch.cat(whole).numpy()))
    assert len(set(rows)) == len(rows) == sum(BATCHES)  # of one epoch: none is left out for another, none repeated
    for step in range(10):
        data = open_data(plan, alone, step)
        read = torch.cat([tokens for tokens, _ in (next(iter(data)) for _ in range(sum(BATCHES[step:]) // 2))])
        data.close()
        assert torch.equal(read, torch.cat(whole[step:])), step


# Runs


def whole_and_in_pieces(shards: str, out: str, engines: list[str], pieces: list[int]) -> None:
    for name in engines:
        for kind in ("whole", "pieces"):
            config = warming_config(Path(shards), Path(out) / name / kind, name)
            for steps in pieces if kind == "pieces" else []:
                assert run(config, steps) == "interrupted"
            assert run(config) == "complete"


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]


def compare(out: Path, engines: list[str]) -> list[list[float]]:
    """Check that runs in pieces are the whole ones, bit for bit, and what they log; returns the losses."""
    keys = ("step", "tokens", "train/loss", "train/grad_norm", "train/learning_rate", "train/sequences_per_step")
    for name in engines:
        whole, pieces = (out / name / kind for kind in ("whole", "pieces"))
        rows = [[[row.get(key) for key in keys] for row in steps_of(each)] for each in (whole, pieces)]
        assert rows[0] == rows[1], name
        logged = steps_of(whole)
        assert [row["tokens"] for row in logged] == TOKENS
        assert [row["train/sequences_per_step"] for row in logged] == BATCHES
        assert [row["train/sequence_length"] for row in logged] == LENGTHS
        for step, tokens in ((5, 896), (10, 2688)):  # the end of each phase
            folders = [each / "checkpoints" / f"step-{step:08d}" for each in (whole, pieces)]
            assert [json.loads((each / "manifest.json").read_text())["tokens"] for each in folders] == [tokens] * 2
            for ours, theirs in zip(*(sorted(each.glob("*.safetensors")) for each in folders), strict=True):
                state, again = load_file(ours), load_file(theirs)
                assert all(torch.equal(state[key], again[key]) for key in state | again), name
        half = open_source(str(whole / "checkpoints" / "step-00000005"))
        assert starting_phase(warming_config(Path("shards"), whole), half) == 1
        assert json.loads((whole / "summary.json").read_text())["tokens"] == 2688
    return [[row["train/loss"] for row in steps_of(out / name / "whole")] for name in engines]


@pytest.mark.slow
def test_a_run_with_warm_ups_is_the_same_on_any_ranks_and_in_pieces(shards: Path, tmp_path: Path) -> None:
    found = []
    for num_ranks, pieces in ((1, [4]), (2, [2, 1, 1, 2, 1])):  # stops at every boundary, and between two
        run_group(num_ranks, whole_and_in_pieces, str(shards), str(tmp_path / str(num_ranks)), ["fsdp2"], pieces)
        found += compare(tmp_path / str(num_ranks), ["fsdp2"])
    assert found[0] == pytest.approx(found[1], abs=2e-3)
    assert found[0][:6] == pytest.approx(found[1][:6], abs=1e-5)  # before rounding makes a difference of a bit large


@pytest.mark.slow
@pytest.mark.parametrize("engines", [["zero-2"], ["zero-0", "zero-1", "zero-3"]])
def test_it_is_the_same_with_deepspeed(shards: Path, tmp_path: Path, engines: list[str]) -> None:
    run_group(2, whole_and_in_pieces, str(shards), str(tmp_path), engines, [3, 3, 1])
    for losses in compare(tmp_path, engines):
        assert losses[0] == pytest.approx(5.78, abs=0.1)


def other_warmups(shards: str, out: str) -> list[str]:
    """What a run says that resumes with other warm-ups, after 4 steps."""

    def resume(*, allowed: bool, **training: Any) -> str:
        allow = {"allow_changes": ["training"]} if allowed else {}
        try:
            outcome = run(
                warming_config(
                    Path(shards), Path(out), training=training, run={"name": "tiny", "folder": out, **allow}
                ),
                1,
            )
        except (ConfigError, CheckpointError) as error:
            return str(error)
        return outcome

    assert run(warming_config(Path(shards), Path(out)), 4) == "interrupted"
    earlier = [{"sequences": 4, "until_tokens": 128}, {"sequences": 8, "until_tokens": 1152}]
    other_unit = [*WARMUPS["batch_warmup"][:1], {"sequences": 10, "until_tokens": 1152}]  # type: ignore[index]
    later = [*WARMUPS["batch_warmup"], {"sequences": 12, "until_tokens": 1920}]  # type: ignore[misc]
    return [
        resume(allowed=False, batch_warmup=later, global_batch_sequences=16),
        resume(allowed=True, batch_warmup=earlier),
        resume(allowed=True, batch_warmup=other_unit),
        resume(allowed=True, batch_warmup=later, global_batch_sequences=16),
    ]


def test_the_batch_of_steps_to_come_may_change_and_of_no_others(shards: Path, tmp_path: Path) -> None:
    [[refused, earlier, other_unit, later]] = run_group(1, other_warmups, str(shards), str(tmp_path / "run"))
    assert "training.batch_warmup.2.sequences: not set in step-00000004, 12 now" in refused
    assert "has 640 tokens in 4 steps, which would be 896 with this global batch" in earlier
    assert "which would be 704 with this global batch" in other_unit
    assert later == "interrupted"
    assert [row["tokens"] for row in steps_of(tmp_path / "run")] == TOKENS[:5]


def raised_batch(shards: str, out: str) -> list[str]:
    def resume(steps: int, **training: Any) -> str:
        keys = {"name": "tiny", "folder": out, "allow_changes": ["training"]}
        return run(tiny_config(Path(shards), Path(out), run=keys, training=training), steps)

    stages = [{"sequences": 8, "until_tokens": 1000}]
    return [resume(3), resume(2, global_batch_sequences=16, batch_warmup=stages)]


def test_the_batch_of_a_run_is_raised_on_the_way(shards: Path, tmp_path: Path) -> None:
    assert run_group(1, raised_batch, str(shards), str(tmp_path / "run")) == [["interrupted", "interrupted"]]
    assert [row["tokens"] for row in steps_of(tmp_path / "run")] == [256, 512, 768, 1024, 1536]


def test_a_larger_step_is_no_hang() -> None:
    pulse = Pulse()
    pulse.now("train", 0)
    pulse.stepped(1, 0.0)
    assert pulse.at.steady
    pulse.changes_size()
    pulse.now("train", 1)
    assert not pulse.at.steady
    assert pulse.usual_step_seconds() == 0


def compiled_lines(shards: str, out: str) -> list[str]:
    """What a run of 4 steps says that are compiled: of 4, 4, 8 and 8 rows, in pieces of 16, 32, 32 and 32 tokens."""
    lines: list[str] = []
    training = {
        "compile": True,
        "batch_warmup": [{"sequences": 4, "until_tokens": 256}],
        "sequence_warmup": [{"length": 16, "until_tokens": 128}],
    }
    config = tiny_config(Path(shards), Path(out), training=training, phases=[{"precision": "16-bit", "steps": 4}])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Console, "line", lambda console, line="": lines.append(line))
        run(config)
    return lines


@pytest.mark.slow
def test_every_size_is_compiled(shards: Path, tmp_path: Path) -> None:
    [lines] = run_group(1, compiled_lines, str(shards), str(tmp_path / "run"))
    told = [line for line in lines if "graph calls" in line]
    assert told == [compile_report(step, calls, calls) for step, calls in ((1, 4), (2, 4), (3, 8))]
