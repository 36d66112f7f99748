"""CPU time of the commands that answer at once: help, a misspelt word, status, schema and plan.

Seconds of user and system time of the whole process, which hardly depend on what else the machine does.

    python benchmarks/start_commands.py [--repeats 5]
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import report

COMMANDS = {
    "--help": 0,
    "--version": 0,
    "trian configs/quickstart.yaml": 2,
    "train configs/quickstart.yaml --rank 2": 2,
    "status {run}": 0,
    "schema": 0,
    "plan configs/quickstart.yaml": 0,
}
"""What follows `tritrain`, and the exit code."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {command: [] for command in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        run.mkdir()
        (run / "state.json").write_text('{"status": "complete"}')
        for repeat in range(options.repeats + 1):
            for command, code in COMMANDS.items():
                taken = cpu_seconds(command.format(run=run).split(), code)
                if repeat:  # the first fills the caches
                    seconds[command].append(taken)
    rows = [
        f"| `tritrain {command.format(run='RUN')}` | {statistics.median(taken):.2f} "
        f"| {min(taken):.2f} to {max(taken):.2f} |"
        for command, taken in seconds.items()
    ]
    text = "CPU seconds, user and system.\n\n| command | median | lowest to highest |\n| --- | --- | --- |\n"
    numbers = {command: round(statistics.median(taken), 3) for command, taken in seconds.items()}
    report("start-commands", text + "\n".join(rows), numbers, ("typer", "pydantic", "rich"))


def cpu_seconds(arguments: list[str], code: int) -> float:
    """CPU time of one command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [str(Path(sys.executable).with_name("tritrain")), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != code:
        sys.exit(f"{' '.join(command)} ended with {ended.returncode}, not {code}:\n{ended.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
