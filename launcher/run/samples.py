"""`samples.jsonl`: what the model has written to the fixed prompts of `evaluation.sample_prompts`, and when."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launcher.run.requeue import append_line, read_lines

SAMPLES = "samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt and its continuation."""

    step: int
    """Steps that were finished."""
    phase: int
    """Index of the last phase that had begun."""
    is_start: bool
    """Whether it is of the model that the run began with, and not of the end of a phase."""
    prompt: str
    completion: str


def note_samples(folder: Path, samples: Iterable[Sample]) -> None:
    """Append samples, in the order of the prompts."""
    for sample in samples:
        append_line(folder / SAMPLES, vars(sample))


def read_samples(folder: Path) -> list[Sample]:
    """The samples of a run, in order; of those that were drawn twice the newest."""
    found: dict[tuple[int, int, str], Sample] = {}
    for line in read_lines(folder / SAMPLES, "step", "phase"):
        step, phase, prompt, completion = line["step"], line["phase"], line.get("prompt"), line.get("completion")
        if isinstance(prompt, str) and isinstance(completion, str):
            is_start = line.get("is_start") is True
            found[step, phase, prompt] = Sample(
                step=step, phase=phase, is_start=is_start, prompt=prompt, completion=completion
            )
    return list(found.values())
