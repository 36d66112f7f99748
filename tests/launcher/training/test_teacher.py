"""Ternary phases with a teacher, on real ranks."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from host_reads import CountHostReads
from ranks import run_group
from runs import ENGINES, run
from tiny import tiny_config, tiny_tree

from launcher.checkpoint.reader import CheckpointReader
from launcher.config.file import parse_config
from launcher.config.sections import Config
from launcher.errors import CheckpointError, ConfigError
from launcher.formats.teacher import teacher_location
from launcher.plan.memory import memory_bytes_per_rank
from launcher.plan.plan import make_plan
from launcher.plan.table import describe
from launcher.process.ranks import Ranks
from launcher.run.metrics_log import read_metrics
from launcher.training.meter import LOSS_PARTS, Meter
from launcher.training.teacher import open_teacher
from model.size import num_parameters

SIXTEEN_BITS = {"precision": "16-bit", "steps": 3}


def config_of(shards: str, out: Path, distillation: dict[str, Any] | None, **sections: Any) -> Config:
    ternary = {
        "precision": "ternary",
        "steps": 4,
        "transition": {"ramp": {"shape": "linear", "steps": 3}},
        "distillation": distillation,
    }
    return tiny_config(Path(shards), out, **{"phases": [SIXTEEN_BITS, ternary], **sections})


def rows(run: Path, *keys: str) -> list[list[Any]]:
    return [[row.get(key) for key in keys] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(run / "checkpoints" / f"step-{step:08d}")
    return {name: reader.read("weight", name, 0, torch.Size(shape).numel()) for name, shape in reader.shapes.items()}


# What it changes


SETS = {"fsdp2": ("fsdp2", "zero-3"), "zero-2": ("zero-2", "hsdp")}
"""By an engine whose runs are compared bit for bit: those whose runs agree with one process."""


def on_two_ranks(shards: str, out: str, name: str) -> None:
    """All runs that the next tests compare, in one launch."""
    for kind, distillation in (("plain", None), ("weight-0", {"weight": 0.0})):
        run(config_of(shards, Path(out) / name / kind, distillation, engine=ENGINES[name]))
    on_engines(shards, out, SETS[name])
    in_pieces(shards, out, name, [3, 2] if name == "fsdp2" else [5])  # right at the transition, and after it


@pytest.fixture(scope="module", params=["fsdp2", pytest.param("zero-2", marks=pytest.mark.slow)])
def runs(request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An engine, and its runs."""
    out = tmp_path_factory.mktemp("distilled")
    run_group(2, on_two_ranks, str(shards), str(out), request.param)
    return request.param, out


@pytest.mark.slow
def test_weight_0_is_bitwise_the_run_without_a_teacher(runs: tuple[str, Path]) -> None:
    name, out = runs
    plain, taught = out / name / "plain", out / name / "weight-0"
    keys = ("train/loss", "train/grad_norm", "quant/strength")
    assert rows(plain, *keys) == rows(taught, *keys)
    ours, theirs = weights(taught, 7), weights(plain, 7)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert rows(plain, *LOSS_PARTS) == [[None] * 3] * 7
    parts = rows(taught, "train/loss", *LOSS_PARTS)
    assert all(loss == nll and relation == 0 for loss, nll, _, relation in parts[3:])
    # At a strength of 0, the first step's, the student is its teacher; then it is not any more.
    assert parts[3][2] == 0
    assert all(kl > 0 for _, _, kl, _ in parts[4:])


def on_engines(shards: str, out: str, names: tuple[str, ...]) -> None:
    for name in names:
        distillation = {"weight": 0.1, "temperature": 2.0, "relation_weight": 0.5}
        run(config_of(shards, Path(out) / name / "taught", distillation, engine=ENGINES[name]))


