"""The `README.md` of an export: what the model is, what it was trained on and how, and how to load it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from data.errors import DataError
from data.prepared import TRAIN, read_manifest
from launcher.checkpoint.manifest import Manifest
from launcher.checkpoint.reader import CheckpointReader
from launcher.config.sections import Config
from launcher.formats.opened import Exportable
from launcher.plan.course import make_course
from launcher.process.console import human_count
from launcher.run.log_keys import TRAINED, cross_entropy_of
from launcher.run.requeue import read_lines
from launcher.run.scores import (
    HARNESS_COLUMNS,
    RESULTS,
    TASK_COLUMNS,
    harness_table_of,
    is_of_harness,
    results_of,
    table_of,
)
from model.size import num_linear_parameters, num_parameters

Reader = Literal["Transformers", "mlx-lm", "ONNX Runtime"]
"""A program that a folder is written for."""


LOADING: dict[Reader, str] = {
    "Transformers": """
```python
from transformers import AutoModelForCausalLM{tokenizer_import}

model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")
{tokenizer_line}```
""",
    "mlx-lm": """
```python
from mlx_lm import load

model, tokenizer = load(FOLDER)
```
""",
    "ONNX Runtime": """
```python
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
```
""",
}


LIBRARIES: dict[Reader, str] = {"Transformers": "transformers", "mlx-lm": "mlx", "ONNX Runtime": "onnx"}


def model_card(
    exportable: Exportable,
    record: Mapping[str, Any],
    holds: str,
    reader: Reader,
    *,
    has_tokenizer: bool,
    license_name: str | None,
) -> str:
    """Markdown, with the metadata that model hubs read on top, and without any path of this machine.

    Args:
        exportable: whose run is described; of a checkpoint from elsewhere there is little to say.
        record: where it comes from, see `launcher.formats.provenance.source_record`.
        holds: what the weights are.
        reader: that the folder is written for.
        has_tokenizer: whether the folder has one.
        license_name: of the weights; None leaves it out.
    """
    config, model = exportable.config, exportable.model
    lines = [
        "---",
        *([f"license: {license_name}"] if license_name else []),
        f"library_name: {LIBRARIES[reader]}",
        "pipeline_tag: text-generation",
        *(["tags: [bitnet, ternary]"] if exportable.quantization else []),
        "---",
        "",
        f"# {record['source']}",
        "",
        f"A language model with {num_parameters(model):,} parameters, {num_linear_parameters(model):,} of them in the "
        f"linear layers of its blocks. This folder holds {holds}.",
        "",
        "## Loading",
        LOADING[reader].format(
            tokenizer_import=", AutoTokenizer" if has_tokenizer else "",
            tokenizer_line="tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n" if has_tokenizer else "",
        ),
    ]
    if config is not None and isinstance(exportable.source, CheckpointReader):
        lines += [*_training(exportable, config, exportable.source.manifest), *_measured(exportable, config)]
    lines += ["## Provenance", "", *_table(["", ""], [[key, f"`{value}`"] for key, value in record.items()])]
    return "\n".join(lines)


def _training(exportable: Exportable, config: Config, manifest: Manifest) -> list[str]:
    course = make_course(config)
    phases = [
        [str(phase.index), phase.precision, phase.objective, f"{phase.start:,}", f"{min(phase.end, manifest.step):,}"]
        for phase in course.phases
        if phase.start < manifest.step
    ]
    tokens, largest = manifest.tokens, course.tokens_at(max(0, manifest.step - 1))
    lengths = {length for start, length in course.lengths if start < max(1, manifest.step)}
    up_to = "up to " if course.tokens_at(0) != largest else ""
    lines = [
        "## Training",
        "",
        f"{manifest.step:,} steps of {up_to}{largest:,} tokens, {tokens:,} ({human_count(tokens)}) in all, "
        f"in sequences of {'up to ' if len(lengths) > 1 else ''}{max(lengths):,}.",
        "",
        *_table(["phase", "precision", "objective", "from step", "to step"], phases),
    ]
    begun = [phase for phase in course.phases if phase.start < max(1, manifest.step)]
    mixtures = [phase for phase in begun if not phase.index or phase.sources != begun[phase.index - 1].sources]
    sources = [
        [
            *([f"{phase.start:,}"] if len(mixtures) > 1 else []),
            f"`{_public(source.path)}`",
            f"{source.weight:g}",
            *_prepared(source.path),
        ]
        for phase in mixtures
        for source in phase.sources
    ]
    from_step = ["from step"] if len(mixtures) > 1 else []
    lines += ["Data:", "", *_table([*from_step, "source", "weight", "made from", "documents"], sources)]
    if exportable.quantization is not None:
        recipe = [[f"`{key}`", f"`{value}`"] for key, value in dataclasses.asdict(exportable.quantization).items()]
        lines += ["Quantization of the phase:", "", *_table(["key", "value"], recipe)]
    return lines


def _prepared(path: str) -> list[str]:
    """What a prepared folder was made from, and of how many documents, where it can be looked at."""
    try:
        manifest = read_manifest(Path(path))
    except DataError:
        return ["", ""]
    inputs = ", ".join(_public(str(name)) for name in manifest["options"]["inputs"])
    return [inputs, f"{manifest['splits'][TRAIN]['documents']:,}"]


def _public(location: str) -> str:
    """The last part of a path or URL; names of data sets on the hub are as they are."""
    kind, colon, name = location.rpartition("hf:") if location.startswith("hf:") else ("", "", location)
    on_hub = colon and not name.startswith(("/", ".", "~"))
    return location if on_hub else kind + colon + (Path(name).name or name)


def _measured(exportable: Exportable, config: Config) -> list[str]:
    """What was measured last of the checkpoint's phase, and its scores in tasks; what is damaged is left out."""
    assert isinstance(exportable.source, CheckpointReader)
    if exportable.run is None:
        return []
    step, phase = exportable.source.manifest.step, exportable.source.manifest.progress.phase
    logged = read_lines(exportable.run / "metrics.jsonl", "step", "phase")
    rows = [row for row in logged if row["step"] <= step and row["phase"] == phase]
    of = "text" if config.phases[phase].objective == "next-token" else "answers"
    measured = {
        "training loss, nats per token": [cross_entropy_of(row) if TRAINED in row else None for row in rows],
        "held-out loss, nats per token": [row.get("validation/loss") for row in rows],
        f"held-out loss, bits per byte of {of}": [row.get("validation/bits_per_byte") for row in rows],
    }
    found = []
    for name, values in measured.items():
        latest_first = reversed([*zip(values, rows, strict=True)])
        for value, row in latest_first:
            if isinstance(value, int | float) and math.isfinite(value):
                found.append([name, f"{value:.4f}", f"{row['step']:,}"])
                break
    lines = ["Last measured:", "", *_table(["", "", "after step"], found)] if found else []
    digest = exportable.source.manifest.digest
    with suppress(DataError):
        scores = results_of(exportable.run / RESULTS, digest)
        if own := [record for record in scores if not is_of_harness(record)]:
            lines += ["Tasks, by `tritrain eval`:", "", *_table(TASK_COLUMNS, table_of(own))]
        if theirs := [record for record in scores if is_of_harness(record)]:
            lines += ["Tasks of lm-evaluation-harness, by `tritrain eval`:", ""]
            lines += _table(HARNESS_COLUMNS, harness_table_of(theirs))
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (header, ["---"] * len(header), *rows)]
    return [*("| " + " | ".join(row) + " |" for row in cells), ""]
