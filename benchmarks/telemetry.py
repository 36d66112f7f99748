"""What looking at quantization costs: a ternary step that is looked at, one that is noted for comparison, and neither.

All three run in turns in one process, forward, backward and AdamW of the FSDP2 engine. At the default interval of n
steps, one step in n is looked at and the one before it is noted; that share of the step time is what telemetry costs.

    python benchmarks/telemetry.py [--config configs/quickstart.yaml] [--repeats 30] [key.sub=value ...]
"""

import statistics
from collections.abc import Callable

import torch
from measure import interleaved, parser_of, report, table

from launcher.config.file import load_config
from launcher.engine.build import build_engine
from launcher.engine.contract import load_weights
from launcher.plan.plan import make_plan
from launcher.plan.schedule import StepSizes
from launcher.process.ranks import process_group
from launcher.run.automatic import concrete
from launcher.training.step import accumulate_gradients
from launcher.training.telemetry import Telemetry
from model.init import initial_value
from model.size import num_parameters


def main() -> None:
    parser = parser_of(__doc__, "configs/quickstart.yaml")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    interval_steps = config.logging.quantization_interval_steps
    if interval_steps is None:
        parser.error("logging.quantization_interval_steps is null: there is nothing to measure")
    with process_group(600) as ranks:
        plan = make_plan(concrete(config, ranks)[0], ranks.world_size)
        phase = next(phase for phase in plan.phases if phase.quantization is not None)
        engine = build_engine(plan, phase, ranks)
        load_weights(engine, lambda name, shape, rows: initial_value(name, shape, config.model, config.run.seed, rows))
        shape = (config.training.micro_batch_sequences, config.data.sequence_length)
        tokens = torch.randint(0, config.model.vocab_size, shape)
        telemetry = Telemetry(engine, phase, plan, interval_steps)
        # The last steps of the phase: its end is looked at, the step before it noted, and those before are neither.
        end = phase.end

        def step_of(number: int, *, with_telemetry: bool) -> Callable[[], None]:
            def step() -> None:
                watch = telemetry if with_telemetry else None
                if watch is not None:
                    watch.begin(number)
                batches = ((tokens, tokens.roll(-1, 1)) for _ in range(plan.most_micro_batches))
                accumulate_gradients(engine, batches, plan.most_micro_batches, telemetry=watch)
                if watch is not None:
                    watch.look_at_gradients(engine)
                engine.step(StepSizes(1e-4))
                if watch is not None:
                    watch.collect()

            for _ in range(3):
                step()
            return step

        seconds = interleaved(
            {
                "without": step_of(end - 3, with_telemetry=False),
                "noted": step_of(end - 2, with_telemetry=True),
                "looked at": step_of(end - 1, with_telemetry=True),
            },
            options.repeats,
            ranks.device,
        )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    extra = medians["noted"] + medians["looked at"] - 2 * medians["without"]
    share = extra / interval_steps / medians["without"]
    text = (
        f"One step of {config.run.name}'s model ({num_parameters(config.model) / 1e6:.1f} M parameters) on "
        f"{plan.most_micro_batches} x {shape[0]} x {shape[1]} tokens, {options.repeats} rounds.\n\n"
        + table(seconds, "without")
        + f"\n\nAt an interval of {interval_steps} steps telemetry takes {share:.2%} of the step time."
    )
    report(f"telemetry-{ranks.device.type}", text, {"median_seconds": medians, "share_of_step_time": round(share, 5)})


if __name__ == "__main__":
    main()