@pytest.mark.slow
def test_engines_agree_with_a_single_process(shards: Path, runs: tuple[str, Path], tmp_path: Path) -> None:
    compared, out = runs
    run_group(1, on_engines, str(shards), str(tmp_path), ("fsdp2",))
    # Up to the second ternary step; from there on rounding to codes lets tiny differences grow.
    keys = ("train/loss", *LOSS_PARTS, "train/grad_norm")
    expected = rows(tmp_path / "fsdp2" / "taught", *keys)[3:5]
    assert all(value > 0 for value in expected[1])
    for name in SETS[compared]:
        for ours, theirs in zip(rows(out / name / "taught", *keys)[3:5], expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5), name
    total, nll, kl, relation, _ = expected[1]
    assert total == pytest.approx(nll + 0.1 * 4 * kl + 0.5 * relation, abs=1e-5)


def in_pieces(shards: str, out: str, name: str, pieces: list[int]) -> None:
    distillation = {"relation_weight": 0.1}
    for kind in ("whole", "pieces"):
        config = config_of(
            shards,
            Path(out) / name / kind,
            distillation,
            engine=ENGINES[name],
            training={"compute_dtype": "bf16", "activation_checkpointing": True},
        )
        for steps in pieces if kind == "pieces" else []:
            assert run(config, steps) == "interrupted"
        assert run(config) == "complete"


@pytest.mark.slow
def test_resume_in_mid_distillation_is_bitwise(runs: tuple[str, Path]) -> None:
    name, out = runs
    whole, pieces = out / name / "whole", out / name / "pieces"
    keys = ("train/loss", "train/grad_norm", *LOSS_PARTS)
    assert rows(whole, *keys) == rows(pieces, *keys)
    ours, theirs = weights(pieces, 7), weights(whole, 7)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def reads_between_steps(shards: str, out: str) -> list[int]:
    counter, seen, add = CountHostReads(), [], Meter.add

    def add_and_note(self: Meter, *args: Any) -> None:
        add(self, *args)
        seen.append(counter.reads)

    Meter.add = add_and_note  # type: ignore[method-assign]
    with counter:
        run(config_of(shards, Path(out), {"relation_weight": 1.0}, logging={"interval_steps": 100}))
    return [after - before for before, after in pairwise(seen[3:])]


def test_the_host_does_not_wait_for_a_lesson(shards: Path, tmp_path: Path) -> None:
    assert run_group(1, reads_between_steps, str(shards), str(tmp_path / "run"))[0] == [0, 0, 0]


def compiled_and_not(shards: str, out: str) -> None:
    for compiled in (False, True):
        run(config_of(shards, Path(out) / str(compiled), {}, training={"compile": compiled}))


@pytest.mark.slow
def test_compiled_blocks_learn_from_a_compiled_teacher(shards: Path, tmp_path: Path) -> None:
    run_group(2, compiled_and_not, str(shards), str(tmp_path))
    eager, compiled = (rows(tmp_path / str(on), "train/loss", *LOSS_PARTS) for on in (False, True))
    assert compiled[3] == pytest.approx(eager[3], abs=1e-5)
    assert compiled[6][2] == pytest.approx(eager[6][2], abs=0.01)


@pytest.mark.slow
def test_a_student_comes_closer_to_its_teacher(shards: Path, tmp_path: Path) -> None:
    run_group(1, long_runs, str(shards), str(tmp_path))
    alone, taught = (
        [kl for [kl] in rows(tmp_path / kind, "train/distillation_loss") if kl is not None][-20:]
        for kind in ("alone", "taught")
    )
    assert sum(taught) < 0.8 * sum(alone)


def long_runs(shards: str, out: str) -> None:
    for kind, weight in (("alone", 0.0), ("taught", 1.0)):
        phases = [
            {"precision": "16-bit", "steps": 60},
            {"precision": "ternary", "steps": 100, "distillation": {"weight": weight}},
        ]
        run(tiny_config(Path(shards), Path(out) / kind, phases=phases))


# Whose teacher


