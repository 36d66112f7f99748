"""Converting a checkpoint of 1B parameters with moments, against DeepSpeed's own tools on the same folder.

A native ZeRO-2 folder of four ranks is made: plain DeepSpeed writes one of a tiny model, whose tensors are replaced by
those of the configuration's size. Then, each in a process of its own, in turns: our conversion into a run against
`ds_to_universal` (both keep weights and moments), and our conversion to a Hugging Face folder in fp32 against
`zero_to_fp32` (both keep the weights); and reading all fp32 weights into memory, ours against `zero_to_fp32`'s own
function. A command begins with its source out of the page cache and ends when what it
wrote has reached the disk. Peak memory is the largest resident set of any process of the command. Needs five times the
checkpoint's size on disk.

    python benchmarks/convert.py [--config configs/olmo-1b.yaml] [--rounds 2] [--folder DIR] [key.sub=value ...]
"""

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from measure import report

from launcher.checkpoint.source import start_checking
from launcher.config.file import load_config
from launcher.formats.open import open_source
from model.size import num_parameters, parameter_shapes
from model.transformer import ModelConfig, Transformer

NUM_RANKS = 4
CLI = "from launcher.cli import main; main()"
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/olmo-1b.yaml"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work; by default the temporary folder")
    parser.add_argument("--name", default="convert", help="of the file of results")
    parser.add_argument("overrides", nargs="*", help="key.sub=value: change the configuration")
    options = parser.parse_args()
    model = load_config(options.config, options.overrides).model
    with tempfile.TemporaryDirectory(dir=options.folder) as text:
        folder = Path(text)
        native = folder / "native"
        make_native(model, native)
        tag, out = native / "global_step1", folder / "out"
        tritrain = [sys.executable, "-c", CLI, "convert", str(native), "--config", str(options.config)]
        tritrain += options.overrides
        commands = {
            "ours, to a run": [*tritrain, "--to", str(out), "--phase", "1"],
            "ds_to_universal": [
                *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"),
                *("--input_folder", str(tag), "--output_folder", str(out), "--inject_missing_state"),
                *("--num_extract_workers", "1", "--num_merge_workers", "1"),
            ],
            "ours, to Hugging Face": [*tritrain, "--to", str(out), "--format", "hf", "--dtype", "fp32"],
            "zero_to_fp32": [
                *(sys.executable, "-m", "deepspeed.utils.zero_to_fp32", str(native), str(out)),
                "--safe_serialization",
            ],
        }
        commands |= {
            name: [sys.executable, __file__, f"--load-{whose}", str(native)]
            for name, whose in (("ours, into memory", "ours"), ("zero_to_fp32, into memory", "theirs"))
        }
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                forget(tag)
                results[name].append(timed(command, folder / "log"))
                shutil.rmtree(out, ignore_errors=True)
        size = sum(path.stat().st_size for path in tag.iterdir())
    numbers = {
        name: {
            "seconds": round(statistics.median(seconds for seconds, _ in runs), 1),
            "peak_gib": round(max(peak for _, peak in runs), 2),
        }
        for name, runs in results.items()
    }
    rows = [f"| {name} | {values['seconds']} | {values['peak_gib']} |" for name, values in numbers.items()]
    largest = max(math.prod(shape) for shape in parameter_shapes(model).values()) * 4 / GIB
    pairs = (
        ("ours, to a run", "ds_to_universal"),
        ("ours, to Hugging Face", "zero_to_fp32"),
        ("ours, into memory", "zero_to_fp32, into memory"),
    )
    ratios = [
        f"{theirs} takes {numbers[theirs]['seconds'] / numbers[ours]['seconds']:.1f} times as long as ours and "
        f"{numbers[theirs]['peak_gib'] / numbers[ours]['peak_gib']:.1f} times the memory."
        for ours, theirs in pairs
    ]
    text = (
        f"{num_parameters(model) / 1e9:.2f} B parameters, a native folder of {size / GIB:.1f} GiB, the largest tensor "
        f"{largest:.2f} GiB; {options.rounds} interleaved rounds.\n\n"
        "| | seconds, median | peak memory, GiB |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n\n" + "\n".join(ratios)
    )
    report(options.name, text, numbers, ("torch", "deepspeed"))


