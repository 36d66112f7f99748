"""Runs of a second or two, in the process of the test or on several ranks."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from launcher.config.sections import Config
from launcher.plan.plan import make_plan
from launcher.process.console import Console
from launcher.process.ranks import Ranks
from launcher.run.folder import RunFolder
from launcher.train import train
from launcher.watch.stopping import StopRequest

ENGINES: dict[str, dict[str, Any]] = {
    "fsdp2": {"name": "fsdp2"},
    "fsdp2-keep-gathered": {"name": "fsdp2", "reshard_after_forward": False},
    "hsdp": {"name": "fsdp2", "replicas": 2},
    "fsdp2-offload": {"name": "fsdp2", "offload": "all"},
    **{f"zero-{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in range(4)},
    "zero-2-offload": {"name": "deepspeed", "zero_stage": 2, "offload": "optimizer"},
    "zero-3-offload": {"name": "deepspeed", "zero_stage": 3, "offload": "all"},
}


class StopAfter(StopRequest):
    """Asks for a stop at the end of the n-th step from now."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def agree(self, ranks: Ranks, due: Sequence[bool] = ()) -> tuple[bool, ...]:
        self.steps -= 1
        _, *flags = super().agree(ranks, due)
        return self.steps <= 0, *flags


def run(config: Config, steps: int = 10**6) -> str:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    folder = RunFolder(config)
    plan = make_plan(config, ranks.world_size)
    if ranks.is_first:
        folder.prepare([phase.end - phase.start for phase in plan.phases])
    dist.barrier()
    return train(plan, ranks, folder, StopAfter(steps), Console(silent=True))