def other_teachers(shards: str, out: str) -> dict[str, Any]:
    """Teach from a run of another shape, given by path; what refuses to teach; and what changes on resuming."""
    base, seen = Path(out), {}
    small = {"hidden_size": 24, "num_layers": 1, "num_heads": 2}
    run(tiny_config(Path(shards), base / "small", model=small, phases=[SIXTEEN_BITS]))
    run(tiny_config(Path(shards), base / "ternary", phases=[{"precision": "ternary", "steps": 3}]))
    run(tiny_config(Path(shards), base / "words", model={"vocab_size": 384}, phases=[SIXTEEN_BITS]))
    ternary = {"precision": "ternary", "steps": 3}

    def attempt(name: str, teacher: str | None, steps: int = 10, **sections: Any) -> str:
        phases = [ternary | {"distillation": {"teacher": teacher, "weight": 0.1, "relation_weight": 0.1}}]
        try:
            return run(tiny_config(Path(shards), base / name, phases=phases, **sections), steps)
        except CheckpointError as error:
            return str(error)

    seen["another shape"] = attempt("taught", str(base / "small"))
    reset = [ternary | {"distillation": {}, "transition": {"optimizer": "reset"}}]
    start = {"start_from": str(base / "ternary")}
    for name in ("ternary", "words", "nowhere"):
        seen[name] = attempt(f"by-{name}", str(base / name))
    try:
        run(tiny_config(Path(shards), base / "from-ternary", phases=reset, checkpoint=start))
    except CheckpointError as error:
        seen["start from ternary"] = str(error)
    start = {"start_from": str(base / "teacher")}
    run(tiny_config(Path(shards), base / "teacher", phases=[SIXTEEN_BITS]))
    config = tiny_config(Path(shards), base / "from-run", phases=reset, checkpoint=start)
    seen["started"] = run(config, 1)
    (base / "teacher" / "checkpoints").rename(base / "gone")
    for name, folder in (("gone", None), ("another", base / "small" / "checkpoints")):
        if folder:
            (base / "teacher" / "checkpoints").symlink_to(folder)
        try:
            run(config)
        except CheckpointError as error:
            seen[f"{name} on resuming"] = str(error)
    return seen


@pytest.mark.slow
def test_teachers_from_elsewhere(shards: Path, tmp_path: Path) -> None:
    [seen] = run_group(1, other_teachers, str(shards), str(tmp_path))
    assert seen["another shape"] == "complete"
    assert all(value > 0 for value in rows(tmp_path / "taught", *LOSS_PARTS)[0])
    assert "it is ternary; a teacher must be in 16 bits" in seen["ternary"]
    assert "it is ternary" in seen["start from ternary"]
    assert "its vocab_size is 384, the model's 320" in seen["words"]
    assert "phases.0.distillation: no such teacher can be had" in seen["nowhere"]
    assert "there is no such folder" in seen["nowhere"]
    assert seen["started"] == "interrupted"
    assert "no such teacher can be had" in seen["gone on resuming"]
    assert "its phase had another teacher" in seen["another on resuming"]


def test_what_a_phase_begins_with_is_its_teacher(tmp_path: Path) -> None:
    def location(distillation: dict[str, Any], **checkpoint: Any) -> str:
        plan = make_plan(config_of("shards", tmp_path, distillation, checkpoint=checkpoint), 1)
        return teacher_location(plan, plan.phases[1], tmp_path)

    milestone = tmp_path / "step-00000003"
    assert location({}) == str(milestone)
    assert location({"teacher": "other"}, start_from="trunk", start_phase=1) == "other"
    assert location({}, start_from="trunk", start_phase=1) == "trunk"
    assert location({}, start_from="trunk") == str(milestone)
    milestone.mkdir()
    (milestone / "manifest.json").touch()
    assert location({}, start_from="trunk", start_phase=1) == str(milestone)  # a converted run holds its own


