"""The reference of preferences: computed once, by all ranks together, and kept; found again, or not used."""

import gc
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from chat_files import pair, prepare_pairs, prepare_text
from hf_folders import ModelSource
from jobs import NUM_RANKS, Job
from models import build
from ranks import run_group
from runs import ENGINES
from safetensors.torch import load_file
from tiny import tiny_config, tiny_tree

from launcher.checkpoint.tensor_file import TensorFile
from launcher.config.sections import Config
from launcher.errors import TrainingError
from launcher.formats.hf_folder import write_hf
from launcher.plan.plan import make_plan
from launcher.process.console import Console
from launcher.process.ranks import Ranks
from launcher.run.folder import RunFolder
from launcher.run.references import DIGEST_BYTES, Kept, KnownRows, read_kept, write_kept
from launcher.training import reference
from launcher.training.held_out import HeldOut
from launcher.training.step import open_data
from launcher.watch.failure import INTERRUPTED
from launcher.watch.stopping import StopRequest
from model.config import PreferenceConfig
from model.preference import Reference
from model.transformer import Transformer

LENGTH, ROWS = 80, 8
PAIRS = [pair(f"{index:02}", "a" * (index % 7 + 1), "b" * (index % 5 + 1)) for index in range(ROWS)]


class Heard(Console):
    """A console that keeps its lines."""

    def __init__(self) -> None:
        super().__init__(silent=True)
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        self.lines.append(text)