def forget(folder: Path) -> None:
    """Let the page cache forget a folder's files, so that each command reads them from the disk."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(command: list[str], log: Path) -> tuple[float, float]:
    """Seconds and peak memory in GiB of a command; a child of its own waits for it, so that others do not count."""
    code = (
        "import os, resource, subprocess, sys, time\n"
        "began = time.perf_counter()\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)\n"
        "os.sync()\n"
        "print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": root, "DS_ACCELERATOR": "cpu"}
    with log.open("w") as errors:
        result = subprocess.run(
            [sys.executable, "-c", code, *command], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    seconds, peak_kib = result.stdout.split()
    return float(seconds), int(peak_kib) * 1024 / GIB


def make_native(model: ModelConfig, folder: Path) -> None:
    """A ZeRO-2 folder as plain DeepSpeed writes it, of one group of parameters and `NUM_RANKS` ranks."""
    subprocess.run(
        [sys.executable, __file__, "--write-tiny", str(folder)], check=True, stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    tag = folder / "global_step1"
    # Our own file of a moment ago: what it names can be trusted.
    states = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=False)
    path = tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    optimizer = torch.load(path, weights_only=False)
    shapes = parameter_shapes(model)
    total = sum(math.prod(shape) for shape in shapes.values())
    length = math.ceil(total / (2 * NUM_RANKS)) * 2
    states |= {"param_shapes": [OrderedDict((n, torch.Size(s)) for n, s in shapes.items())], "dp_world_size": NUM_RANKS}
    states["module"] = OrderedDict((name, torch.empty(0)) for name in shapes)
    torch.save(states, tag / "mp_rank_00_model_states.pt")
    content = optimizer["optimizer_state_dict"]
    address = type(next(iter(content["param_slice_mappings"][0].values())))
    content |= {"partition_count": [NUM_RANKS], "param_alignment_paddings": [[0] * len(shapes)]}
    for rank in range(NUM_RANKS):
        begin, end, position = rank * length, min((rank + 1) * length, total), 0
        slices = OrderedDict()
        for name, shape in shapes.items():
            low, high = max(position, begin), min(position + math.prod(shape), end)
            if low < high:
                slices[name] = address(numel=high - low, start=low - begin)
            position += math.prod(shape)
        generator = torch.Generator().manual_seed(rank)
        values = torch.randn(2**22, generator=generator).repeat(math.ceil(length / 2**22))[:length].clone()
        content["param_slice_mappings"] = [slices]
        content["single_partition_of_fp32_groups"] = [values]
        content["group_paddings"] = [length * NUM_RANKS - total if rank == NUM_RANKS - 1 else 0]
        state = content["base_optimizer_state"]["state"][0]
        state["exp_avg"], state["exp_avg_sq"] = values * 1e-3, values.square() * 1e-6
        torch.save(optimizer, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def write_tiny(folder: Path) -> None:
    """Let plain DeepSpeed take a step of ZeRO-2 and save."""
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29517",
    }
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for minutes
    model = Transformer(ModelConfig(vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64))
    optimizer = torch.optim.AdamW(model.parameters())
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    tokens = torch.randint(0, 64, (1, 17))
    engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
    engine.step()
    engine.save_checkpoint(str(folder))


def load_ours(folder: Path) -> int:
    """Read every weight of a native folder; returns how many elements."""
    source = open_source(str(folder))
    start_checking(source, ("weight",))
    weights = {name: source.read("weight", name, 0, math.prod(shape)) for name, shape in source.shapes.items()}
    return sum(weight.numel() for weight in weights.values())


def load_theirs(folder: Path) -> int:
    """The same by DeepSpeed."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return sum(weight.numel() for weight in get_fp32_state_dict_from_zero_checkpoint(str(folder)).values())


if __name__ == "__main__":
    parts = {"--write-tiny": write_tiny, "--load-ours": load_ours, "--load-theirs": load_theirs}
    if sys.argv[1:] and sys.argv[1] in parts:
        parts[sys.argv[1]](Path(sys.argv[2]))
    else:
        main()
