"""Begin a run with the end of a trunk: what its own uninterrupted run would have at that step.

The run's folder gets the trunk's checkpoint, whose files are linked, and its log. It resumes from there by the same
code as any run, and goes on with the same bits.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from data.new_paths import replace_file
from launcher.checkpoint.folders import MANIFEST, TOKENIZERS, folder_of
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.writer import CheckpointWriter
from launcher.config.automatic import ANY_GPU, made_concrete, stored_values
from launcher.config.sections import Config
from launcher.plan.course import make_course
from launcher.run.folder import RunFolder, read_tree
from launcher.run.metrics_log import read_metrics
from launcher.run.references import FOLDER as REFERENCES
from launcher.run.requeue import append_line, read_lines
from launcher.run.row_losses import ROW_LOSSES
from launcher.training.meter import EVALUATED


def branch(config: Config, trunk: Path, step: int) -> None:
    """Make the folder of a run that continues a trunk; one that was begun and not finished is made anew.

    Args:
        config: of the run, which is the trunk's in all that influences the steps up to there.
        trunk: folder of the trunk's run.
        step: of its checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged.
        OSError: a file cannot be written.
    """
    reader = CheckpointReader(folder_of(trunk / "checkpoints", step))
    # What a trunk decided on its device holds for all that continue it.
    config, _ = made_concrete(config, ANY_GPU, stored_values(read_tree(trunk / "config.yaml")))
    folder, course = RunFolder(config), make_course(config)
    folder.prepare([phase.end - phase.start for phase in course.phases])
    rows = [row for row in read_metrics(trunk / "metrics.jsonl") if row["step"] <= step]
    # Whether the loss after the last step is due depends on the run, which measures it when it resumes.
    rows = [row for row in rows if not (row["step"] == step and EVALUATED in row)]
    replace_file(folder.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for line in read_lines(trunk / ROW_LOSSES, "step"):
        if line["step"] < step:
            append_line(folder.path / ROW_LOSSES, line)
    folder.write_state("converted", source=str(reader.folder))
    phase = course.phases[max(reader.manifest.progress.phase, 0)]
    if phase.has_second_model and phase.start < step:
        _take_second_model(trunk, folder, phase.start)
    writer = CheckpointWriter(folder_of(folder.checkpoints, step))
    writer.begin()
    files = {name: record for name, record in reader.manifest.files.items() if name.endswith(".safetensors")}
    for name in files:
        writer.link(reader.folder / name)
    tokenizer = next((path for name in TOKENIZERS if (path := reader.folder / name).is_file()), None)
    milestone = step in {phase.end for phase in course.phases}
    writer.finish(files, folder.config_text, tokenizer, replace(reader.manifest, milestone=milestone))


def _take_second_model(trunk: Path, folder: RunFolder, start: int) -> None:
    """Take the checkpoint that a phase begins with, which teaches it or is its reference, and what is kept of one."""
    taken = folder_of(trunk / "checkpoints", start)
    if (taken / MANIFEST).is_file():  # else it is another one, that the configuration names
        shutil.copytree(taken, folder_of(folder.checkpoints, start), dirs_exist_ok=True)
    if (trunk / REFERENCES).is_dir():
        shutil.copytree(trunk / REFERENCES, folder.path / REFERENCES, dirs_exist_ok=True)
