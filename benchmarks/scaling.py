"""Tables and picture of docs/scaling.md, from the model of `tritrain plan`: computed, not measured.

python benchmarks/scaling.py     # rewrites both
"""

import math
import re
from pathlib import Path
from typing import Any

from launcher.config.file import parse_config
from launcher.plan.memory import memory_bytes_per_rank
from launcher.plan.plan import Plan, make_plan
from launcher.plan.traffic import bytes_sent
from model.size import num_parameters

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
PICTURE = PAGE.parent / "images" / "scaling.png"
BEGIN, END = "<!-- made by benchmarks/scaling.py -->\n", "<!-- end -->"
GIB = 2**30
RANKS = (8, 64, 512)
LLAMA3 = {"vocab_size": 128256, "num_kv_heads": 8, "intermediate_size": 8192, "tie_embeddings": True}
LLAMA2 = {"vocab_size": 32000, "tie_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "1B": LLAMA3 | {"hidden_size": 2048, "num_layers": 16, "num_heads": 32},
    "3B": LLAMA3 | {"hidden_size": 3072, "num_layers": 28, "num_heads": 24},
    "7B": LLAMA2 | {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "intermediate_size": 11008},
    "13B": LLAMA2 | {"hidden_size": 5120, "num_layers": 40, "num_heads": 40, "intermediate_size": 13824},
}
ENGINES = ("ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2", "FSDP2, each", "HSDP")


def plan_of(model: str, engine: str, ranks: int) -> Plan:
    """1,024 sequences of 4,096 tokens a step, two at once on a rank, with activation checkpointing."""
    if engine.startswith("ZeRO"):
        chosen: dict[str, Any] = {"name": "deepspeed", "zero_stage": int(engine[-1])}
    else:
        chosen = {"name": "fsdp2", "replicas": ranks // 8 if engine == "HSDP" else 1}
        chosen["reduce_gradients"] = "micro-batch" if engine == "FSDP2, each" else "step"
    tree = {
        "run": {"name": "scaling"},
        "model": MODELS[model] | {"max_sequence_length": 4096},
        "data": {"sources": [{"path": "shards"}], "sequence_length": 4096},
        "training": {
            "global_batch_sequences": 1024,
            "micro_batch_sequences": 2,
            "compute_dtype": "bf16",
            "activation_checkpointing": True,
        },
        "optimizer": {"learning_rate": 3e-4},
        "phases": [{"precision": "16-bit", "steps": 5000}, {"precision": "ternary", "steps": 5000}],
        "engine": chosen,
    }
    return make_plan(parse_config(tree), ranks)


def numbers(model: str, engine: str, ranks: int) -> tuple[float, float, float]:
    """GiB of memory, GiB sent in a step, and in one that gathers codes; the last is NaN where no engine does."""
    plan = plan_of(model, engine, ranks)
    held = sum(memory_bytes_per_rank(plan).values())
    in_codes = math.nan if engine.startswith("ZeRO") else sum(bytes_sent(plan, codes=True).values())
    return held / GIB, sum(bytes_sent(plan).values()) / GIB, in_codes / GIB


def tables() -> str:
    """Markdown, one table for each model."""
    lines = []
    for model in MODELS:
        parameters = num_parameters(plan_of(model, "FSDP2", 8).config.model)
        columns = [f"{what}, {ranks} GPUs" for ranks in RANKS for what in ("memory", "sent", "in codes")]
        lines += [f"**{model}** ({parameters:,} parameters), GiB:", "", "| engine | " + " | ".join(columns) + " |"]
        lines.append("| --- |" + " ---: |" * len(columns))
        for engine in ENGINES:
            cells = []
            for ranks in RANKS:
                held, sent, in_codes = numbers(model, engine, ranks)
                cells += [f"{held:.1f}", f"{sent:.1f}", "" if math.isnan(in_codes) else f"{in_codes:.1f}"]
            lines.append(f"| {engine} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def draw() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    ranks = (8, 16, 32, 64, 128, 256, 512)
    figure, (memory, sent) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for engine, marker in zip(ENGINES, "osD^Pv", strict=True):
        found = [numbers("7B", engine, n) for n in ranks]
        memory.plot(ranks, [held for held, _, _ in found], marker=marker, label=engine)
        [line] = sent.plot(ranks, [size for _, size, _ in found], marker=marker, label=engine)
        color = line.get_color()
        sent.plot(ranks, [size for _, _, size in found], marker=marker, linestyle="--", color=color)
    for axes, title in ((memory, "memory of a GPU, GiB"), (sent, "sent by a GPU in a step, GiB")):
        axes.set(title=f"7B: {title}", xlabel="GPUs", xscale="log", yscale="log")
        axes.set_xticks(ranks, [str(n) for n in ranks], minor=False)
        axes.minorticks_off()
        ticks = (5, 10, 20, 40, 80, 160) if axes is memory else (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.grid(alpha=0.3)
    memory.axhline(80, color="black", linewidth=1, linestyle=":")
    sent.plot([], [], color="black", linestyle="--", label="ternary, in codes")
    figure.legend(handles=[*memory.get_lines()[: len(ENGINES)], sent.get_lines()[-1]], loc="outside right center")
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    page = PAGE.read_text()
    PAGE.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: BEGIN + tables() + END, page, flags=re.DOTALL))
    draw()


if __name__ == "__main__":
    main()
