"""The `tritrain` command: each function is a command, and its parameters are the arguments and options.

What a command needs is imported in it, so that `--help` and mistakes are answered at once.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from data.config import Compression, Packing
from launcher.config.engine import EngineName
from launcher.config.transition import OptimizerChoice
from launcher.errors import ConfigError, report_error
from launcher.formats.choices import (
    BlockType,
    ConvertFormat,
    Device,
    Dtype,
    EmbeddingType,
    ExportFormat,
    ExportWeights,
    InputBits,
    LinearClass,
    Runtime,
)
from launcher.plan.gpus import UTILIZATION
from launcher.process.console import Console
from launcher.process.torchrun import JobLauncher, Launcher, become_ranks, become_run, default_ranks

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Pretrain language models in 16 bits and finish them in 1.58 bits.",
)


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def path(text: str) -> Path:
    """The path that a command reads.

    Raises:
        ConfigError: it is blank, which would be the current folder, or an option that there is not.
    """
    if not text.strip():
        raise ConfigError("the name of a file or folder is blank; write . for the current folder")
    if text.startswith("--"):
        refuse_option(text, None)
    return Path(text)


def no_options(overrides: list[str] | None) -> list[str] | None:
    """The overrides, if none of them is an option of another program."""
    for text, following in zip(overrides or [], [*(overrides or [])[1:], None], strict=False):
        if text.startswith("-"):
            refuse_option(text, following)
    return overrides


def refuse_option(text: str, following: str | None) -> NoReturn:
    """Say what to write for an option that there is not.

    Args:
        text: the option, perhaps with its value.
        following: the argument after it, which may be its value.
    """
    from launcher.config.advice import key_named

    option, _, value = text.partition("=")
    name = option.lstrip("-").replace("-", "_")
    if name.startswith(("resume", "continue")):
        raise ConfigError(f"{option}: no such option; a run is resumed by the same command that began it")
    if not value and following and "=" not in following and not following.startswith("-"):
        value = following
    key = key_named(name)
    advice = f"write {key}={value or 'VALUE'}, without dashes" if key else "--help lists the options"
    raise ConfigError(f"{option}: no such option; {advice}")


ConfigPath = Annotated[Path, typer.Argument(parser=path, help="Configuration file (YAML).", show_default=False)]


OVERRIDABLE = {"ignore_unknown_options": True}
"""Unknown options come to `no_options`, which knows the keys for them."""


Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Override keys of the configuration: key.sub=value.", show_default=False, callback=no_options),
]


RanksOption = Annotated[
    int | None, typer.Option("--ranks", min=1, help="Number of processes; default: one per GPU, or one.")
]


def show_version(asked: bool) -> None:
    """Print the version, and end."""
    if asked:
        from importlib.metadata import version

        typer.echo(f"tritrain {version('tritrain')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that need no command."""


def main() -> None:
    """Run the command; an error that the user can put right is reported in a sentence, without a traceback."""
    try:
        app()
    except Exception as error:
        sys.exit(report_error(error))


@app.command(context_settings=OVERRIDABLE)
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: RanksOption = None,
    launcher: Annotated[Launcher, typer.Option("--with", help="Program that starts the processes.")] = "torchrun",
    stop_after_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Smoke test: only N steps of each phase, in a folder that is removed afterwards."),
    ] = None,
    profile: Annotated[
        int | None, typer.Option(min=1, help="Trace N steps of each phase: logging.profile_steps.", metavar="N")
    ] = None,
) -> None:
    """Train on this machine; start a run or resume it."""
    from launcher.commands.train import check_start

    num_ranks = ranks or default_ranks()
    overrides = [*(overrides or ()), *([] if profile is None else [f"logging.profile_steps={profile}"])]
    folder, plan = check_start(config, overrides, num_ranks, is_smoke=stop_after_steps is not None)
    if folder.is_complete(plan.total_steps):
        console = Console(silent=False)
        console.line(f"The run {plan.config.run.name} is complete: {plan.total_steps} steps, in {folder.path}.")
        from launcher.report.ending import show_next

        show_next(folder, console)
        return
    smoke = [] if stop_after_steps is None else [f"--stop-after-steps={stop_after_steps}"]
    become_run(launcher, config, [*smoke, *overrides], num_ranks)


