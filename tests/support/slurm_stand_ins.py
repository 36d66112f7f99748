"""Stand-ins for Slurm's programs, which note how they were called."""

from pathlib import Path

SHOWN = "   JobState=RUNNING Reason=None\n   StartTime=2026-01-01T00:00:00 EndTime=2026-01-02T00:00:00 Deadline=N/A"


def stand_ins(folder: Path) -> Path:
    """A folder of stand-ins for a cluster's programs that write down what they are called with."""
    folder.mkdir()
    answers = {
        "scontrol": f"case $1$2 in showhostnames) echo node1; echo node2;; showjob) echo '{SHOWN}';; esac",
        "sbatch": "echo 17",
        **dict.fromkeys(("srun", "module", "scancel", "sleep", "python3", "python"), ":"),
    }
    for name, answer in answers.items():
        note = f"{{ printf '%s\\0' {name} \"$@\"; echo; }} >> {folder}/calls"
        (folder / name).write_text(f"#!/bin/bash\n{answer}\n{note}\n")
        (folder / name).chmod(0o755)
    return folder


def checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
