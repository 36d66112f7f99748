"""Bytes that ranks send: the model by hand, and real bytes of real gloo runs, counted by the kernel."""

import copy
import json
import os
import runpy
import shutil
import subprocess
import sys

import pytest
from places import ROOT, SUPPORT
from ranks import IN_FORK_SERVER, PRELOADED

from launcher.config.file import apply_override, parse_config
from launcher.plan.memory import zero3_held_parameters
from launcher.plan.plan import make_plan
from launcher.plan.traffic import bytes_sent, collectives, describe_traffic

TREE = {
    "run": {"name": "traffic"},
    "model": {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24},
    "data": {"sources": [{"path": "shards"}], "sequence_length": 8},
    "training": {"global_batch_sequences": 24, "micro_batch_sequences": 1},
    "optimizer": {"learning_rate": 1e-2},
    "phases": [{"precision": "16-bit", "steps": 4}, {"precision": "ternary", "steps": 6}],
}
LINEAR = 2 * (4 * 16 * 16 + 3 * 16 * 24)
BLOCKS = LINEAR + 4 * 16  # with norms
OUTSIDE = 64 * 16 + 16  # embedding and the last norm
P = BLOCKS + OUTSIDE
N, M = 4, 6  # ranks, micro-batches
RING = (N - 1) / N


def plan_of(*overrides, world_size=N):
    tree = copy.deepcopy(TREE)
    for override in overrides:
        apply_override(tree, override)
    return make_plan(parse_config(tree), world_size)


def zero(stage, *overrides):
    return plan_of("engine.name=deepspeed", f"engine.zero_stage={stage}", *overrides)


def test_fsdp2_by_hand():
    """Blocks are gathered twice in bf16 for each micro-batch, the rest once; one reduction in fp32."""
    sent = bytes_sent(plan_of())
    assert sent["weights"] == M * RING * 2 * (2 * BLOCKS + OUTSIDE)
    assert sent["gradients"] == RING * 4 * P
    assert sent["scalars"] == 2 * RING * (4 + 8)  # the gradient norm, and whether to stop and to save
    assert bytes_sent(plan_of("engine.reshard_after_forward=false"))["weights"] == M * RING * 2 * P
    assert bytes_sent(plan_of("training.compute_dtype=fp32"))["weights"] == M * RING * 4 * (2 * BLOCKS + OUTSIDE)
    assert bytes_sent(plan_of(), backend="gloo")["gradients"] == 2 * RING * 4 * P


def test_replicas_gather_among_fewer_and_reduce_among_each_other():
    sent = bytes_sent(plan_of("engine.replicas=2"))
    assert sent["weights"] == M * 1 / 2 * 2 * (2 * BLOCKS + OUTSIDE)
    assert sent["gradients"] == 1 / 2 * 4 * P + 2 * 1 / 2 * 4 * P / 2


def test_rows_are_padded_to_the_number_of_shards():
    plan = plan_of("training.global_batch_sequences=30", world_size=5)
    padded = 65 * 16 + 2 * (4 * 20 * 16 + 2 * 25 * 16 + 20 * 24) + 5 * 20
    assert bytes_sent(plan)["gradients"] == pytest.approx(4 / 5 * 4 * padded)


def test_zero_by_hand():
    assert bytes_sent(zero(0))["gradients"] == 2 * RING * 2 * P
    assert "weights" not in bytes_sent(zero(0))
    one = bytes_sent(zero(1))
    assert (one["gradients"], one["weights"]) == (2 * RING * 2 * P, RING * 2 * P)
    two = bytes_sent(zero(2))
    assert (two["gradients"], two["weights"]) == (M * 2 * RING * 2 * P, RING * 2 * P)


def test_zero_3_by_hand():
    """All is small enough to stay whole; then nothing is, and is gathered for each pass, once or twice."""
    assert bytes_sent(zero(3))["weights"] == RING * 2 * P
    none = "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    assert bytes_sent(zero(3, none))["weights"] == M * RING * 2 * P
    keys = "{stage3_param_persistence_threshold: 0, stage3_max_live_parameters: 0, stage3_max_reuse_distance: 0}"
    nothing_kept = zero(3, f"engine.deepspeed.zero_optimization={keys}")
    assert zero3_held_parameters(nothing_kept.config) == (0, 0)
    assert bytes_sent(nothing_kept)["weights"] == 2 * M * RING * 2 * P
    assert bytes_sent(nothing_kept)["gradients"] == M * RING * 2 * P


def test_one_rank_sends_nothing():
    assert set(bytes_sent(plan_of(world_size=1)).values()) == {0}


def test_precision_of_a_phase_does_not_matter_where_weights_are_gathered():
    assert bytes_sent(plan_of()) == bytes_sent(plan_of("phases=[{precision: 16-bit, steps: 4}]"))


def test_a_step_in_codes_gathers_everything_once_by_hand():
    plan = plan_of("engine.gather=codes")
    sent = bytes_sent(plan, codes=True)
    assert sent["weights"] == RING * (2 * (P - LINEAR) + LINEAR / 4)
    assert sent["gradients"] == bytes_sent(plan)["gradients"]
    rows = 2 * (5 * 16 + 2 * 24)
    assert sent["scalars"] == bytes_sent(plan)["scalars"] + RING * 8 * rows
    described = describe_traffic(plan)
    assert described["bytes_sent_per_rank_and_step_in_codes"] == {what: round(size) for what, size in sent.items()}
    assert describe_traffic(plan_of()) == described  # as engine.gather auto does
    in_16_bits = {"bytes_sent_per_rank_and_step"}
    for override in ("engine.gather=weights", "engine.offload=all", "phases.1.quantization.granularity=row"):
        assert set(describe_traffic(plan_of(override))) == in_16_bits, override


