"""The table of steps in README.md, from `results/`: what was measured there, and what was not.

python benchmarks/readme.py     # rewrites it
"""

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- made by benchmarks/readme.py -->\n", "<!-- end -->"
COLUMNS = {"CPU, fp32": "peers-1024-cpu-fp32", "GPU, bf16": "peers-2048-cuda-bf16"}
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
    """Markdown: time of a step and bytes kept for its backward pass, relative to the 16-bit step."""
    results = {column: numbers(name) for column, name in COLUMNS.items()}
    heads = [
        f"[{column}](benchmarks/results/{COLUMNS[column]}.md)" if found else column for column, found in results.items()
    ]
    lines = ["| a block's step, compiled | " + " | ".join(f"time, {head} | kept" for head in heads) + " |"]
    lines.append("| --- |" + " ---: | ---: |" * len(heads))
    for variant, shown in ROWS.items():
        cells = []
        for found in results.values():
            measured = found.get(variant)
            if measured is None:
                cells += ["not measured", ""]
            else:
                kept = measured["saved_bytes"] / found["16-bit, compiled"]["saved_bytes"]
                cells += [f"{measured['ratio']:.2f}", f"{kept:.2f}"]
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