@app.command(context_settings=OVERRIDABLE)
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="GPUs of a node; default: the site's.")] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes of a node; default: one per GPU, or one.")
    ] = None,
    site: Annotated[
        Path | None, typer.Option(parser=path, help="Settings of your cluster (YAML); default: $TRITRAIN_SITE.")
    ] = None,
    launcher: Annotated[JobLauncher, typer.Option("--with", help="Program that starts the processes.")] = "torchrun",
    time: Annotated[str | None, typer.Option(help="Time limit of the job; default: the site's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job script and submit nothing.")] = False,
) -> None:
    """Submit a run to Slurm; the job queues itself again until the run is complete."""
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
    console.line(f"To save and stop it: touch {parsed.run.path}/stop")


@app.command(context_settings=OVERRIDABLE)
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: RanksOption = None,
    as_json: JsonOption = False,
    gpu: Annotated[str | None, typer.Option(help="GPU to estimate hours for, such as H100; default: this one.")] = None,
    utilization: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of its peak that is reached.")
    ] = UTILIZATION,
) -> None:
    """Show what a run would do and need: sizes, memory, time, disk, exports, missing files. Trains nothing."""
    from launcher.config.automatic import ANY_GPU, made_concrete, stored_values
    from launcher.config.file import load_config
    from launcher.plan.gpus import gpu_of_this_machine, named_gpu
    from launcher.plan.plan import make_plan
    from launcher.plan.table import show_plan
    from launcher.run.folder import configuration_of_run

    parsed = load_config(config, overrides or ())
    parsed, counted_as = made_concrete(parsed, ANY_GPU, stored_values(configuration_of_run(parsed.run.path)))
    show_plan(
        make_plan(parsed, ranks or default_ranks()),
        Console(silent=False),
        as_json=as_json,
        gpu=named_gpu(gpu) if gpu else gpu_of_this_machine(),
        utilization=utilization,
        counted_as=counted_as,
    )


@app.command()
def study(
    file: Annotated[Path, typer.Argument(parser=path, help="File of the study (YAML).", show_default=False)],
    out: Annotated[str, typer.Option(help="Folder of the study; the same one goes on with it.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show arms, trunks, hours and disk; train nothing.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at once; default: as many as cores or GPUs allow.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes of each run.")] = 1,
    gpu: Annotated[
        str | None, typer.Option(help="--dry-run: estimate hours for this GPU, instead of measuring here.")
    ] = None,
    utilization: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="--gpu: share of its peak that is reached.")
    ] = UTILIZATION,
) -> None:
    """Train a grid of runs that share their trunks, several at once; the same command goes on."""
    from launcher.study.study import Options
    from launcher.study.study import study as run_study

    options = Options(jobs=jobs, num_ranks=ranks, dry_run=dry_run, gpu=gpu, utilization=utilization)
    sys.exit(run_study(file, local_target(out, "--out"), options, Console(silent=False)))