def test_blocks_without_codes_are_gathered_for_each_pass():
    plan = plan_of("engine.gather=codes", r"phases.1.quantization.include=layers\.0\..*_proj")
    block, coded = BLOCKS / 2, LINEAR / 2
    weights = bytes_sent(plan, codes=True)["weights"]
    assert weights == pytest.approx(RING * (2 * (OUTSIDE + block - coded) + coded / 4 + 2 * M * 2 * block))


def test_gradients_that_are_reduced_for_each_micro_batch():
    each, once = bytes_sent(plan_of("engine.reduce_gradients=micro-batch")), bytes_sent(plan_of())
    assert each == once | {"gradients": M * once["gradients"]}


def test_medians_are_found_by_counting_magnitudes():
    plan = plan_of("engine.gather=codes", "phases.1.quantization={preset: nielsen-2025}")
    medians = 2 * RING * 4 * 2**15 * 14  # an all-reduce of the counts of 14 matrices
    assert bytes_sent(plan, codes=True)["scalars"] == bytes_sent(plan)["scalars"] + medians


def test_codes_of_rows_that_four_does_not_divide_take_whole_bytes():
    plan = plan_of(
        "engine.gather=codes", "model.intermediate_size=25", "training.global_batch_sequences=30", world_size=5
    )
    outside = 65 * 16 + 2 * 2 * 20 + 20
    packed = 2 * (4 * 20 * 4 + 2 * 25 * 4 + 20 * 7)
    assert bytes_sent(plan, codes=True)["weights"] == pytest.approx(4 / 5 * (2 * outside + packed))


def test_a_teacher_is_gathered_once_for_each_micro_batch():
    taught = "phases=[{precision: 16-bit, steps: 4}, {precision: ternary, steps: 6, distillation: {}}]"
    assert bytes_sent(plan_of(taught))["teacher"] == M * RING * 2 * P


def test_unknown_deepspeed_keys_are_not_guessed_at():
    plan = zero(3, "engine.deepspeed.zero_optimization.zero_quantized_weights=true")
    assert describe_traffic(plan) == {"bytes_sent_per_rank_and_step": None}
    with pytest.raises(ValueError, match="zero_quantized_weights"):
        collectives(plan)


def test_the_tables_of_the_page_are_those_of_the_model():
    made = runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))
    assert made["BEGIN"] + made["tables"]() + made["END"] in (ROOT / "docs" / "scaling.md").read_text(), (
        "run benchmarks/scaling.py"
    )


# Real bytes

COUNTING = SUPPORT / "counting.py"
NAMESPACE = ["unshare", "--user", "--map-root-user", "--net"]
LIVE = {"stage3_max_live_parameters": 2_000_000, "stage3_max_reuse_distance": 2_000_000}
SMALL_PIECES = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1_000_000}
NOTHING_KEPT = SMALL_PIECES | {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
ENGINES = {
    "fsdp2": {"name": "fsdp2"},
    "hsdp": {"name": "fsdp2", "replicas": 2},
    "fsdp2, each micro-batch": {"name": "fsdp2", "reduce_gradients": "micro-batch"},
    "fsdp2, codes": {"name": "fsdp2", "gather": "codes"},
    "hsdp, codes": {"name": "fsdp2", "replicas": 2, "gather": "codes"},
    **{f"zero-{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in range(4)},
    "zero-3, nothing kept": {
        "name": "deepspeed", "zero_stage": 3, "deepspeed": {"zero_optimization": NOTHING_KEPT},
    },
    "zero-3, 2 M kept": {
        "name": "deepspeed", "zero_stage": 3, "deepspeed": {"zero_optimization": SMALL_PIECES | LIVE},
    },
}  # fmt: skip


def check_counted(jobs):
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("needs `unshare` and the right to make a network namespace")
    command = [*NAMESPACE, sys.executable, "-W", "ignore", str(COUNTING), json.dumps(jobs)]
    root = str(COUNTING.parents[1])
    environment = {key: value for key, value in os.environ.items() if key != IN_FORK_SERVER} | {"PYTHONPATH": root}
    if all(engine["name"] == "fsdp2" for _, engine, _ in jobs):
        environment[PRELOADED] = "tiny launcher.engine.fsdp launcher.engine.build"
    done = subprocess.run(command, capture_output=True, text=True, timeout=480, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 2 * len(jobs)  # of a 16-bit phase, and of a ternary one
    sys.stdout.write(done.stdout)  # `pytest -s` shows what docs/scaling.md quotes
    for row in rows:
        assert row["counted"] == pytest.approx(row["model"], rel=0.05), row


@pytest.mark.slow
def test_two_ranks_of_fsdp2_send_what_the_model_says():
    check_counted([["fsdp2, codes", ENGINES["fsdp2, codes"], 2]])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_engine_sends_what_the_model_says(ranks):
    check_counted([[name, engine, ranks] for name, engine in ENGINES.items()])
