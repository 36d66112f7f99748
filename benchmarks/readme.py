"""The table of steps in README.md, from `results/`: what was measured there, and what was not.

python benchmarks/readme.py     # rewrites it
"""

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "README.md"
LINK = "benchmarks/results/"
BEGIN, END = "<!-- made by benchmarks/readme.py -->\n", "<!-- end -->"
VNNI, AVX2 = "peers-1024-cpu-vnni-fp32", "peers-1024-cpu-avx2-fp32"
PHASES = "phases-llama-1b-cuda-bf16"
ROWS = {
    "16-bit, compiled": "16 bits",
    "naive fake quantization": "fake quantization in plain PyTorch",
    "bitlinear": "`bitlinear`",
    "torchao bitnet_training": "torchao's `bitnet_training`",
    "ternary": "**ternary**",
    "ternary, int8-input": "**ternary, `backward: int8-input`**",
    "ternary, int8": "**ternary, `backward: int8`**",
}


def table() -> str:
    """Markdown: time and bytes kept of a block's step, and time of a whole one, relative to 16 bits."""
    vnni, avx2, phases = numbers(VNNI), numbers(AVX2), numbers(PHASES)
    heads = [
        f"[a block's step, fp32, CPU with VNNI]({LINK}{VNNI}.md)",
        f"[with AVX2 alone]({LINK}{AVX2}.md)",
        "kept for backward",
        f"[a whole step, 1.2 B, H200, bf16]({LINK}{PHASES}.md)",
    ]
    lines = [f"| compiled | {' | '.join(heads)} |", "| --- | ---: | ---: | ---: | ---: |"]
    for variant, shown in ROWS.items():
        cells = ["not measured", "not measured", "", "not measured"]
        for column, peers in enumerate((vnni, avx2)):
            if (found := peers.get(variant)) is not None:
                cells[column] = f"{found['ratio']:.2f}"
                cells[2] = f"{found['saved_bytes'] / peers['16-bit, compiled']['saved_bytes']:.2f}"
        times = phases.get("median_seconds", {})
        if (seconds := times.get(variant.removesuffix(", compiled"))) is not None:
            cells[3] = f"{seconds / times['16-bit']:.2f}"
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def numbers(name: str) -> dict[str, Any]:
    """The numbers of a result; none if it was not measured."""
    path = RESULTS / f"{name}.md"
    if not path.exists():
        return {}
    found = re.search(r"```json\n(.*)\n```", path.read_text())
    return json.loads(found[1]) if found else {}  # type: ignore[no-any-return]


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: BEGIN + table() + END, page, flags=re.DOTALL))