@app.command()
def prepare(
    inputs: Annotated[list[str], typer.Argument(help="Files, folders, hf:NAME:SPLIT or python-stdlib.")],
    out: Annotated[str, typer.Option(help="Folder to create, or the URL of one in a store.")],
    tokenizer: Annotated[str, typer.Option(help="Tokenizer file or hf:NAME; bpe:VOCAB or unigram:VOCAB trains one.")],
    end_of_document: Annotated[
        str | None, typer.Option(help="Token that ends a document; default: the one that the tokenizer's files name.")
    ] = None,
    lossy_tokenizer: Annotated[
        bool, typer.Option("--lossy-tokenizer", help="Accept a tokenizer that does not give the text back.")
    ] = False,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 2048,
    packing: Annotated[
        Packing, typer.Option(help="Cut rows from the stream of documents, or keep documents whole.")
    ] = "stream",
    compression: Annotated[Compression, typer.Option(help="Compression of the shards.")] = "none",
    validation_fraction: Annotated[float, typer.Option(help="Fraction of the documents to hold out.")] = 0.0,
    validation_input: Annotated[
        list[str] | None, typer.Option(help="Hold out this whole input; may be repeated.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of tokenizing processes.")] = 1,
    scratch: Annotated[str | None, typer.Option(help="For a URL: local folder to make the files in.")] = None,
) -> None:
    """Tokenize text into shards for training."""
    from data.shards import PrepareConfig
    from launcher.commands.prepare import prepare_with_progress
    from launcher.commands.upload import is_url, prepare_in_store

    try:
        config = PrepareConfig(
            inputs=tuple(inputs),
            tokenizer=tokenizer,
            end_of_document=end_of_document,
            lossy_tokenizer=lossy_tokenizer,
            packing=packing,
            compression=compression,
            validation_fraction=validation_fraction,
            validation_inputs=tuple(validation_input or ()),
            workers=workers,
        )
    except ValueError as error:
        raise ConfigError("\n".join(f"{key}: {problem}" for key, problem in error.args[0].items())) from error
    console = Console(silent=False)
    if is_url(out):
        folder = None if scratch is None else local_target(scratch, "--scratch")
        prepare_in_store(config, sequence_length, out, folder, console)
    else:
        prepare_with_progress(config, sequence_length, local_target(out, "--out"), console)
    console.line(f"{out} is ready. List it in data.sources, with data.sequence_length: {sequence_length}")


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(help="Prepared folder, or the URL of one.", show_default=False)],
    rows: Annotated[int, typer.Option(min=1, help="Rows of each split to read, the first ones.")] = 4096,
    samples: Annotated[int, typer.Option(min=0, help="Rows to decode.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Show what a prepared folder holds: counts, lengths of documents, padding, use of the vocabulary, text."""
    from launcher.commands.inspection import inspect as inspect_folder

    inspect_folder(folder, Console(silent=False), num_rows=rows, num_samples=samples, as_json=as_json)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Tritrain checkpoint or run, DeepSpeed folder, or an export.")],
    to: Annotated[str, typer.Option(help="Folder to create.")],
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(parser=path, help="Configuration of the run, or of the model alone.")
    ] = None,
    into: Annotated[
        ConvertFormat,
        typer.Option("--format", help="Tritrain run, DeepSpeed universal checkpoint, or Hugging Face folder."),
    ] = "run",
    phase: Annotated[
        int | None, typer.Option(help="run: index of the phase to begin in; default: the one at the checkpoint's step.")
    ] = None,
    optimizer: Annotated[
        OptimizerChoice | None, typer.Option(help="run: what happens to Adam's state; default: as configured.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="hf: dtype of the weights; default: bf16.")] = None,
    calibrate: Annotated[
        int | None, typer.Option(help="run: fit the ternary phase's codes to this many training sequences.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would happen to each tensor; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="--dry-run: print JSON.")] = False,
) -> None:
    """Convert a checkpoint into a new run or another format. Needs no GPU."""
    from launcher.commands.convert import convert_checkpoint

    console, calibrated = Console(silent=as_json), None
    if calibrate is not None:
        from launcher.training.calibrated import calibrating

        calibrated = calibrating(console)
    convert_checkpoint(
        source,
        local_target(to, "--to"),
        config,
        overrides or [],
        console,
        into=into,
        phase=phase,
        optimizer=optimizer,
        dtype=dtype,
        calibrate=calibrate,
        calibrated=calibrated,
        dry_run=dry_run,
        as_json=as_json,
    )


@app.command()
def average(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoints of a 16-bit phase; with --last, a run.")],
    out: Annotated[str, typer.Option(help="Folder to create.")],
    last: Annotated[
        int | None,
        typer.Option(min=1, help="Take the run's last N checkpoints of a 16-bit phase.", metavar="N"),
    ] = None,
    decay: Annotated[
        float | None,
        typer.Option(help="Exponential average: each checkpoint weighs D times the one after it.", metavar="D"),
    ] = None,
    across_ternary: Annotated[
        bool, typer.Option("--across-ternary", help="Accept ternary phases; the result is for measurement only.")
    ] = False,
) -> None:
    """Average checkpoints of a 16-bit phase into one, to see what a decay would gain. Needs no GPU."""
    from launcher.commands.average import average_checkpoints

    target = local_target(out, "--out")
    average_checkpoints(
        checkpoints, target, Console(silent=False), last=last, decay=decay, across_ternary=across_ternary
    )


def local_target(text: str, option: str) -> Path:
    """The path that a command writes to.

    Raises:
        ConfigError: the path would be the working directory or a folder named `s3:` or `~`, which nobody means.
    """
    from launcher.config.rules import local_problem

    if problem := local_problem(text) if text else "is empty; name what is to be written":
        raise ConfigError(f"{option}: {problem}")
    return Path(text)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint, or run (its newest checkpoint).")],
    to: Annotated[str, typer.Option(help="Folder or file to create.")],
    into: Annotated[
        ExportFormat,
        typer.Option(
            "--format", help="Folder in 16 bits, or with codes for Transformers, MLX or ONNX; or a GGUF file."
        ),
    ],
    weights: Annotated[
        ExportWeights | None,
        typer.Option(help="hf, from a ternary phase: latent weights (to train on) or dequantized ones (to run)."),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="All but onnx, gguf: dtype of what is not codes; default: the run's.")
    ] = None,
    linear_class: Annotated[
        LinearClass | None,
        typer.Option(help="hf-ternary: bitlinear (default) multiplies integers; autobitlinear is faster and larger."),
    ] = None,
    activations: Annotated[
        InputBits | None,
        typer.Option(help="compressed-tensors, onnx: whether layers round their inputs to int8; default: by training."),
    ] = None,
    block_type: Annotated[
        BlockType | None,
        typer.Option("--type", help="gguf: type of the projections; tq2_0 (default), q2_0, or tq1_0: smaller, slower."),
    ] = None,
    device: Annotated[
        Device | None, typer.Option("--for", help="gguf: choose the ternary type that is fastest there.")
    ] = None,
    embeddings: Annotated[
        EmbeddingType | None,
        typer.Option(help="gguf: type of embedding and head; default: f16 with --type f16, else q8_0."),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(parser=path, help="Tokenizer file; default: the run's.")] = None,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Leave the tokenizer out.")] = False,
    license_name: Annotated[
        str | None, typer.Option("--license", help="License of the weights, for the model card: apache-2.0, mit, ...")
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Upload it to OWNER/NAME on the Hugging Face hub, if verify finds it sound.")
    ] = None,
) -> None:
    """Export a model for Transformers, vLLM, SGLang, MLX, ONNX Runtime or llama.cpp. Needs no GPU."""
    from launcher.commands.export import ExportOptions, export_checkpoint

    options = ExportOptions(
        into=into,
        weights=weights,
        dtype=dtype,
        linear_class=linear_class,
        inputs=activations,
        block_type=block_type,
        device=device,
        embeddings=embeddings,
        tokenizer=tokenizer,
        no_tokenizer=no_tokenizer,
        license_name=license_name,
        push=push,
    )
    export_checkpoint(checkpoint, local_target(to, "--to"), options, Console(silent=False))


TokenizerOption = Annotated[str | None, typer.Option(help="Tokenizer file, if the model has none.")]


@app.command()
def verify(
    places: Annotated[
        list[str], typer.Argument(help="Tritrain checkpoints or runs; exported folders or GGUF files, of anyone.")
    ],
    text: Annotated[str | None, typer.Option(help="exports: file of text to measure the perplexity on.")] = None,
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read checkpoints and exports and report what is damaged or wrong. Exits with 1 if anything is."""
    from launcher.commands.verify import verify as verify_places

    sys.exit(verify_places(places, Console(silent=False), as_json=as_json, text=text, tokenizer=tokenizer))


ModelPath = Annotated[str, typer.Argument(help="Tritrain checkpoint or run, or an export.")]


@app.command("eval")
def evaluate(
    model: ModelPath,
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated: paper11, paper11-harness, single tasks of these, or any task or group of "
            "lm-evaluation-harness."
        ),
    ] = "paper11",
    task_data: Annotated[
        Path | None,
        typer.Option(parser=path, help="Folder of JSON lines, TASK_SPLIT.jsonl; default: data sets from the hub."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N examples of each task.")] = None,
    out: Annotated[str | None, typer.Option(help="File of results; default: scores.json in the run.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Score all checkpoints of a run, not just the newest.")] = False,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="harness: examples in each prompt; default: what the task says.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="harness: ask with the chat template of the tokenizer.")
    ] = False,
    system_instruction: Annotated[str | None, typer.Option(help="harness: text in front of each prompt.")] = None,
    add_bos_token: Annotated[
        bool | None, typer.Option(help="harness: begin each text with the first token; default: as the tokenizer does.")
    ] = None,
    tokenizer: TokenizerOption = None,
    ranks: RanksOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model on benchmarks: any task of lm-evaluation-harness, and Tritrain's own eleven."""
    from launcher.inference.any_task import Prompting
    from launcher.inference.measure import Evaluation, check_tasks
    from launcher.inference.sharded import locations_of

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    folder = str(task_data) if task_data else None
    prompting = Prompting(num_fewshot, chat_template, system_instruction, add_bos_token)
    check_tasks(names, folder, prompting)
    results = None if out is None else str(local_target(out, "--out"))
    models = locations_of(model, every=every)
    measure(Evaluation(models, names, folder, limit, results, tokenizer, as_json, prompting), ranks)


@app.command()
def perplexity(
    model: ModelPath,
    files: Annotated[list[str], typer.Argument(help="Text files, JSON lines or folders, as for prepare.")],
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between the starts of two windows; default: a window.")
    ] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Tokens in a window; default: the model's context.")] = None,
    documents: Annotated[
        bool, typer.Option("--documents/--stream", help="Measure each document by itself, or all as one stream.")
    ] = True,
    tokenizer: TokenizerOption = None,
    ranks: RanksOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model on text, in bits per byte and perplexity."""
    from launcher.inference.measure import TextMeasurement

    measure(TextMeasurement(model, files, window, stride, documents, tokenizer, as_json), ranks)


def measure(asked: Any, ranks: int | None) -> NoReturn:
    """Run a measurement in this process, or become the launcher of several ranks."""
    from dataclasses import asdict

    from launcher.inference.measure import run

    num_ranks = ranks or default_ranks()
    if num_ranks == 1:
        sys.exit(run(asked))
    become_ranks(num_ranks, ["-m", "launcher.inference.measure", json.dumps(asdict(asked))])


MaxTokensOption = Annotated[int, typer.Option(min=1, help="Largest number of new tokens.")]
TemperatureOption = Annotated[
    float, typer.Option(min=0.0, help="Sampling temperature; 0 always takes the likeliest token.")
]
TopPOption = Annotated[float, typer.Option(max=1.0, help="Sample from the likeliest tokens of this total probability.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the sampling.")]
RuntimeOption = Annotated[
    Runtime, typer.Option("--with", help="Program that computes; llama.cpp is faster on CPUs, and rounds otherwise.")
]
ComputeDtypeOption = Annotated[
    Dtype | None,
    typer.Option(help="dtype of what is not ternary; default: bf16 where the device computes it, else fp32."),
]
PackedOption = Annotated[
    bool | None,
    typer.Option("--packed/--latent", help="Packed codes, or latent weights; default: packed if ternary."),
]


def sampling(max_tokens: int, temperature: float, top_p: float, seed: int) -> dict[str, Any]:
    """The options that choose tokens."""
    if top_p <= 0:
        raise ConfigError(f"--top-p: is {top_p}; must be above 0")
    return {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}


@app.command()
def generate(
    model: ModelPath,
    prompt: Annotated[str | None, typer.Argument(help="Text to continue.", show_default=False)] = None,
    prompts: Annotated[
        Path | None, typer.Option(parser=path, help="File of prompts: one a line, or .jsonl with prompt in each line.")
    ] = None,
    max_tokens: MaxTokensOption = 256,
    temperature: TemperatureOption = 0.7,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    runtime: RuntimeOption = "tritrain",
    dtype: ComputeDtypeOption = None,
    packed: PackedOption = None,
    tokenizer: TokenizerOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each prompt.")] = False,
) -> None:
    """Continue a text, on the GPU if there is one. The text is printed as it is generated."""
    from launcher.inference.generate import open_model, texts_to_continue, write_texts

    choice = sampling(max_tokens, temperature, top_p, seed)
    texts = texts_to_continue(prompt, prompts)
    loaded = open_model(model, runtime=runtime, dtype=dtype, packed=packed, tokenizer=tokenizer)
    write_texts(loaded, texts, as_json=as_json, **choice)


@app.command()
def chat(
    model: ModelPath,
    system: Annotated[str | None, typer.Option(help="System message, before the first question.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens of an answer.")] = 1024,
    temperature: TemperatureOption = 0.7,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    runtime: RuntimeOption = "tritrain",
    dtype: ComputeDtypeOption = None,
    packed: PackedOption = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Talk to a model that has a chat template, line by line."""
    from launcher.inference.chat import chat as talk
    from launcher.inference.generate import open_model

    choice = sampling(max_tokens, temperature, top_p, seed)
    talk(open_model(model, runtime=runtime, dtype=dtype, packed=packed, tokenizer=tokenizer), system=system, **choice)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            parser=path, help="Runs, or folders that contain runs; several are compared.", show_default=False
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(help="File: .html; .png or .pdf, of loss curves; or .csv. Default: report.html in the folder."),
    ] = None,
) -> None:
    """Write a report with tables and plots."""
    from launcher.report.output import report as write_report

    console = Console(silent=False)
    target = None if out is None else local_target(out, "--out")
    console.line(f"Written: {write_report(runs, target, console.line)}")


@app.command()
def status(
    runs: Annotated[list[Path], typer.Argument(parser=path, help="Folders of runs, or folders that contain runs.")],
    as_json: JsonOption = False,
    watch: Annotated[float | None, typer.Option(min=0.1, help="Refresh every N seconds.")] = None,
) -> None:
    """Show the status of runs. Exits with 1 if one has failed, is stalled or cannot be read."""
    from launcher.report.status import show_status

    sys.exit(show_status(runs, as_json=as_json, watch_seconds=watch))


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(parser=path, help="Configuration to check for (YAML).", show_default=False)
    ] = None,
    overrides: Overrides = None,
    ranks: RanksOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine for what would stop or slow down a run. Exits with 1 if there are problems."""
    from launcher.doctor import doctor as doctor_of_rank

    arguments = [*(["--config", str(config)] if config else []), *(["--json"] if as_json else []), *(overrides or [])]
    if (num_ranks := ranks or default_ranks()) == 1:
        sys.exit(doctor_of_rank.main(arguments))
    become_ranks(num_ranks, ["-m", "launcher.doctor", *arguments])


@app.command()
def init(
    to: Annotated[str, typer.Argument(help="YAML file to write; must not exist.", show_default=False)],
    size: Annotated[str | None, typer.Option(help="Parameters, such as 350M.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="Number of GPUs; 0 trains on the CPU.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Kind of GPU, such as H100; by default this machine's.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens, such as 7B; by default 20 for each parameter.")] = None,
    data: Annotated[str | None, typer.Option(help="A prepared folder, text, or hf:NAME[:CONFIG]:SPLIT.")] = None,
    engine: Annotated[EngineName | None, typer.Option(help="Engine; default: fsdp2.", show_default=False)] = None,
) -> None:
    """Write a commented configuration for a model size; asks for what is not given."""
    from launcher.commands.init import InitOptions, write_configuration

    options = InitOptions(size=size, tokens=tokens, gpus=gpus, gpu=gpu, data=data, engine=engine)
    write_configuration(local_target(to, "TO"), options, Console(silent=False))


@app.command()
def explain(
    key: Annotated[str, typer.Argument(help="A key such as schedule.warmup_steps, or a section.", show_default=False)],
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(parser=path, help="Also print the value in this configuration.")
    ] = None,
) -> None:
    """Explain a key of the configuration: its type, its default and its meaning."""
    from launcher.commands.explain import explain as explain_key

    explain_key(key, config, overrides or [], Console(silent=False))


@app.command()
def schema() -> None:
    """Print the JSON schema of configuration files, for editors."""
    from launcher.config.file import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


if __name__ == "__main__":
    main()
