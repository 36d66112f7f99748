"""Commands that turn checkpoints into others, and check what came of it."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.arguments import JsonOption, Overrides, TokenizerOption, local_target, path
from launcher.config.transition import OptimizerChoice
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
)
from launcher.process.console import Console


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
