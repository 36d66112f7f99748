"""A made description of a run for trackers."""

from pathlib import Path

from launcher.run.trackers.contract import TrackedRun


def tracked_run(folder: Path) -> TrackedRun:
    """Six steps in two phases, the second one ternary after step 3."""
    return TrackedRun(
        run_id="0123456789abcdef" * 2,
        name="tiny",
        project="proj",
        folder=str(folder),
        config={"run": {"name": "tiny"}, "model": {"num_layers": 2}},
        phases=[("16-bit", 0), ("ternary", 3)],
        total_steps=6,
        steps_taken=0,
    )