def held_by_a_teacher(shards: str, out: str) -> list[Any]:
    """Numbers that one rank of two holds of a teacher, and which dtypes they have."""
    config = config_of(shards, Path(out), {}, training={"compute_dtype": "bf16"})
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    run(config)
    plan = make_plan(config, ranks.world_size)
    teacher = open_teacher(plan, plan.phases[1], ranks, Path(out) / "checkpoints", None)
    assert teacher is not None
    parameters = list(teacher._model.parameters())
    tokens, labels = torch.zeros(2, 2, 8, dtype=torch.int64)
    with teacher.teaching(tokens, (tokens, labels)):
        gathered = teacher._model.head.numel()
    return [
        sum(parameter.to_local().numel() for parameter in parameters),
        gathered,
        [parameter.dtype == torch.bfloat16 and not parameter.requires_grad for parameter in parameters],
    ]


def test_a_teacher_is_frozen_and_sharded_in_the_compute_dtype(shards: Path, tmp_path: Path) -> None:
    results = run_group(2, held_by_a_teacher, str(shards), str(tmp_path / "run"))
    config = config_of(str(shards), tmp_path / "run", {})
    total = num_parameters(config.model)
    assert sum(held for held, _, _ in results) == total
    assert all(held < 0.51 * total for held, _, _ in results)
    assert all(all(flags) and gathered == 320 * 36 for _, gathered, flags in results)


# Configuration and plan


@pytest.mark.parametrize(
    ("phases", "sections", "problem"),
    [
        ([{"precision": "ternary", "steps": 2, "distillation": {}}], {}, "phases.0.distillation.teacher: is missing"),
        (
            [{"precision": "ternary", "steps": 2}, {"precision": "ternary", "steps": 2, "distillation": {}}],
            {},
            "phases.1.distillation.teacher: is missing; the phase before is ternary",
        ),
        ([SIXTEEN_BITS | {"distillation": {}}], {}, "phases.0.distillation: is given for a 16-bit phase"),
        (
            [SIXTEEN_BITS, {"precision": "ternary", "steps": 2, "distillation": {"temperature": 0.0}}],
            {},
            "phases.1.distillation.temperature: is 0.0; must be above 0",
        ),
        (
            [
                SIXTEEN_BITS,
                {
                    "precision": "ternary",
                    "steps": 2,
                    "distillation": {"relation_weight": 1.0, "relation_layer": 2},
                },
            ],
            {},
            "phases.1.distillation.relation_layer: is 2; the last of the 2 blocks is 1",
        ),
        (
            [SIXTEEN_BITS, {"precision": "ternary", "steps": 2, "distillation": {"relation_weight": 1.0}}],
            {"compile": True},
            "phases.1.distillation.relation_weight: is 1.0, but training.compile",
        ),
    ],
)
def test_problems_are_told(phases: list[Any], sections: dict[str, Any], problem: str) -> None:
    tree = tiny_tree(Path("shards"), Path("run"))
    tree["phases"] = phases
    tree["training"] |= sections
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    assert problem in str(caught.value)


def test_the_plan_counts_the_teacher() -> None:
    plain, taught = (make_plan(config_of("shards", Path("run"), kind), 2) for kind in (None, {}))
    flops = plain.flops_per_token_at(3)
    assert taught.flops_per_token_at(2) == flops
    assert taught.flops_per_token_at(3) == flops * 4 // 3  # forward is a third of forward and backward
    tokens = plain.tokens_at(0)
    assert describe(taught)["total_flops"] - describe(plain)["total_flops"] == flops // 3 * tokens * 4
    sizes = memory_bytes_per_rank(taught)
    teacher = sizes.pop("teacher")
    assert sizes == memory_bytes_per_rank(plain)
    parameters = num_parameters(plain.config.model)
    assert teacher == 4 * (parameters / 2 + 2 * parameters / 2)  # fp32; a half, and two blocks of two gathered