def config_of(folder: Path, *, steps: int = 2, engine: str = "fsdp2", workers: int = 0, **training: Any) -> Config:
    """Of a run whose epoch is two steps."""
    return tiny_config(
        folder / "pairs",
        folder / "run",
        engine=ENGINES[engine],
        model={"vocab_size": 320, "max_sequence_length": LENGTH},
        data={"sequence_length": LENGTH, "validation_rows": 2, "workers": workers},
        training={"global_batch_sequences": 4, "micro_batch_sequences": 2, "compute_dtype": "fp32"} | training,
        phases=[{"precision": "16-bit", "steps": steps, "objective": "dpo"}],
        schedule={"warmup_steps": 0},
        checkpoint={"start_from": str(folder / "model")},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    prepare_pairs(held_out, LENGTH, PAIRS[0], pair("??", "yes", "no"))
    prepare_pairs(tmp_path, LENGTH, *PAIRS, validation_inputs=(str(held_out / "pairs.jsonl"),))
    write_model(tmp_path)
    return tmp_path


def write_model(folder: Path, factor: float = 1.0) -> None:
    model = build(config_of(folder).model)
    with torch.no_grad():
        model.model.norm.weight.mul_(factor)
    shutil.rmtree(folder / "model", ignore_errors=True)
    write_hf(ModelSource(model), model.config, folder / "model", torch.float32)


def opened(folder: str, starts: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Open the reference of a run again and again: what this rank computed, what was said, and what is known."""
    found = []
    for what, options in starts:
        if dist.get_rank() == 0:
            before(what, Path(folder))
        dist.barrier()
        found.append(open_once(config_of(Path(folder), **options)))
    return found


def before(what: str, folder: Path) -> None:
    path = folder / "run" / "reference" / "phase-0.safetensors"
    if what == "another model":
        write_model(folder, 2.0)
    elif what == "forgotten":
        path.unlink()
    elif what == "damage":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    elif what == "killed":  # after the first rows were kept
        given_by = TensorFile(path).metadata["given_by"]
        digests, ends, values = read_kept(path, given_by)[0].rows.arrays()
        write_kept(path, given_by, Kept(covers=None, rows=KnownRows(digests[:3], ends[:3], values[: ends[2]])))


def open_once(config: Config) -> dict[str, Any]:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    plan, console, computed = make_plan(config, ranks.world_size), Heard(), []
    data = open_data(plan, ranks, 0)
    held_out = HeldOut(plan, ranks, data, plan.held_out_of(plan.phases[0]))
    compute = reference._log_probabilities

    def counting(model: Any, plan: Any, ranks: Any, unknown: Any, *more: Any) -> Any:
        computed.extend(unknown)
        return compute(model, plan, ranks, unknown, *more)

    with patch.object(reference, "_log_probabilities", counting):
        found = reference.open_second_model(
            plan, plan.phases[0], ranks, RunFolder(config), (data.first_token, data.fingerprint), held_out.pairs,
            console, lambda: None, StopRequest(),
        )  # fmt: skip
    assert isinstance(found, reference.KnownReference)
    data.close()
    models = sum(isinstance(each, Transformer) for each in gc.get_objects())
    return {"computed": computed, "lines": console.lines, "known": by_digest(found._rows), "models": models}


def by_digest(rows: KnownRows) -> dict[str, list[float]]:
    digests = [each.ljust(DIGEST_BYTES, b"\0").hex() for each in rows.arrays()[0]]
    return {digest: [*map(float, rows[digest])] for digest in digests}


def test_each_row_is_computed_once_by_one_rank_and_found_again_on_any_number_of_them(folder: Path) -> None:
    both = run_group(2, opened, str(folder), [("", {"steps": 6})] * 2)
    (first, again), (of_second, _) = both
    assert sorted(first["computed"] + of_second["computed"]) == sorted(first["known"]) == sorted(of_second["known"])
    assert first["computed"]
    assert of_second["computed"]
    assert len(first["known"]) == ROWS + 1  # one of the two that are held out is a row of training too
    assert {len(values) for values in first["known"].values()} == {2}  # a pair each; padding has no values
    assert again["computed"] == again["lines"] == []
    path = folder / "run" / "reference" / "phase-0.safetensors"
    assert first["lines"] == [f"Log-probabilities of the reference for {ROWS + 1} rows are kept in {path}"]
    assert [each["models"] for rank in both for each in rank] == [0, 0, 0, 0]
    on_zero, in_bf16 = {"steps": 6, "engine": "zero-1"}, {"steps": 6, "compute_dtype": "bf16"}
    [(alone, forgotten, in_bf16)] = run_group(
        1, opened, str(folder), [("", on_zero), ("forgotten", {"steps": 6}), ("", in_bf16)]
    )
    assert alone["computed"] == []
    assert sorted(forgotten["computed"]) == sorted(first["known"])
    assert alone["known"] == forgotten["known"] == first["known"]
    assert in_bf16["lines"][0] == f"{path} is of another model or precision; its log-probabilities are computed again"
    assert sorted(in_bf16["computed"]) == sorted(first["known"])
    assert in_bf16["known"] != first["known"]


def test_what_is_missing_is_computed_and_what_is_of_no_use_is_not_used(folder: Path) -> None:
    [found] = run_group(
        1,
        opened,
        str(folder),
        [
            ("", {"steps": 1, "workers": 1}),
            *[(what, {"steps": 2}) for what in ("", "killed", "damage", "another model")],
        ],
    )
    short, longer, killed, damaged, another = found
    assert len(short["computed"]) in (5, 6)  # 4 of training and 2 held out, of which one may be both
    assert len(longer["computed"]) == ROWS + 1 - len(short["computed"])
    assert not {*longer["computed"]} & {*short["known"]}
    assert len(killed["computed"]) == ROWS + 1 - 3
    assert damaged["lines"][0].endswith(
        "phase-0.safetensors is damaged (its content is not what was written); its log-probabilities are computed again"
    )
    assert another["lines"][0].endswith("is of another model or precision; its log-probabilities are computed again")
    for each in (damaged, another):
        assert sorted(each["computed"]) == sorted(longer["known"])
    assert longer["known"] == killed["known"] == damaged["known"] != another["known"]


def test_a_reference_that_is_not_finite_is_an_error(folder: Path) -> None:
    write_model(folder, 1e38)
    with pytest.raises(TrainingError, match=r"phases\.0\.objective: the model that the phase begins with gives an"):
        run_group(2, opened, str(folder), [("", {})])
    assert not (folder / "run" / "reference").exists()


def test_values_are_compared_in_float64_also_those_that_were_just_computed() -> None:
    tokens, labels = torch.tensor([[~5, 6, ~5, 7]]), torch.tensor([[6, -100, 7, -100]])
    found = {str(reference.digest_of(tokens[0], labels[0])): [-0.1, -1 / 3]}
    for sorted_in in (False, True):
        rows = KnownRows()
        rows.add(found)
        if sorted_in:
            rows.arrays()
        known = reference.KnownReference(PreferenceConfig(), "it", rows)
        with known.teaching(tokens, (tokens, labels)) as lesson:
            assert isinstance(lesson, Reference)
            assert lesson.log_probabilities.tolist() == [[[-0.1, -1 / 3]]]


def asked_to_end(rank: int) -> None:
    """Send the second rank a signal while it computes its first batch."""
    sums, is_first = reference.by_side, iter([rank == 1])

    def sums_after_signal(*given: Any) -> Any:
        if next(is_first, False):
            os.kill(os.getpid(), signal.SIGTERM)
        return sums(*given)

    reference.by_side = sums_after_signal


@pytest.mark.parametrize("begins", ["a model", pytest.param("text", marks=pytest.mark.slow)])
def test_a_stop_is_heard_within_a_batch_and_what_is_known_is_kept(folder: Path, begins: str) -> None:
    phases: list[dict[str, Any]] = [
        {"precision": "16-bit", "steps": 2, "objective": "dpo", "transition": {"optimizer": "reset"}}
    ]
    sections: dict[str, Any] = {"checkpoint": {"start_from": str(folder / "model")}}
    if begins == "text":  # the reference is the run's own checkpoint, and the first phase is its only sign of progress
        phases = [{"precision": "16-bit", "steps": 2}, phases[0] | {"sources": [{"path": str(folder / "pairs")}]}]
        sections = {}
    first = prepare_text(folder, LENGTH) if begins == "text" else folder / "pairs"
    tree = tiny_tree(first, folder / "run") | sections | {"phases": phases}
    tree["model"] |= {"vocab_size": 320, "max_sequence_length": LENGTH}
    tree["data"] |= {"sequence_length": LENGTH, "validation_rows": 2}
    tree["training"] |= {"global_batch_sequences": 4}
    tree["schedule"]["warmup_steps"] = 0
    run = folder / "run"
    job = Job(tree, asked_to_end)
    assert job.wait() == [INTERRUPTED] * NUM_RANKS, job.output
    state = json.loads((run / "state.json").read_text())
    saved = str(run / "checkpoints" / "step-00000002") if begins == "text" else None
    assert [state[key] for key in ("status", "reason", "checkpoint")] == ["interrupted", "signal", saved]
    path = run / "reference" / f"phase-{len(phases) - 1}.safetensors"
    assert f"Log-probabilities of the reference for 4 rows are kept in {path}" in job.output
    end = f"Stopped and saved (signal): {saved}." if saved else "Stopped (signal) before the first step."
    assert f"{end} The same command resumes from there." in job.output
    known = load_file(path)
    job = Job(tree)
    assert job.wait() == [0] * NUM_RANKS, job.output
    assert f"Log-probabilities of the reference for {ROWS + 1} rows are kept in {path}" in job.output
    values = {row.numpy().tobytes(): pair for row, pair in rows_of(load_file(path))}
    assert len(values) == ROWS + 1
    assert all(torch.equal(values[row.numpy().tobytes()], pair) for row, pair in rows_of(known))


def rows_of(kept: dict[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The digests and the values in a file of rows of a pair each."""
    return zip(kept["rows"], kept["log_probabilities"].view(-1, 2), strict=True)
