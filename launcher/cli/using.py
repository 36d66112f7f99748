"""Commands that measure models and generate text with them."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from launcher.cli.arguments import JsonOption, ModelPath, RanksOption, TokenizerOption, local_target, path
from launcher.errors import ConfigError
from launcher.formats.choices import Dtype, Runtime
from launcher.process.torchrun import become_ranks, default_ranks


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
