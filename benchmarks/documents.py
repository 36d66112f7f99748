"""What keeping documents apart costs: a training step with `data.documents: masked`, and one with `joined`.

Both run in turns in one process, forward, backward and optimizer of the FSDP2 engine, in a 16-bit phase. Documents
begin at random, one in `--tokens-per-document` tokens.

    python benchmarks/documents.py [--config configs/quickstart.yaml] [--repeats 30] [key.sub=value ...]
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
from model.init import initial_value

FIRST_TOKEN = 0


def main() -> None:
    parser = parser_of(__doc__, "configs/quickstart.yaml")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--tokens-per-document", type=int, default=100)
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    with process_group(600) as ranks:
        plan = make_plan(concrete(config, ranks)[0], ranks.world_size)
        engine = build_engine(plan, plan.phases[0], ranks)
        load_weights(engine, lambda name, shape, rows: initial_value(name, shape, config.model, config.run.seed, rows))
        shape = (config.training.micro_batch_sequences, config.data.sequence_length)
        tokens = torch.randint(1, config.model.vocab_size, shape)
        tokens[torch.rand(shape) * options.tokens_per_document < 1] = FIRST_TOKEN

        def step_of(first_token: int | None) -> Callable[[], None]:
            def step() -> None:
                engine.keep_apart(first_token)
                batches = ((tokens, tokens.roll(-1, 1)) for _ in range(plan.most_micro_batches))
                accumulate_gradients(engine, batches, plan.most_micro_batches)
                engine.step(StepSizes(1e-4))

            for _ in range(3):
                step()
            return step

        steps = {"joined": step_of(None), "masked": step_of(FIRST_TOKEN)}
        on_processor = ranks.device.type == "cpu"
        seconds = interleaved(steps, options.repeats, ranks.device, of_process=on_processor)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    text = (
        f"One step of {config.run.name} on {plan.most_micro_batches} x {shape[0]} x {shape[1]} tokens, a document in "
        f"{options.tokens_per_document}; {options.repeats} rounds"
        f"{', seconds of the processor' if on_processor else ''}.\n\n" + table(seconds, "joined")
    )
    report("documents", text, {"median_seconds": medians, "ratio": round(medians["masked"] / medians["joined"], 4)})


if __name__ == "__main__":
    main()
