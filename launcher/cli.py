"""The `tritrain` command."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from launcher.console import Console, human_bytes, human_count

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pretrain language models in 16 bits and finish them in 1.58 bits.",
)

ConfigPath = Annotated[Path, typer.Argument(help="Configuration, a YAML file.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value: override one key.", show_default=False)]
EXPORT_FORMATS = ("hf", "hf-ternary", "gguf")
HF_WEIGHTS = ("latent", "dequantized")
LINEAR_CLASSES = ("bitlinear", "autobitlinear")
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
RanksOption = Annotated[int | None, typer.Option("--ranks", min=1, help="Processes; by default the GPUs, or one.")]


def main() -> None:
    """Run the command; what the user can put right is told in a sentence, without a traceback."""
    from data.errors import DataError
    from launcher.config import ConfigError
    from launcher.metrics import LogError
    from launcher.source import CheckpointError

    try:
        app()
    except (ConfigError, DataError, CheckpointError, LogError) as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    else:
        return
    print(problem, file=sys.stderr)  # noqa: T201
    sys.exit(2)


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: RanksOption = None,
    launcher: Annotated[str, typer.Option("--with", help="torchrun or deepspeed")] = "torchrun",
) -> None:
    """Start a run on this machine, or go on with it."""
    from launcher.config import ConfigError
    from launcher.config_file import load_config
    from launcher.ending import show_next
    from launcher.plan import make_plan
    from launcher.run_folder import RunFolder, check_place

    if launcher not in ("torchrun", "deepspeed"):
        raise ConfigError(f"--with {launcher}: torchrun and deepspeed are there")
    parsed = load_config(config, overrides or ())
    num_ranks = ranks or default_ranks()
    plan = make_plan(parsed, num_ranks)
    check_place(config, overrides or (), parsed)
    folder, console = RunFolder(parsed), Console(silent=False)
    folder.check_configuration()
    if folder.read_state().get("status") == "complete":
        console.line(f"The run {parsed.run.name} is complete: {plan.total_steps} steps, in {folder.path}.")
        show_next(folder, console)
        return
    launch(launcher, config, overrides or [], num_ranks)


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="By default the site's; one rank each.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="By default the GPUs, or one.")] = None,
    site: Annotated[Path | None, typer.Option(help="What your cluster needs; by default $TRITRAIN_SITE.")] = None,
    launcher: Annotated[str, typer.Option("--with", help="torchrun, srun or deepspeed")] = "torchrun",
    time: Annotated[str | None, typer.Option(help="Time limit; by default the site's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job's script, and submit nothing.")] = False,
) -> None:
    """Queue a run as a job of Slurm that goes on until the run is complete."""
    from launcher.config_file import load_config
    from launcher.slurm_site import load_site
    from launcher.submit import Request, next_submission, render
    from launcher.submit import submit as submit_job

    parsed, cluster, console = load_config(config, overrides or ()), load_site(site), Console(silent=False)
    gpus = cluster.gpus_per_node if gpus_per_node is None else gpus_per_node
    request = Request(
        nodes=nodes, gpus_per_node=gpus, ranks_per_node=ranks_per_node or gpus or 1, launcher=launcher, time=time
    )
    if dry_run:
        sys.stdout.write(render(parsed, cluster, request, next_submission(parsed)))
        return
    job, folder = submit_job(parsed, cluster, request)
    console.line(f"Submitted: job {job}, in {folder}")
    console.line(f"Save and end it: touch {parsed.run.path}/stop")


def default_ranks() -> int:
    """As many ranks as there are GPUs, or one."""
    import torch

    return torch.cuda.device_count() or 1


def launch(launcher: str, config: Path, overrides: list[str], num_ranks: int) -> NoReturn:
    """Become the launcher of this machine's ranks, so that signals reach it and its exit code is the command's."""
    script = [str(Path(__file__).with_name("pretrain.py")), "--config", str(config), *overrides]
    if launcher == "deepspeed":
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(num_ranks), *script]
        sys.stdout.flush()
        os.execv(command[0], command)
    become_ranks(num_ranks, script)


def become_ranks(num_ranks: int, script: list[str]) -> NoReturn:
    """Become torch's launcher of so many ranks of a script on this machine."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "launcher.torchrun", str(num_ranks), *script])


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: RanksOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a run would do, without doing it."""
    from launcher.config_file import flat_lines, load_config, to_tree
    from launcher.plan import describe, make_plan
    from launcher.timeline import events
    from launcher.traffic import describe_traffic

    parsed = load_config(config, overrides or ())
    resolved = make_plan(parsed, ranks or default_ranks())
    numbers = describe(resolved) | describe_traffic(resolved) | {"events": events(resolved)}
    console = Console(silent=False)
    if as_json:
        console.line(json.dumps({"config": to_tree(parsed), "plan": numbers}, indent=2))
        return
    for line in flat_lines(to_tree(parsed)):
        console.line(line)
    console.line()
    memory, sent = numbers["bytes_per_rank"], numbers["bytes_sent_per_rank_and_step"]
    rows = [
        ["parameters", f"{numbers['parameters']:,} ({numbers['ternary_parameters']:,} in layers that become ternary)"],
        ["FLOPs per token", f"{human_count(numbers['flops_per_token'])} (forward and backward)"],
        ["FLOPs of the run", human_count(numbers["total_flops"])],
        ["ranks", str(numbers["ranks"])],
        ["tokens per step", f"{numbers['tokens_per_step']:,} ({numbers['sequences_per_step']} sequences)"],
        ["micro-batches per step", str(numbers["micro_batches_per_step"])],
        *[
            [f"phase {index}: {phase['precision']}", f"{phase['steps']:,} steps, {human_count(phase['tokens'])} tokens"]
            for index, phase in enumerate(numbers["phases"])
        ],
        *[[f"step {event['step']:,}", str(event["what"])] for event in numbers["events"]],
        *[[f"bytes per rank: {name}", human_bytes(size)] for name, size in memory.items()],
        ["bytes per rank: all", f"{human_bytes(numbers['total_bytes_per_rank'])} (estimate)"],
        *[[f"sent per rank and step: {what}", human_bytes(size)] for what, size in (sent or {}).items() if size],
        *([] if sent is not None else [["sent per rank and step", "not modelled with these engine.deepspeed keys"]]),
        [
            "checkpoints",
            f"{numbers['checkpoints_written']} of {human_bytes(numbers['checkpoint_bytes'])}, "
            f"{numbers['checkpoints_kept']} kept",
        ],
    ]
    console.table(f"Plan of {parsed.run.name}", ["", "value"], rows)


@app.command()
def prepare(
    inputs: Annotated[list[str], typer.Argument(help="Files, folders, hf:NAME:SPLIT or python-stdlib.")],
    out: Annotated[str, typer.Option(help="Folder to make.")],
    tokenizer: Annotated[str, typer.Option(help="A tokenizer's file, bpe:VOCAB or unigram:VOCAB.")],
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 2048,
    validation_fraction: Annotated[float, typer.Option(help="Share of the documents that is held out.")] = 0.0,
    validation_input: Annotated[list[str] | None, typer.Option(help="Input that is held out as a whole.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that tokenize.")] = 1,
) -> None:
    """Turn text into token shards."""
    from data.shards import PrepareConfig
    from launcher.config import ConfigError
    from launcher.preparing import prepare_with_progress

    try:
        config = PrepareConfig(
            inputs=tuple(inputs),
            tokenizer=tokenizer,
            validation_fraction=validation_fraction,
            validation_inputs=tuple(validation_input or ()),
            workers=workers,
        )
    except ValueError as error:
        raise ConfigError("\n".join(f"{key}: {problem}" for key, problem in error.args[0].items())) from error
    console = Console(silent=False)
    prepare_with_progress(config, sequence_length, local_target(out, "--out"), console)
    console.line(f"{out} is ready: name it in data.sources, with data.sequence_length {sequence_length}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint or run of ours, DeepSpeed's or Hugging Face's folder.")],
    to: Annotated[str, typer.Option(help="Folder to make: of a run, or of the other format.")],
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="Configuration of the run (or just of the model).")] = None,
    into: Annotated[str, typer.Option("--format", help="run, universal (DeepSpeed) or hf (16 bits).")] = "run",
    phase: Annotated[int | None, typer.Option(help="Phase to begin in; by default the one that begins there.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="keep, reset, keep-variance or rescale.")] = None,
    dtype: Annotated[str | None, typer.Option(help="hf: bf16 (default) or fp32.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say for every tensor what will happen.")] = False,
) -> None:
    """Turn a checkpoint into a run that begins with it, or into another format. Needs no GPU."""
    from launcher.config import ConfigError
    from launcher.config_file import load_config
    from launcher.convert import (
        begins_anew,
        convert_to_hf,
        convert_to_run,
        not_carried,
        preview,
        starting_phase,
        write_provenance,
    )
    from launcher.deepspeed_universal import write_universal
    from launcher.start_from import check_sound, open_source

    if into not in ("run", "universal", "hf"):
        raise ConfigError(f"--format {into}: run, universal and hf are there")
    for option, value, wanted in (
        ("--phase", phase, "run"),
        ("--optimizer", optimizer, "run"),
        ("--dtype", dtype, "hf"),
    ):
        if value is not None and into != wanted:
            raise ConfigError(f"{option} {value}: belongs to --format {wanted}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: bf16 and fp32 are there")
    if overrides and config is None:
        raise ConfigError(f"{overrides[0]}: overrides a configuration, and there is none; give --config")
    target = local_target(to, "--to")
    console, changes = Console(silent=False), list(overrides or ())
    if into == "run":
        if config is None:
            raise ConfigError("--config: is missing; a run needs its configuration")
        for set_by, key in (("--to", "run.folder"), ("SOURCE", "checkpoint.start_from")):
            if any(change.startswith(f"{key}=") for change in changes):
                raise ConfigError(f"{key}: is what {set_by} says; leave it out")
        changes += [f"run.folder={json.dumps(to)}", f"checkpoint.start_from={json.dumps(source)}"]
        opened = open_source(source)
        begins = starting_phase(load_config(config, changes), opened) if phase is None else phase
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
        console.line(f"Written: {made}. Train it: tritrain train {shlex.quote(str(target / 'config.yaml'))}")
        return
    opened = open_source(source)
    given = load_config(config, changes) if config else None
    for sentence in [*opened.missing, *not_carried(opened, into)]:
        console.line(f"  {sentence}")
    if dry_run:
        rows = [[name, " x ".join(map(str, shape))] for name, shape in opened.shapes.items()]
        console.aligned([["tensor", "shape"], *rows])
        return
    if target.exists():
        raise ConfigError(f"{to}: is there already; name a folder that is not")
    if into == "hf":
        convert_to_hf(opened, given, target, torch_dtype(DTYPES[dtype or "bf16"]))
    else:
        check_sound(opened)
        write_universal(opened, target)
    write_provenance(target, opened)
    console.line(f"Written: {to}")


def local_target(text: str, option: str) -> Path:
    """Where a command is to write.

    Raises:
        ConfigError: a path would be something else than was meant: a folder named `s3:` or `~`.
    """
    from launcher.config import ConfigError, local_problem

    if problem := local_problem(text):
        raise ConfigError(f"{option}: {problem}")
    return Path(text)


def torch_dtype(name: str) -> Any:
    """A dtype by name; torch is imported only where it is needed."""
    import torch

    return getattr(torch, name)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint, or a run, of which the newest is taken.")],
    to: Annotated[str, typer.Option(help="What to make; must not be there yet.")],
    into: Annotated[str, typer.Option("--format", help="hf (16 bits), hf-ternary (packed codes) or gguf.")],
    weights: Annotated[
        str | None, typer.Option(help="hf, of a ternary phase: latent (to train on) or dequantized (to run).")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; by default what the run computes in.")] = None,
    linear_class: Annotated[
        str | None,
        typer.Option(help="hf-ternary: bitlinear (default; integer products) or autobitlinear (faster, more memory)."),
    ] = None,
    block_type: Annotated[
        str | None, typer.Option("--type", help="gguf: tq2_0 (default), tq1_0 (smaller, slower), q8_0 or f16.")
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="gguf: q8_0 or f16, of embedding and head; by default f16 beside f16, else q8_0.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Its file; by default that of the run's data.")] = None,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Leave the tokenizer out.")] = False,
) -> None:
    """Write a model for other programs to run. Needs no GPU."""
    from launcher.config import ConfigError
    from launcher.export import open_exportable
    from launcher.gguf_export import EMBEDDING_TYPES, export_gguf
    from launcher.hf_export import export_hf
    from quant.gguf import BLOCK_TYPES, TERNARY_TYPES

    if into not in EXPORT_FORMATS:
        raise ConfigError(f"--format {into}: {' and '.join(EXPORT_FORMATS)} are there")
    for option, value, known, formats in (
        ("--dtype", dtype, DTYPES, ("hf", "hf-ternary")),
        ("--weights", weights, HF_WEIGHTS, ("hf",)),
        ("--linear-class", linear_class, LINEAR_CLASSES, ("hf-ternary",)),
        ("--type", block_type, BLOCK_TYPES, ("gguf",)),
        ("--embeddings", embeddings, EMBEDDING_TYPES, ("gguf",)),
    ):
        if value is not None and value not in known:
            raise ConfigError(f"{option} {value}: {' and '.join(known)} are there")
        if value is not None and into not in formats:
            raise ConfigError(f"{option} {value}: belongs to --format {' and '.join(formats)}")
    if no_tokenizer and into == "gguf":
        raise ConfigError("--no-tokenizer: a GGUF file holds one")
    if tokenizer and no_tokenizer:
        raise ConfigError("--tokenizer and --no-tokenizer exclude each other")
    target = local_target(to, "--to")
    if target.exists():
        raise ConfigError(f"{to}: is there already; name what is not")
    block_type = block_type or "tq2_0"
    codes = {"hf": weights == "dequantized", "hf-ternary": True, "gguf": block_type in TERNARY_TYPES}
    opened = open_exportable(checkpoint, ternary=codes[into])
    if into == "hf" and weights is None:
        if opened.quantization is not None:
            raise ConfigError(
                f"--weights: is missing; {opened.source.location} is of a ternary phase. latent are the 16-bit weights "
                "that it trains, dequantized those that it computes with"
            )
        weights = "latent"
    file = None if no_tokenizer else tokenizer or opened.tokenizer
    if file is None and not no_tokenizer:
        raise ConfigError(
            f"{opened.source.location}: its tokenizer was not found; name it with --tokenizer"
            + ("" if into == "gguf" else ", or leave it out with --no-tokenizer")
        )
    console = Console(silent=False)
    if into == "gguf":
        assert file is not None
        console.line(export_gguf(opened, target, into=block_type, embeddings=embeddings, tokenizer=file))  # type: ignore[arg-type]
        console.line(f"Written: {to}")
        return
    export_hf(
        opened,
        target,
        weights="packed" if into == "hf-ternary" else weights,  # type: ignore[arg-type]
        dtype=torch_dtype(DTYPES[dtype]) if dtype else None,
        linear_class=linear_class or "bitlinear",  # type: ignore[arg-type]
        tokenizer=file,
    )
    console.line(f"Written: {to}")


@app.command()
def verify(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoints of ours, or runs: folders or URLs.")],
) -> None:
    """Read every byte of checkpoints and say which tensors of which files are damaged."""
    from launcher.checkpoint import MANIFEST, complete_checkpoints
    from launcher.checkpoint_reader import CheckpointReader
    from launcher.location import is_local, reaching, to_location
    from launcher.source import CheckpointError

    console, damaged = Console(silent=False), False
    for text in checkpoints:
        place = to_location(text)
        with reaching(place):
            if is_local(place) and not place.exists():
                raise CheckpointError(f"{text}: there is no such folder")
            inside = [*complete_checkpoints(place), *complete_checkpoints(place / "checkpoints")]
        folders = [place] if (place / MANIFEST).is_file() or not inside else inside
        for folder in folders:
            try:
                problems = list(CheckpointReader(folder).damage())
            except CheckpointError as error:
                problems = [str(error)]
            damaged |= bool(problems)
            for line in problems or [f"{folder}: sound"]:
                console.line(line)
    if damaged:
        raise typer.Exit(1)


ModelPath = Annotated[str, typer.Argument(help="A checkpoint or run of ours, or a Hugging Face folder.")]
TokenizerOption = Annotated[str | None, typer.Option(help="Its tokenizer, where that is not found beside it.")]


@app.command("eval")
def evaluate(
    model: ModelPath,
    tasks: Annotated[
        str, typer.Option(help="Names with commas: paper11, paper11-harness, or single tasks.")
    ] = "paper11",
    task_data: Annotated[
        Path | None, typer.Option(help="Folder of JSON lines; by default the hub's data sets.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many examples of each task, its first.")] = None,
    out: Annotated[Path | None, typer.Option(help="File of results; by default scores.json in the run.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All checkpoints of a run, not just the newest.")] = False,
    tokenizer: TokenizerOption = None,
    ranks: RanksOption = None,
) -> None:
    """Let a model do the tasks that compare answers."""
    from launcher.measuring import Evaluation, check_tasks
    from launcher.subject import locations_of

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    folder = str(task_data) if task_data else None
    check_tasks(names, folder)
    models = locations_of(model, every=every)
    measure(Evaluation(models, names, folder, limit, str(out) if out else None, tokenizer), ranks)


@app.command()
def perplexity(
    model: ModelPath,
    files: Annotated[list[str], typer.Argument(help="Text, JSON lines or folders, as `prepare` reads them.")],
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens that windows move by; by default a window.")] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Tokens of a window; by default all that fit.")] = None,
    documents: Annotated[
        bool, typer.Option("--documents/--stream", help="Each document by itself, or all as one stream.")
    ] = True,
    tokenizer: TokenizerOption = None,
    ranks: RanksOption = None,
) -> None:
    """Measure a model on text, in bits per byte and in perplexity."""
    from launcher.measuring import TextMeasurement

    measure(TextMeasurement(model, files, window, stride, documents, tokenizer), ranks)


def measure(asked: Any, ranks: int | None) -> NoReturn:
    """Run a measurement here, or become the launcher of as many ranks."""
    from dataclasses import asdict

    from launcher.measuring import run

    num_ranks = ranks or default_ranks()
    if num_ranks == 1:
        sys.exit(run(asked))
    become_ranks(num_ranks, [str(Path(__file__).with_name("measuring.py")), json.dumps(asdict(asked))])


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A checkpoint or run of ours, or a Hugging Face folder.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(max=1.0, help="Keep the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the choice.")] = 0,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32, of what is not ternary.")] = "bf16",
    packed: Annotated[bool | None, typer.Option("--packed/--latent", help="Default: packed if ternary.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Its file, where it is not found.")] = None,
) -> None:
    """Let a model continue a text, on the GPU where there is one; the text goes to stdout as it comes."""
    from launcher.config import ConfigError
    from launcher.generating import write_text

    dtypes = {"bf16": torch_dtype("bfloat16"), "fp32": torch_dtype("float32")}
    if dtype not in dtypes:
        raise ConfigError(f"--dtype {dtype}: bf16 and fp32 are there")
    if top_p <= 0:
        raise ConfigError(f"--top-p {top_p}: must be above 0")
    choice = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    write_text(model, prompt, dtype=dtypes[dtype], packed=packed, tokenizer=tokenizer, **choice)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, side by side.", show_default=False)],
    out: Annotated[Path, typer.Option(help="HTML file to write; .png draws the loss curve of one run.")],
) -> None:
    """Write tables and plots to look at."""
    from launcher.config import ConfigError
    from launcher.report import write_picture, write_report

    if out.suffix == ".png":
        if len(runs) > 1:
            raise ConfigError(f"--out {out}: a picture shows one run, and here are {len(runs)}; name an HTML file")
        write_picture(runs[0], out)
    else:
        write_report(runs, out)
    Console(silent=False).line(f"Written: {out}")


@app.command()
def status(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or folders that hold some.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[float | None, typer.Option(min=0.1, help="Look again every so many seconds.")] = None,
) -> None:
    """Say how runs stand. Exits with 1 where one has failed, is stalled or cannot be read."""
    from launcher.status import show_status

    sys.exit(show_status(runs, as_json=as_json, watch_seconds=watch))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="Configuration that is planned.", show_default=False)] = None,
    overrides: Overrides = None,
    ranks: RanksOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine before a run: what would stop or slow it down. Exits with 1 where there are problems."""
    from launcher import doctor as doctor_of_rank

    arguments = [*(["--config", str(config)] if config else []), *(["--json"] if as_json else []), *(overrides or [])]
    if (num_ranks := ranks or default_ranks()) == 1:
        sys.exit(doctor_of_rank.main(arguments))
    become_ranks(num_ranks, [str(Path(__file__).with_name("doctor.py")), *arguments])


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration, for editors."""
    from launcher.config_file import json_schema

    Console(silent=False).line(json.dumps(json_schema(), indent=2))
