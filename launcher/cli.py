"""The `tritrain` command."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from launcher.errors import report_error
from launcher.process.console import Console
from launcher.process.torchrun import become_ranks, become_run, default_ranks

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pretrain language models in 16 bits and finish them in 1.58 bits.",
)


ConfigPath = Annotated[Path, typer.Argument(help="Configuration, a YAML file.", show_default=False)]


Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value: override one key.", show_default=False)]


RanksOption = Annotated[int | None, typer.Option("--ranks", min=1, help="Processes; by default the GPUs, or one.")]


def main() -> None:
    """Run the command; an error that the user can put right is reported in a sentence, without a traceback."""
    try:
        app()
    except Exception as error:
        sys.exit(report_error(error))


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: RanksOption = None,
    launcher: Annotated[str, typer.Option("--with", help="torchrun or deepspeed")] = "torchrun",
) -> None:
    """Start a run on this machine, or go on with it."""
    from launcher.config.file import load_config
    from launcher.errors import ConfigError
    from launcher.plan.plan import make_plan
    from launcher.report.ending import show_next
    from launcher.run.folder import RunFolder, check_place

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
    become_run(launcher, config, overrides or [], num_ranks)


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
    from launcher.config.file import load_config
    from launcher.run.folder import check_place
    from launcher.slurm.cluster import load_site
    from launcher.slurm.submit import Request, next_submission, render
    from launcher.slurm.submit import submit as submit_job

    parsed, cluster, console = load_config(config, overrides or ()), load_site(site), Console(silent=False)
    check_place(config, overrides or (), parsed)
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


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: RanksOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a run would do, without doing it."""
    from launcher.config.file import load_config
    from launcher.plan.plan import make_plan
    from launcher.plan.table import show_plan

    resolved = make_plan(load_config(config, overrides or ()), ranks or default_ranks())
    show_plan(resolved, Console(silent=False), as_json=as_json)


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
    from launcher.commands.prepare import prepare_with_progress
    from launcher.errors import ConfigError

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
    from launcher.commands.convert import convert_checkpoint

    convert_checkpoint(
        source,
        local_target(to, "--to"),
        config,
        overrides or [],
        Console(silent=False),
        into=into,
        phase=phase,
        optimizer=optimizer,
        dtype=dtype,
        dry_run=dry_run,
    )


def local_target(text: str, option: str) -> Path:
    """Where a command is to write.

    Raises:
        ConfigError: a path would be something else than was meant: a folder named `s3:` or `~`.
    """
    from launcher.config.rules import local_problem
    from launcher.errors import ConfigError

    if problem := local_problem(text):
        raise ConfigError(f"{option}: {problem}")
    return Path(text)


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
    from launcher.commands.export import ExportOptions, export_checkpoint

    options = ExportOptions(
        into=into,
        weights=weights,
        dtype=dtype,
        linear_class=linear_class,
        block_type=block_type,
        embeddings=embeddings,
        tokenizer=tokenizer,
        no_tokenizer=no_tokenizer,
    )
    export_checkpoint(checkpoint, local_target(to, "--to"), options, Console(silent=False))


@app.command()
def verify(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoints of ours, or runs: folders or URLs.")],
) -> None:
    """Read every byte of checkpoints and say which tensors of which files are damaged."""
    from launcher.commands.verify import show_damage

    sys.exit(show_damage(checkpoints, Console(silent=False)))


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
    out: Annotated[str | None, typer.Option(help="File of results; by default scores.json in the run.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All checkpoints of a run, not just the newest.")] = False,
    tokenizer: TokenizerOption = None,
    ranks: RanksOption = None,
) -> None:
    """Let a model do the tasks that compare answers."""
    from launcher.inference.measure import Evaluation, check_tasks
    from launcher.inference.sharded import locations_of

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    folder = str(task_data) if task_data else None
    check_tasks(names, folder)
    results = str(local_target(out, "--out")) if out else None
    models = locations_of(model, every=every)
    measure(Evaluation(models, names, folder, limit, results, tokenizer), ranks)


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
    from launcher.inference.measure import TextMeasurement

    measure(TextMeasurement(model, files, window, stride, documents, tokenizer), ranks)


def measure(asked: Any, ranks: int | None) -> NoReturn:
    """Run a measurement here, or become the launcher of as many ranks."""
    from dataclasses import asdict

    from launcher.inference.measure import run

    num_ranks = ranks or default_ranks()
    if num_ranks == 1:
        sys.exit(run(asked))
    become_ranks(num_ranks, ["-m", "launcher.inference.measure", json.dumps(asdict(asked))])


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
    from launcher.engine.build import COMPUTE_DTYPES
    from launcher.errors import ConfigError
    from launcher.inference.generate import write_text

    if dtype not in COMPUTE_DTYPES:
        raise ConfigError(f"--dtype {dtype}: {' and '.join(COMPUTE_DTYPES)} are there")
    if top_p <= 0:
        raise ConfigError(f"--top-p {top_p}: must be above 0")
    choice = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    write_text(model, prompt, dtype=COMPUTE_DTYPES[dtype], packed=packed, tokenizer=tokenizer, **choice)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, side by side.", show_default=False)],
    out: Annotated[Path, typer.Option(help="HTML file to write; .png draws the loss curve of one run.")],
) -> None:
    """Write tables and plots to look at."""
    from launcher.errors import ConfigError
    from launcher.report.page import write_picture, write_report

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
    from launcher.report.status import show_status

    sys.exit(show_status(runs, as_json=as_json, watch_seconds=watch))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="Configuration that is planned.", show_default=False)] = None,
    overrides: Overrides = None,
    ranks: RanksOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine before a run: what would stop or slow it down. Exits with 1 where there are problems."""
    from launcher.doctor import doctor as doctor_of_rank

    arguments = [*(["--config", str(config)] if config else []), *(["--json"] if as_json else []), *(overrides or [])]
    if (num_ranks := ranks or default_ranks()) == 1:
        sys.exit(doctor_of_rank.main(arguments))
    become_ranks(num_ranks, ["-m", "launcher.doctor", *arguments])


@app.command()
def explain(
    key: Annotated[str, typer.Argument(help="A key such as schedule.warmup_steps, or a section.", show_default=False)],
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="Also print the value in this configuration.")] = None,
) -> None:
    """Explain a key of the configuration: its type, its default and its meaning."""
    from launcher.commands.explain import explain as explain_key

    explain_key(key, config, overrides or [], Console(silent=False))


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration, for editors."""
    from launcher.config.file import json_schema

    Console(silent=False).line(json.dumps(json_schema(), indent=2))


if __name__ == "__main__":
    main()
