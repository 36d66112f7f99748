"""Entry of a rank: `deepspeed launcher/pretrain.py --config FILE [key.sub=value ...]`.

`torchrun`, `srun` and plain `python` start it the same way.
"""

import sys
from pathlib import Path

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # A script's folder comes first on the path, where our modules would hide others of the same name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import errno
import gc
import os
import shlex
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from data.errors import DataError
from data.messages import safe_message
from launcher.commands.prepare import prepare_with_progress
from launcher.config.file import load_config
from launcher.config.sections import Config
from launcher.errors import USER_ERRORS, CheckpointError, ConfigError, FirstRankError, NoTimeError, report_error
from launcher.inference.inputs import input_problems
from launcher.plan.course import make_course
from launcher.plan.plan import Plan, make_plan
from launcher.process.companions import TICK_SECONDS, Companions, end_without_launcher, say
from launcher.process.console import Console
from launcher.process.exchange import failing_alike, value_of_first
from launcher.process.ranks import Ranks, everyones, process_group, seed_everything
from launcher.process.streams import outlive_streams
from launcher.process.supervisor import SECONDS_TO_SAVE
from launcher.run.automatic import concrete, slow_choices, values_of_run
from launcher.run.belonging import check_owner, release_checkpoints
from launcher.run.folder import RunFolder, check_place, slurm_job
from launcher.run.rollbacks import read_rollbacks, restore_rollbacks
from launcher.run.smoke import check_smoke, clear_smoke, smoke_config
from launcher.train import train
from launcher.watch.failure import (
    COMPLETE,
    FAILED,
    INTERRUPTED,
    MISCONFIGURED,
    NO_TIME,
    SECONDS_TO_BE_SEEN_DEAD,
    has_failed,
    leave_presence,
    resume_advice,
    say_failure,
    who_is_gone,
    write_presence,
)
from launcher.watch.heartbeat import Heartbeat, Pulse
from launcher.watch.stopping import StopRequest, time_to_stop
from launcher.watch.watchdog import Watchdog

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; returns an exit code."""
    parser = argparse.ArgumentParser(description="One rank of a training run.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file")
    parser.add_argument("--stop-after-steps", type=int, metavar="N", help="smoke test: only N steps of each phase")
    parser.add_argument("--stop-at-step", type=int, metavar="N", help="save and stop after N steps of the run")
    parser.add_argument("--no-report", action="store_true", help="write no report at the end")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; the environment has it too")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override one key of the configuration")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        if options.stop_after_steps is not None:
            return run(smoke_config(config), options.stop_after_steps)
        check_place(options.config, options.overrides, config)
        RunFolder(config).check_configuration()
        return run(config, stop_at_step=options.stop_at_step, reports=not options.no_report)
    except USER_ERRORS as error:
        note_refusal(str(error))
        return report_error(error)
    except Exception as error:
        report_error(error)
        return FAILED


def note_refusal(message: str) -> None:
    """Leave what is wrong with the configuration where a job looks before it queues itself again."""
    if note := os.environ.get("TRITRAIN_REFUSED"):
        Path(note).write_text(message)


def run(
    config: Config, smoke_steps: int | None = None, *, stop_at_step: int | None = None, reports: bool = True
) -> int:
    """Join the other ranks and train; returns an exit code.

    Args:
        config: of the run.
        smoke_steps: train only the first and last steps of each phase, as a smoke test; None: all.
        stop_at_step: save and stop after this many steps of the run; None: at its end.
        reports: whether a complete run writes its report and shows its results.
    """
    folder = RunFolder(config)
    companions = Companions()
    with (
        StopRequest(stop_at_step).installed() as stop,
        process_group(config.engine.timeout_seconds, companions) as ranks,
    ):
        pulse = Pulse()
        try:
            if refusal := claim(folder, ranks, is_smoke=smoke_steps is not None):
                companions.release()
                if ranks.is_first:
                    print(safe_message(refusal), file=sys.stderr)  # noqa: T201
                return MISCONFIGURED
            if folder.found_complete:
                companions.release()
                Console(silent=not ranks.is_first).line(folder.completion())
                return COMPLETE
            heartbeat = Heartbeat(ranks, config.watch.beat_seconds, pulse, folder.write_heartbeats)
            watchdog = Watchdog(config.watch, folder, ranks, pulse, heartbeat)
        except RuntimeError as error:
            companions.explain(error)
        companions.release()  # the watchdog takes over
        companions.when_launcher_is_lost(lambda message: stop_without_launcher(message, stop, pulse))
        try:
            return run_rank(config, folder, ranks, stop, pulse, watchdog, smoke_steps, reports=reports)
        except Exception as error:
            is_user_error = isinstance(error, USER_ERRORS)
            try:
                message = str(error) if is_user_error else explanation(error, folder, ranks, heartbeat, watchdog)
                if message is not None:
                    say_failure(folder, ranks, message)
                if isinstance(error, ConfigError):
                    note_refusal(str(error))
                settle(error, folder, ranks, heartbeat)
            except Exception:  # the disk may be gone, where the newest checkpoint and the ranks' notes are looked for
                print(safe_message(traceback.format_exc()), file=sys.stderr)  # noqa: T201
            # The process group cannot be left in order: the others may be anywhere.
            os._exit(exit_code_of(error))


def exit_code_of(error: Exception) -> int:
    """The exit code of a rank that this has ended."""
    if isinstance(error, NoTimeError):
        return NO_TIME
    return MISCONFIGURED if isinstance(error, ConfigError) else FAILED


def stop_without_launcher(message: str, stop: StopRequest, pulse: Pulse) -> None:
    """Have the run saved and ended, within `SECONDS_TO_SAVE`; before it trains there is nothing to save."""
    if pulse.at.doing in ("start", "prepare"):
        end_without_launcher(message)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"{message}; its ranks save and end.")
    else:
        time.sleep(2 * TICK_SECONDS)  # the first rank of the host finds it too, and is to say so before the run ends
    stop.launcher_is_lost()
    late = f"{message}, and its ranks have not saved within {SECONDS_TO_SAVE} s"
    timer = threading.Timer(SECONDS_TO_SAVE, end_without_launcher, [late])
    timer.daemon = True
    timer.start()


def explanation(
    error: Exception, folder: RunFolder, ranks: Ranks, heartbeat: Heartbeat, watchdog: Watchdog
) -> str | None:
    """The reason why this rank cannot continue; None if another rank has reported it."""
    if isinstance(error, FirstRankError):
        return None
    if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
        return f"{folder.path}: {error}. Make room there. {resume_advice(folder)}"
    traceback_text = "".join(traceback.format_exception(error)) + resume_advice(folder)
    if ranks.world_size == 1 or not isinstance(error, RuntimeError):
        return traceback_text
    # A rank that is gone shows itself to the others as a broken connection, with nothing said of who it was.
    gone = who_is_gone(folder, ranks, heartbeat)
    if watchdog.is_ending:
        watchdog.wait_for_end()
    if has_failed(folder):
        return None
    if gone is not None:
        return f"{gone} {resume_advice(folder)}"
    if "timed out" in str(error).lower():
        watchdog.end_job("A collective took longer than engine.timeout_seconds.")
    return traceback_text


def claim(folder: RunFolder, ranks: Ranks, *, is_smoke: bool) -> str | None:
    """Take the run's folder for this job; returns, on all ranks, why that cannot be.

    What earlier starts have said there goes before any rank can fail: it would keep this one from saying the same. A
    complete run is left as it is: it reads nothing any more, and cannot fail.
    """
    refusal: str | None = None
    if ranks.is_first:
        try:
            if is_smoke:
                check_smoke(folder.path)
            folder.claim()
            if is_smoke:
                clear_smoke(folder.path)
            folder.state_before = folder.read_state()
            check_checkpoints(folder)
            folder.found_complete = folder.is_complete(make_course(folder.config).total_steps)
            if not folder.found_complete:
                for damage in [*folder.set_damaged_aside(), *restore_rollbacks(folder.path)]:
                    print(f"WARNING: {damage}", file=sys.stderr)  # noqa: T201
                shutil.rmtree(folder.ranks, ignore_errors=True)
                folder.write_state("running")
        except (ConfigError, OSError) as error:
            refusal = str(error) if isinstance(error, ConfigError) else f"{folder.path}: {error}"
            if folder.holder and folder.is_of_first_start():
                shutil.rmtree(folder.path, ignore_errors=True)
    refusal, folder.holder, folder.found_complete = value_of_first([refusal, folder.holder, folder.found_complete])
    return refusal


def check_checkpoints(folder: RunFolder) -> None:
    """Check that the folder of checkpoints is not another run's, before anything is said of this one.

    Raises:
        ConfigError: it is.
    """
    try:
        check_owner(folder)
    except ConfigError as error:
        note_refusal(str(error))
        raise
    except CheckpointError:  # a store that cannot be reached: who must write there will say so
        pass


def settle(error: Exception, folder: RunFolder, ranks: Ranks, heartbeat: Heartbeat) -> None:
    """Leave no folder of a run that never began, and no failure where only the configuration was refused.

    The first rank does it, once the others have said what they had to say: what a user can put right befalls all.
    """
    if heartbeat.store is not None and isinstance(error, USER_ERRORS):
        with contextlib.suppress(RuntimeError):  # who has said nothing by now is gone, or hangs
            heartbeat.store.set(f"said-{ranks.rank}", "")
            if ranks.is_first:
                said = [f"said-{rank}" for rank in range(ranks.world_size)]
                heartbeat.store.wait(said, timedelta(seconds=SECONDS_TO_BE_SEEN_DEAD))
    if ranks.is_first:
        heartbeat.stop()  # which writes into the folder
        if folder.is_of_first_start():
            with contextlib.suppress(CheckpointError):  # a store that cannot be reached may be why it failed
                release_checkpoints(folder)
            shutil.rmtree(folder.path, ignore_errors=True)
        elif isinstance(error, ConfigError) and folder.state_before:
            folder.write_state(**folder.state_before)


def run_rank(
    config: Config,
    folder: RunFolder,
    ranks: Ranks,
    stop: StopRequest,
    pulse: Pulse,
    watchdog: Watchdog,
    smoke_steps: int | None,
    *,
    reports: bool,
) -> int:
    """Train on this rank, all ranks being there."""
    console = Console(silent=not ranks.is_first)
    config = decide(config, folder, ranks, console)
    plan = plan_of_run(config, folder, ranks, smoke_steps)
    seed_everything(config.run.seed, ranks.rank)
    with failing_alike():
        if ranks.is_first:
            for choice in slow_choices(plan, ranks.device):
                console.line(f"WARNING: {choice}")
            stop.watch(folder.path, time_to_stop(config.run.stop_before_end_seconds, console.line))
            folder.prepare([phase.end - phase.start for phase in plan.phases])
    write_presence(folder.ranks, ranks)
    mine = input_problems(config, with_remote=ranks.is_first)  # of folders, each host has its own
    if problems := everyones([f"{key}: {problem}" for key, problem in mine], ranks):
        raise DataError("\n".join(problems))
    if config.data.prepare is not None:
        # One rank of a machine does it, with a console of its own, and the others find it done.
        source = Path(config.data.sources[0].path)
        pulse.now("prepare", 0)
        prepare_with_progress(config.data.prepare, config.data.sequence_length, source, Console(silent=False))
        pulse.now("start", 0)
    while (outcome := train(plan, ranks, folder, stop, console, pulse)) == "rolled back":
        gc.collect()  # engines have reference cycles, and the memory of this one is needed
        plan = plan_of_run(config, folder, ranks, smoke_steps)
    newest = None
    # Before any rank leaves: launchers kill who is still there once one has exited with anything but 0. And a rank that
    # leaves breaks connections that others may still be making. All is saved: to break here is no failure.
    with contextlib.suppress(RuntimeError):
        with failing_alike():
            if ranks.is_first and outcome == "interrupted":
                newest = folder.newest_checkpoint()
                stop.look_again()
                saved = None if newest is None else str(newest)
                folder.write_state("interrupted", reason=stop.reason, checkpoint=saved, job=slurm_job())
                stop.done()
            elif ranks.is_first:
                folder.write_state("complete", steps=plan.total_steps)
                stop.look_again()
                stop.done()
        dist.barrier()
    watchdog.stop()
    leave_presence(folder.ranks, ranks)
    if not ranks.is_first:
        return COMPLETE if outcome == "complete" else INTERRUPTED
    if outcome == "interrupted":
        next_time = "resumes from there" if smoke_steps is None else "begins the smoke test again"
        saved = f"and saved ({stop.reason}): {newest}" if newest else f"({stop.reason}) before the first step"
        console.line(f"Stopped {saved}. The same command {next_time}.")
        return INTERRUPTED
    if smoke_steps is not None:
        shutil.rmtree(folder.path, ignore_errors=True)
        console.line(
            f"The smoke test is complete: {smoke_steps} steps of each of {len(plan.phases)} phases were trained, "
            f"evaluated and saved. {folder.path} is removed again."
        )
        return COMPLETE
    if not reports:
        return COMPLETE
    try:
        from launcher.report.ending import show_ending

        show_ending(folder, console)
    except Exception as error:  # whatever it is, the run is complete
        if not isinstance(error, (*USER_ERRORS, OSError)):
            traceback.print_exc()
        console.line(f"WARNING: the run is complete, but its report could not be written: {error}")
        place, page = (shlex.quote(str(path)) for path in (folder.path, folder.path / "report.html"))
        console.line(f"Write it with: tritrain report {place} --out {page}")
    return COMPLETE


def decide(config: Config, folder: RunFolder, ranks: Ranks, console: Console) -> Config:
    """The configuration with a value for each key that is `auto`: that of the run or, at first, of the device.

    A collective, after the folder is claimed.
    """
    stored = None
    with failing_alike():
        if ranks.is_first:
            stored = values_of_run(folder)
    plan = make_plan(config, ranks.world_size)
    config, said = concrete(config, ranks, stored, plan.total_flops / ranks.world_size)
    folder.take(config)
    for key, text in said.items():
        console.line(f"{key}: {text}")
    return config


def plan_of_run(config: Config, folder: RunFolder, ranks: Ranks, smoke_steps: int | None = None) -> Plan:
    """The plan of a run as it stands: one that went back to a switch has longer ramps; a collective."""
    rollbacks = read_rollbacks(folder.path)
    plan = make_plan(config, ranks.world_size, {phase: rollback.attempts for phase, rollback in rollbacks.items()})
    return replace(plan, smoke_steps=smoke_steps)


if __name__ == "__main__":
    outlive_streams()
    # A rank that fails ends at once, and leaves it to multiprocessing to remove its shared memory, which warns of that.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    sys.exit(main())
