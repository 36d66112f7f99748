"""Show the results at the end of a run: a short table, a sample, and the next commands."""

import shlex

from launcher.config.file import override_of
from launcher.process.console import Console, human_count
from launcher.report.page import write_report
from launcher.report.summary import (
    COMPARED,
    RunSummary,
    duration,
    percent,
    recovery_text,
    samples_by_prompt,
    spike_text,
    summarize,
    verdict,
)
from launcher.run.folder import RunFolder
from launcher.run.metrics_log import as_code
from launcher.run.recovery import Transition


def show_ending(folder: RunFolder, console: Console) -> None:
    """Write the report of a complete run and show its results."""
    report = folder.path / "report.html"
    write_report([folder.path], report)
    summary = summarize(folder.path)
    console.line()
    console.line(verdict(summary))
    console.table(f"Run {summary.name}", *phase_table(summary))
    for transition in summary.transitions:
        console.line(transition_sentence(transition))
    if len(summary.phases) > 1:
        console.line(COMPARED)
    if written := samples_by_prompt(summary):
        add_to_tensorboard(folder, summary)
        console.line("From the finished model:")
        for prompt, by_place in written.items():
            console.line(prompt + [*by_place.values()][-1])
            console.line()
    console.line(f"{duration(summary.elapsed_seconds or 0)} in all. The report, to look at: {report}")
    show_next(folder, console)


def add_to_tensorboard(folder: RunFolder, summary: RunSummary) -> None:
    """Add the samples to TensorBoard's files, if the run writes any."""
    logs = folder.path / "tensorboard"
    if logs.is_dir():
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(logs)) as tensorboard:
            prompts = [*samples_by_prompt(summary)]
            for each in summary.samples:
                text = as_code(each.prompt + each.completion)
                tensorboard.add_text(f"sample/{1 + prompts.index(each.prompt)}", text, each.step)


def phase_table(summary: RunSummary) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of phases."""
    columns = ["phase", "steps", "tokens", "train loss", "held-out bits per byte", "tokens/s"]
    has_average = any(phase.averaged_bits_per_byte is not None for phase in summary.phases)
    if has_average:
        columns.insert(-1, "of averaged weights")
    rows = [
        [
            phase.label,
            str(phase.steps),
            human_count(phase.tokens),
            number(phase.train_loss),
            f"{number(phase.validation_bits_per_byte_at_start)} to {number(phase.validation_bits_per_byte)}",
            *([number(phase.averaged_bits_per_byte)] if has_average else []),
            human_count(phase.tokens_per_second or 0),
        ]
        for phase in summary.phases
    ]
    return columns, rows


def transition_sentence(transition: Transition) -> str:
    """The effect of a switch on the held-out and the training loss."""
    before, after = transition.bits_per_byte_before, transition.bits_per_byte_after
    parts = []
    if before is not None and after is not None:
        change = percent(after, before)
        parts.append(f"held-out text {before:.4f} bits per byte right before, {after:.4f} right after ({change})")
    loss = f"training loss {transition.loss_before:.3f} before, {spike_text(transition)}"
    if transition.is_beyond_noise:
        loss += f", back: {recovery_text(transition)}; {human_count(transition.area)} nats in all"
    return f"Switch to {transition.to_precision} at step {transition.step}: {'; '.join([*parts, loss])}."


def number(value: float | None) -> str:
    """A loss with four digits, or a dash."""
    return "-" if value is None else f"{value:.4f}"


def show_next(folder: RunFolder, console: Console) -> None:
    """Say what can be done with a complete run."""
    console.line("Next:")
    console.line("  compare it with another run:")
    run = shlex.quote(str(folder.path))
    console.line(f"    tritrain report {run} OTHER_RUN --out compared.html")
    console.line("  look at every curve:")
    console.line(f"    tensorboard --logdir {run}")
    if (newest := folder.newest_checkpoint()) is not None:
        console.line("  begin another run with its weights:")
        start_from = shlex.quote(override_of("checkpoint.start_from", str(newest)))
        console.line(f"    tritrain train CONFIG {folder.config.run.key_of_path}=NEW {start_from}")
