"""A whole optimizer step with AdamW and with Muon, through the engine: time, and the optimizer's state.

One engine on one model takes turns: Muon goes on with AdamW's first moments, and AdamW starts anew. Once more AdamW
steps with weights that are averaged. Beside the times stand the FLOPs of Muon's iterations as `tritrain plan` counts
them, as a share of the step's forward and backward.

    python benchmarks/optimizers.py [--config configs/quickstart.yaml] [--repeats 9] [key.sub=value ...]
"""

import statistics
from functools import partial

import torch
from measure import interleaved, parser_of, report
from phases import take_step

from launcher.config.file import load_config
from launcher.engine.averaging import Average
from launcher.engine.build import build_engine
from launcher.engine.contract import load_weights
from launcher.plan.muon import muon_flops
from launcher.plan.plan import make_plan
from launcher.process.ranks import process_group
from launcher.run.automatic import concrete
from model.init import initial_value
from model.size import num_parameters


def main() -> None:
    parser = parser_of(__doc__, "configs/quickstart.yaml")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_intermixed_args()
    config = load_config(options.config, [*options.overrides, "optimizer.name=muon"])
    with process_group(600) as ranks:
        plan = make_plan(concrete(config, ranks)[0], ranks.world_size)
        engine = build_engine(plan, None, ranks)
        load_weights(engine, lambda name, shape, rows: initial_value(name, shape, config.model, config.run.seed, rows))
        assert engine.muon is not None
        shape = config.training.micro_batch_sequences, config.data.sequence_length
        tokens = torch.randint(0, config.model.vocab_size, shape)
        step = partial(take_step, engine, tokens, plan.most_micro_batches)
        skipped = torch.zeros((), device=ranks.device)

        def averaged_step() -> None:
            step()
            assert engine.average is not None
            engine.average.update_(engine.weights(), plan.tokens_at(0), skipped)

        steps = {"AdamW": step, "AdamW, averaged": averaged_step, "Muon": step}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        state_bytes = {}
        on_processor = ranks.device.type == "cpu"
        for turn in range(options.repeats + 1):
            for name in seconds:
                engine.muon.turn(on=name == "Muon")
                engine.average = None
                if name == "AdamW, averaged":
                    engine.average = Average(engine.weights(), 100 * plan.tokens_at(0), engine.device)
                steps[name]()
                if turn:
                    seconds[name] += interleaved({name: steps[name]}, 1, ranks.device, of_process=on_processor)[name]
                state_bytes[name] = sum(
                    tensor.numel() * tensor.element_size()
                    for shard in engine.shards()
                    for kind, tensor in shard.tensors.items()
                    if kind != "weight"
                )
    flops = plan.flops_per_token_at(0) * plan.tokens_at(0)
    base = statistics.median(seconds["AdamW"])
    lines = ["| | median ms | fastest to slowest | x | state MiB |", "| --- | ---: | --- | ---: | ---: |"]
    for name, values in seconds.items():
        median = statistics.median(values)
        lines.append(
            f"| {name} | {1e3 * median:.1f} | {1e3 * min(values):.1f} to {1e3 * max(values):.1f} "
            f"| {median / base:.3f} | {state_bytes[name] / 2**20:.1f} |"
        )
    text = (
        f"One 16-bit step of {config.run.name}'s model ({num_parameters(config.model) / 1e6:.1f} M parameters) on "
        f"{plan.most_micro_batches} x {shape[0]} x {shape[1]} tokens, {options.repeats} rounds in turns"
        f"{', in seconds of the process' if on_processor else ''}. Muon's iterations have "
        f"{muon_flops(plan) / flops:.1%} of the FLOPs of forward and backward.\n\n" + "\n".join(lines)
    )
    report(
        f"optimizers-{config.run.name}-{ranks.device.type}",
        text,
        {"median_seconds": {name: statistics.median(values) for name, values in seconds.items()}, "bytes": state_bytes},
    )


if __name__ == "__main__":
    main()
