"""Plain DeepSpeed, which trains, writes its folders and goes on from ours.

Nothing of ours but the model and its parameter groups takes part in the training here.
"""

import argparse
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.checkpoint.source import KINDS, Source
from launcher.config.optimizer import OptimizerConfig
from launcher.engine.adamw import build_adamw, parameter_groups
from model.init import initialize_
from model.transformer import ModelConfig, Output, Transformer

# Shapes that neither 2 nor 3 ranks divide.
MODEL = ModelConfig(
    vocab_size=67, hidden_size=18, num_layers=2, num_heads=3, num_kv_heads=1, intermediate_size=29, sub_norm=True,
    max_sequence_length=16,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(learning_rate=3e-3)
NUM_SEQUENCES, NUM_STEPS = 6, 3
Truth = dict[str, dict[str, Tensor]]


class Tied(nn.Module):
    """An embedding that is the output head too, and a layer that may be frozen."""

    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(67, 7)
        self.scale = nn.Linear(7, 7)
        self.middle = nn.Linear(7, 7, bias=False)
        self.head = nn.Linear(7, 67, bias=False)
        self.head.weight = self.embed.weight
        self.scale.requires_grad_(not frozen)
        self.register_buffer("offset", torch.ones(7))

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor) -> Output:
        hidden = torch.tanh(self.middle(self.scale(self.embed(tokens_BT) + self.offset)))
        return Output(loss=nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels_BT.flatten()))


