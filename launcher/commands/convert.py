"""`tritrain convert`: make a run that begins with a checkpoint, or a checkpoint in another format."""

import shlex
from pathlib import Path
from typing import Any

from launcher.checkpoint.source import Source
from launcher.config.file import load_config, override_of
from launcher.config.transition import OptimizerChoice
from launcher.engine.build import COMPUTE_DTYPES
from launcher.errors import ConfigError
from launcher.formats.choices import ConvertFormat, Dtype
from launcher.formats.convert import (
    Contents,
    begins_anew,
    check_begins_calibrated,
    check_hf,
    convert_to_run,
    first_token_note,
    not_carried,
    preview,
    starting_phase,
    unchanged,
)
from launcher.formats.deepspeed_universal import check_universal, write_universal
from launcher.formats.hf_folder import rounding_note, to_json, write_hf
from launcher.formats.open import check_sound, open_source
from launcher.formats.provenance import source_record
from launcher.formats.tokens import named_tokens
from launcher.inference.inputs import check_inputs
from launcher.inference.start import put_sub_norms_in
from launcher.inference.vocabulary import grow_vocabulary_
from launcher.process.console import Console, print_results


def convert_checkpoint(
    source: str,
    to: Path,
    config: Path | None,
    overrides: list[str],
    console: Console,
    *,
    into: ConvertFormat,
    phase: int | None,
    optimizer: OptimizerChoice | None,
    dtype: Dtype | None,
    calibrate: int | None = None,
    calibrated: Contents | None = None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make what the options ask for; see `convert_into_run` and `convert_into_format`.

    Raises:
        ConfigError: an option belongs to another format.
    """
    for option, value, wanted in (
        ("--phase", phase, "run"),
        ("--optimizer", optimizer, "run"),
        ("--calibrate", calibrate, "run"),
        ("--dtype", dtype, "hf"),
    ):
        if value is not None and into != wanted:
            raise ConfigError(f"{option} {value}: belongs to --format {wanted}")
    if as_json and not dry_run:
        raise ConfigError("--json: belongs to --dry-run")
    if overrides and config is None:
        raise ConfigError(f"{overrides[0]}: there is no configuration to override; give one with --config")
    asked = (source, to, config, overrides, console)
    if into == "run":
        convert_into_run(
            *asked,
            phase=phase,
            optimizer=optimizer,
            calibrate=calibrate,
            contents=calibrated or unchanged,
            dry_run=dry_run,
            as_json=as_json,
        )
    else:
        convert_into_format(*asked, into=into, dtype=dtype or "bf16", dry_run=dry_run, as_json=as_json)


def convert_into_run(
    source: str,
    to: Path,
    config: Path | None,
    overrides: list[str],
    console: Console,
    *,
    phase: int | None,
    optimizer: OptimizerChoice | None,
    calibrate: int | None,
    contents: Contents,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make the folder of a run; with ``dry_run``, list what would happen to each tensor.

    Args:
        source: what `launcher.formats.open.open_source` opens.
        to: the run's folder.
        config: of the run; it needs one.
        overrides: `key.sub=value`.
        console: where progress is printed.
        phase: to begin in; None takes ``checkpoint.start_phase``, or the phase that begins at the step of a Tritrain
            checkpoint, or else the first.
        optimizer: what happens to Adam's state; None leaves it to the configuration.
        calibrate: sequences that the ternary phase is calibrated on; None leaves it to the run.
        contents: of the checkpoint.
        dry_run: whether to write nothing.
        as_json: of a dry run, print JSON.

    Raises:
        ConfigError: the configuration is missing or wrong, or the folder already holds a run.
        CheckpointError: the source is unknown or damaged, or does not fit.
        DataError: data that a calibration or its measurement reads are missing.
    """
    if config is None:
        raise ConfigError("--config: is missing; a run needs a configuration")
    for set_by, key in (("--to", "run.folder"), ("SOURCE", "checkpoint.start_from")):
        if any(change.startswith(f"{key}=") for change in overrides):
            raise ConfigError(f"{key}: {set_by} sets it; leave it out")
    changes = [*overrides, override_of("run.folder", str(to)), override_of("checkpoint.start_from", source)]
    opened = open_source(source)
    begins = phase
    if begins is None:
        given = load_config(config, changes)
        begins = given.checkpoint.start_phase or starting_phase(given, opened)
    changes.append(f"checkpoint.start_phase={begins}")
    if optimizer is not None:
        changes.append(f"phases.{begins}.transition.optimizer={optimizer}")
    if calibrate is not None:
        changes.append(f"phases.{begins}.transition.calibration.sequences={calibrate}")
    parsed = load_config(config, changes)
    place = "before" if calibrate is None else "at the beginning of"
    console.line(f"{opened.location} to {to}, {place} phase {begins} ({parsed.phases[begins].precision})")
    notes = [*begins_anew(parsed, opened), *opened.missing, *first_token_note(opened)]
    notes += [*grow_vocabulary_(opened, parsed), *put_sub_norms_in(opened, parsed)]
    for sentence in notes:
        console.line(f"  {sentence}")
    if calibrate is not None:  # which reads what training does
        check_begins_calibrated(parsed)
        check_inputs(parsed)
    if dry_run:
        rows = [["tensor", "shape", "weight", "moments"], *preview(parsed, opened)]
        if as_json:
            print_tensors(opened, to, rows, notes, format="run", phase=begins)
        else:
            console.aligned(rows)
        return
    made = convert_to_run(parsed, opened, contents)
    console.line(f"Written: {made}. Train it: tritrain train {shlex.quote(str(to / 'config.yaml'))}")


def convert_into_format(
    source: str,
    to: Path,
    config: Path | None,
    overrides: list[str],
    console: Console,
    *,
    into: ConvertFormat,
    dtype: Dtype,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a folder in another format; with ``dry_run``, check all that is checked, and list the tensors.

    Args:
        source: what `launcher.formats.open.open_source` opens.
        to: the folder; must not exist.
        config: describes the model if the source does not.
        overrides: `key.sub=value`.
        console: where progress is printed.
        into: `universal` or `hf`.
        dtype: of the weights in ``hf``.
        dry_run: whether to write nothing.
        as_json: of a dry run, print JSON.

    Raises:
        ConfigError: the configuration is missing or wrong, or the folder exists.
        CheckpointError: the source is unknown or damaged, the format cannot hold it, or the folder cannot be written.
    """
    opened = open_source(source)
    given = load_config(config, overrides, stored=None) if config else None
    notes = [*opened.missing, *not_carried(opened, into)]
    if into == "hf" and (rounding := rounding_note(opened, COMPUTE_DTYPES[dtype])):
        notes.append(rounding)
    for sentence in notes:
        console.line(f"  {sentence}")
    if to.exists():
        raise ConfigError(f"{to}: exists already; name a new folder")
    model, quantization = check_hf(opened, given, to, dtype) if into == "hf" else (None, None)
    if into == "universal":
        check_universal(opened)
    check_sound(opened)
    if dry_run:
        rows = [["tensor", "shape"], *([name, " x ".join(map(str, shape))] for name, shape in opened.shapes.items())]
        if as_json:
            print_tensors(opened, to, rows, notes, format=into)
        else:
            console.aligned(rows)
        return
    files = {"provenance.json": to_json(source_record(opened))}
    if model is not None:
        tokens = named_tokens(opened)
        write_hf(opened, model, to, dtype=COMPUTE_DTYPES[dtype], quantization=quantization, files=files, tokens=tokens)
    else:
        write_universal(opened, to, files=files)
    console.line(f"Written: {to}")


def print_tensors(source: Source, to: Path, rows: list[list[str]], notes: list[str], **about: Any) -> None:
    """Print the table of a dry run as JSON, with shapes as lists."""
    columns, *tensors = rows
    results = [dict(zip(columns, row, strict=True)) | {"shape": source.shapes[row[0]]} for row in tensors]
    print_results("convert", results, source=source.location, to=str(to), **about, notes=notes)
