"""`tritrain convert`: into a run that begins with a checkpoint, or into another format."""

import json
import shlex
from pathlib import Path

from launcher.config.file import load_config
from launcher.engine.build import COMPUTE_DTYPES
from launcher.errors import ConfigError
from launcher.formats.convert import begins_anew, convert_to_hf, convert_to_run, not_carried, preview, starting_phase
from launcher.formats.deepspeed_universal import write_universal
from launcher.formats.open import check_sound, open_source
from launcher.formats.provenance import write_provenance
from launcher.process.console import Console

FORMATS = ("run", "universal", "hf")


def convert_checkpoint(
    source: str,
    to: Path,
    config: Path | None,
    overrides: list[str],
    console: Console,
    *,
    into: str,
    phase: int | None,
    optimizer: str | None,
    dtype: str | None,
    dry_run: bool,
) -> None:
    """Make what the options ask for; see `convert_into_run` and `convert_into_format`.

    Raises:
        ConfigError: an option is unknown, or belongs to another format.
    """
    if into not in FORMATS:
        raise ConfigError(f"--format {into}: {', '.join(FORMATS)} are there")
    for option, value, wanted in (
        ("--phase", phase, "run"),
        ("--optimizer", optimizer, "run"),
        ("--dtype", dtype, "hf"),
    ):
        if value is not None and into != wanted:
            raise ConfigError(f"{option} {value}: belongs to --format {wanted}")
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        raise ConfigError(f"--dtype {dtype}: {' and '.join(COMPUTE_DTYPES)} are there")
    if overrides and config is None:
        raise ConfigError(f"{overrides[0]}: overrides a configuration, and there is none; give --config")
    asked = (source, to, config, overrides, console)
    if into == "run":
        convert_into_run(*asked, phase=phase, optimizer=optimizer, dry_run=dry_run)
    else:
        convert_into_format(*asked, into=into, dtype=dtype or "bf16", dry_run=dry_run)


def convert_into_run(
    source: str,
    to: Path,
    config: Path | None,
    overrides: list[str],
    console: Console,
    *,
    phase: int | None,
    optimizer: str | None,
    dry_run: bool,
) -> None:
    """Make a run's folder, or say for every tensor what would happen.

    Args:
        source: what `launcher.formats.open.open_source` opens.
        to: the run's folder.
        config: of the run; it needs one.
        overrides: `key.sub=value`.
        console: where to say what is done.
        phase: to begin in; None takes ``checkpoint.start_phase``, or the one that begins where a checkpoint of ours
            stands, else the first.
        optimizer: what becomes of Adam's state; None leaves it to the configuration.
        dry_run: whether to say it alone.

    Raises:
        ConfigError: the configuration is missing or wrong, or the folder holds a run already.
        CheckpointError: the source is unknown or damaged, or does not fit.
    """
    if config is None:
        raise ConfigError("--config: is missing; a run needs its configuration")
    for set_by, key in (("--to", "run.folder"), ("SOURCE", "checkpoint.start_from")):
        if any(change.startswith(f"{key}=") for change in overrides):
            raise ConfigError(f"{key}: is what {set_by} says; leave it out")
    changes = [*overrides, f"run.folder={json.dumps(str(to))}", f"checkpoint.start_from={json.dumps(source)}"]
    opened = open_source(source)
    begins = phase
    if begins is None:
        given = load_config(config, changes)
        begins = given.checkpoint.start_phase or starting_phase(given, opened)
    changes.append(f"checkpoint.start_phase={begins}")
    if optimizer is not None:
        changes.append(f"phases.{begins}.transition.optimizer={optimizer}")
    parsed = load_config(config, changes)
    console.line(f"{opened.location} to {to}, before phase {begins} ({parsed.phases[begins].precision})")
    for sentence in [*begins_anew(parsed, opened), *opened.missing]:
        console.line(f"  {sentence}")
    if dry_run:
        console.aligned([["tensor", "shape", "weight", "moments"], *preview(parsed, opened)])
        return
    made = convert_to_run(parsed, opened)
    console.line(f"Written: {made}. Train it: tritrain train {shlex.quote(str(to / 'config.yaml'))}")


def convert_into_format(
    source: str,
    to: Path,
    config: Path | None,
    overrides: list[str],
    console: Console,
    *,
    into: str,
    dtype: str,
    dry_run: bool,
) -> None:
    """Write a folder of another format, or say which tensors it would hold.

    Args:
        source: what `launcher.formats.open.open_source` opens.
        to: the folder; must not be there.
        config: says what the model is where the source does not.
        overrides: `key.sub=value`.
        console: where to say what is done.
        into: `universal` or `hf`.
        dtype: of the weights in ``hf``: `bf16` or `fp32`.
        dry_run: whether to say it alone.

    Raises:
        ConfigError: the configuration is missing or wrong, or the folder is there.
        CheckpointError: the source is unknown or damaged, or the folder cannot be written.
    """
    opened = open_source(source)
    given = load_config(config, overrides) if config else None
    for sentence in [*opened.missing, *not_carried(opened, into)]:
        console.line(f"  {sentence}")
    if dry_run:
        rows = [[name, " x ".join(map(str, shape))] for name, shape in opened.shapes.items()]
        console.aligned([["tensor", "shape"], *rows])
        return
    if to.exists():
        raise ConfigError(f"{to}: is there already; name a folder that is not")
    if into == "hf":
        convert_to_hf(opened, given, to, COMPUTE_DTYPES[dtype])
    else:
        check_sound(opened)
        write_universal(opened, to)
    write_provenance(to, opened)
    console.line(f"Written: {to}")