def plain_engine(
    stage: int,
    *,
    bf16: bool,
    model: str = "transformer",
    universal: bool = False,
    accumulates_in_fp32: bool = False,
    **zero: Any,
) -> Any:
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)
    torch.manual_seed(0)
    if model == "transformer":
        module: nn.Module = Transformer(MODEL)
        initialize_(module, 0)
    else:
        module = Tied(frozen=model == "frozen")
    trained = [(name, p.ndim, p) for name, p in module.named_parameters() if p.requires_grad]
    optimizer = build_adamw(parameter_groups(trained, OPTIMIZER), OPTIMIZER, fused=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    config = {
        "train_micro_batch_size_per_gpu": NUM_SEQUENCES // dist.get_world_size(),
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "bf16": {"enabled": bf16},
        "gradient_clipping": 0.5,
        "checkpoint": {"load_universal": universal},
    }
    if accumulates_in_fp32:  # stage 1 in bf16 then has an optimizer of its own
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    return engine


def train(engine: Any, first: int, num_steps: int) -> list[float]:
    """Mean losses of the same global batches on any number of ranks."""
    losses = []
    for step in range(first, first + num_steps):
        tokens = torch.randint(0, 67, (NUM_SEQUENCES, 17), generator=torch.Generator().manual_seed(step))
        mine = tokens.chunk(dist.get_world_size())[dist.get_rank()]
        loss = engine(mine[:, :-1], mine[:, 1:]).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def truth_of(engine: Any, stage: int, *, bf16: bool) -> Truth:
    """What DeepSpeed holds: in stages 1 and 2 by where weights lie in memory, in stage 3 by what it says itself.

    In stages 1 and 2 it says wrong things with ``round_robin_gradients``.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    outer, truth = engine.optimizer, {}
    if stage in (1, 2):
        return _truth_in_memory(outer, engine.basic_optimizer.state, outer.param_names)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 0:
            master = parameter
            if bf16:
                lows, highs = (
                    [p for group in groups for p in group] for groups in (outer.fp16_groups, outer.fp32_groups)
                )
                master = next(high for low, high in zip(lows, highs, strict=True) if low is parameter)
            state = engine.basic_optimizer.state[master]
            values = [master.detach(), state["exp_avg"], state["exp_avg_sq"]]
        else:
            moments = (safe_get_full_optimizer_state(parameter, kind) for kind in KINDS[1:])
            values = [safe_get_full_fp32_param(parameter), *moments]
        truth[name] = {kind: value.flatten().clone() for kind, value in zip(KINDS, values, strict=True)}
    return truth


def _truth_in_memory(outer: Any, states: Any, names: dict[Tensor, str]) -> Truth:
    """The fp32 state of parameters, which are views of a flat tensor of which each rank has a part in fp32."""
    truth = {}
    if hasattr(outer, "bf16_groups"):
        groups = zip(outer.fp32_groups_flat_partition, outer.bf16_groups, outer.bf16_groups_flat, strict=True)
    else:
        groups = zip(outer.single_partition_of_fp32_groups, outer.bit16_groups, outer.bit16_groups_flat, strict=True)
    for master, parameters, flat in groups:
        whole = {}
        for kind, mine in zip(KINDS, (master.detach(), *(states[master][kind] for kind in KINDS[1:])), strict=True):
            parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, mine)
            whole[kind] = torch.cat(parts)
        for parameter in parameters:
            start = (parameter.data_ptr() - flat.data_ptr()) // flat.itemsize
            assert 0 <= start <= start + parameter.numel() <= flat.numel()
            truth[names[parameter]] = {
                kind: values[start : start + parameter.numel()].clone() for kind, values in whole.items()
            }
    return truth


def write_folders(root: str, jobs: list[tuple[str, int, dict[str, Any]]]) -> dict[str, Any]:
    results = {}
    for name, stage, options in jobs:
        engine = plain_engine(stage, **options)
        train(engine, 0, NUM_STEPS)
        truth = truth_of(engine, stage, bf16=options["bf16"])
        engine.save_checkpoint(f"{root}/{name}", client_state={"args": argparse.Namespace(seed=3)})
        results[name] = {"truth": truth, "losses": train(engine, NUM_STEPS, NUM_STEPS)}
        engine.destroy()
    return results


def continue_folders(jobs: list[tuple[str, int, dict[str, Any]]]) -> list[list[float]]:
    curves = []
    for folder, stage, options in jobs:
        engine = plain_engine(stage, universal=True, **options)
        engine.load_checkpoint(folder)
        if stage == 3:
            for state in engine.optimizer.optimizer.state.values():
                state["step"] = state["step"].clone()  # as `write_universal` says
        curves.append(train(engine, NUM_STEPS, NUM_STEPS))
        engine.destroy()
    return curves


def continue_and_write(continued: list[Any], root: str, written: list[Any]) -> dict[str, Any]:
    return {"curves": continue_folders(continued), "written": write_folders(root, written)}


FP32, BF16 = {"bf16": False}, {"bf16": True}
AT_2 = [
    ("zero0", 0, FP32),
    ("zero0-bf16", 0, BF16),
    ("zero1", 1, FP32),
    ("zero2-bf16", 2, BF16),
    ("zero2", 2, FP32),
    ("zero3", 3, FP32),
    ("zero1-frozen", 1, FP32 | {"model": "frozen"}),
    ("zero3-frozen", 3, FP32 | {"model": "frozen"}),
    ("zero0-tied", 0, FP32 | {"model": "tied"}),
    ("zero2-tied", 2, FP32 | {"model": "tied"}),
    ("zero1-aligned", 1, BF16 | {"parameter_alignment": True}),
    ("zero2-robin", 2, FP32 | {"round_robin_gradients": True}),
    ("zero1-bf16-robin", 1, BF16 | {"round_robin_gradients": True}),
]
AT_3 = [
    ("zero2x3", 2, FP32),
    ("zero3x3", 3, FP32 | {"sub_group_size": 2000}),
    ("zero3x3-bf16", 3, BF16),
]


def assert_holds(source: Source, truth: Truth, num_ranges: int = 5) -> None:
    rng = random.Random(0)
    assert source.has_moments
    for name, kinds in truth.items():
        for kind, expected in kinds.items():
            assert torch.equal(source.read(kind, name, 0, len(expected)), expected), (name, kind)
            for _ in range(num_ranges):
                start = rng.randrange(len(expected))
                length = rng.randint(0, len(expected) - start)
                found = source.read(kind, name, start, length)
                assert found.dtype == torch.float32
                assert torch.equal(found, expected[start : start + length]), (name, kind, start, length)


def copied(folder: Path, to: Path) -> Path:
    """The tag's folder of a copy, without the scripts that DeepSpeed leaves there."""
    shutil.copytree(next(folder.glob("global_step*")), to, ignore=shutil.ignore_patterns("*.py"))
    return to


RANK_1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
