"""Every shipped configuration on as many ranks as it is meant for, without them: fake tensors and a fake process group.

The engine is the real one; only the collectives do nothing, and tensors have no storage. DeepSpeed cannot be built like
that (it looks at values while it sets up), so its configuration is run on FSDP2 here, and its own collectives are
counted for real in tests/launcher/plan/test_traffic.py.
"""

import math
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from places import ROOT
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.config.automatic import ANY_GPU, made_concrete
from launcher.config.file import load_config
from launcher.engine.build import build_engine
from launcher.plan.memory import gathers_codes, memory_bytes_per_rank
from launcher.plan.plan import make_plan
from launcher.plan.schedule import StepSizes
from launcher.plan.traffic import collectives
from launcher.process.ranks import Ranks
from model.size import parameter_shapes
from quant.linear import set_strengths_

CONFIGS = ROOT / "configs"
FULL_SIZES = {"quickstart": 2, "english-4m": 2, "tiny-150m": 8, "olmo-1b": 256, "llama-1b": 256, "bitnet-2b": 256}
"""As docs/scaling.md says."""
ON_FSDP2 = ("engine.name=fsdp2", "engine.zero_stage=null")


class Recorder(TorchDispatchMode):
    """Notes the collectives: kind and number of ranks, and the bytes of the whole tensors."""

    def __init__(self):
        super().__init__()
        self.payload_bytes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            kind, whole = {
                "_allgather_base_": ("all-gather", args[0]),
                "allgather_": ("all-gather", args[0][0]),
                "_reduce_scatter_base_": ("reduce-scatter", args[1]),
                "allreduce_": ("all-reduce", args[0][0] if isinstance(args[0], list) else args[0]),
            }[function._schema.name.removeprefix("c10d::")]
            [group] = [dist.ProcessGroup.unbox(arg) for arg in args if is_group(arg)]
            for tensor in whole if isinstance(whole, list) else [whole]:
                self.payload_bytes[kind, group.size()] += tensor.numel() * tensor.element_size()
        return function(*args, **(kwargs or {}))


def is_group(arg):
    return isinstance(arg, torch.ScriptObject) and "ProcessGroup" in arg._type().name()


@pytest.fixture
def fake_ranks(monkeypatch):
    """Join a fake group; weights that an engine makes are fake from then on."""
    import torch.distributed._tools.fake_collectives
    from torch.testing._internal.distributed.fake_pg import FakeStore

    mode, to_empty = FakeTensorMode(allow_non_fake_inputs=True), nn.Module.to_empty

    def to_fake(module, **options):
        with mode:
            return to_empty(module, **options)

    def join(rank, world_size):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        return Ranks(rank, world_size, 0, torch.device("cpu")), mode

    monkeypatch.setattr(nn.Module, "to_empty", to_fake)
    yield join
    dist.destroy_process_group()


def check(name, rank, world_size, join, *overrides):
    engine_overrides = ON_FSDP2 if name == "bitnet-2b" else ()
    config = load_config(CONFIGS / f"{name}.yaml", ["training.compile=false", *engine_overrides, *overrides])
    config, _ = made_concrete(config, ANY_GPU)
    plan = make_plan(config, world_size)
    ranks, mode = join(rank, world_size)
    replicas = config.engine.replicas
    shards, shard_rank = world_size // replicas, rank % (world_size // replicas)
    for phase in plan.phases[:2]:
        in_codes = gathers_codes(plan) and phase.quantization is not None
        expected = Counter()
        for collective in collectives(plan, codes=in_codes):
            expected[collective.kind, collective.group_size] += collective.count * collective.payload_bytes
        expected["all-reduce", world_size] -= 8  # whether to stop or to save, which the loop asks for, not the engine
        engine = build_engine(plan, phase, ranks)
        elements = {shard.name: shard.tensors["weight"].numel() for shard in engine.shards()}
        for parameter, shape in parameter_shapes(config.model).items():
            rows = math.ceil(shape[0] / shards)
            mine = max(0, min(rows, shape[0] - shard_rank * rows))
            assert elements[parameter] == mine * math.prod(shape[1:]), parameter
        estimate = memory_bytes_per_rank(plan)["moments"]
        assert rank != 0 or 8 * sum(elements.values()) == pytest.approx(estimate, rel=0.01)
        with mode, Recorder() as recorder:
            if phase.quantization is not None:
                set_strengths_(engine.model, *plan.strengths_at(phase.end - 1))
            tokens = torch.zeros(config.training.micro_batch_sequences, config.data.sequence_length, dtype=torch.long)
            for index in range(plan.most_micro_batches):
                last = index == plan.most_micro_batches - 1
                engine.backward(engine.forward(tokens, tokens).loss / plan.most_micro_batches, last=last)
            engine.step(StepSizes(1e-3))
        assert {key: size for key, size in recorder.payload_bytes.items() if key[1] > 1} == +expected


def test_there_is_a_full_size_for_every_shipped_configuration():
    assert set(FULL_SIZES) == {path.stem for path in CONFIGS.glob("*.yaml")}


def test_quickstart_at_full_size(fake_ranks):
    check("quickstart", 0, 2, fake_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("name", FULL_SIZES)
def test_every_shipped_configuration_at_full_size(name, place, fake_ranks):
    world_size = FULL_SIZES[name]
    check(name, 0 if place == "first" else world_size - 1, world_size, fake_ranks)


@pytest.mark.slow
def test_replicas_at_full_size(fake_ranks):
    check("llama-1b", 255, 256, fake_ranks, "engine.replicas=32")


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 32])
def test_codes_at_full_size(fake_ranks, replicas):
    check("llama-1b", 255, 256, fake_ranks, "engine.gather=codes", f"engine.replicas={replicas}")
