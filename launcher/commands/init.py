"""`tritrain init`: write a commented configuration for a size, a number of tokens and some GPUs."""

import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import click
import typer

from data.errors import DataError
from data.new_paths import new_file
from data.prepared import MANIFEST, VALIDATION, read_manifest
from data.survey import check_input
from launcher.commands.recipes import recipe_file, with_recipe
from launcher.config.engine import EngineName
from launcher.config.file import parse_config, parse_yaml
from launcher.errors import ConfigError
from launcher.plan.gpus import gpu_of_this_machine, named_gpu
from launcher.plan.plan import make_plan
from launcher.plan.proposal import Tree, Wish, propose, sequence_length_for, vocabulary_for
from launcher.process.console import Console, human_count
from model.size import num_parameters

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
TOKENS_PER_PARAMETER = 20
COMMENT_COLUMN = 33
VOCABULARY_MULTIPLE = 128
"""Rows of an embedding are rounded up to this; matrices of such sizes are multiplied faster."""


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """The options as they were given; None where nothing was said, which is asked on a terminal."""

    size: str | None
    tokens: str | None
    gpus: int | None
    gpu: str | None
    data: str | None
    engine: EngineName | None
    recipe: str | None = None
    """A training recipe that comes with the project; None: the one of the template."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The options, completed by a person's answers."""

    size: int
    tokens: int
    gpus: int
    data: str
    engine: EngineName


@dataclass(frozen=True)
class Data:
    """The source of tokens."""

    text: str
    """The section `data`, as YAML."""
    vocab_size: int
    sequence_length: int


def write_configuration(to: Path, options: InitOptions, console: Console) -> None:
    """Ask for what the options leave out, and write a configuration that `tritrain plan` accepts.

    Args:
        to: the YAML file, which must not exist.
        options: as they were given.
        console: to print to.

    Raises:
        ConfigError: the file exists, an option is missing or wrong, or there is no such model.
    """
    if to.exists():
        raise ConfigError(f"{to}: exists, and nothing is overwritten; name another file")
    recipe = recipe_file(options.recipe) if options.recipe else None
    name, gpu = named_gpu(options.gpu) if options.gpu else gpu_of_this_machine() or named_gpu("H100")
    answers = answered(options)
    vocab_size, length = vocabulary_for(answers.size), sequence_length_for(answers.size)
    data = describe_data(answers.data, f"bpe:{vocab_size}", vocab_size, length)
    wish = Wish(
        num_parameters=answers.size,
        num_tokens=answers.tokens,
        num_gpus=answers.gpus,
        gpu=gpu,
        engine=answers.engine,
        vocab_size=VOCABULARY_MULTIPLE * -(-data.vocab_size // VOCABULARY_MULTIPLE),
        sequence_length=data.sequence_length,
    )
    text = commented(propose(wish), wish, data, run_name(to), name)
    if recipe:
        text = "".join(f"{aligned(line)}\n" for line in with_recipe(text, recipe).splitlines())
    write_checked(to, text, wish, console)


def write_checked(to: Path, text: str, wish: Wish, console: Console) -> None:
    """Write a configuration if there is a plan for it, and say what comes next."""
    config = parse_config(parse_yaml(text, str(to)))
    make_plan(config, wish.num_ranks)
    with new_file(to) as building:
        building.write_text(text)
    console.line(f"Written: {to}, a model of {human_count(num_parameters(config.model))} parameters. Next:")
    written = shlex.quote(str(to))
    console.line(f"  tritrain plan {written} --ranks {wish.num_ranks}")
    starter = " --with deepspeed" if wish.engine == "deepspeed" else ""
    console.line(f"  tritrain train {written} --ranks {wish.num_ranks}{starter}")


def answered(options: InitOptions) -> Answers:
    """The options, with answers to questions in place of those that were not given.

    Raises:
        ConfigError: there is no terminal to ask on, and names the missing options; or a count is none.
    """
    given = vars(options)
    missing = [f"--{name}" for name in ("size", "gpus", "data") if given[name] is None]
    if missing and not sys.stdin.isatty():
        raise ConfigError(f"{', '.join(missing)}: missing, and there is no terminal to ask on; give all of them")

    def ask(name: str, question: str, default: str | None = None, kind: click.Choice[str] | None = None) -> str:
        """Return the option, or the answer to a question, or the default if nothing needs to be asked."""
        if given[name] is not None:
            return str(given[name])
        return str(typer.prompt(question, default=default, type=kind)) if missing or default is None else default

    size = parse_count(ask("size", "Parameters, such as 350M"), "--size")
    tokens = ask("tokens", "Tokens to train on, such as 7B", str(TOKENS_PER_PARAMETER * size))
    gpus = ask("gpus", "GPUs (0: on the CPU)", "1")
    if not gpus.isdecimal():
        raise ConfigError(f"--gpus {gpus}: is no number of GPUs; 8 would be one")
    return Answers(
        size=size,
        tokens=parse_count(tokens, "--tokens"),
        gpus=int(gpus),
        data=ask("data", "Data: a folder of `tritrain prepare`, text, or hf:NAME:SPLIT"),
        engine=cast(EngineName, ask("engine", "Engine", "fsdp2", click.Choice(get_args(EngineName)))),
    )


def parse_count(text: str, option: str) -> int:
    """Read a count such as 350M, 7B, 1.3B or 2e9.

    Raises:
        ConfigError: it is none.
    """
    matched = re.fullmatch(r"(\d[\d_]*\.?\d*(?:e\d+)?)\s*([KMBGT]?)", text.strip(), re.IGNORECASE)
    value = float(matched[1]) * UNITS[matched[2].upper()] if matched else 0.0
    if not value < 2**63 or not (count := round(value)):
        raise ConfigError(f"{option} {text}: is no count; 350M or 7B would be one")
    return count


def run_name(to: Path) -> str:
    """The name of the run: that of the file, without what a name cannot have."""
    return re.sub(r"[^\w.-]", "-", to.stem).lstrip(".-") or "run"


def describe_data(text: str, tokenizer: str, vocab_size: int, length: int) -> Data:
    """The section `data` for a prepared folder, for text that is to be prepared, or for a folder that does not exist.

    Args:
        text: what a person has named.
        tokenizer: for text, a folder or `bpe:VOCAB`.
        vocab_size: its tokens.
        length: of a sequence, for text.

    Raises:
        ConfigError: it is none of these.
    """
    if "://" in text:
        raise ConfigError(f"--data {text}: is a URL; name a local copy, and set data.sources and data.cache afterwards")
    quoted = json.dumps(text)
    if (Path(text) / MANIFEST).is_file():
        manifest = read_manifest(Path(text))
        length = manifest["sequence_length"]
        section = f"  sources: [{{path: {quoted}}}]\n  sequence_length: {length}      # as the folder was prepared\n"
        if VALIDATION not in manifest["splits"]:
            section += "  validation_rows: 0            # `prepare` holds some out with --validation-fraction\n"
        return Data(section, manifest["vocab_size"], length)
    try:
        check_input(text)
    except DataError as error:
        if Path(text).exists() or text.startswith("hf:"):
            raise ConfigError(f"--data: {error}") from error
        section = (
            f"  # The folder does not exist yet. This makes it, of text files, JSON lines or parquet:\n"
            f"  # tritrain prepare TEXT --out {shlex.quote(text)} --tokenizer {tokenizer} --sequence-length {length} "
            "--validation-fraction 0.01\n"
            f"  sources: [{{path: {quoted}}}]\n  sequence_length: {length}\n"
        )
        return Data(section, vocab_size, length)
    name = re.sub(r"\W+", "-", text.removeprefix("hf:")).strip("-")
    return Data(
        f"  sources: [{{path: runs/data/{name}}}]\n"
        f"  sequence_length: {length}\n"
        "  prepare:                      # made at the first start\n"
        f"    inputs: [{quoted}]\n"
        f"    tokenizer: {_tokenizer_line(tokenizer)}\n"
        "    validation_fraction: 0.01   # held out, to measure the loss on\n",
        vocab_size,
        length,
    )


def _tokenizer_line(tokenizer: str) -> str:
    if tokenizer.startswith("bpe:"):
        return f"{tokenizer}        # SentencePiece BPE: every export can hold it"
    return f"{json.dumps(tokenizer)}        # the model's own, whose tokens its embeddings stand for"


def commented(
    tree: Tree, wish: Wish, data: Data, name: str, gpu: str, template: str = "init.yaml.j2", **about: Any
) -> str:
    """The configuration as YAML, with a reason for each choice; ``about`` has more variables of the template."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    steps = wish.num_tokens / (tree["training"]["global_batch_sequences"] * wish.sequence_length)
    text = environment.get_template(template).render(
        **tree,
        **about,
        wish=wish,
        data=data,
        name=json.dumps(name),
        gpu=gpu,
        total_steps=round(steps),
        count=lambda number: human_count(number).replace(" ", ""),
    )
    return "".join(f"{aligned(line)}\n" for line in text.splitlines())


def aligned(line: str) -> str:
    """A line of YAML with its comment in a column."""
    found = re.fullmatch(r'((?:"(?:\\.|[^"\\])*"|[^"])*?) # (.*)', line)
    return f"{found[1].rstrip():<{COMMENT_COLUMN}} # {found[2]}" if found and found[1].strip() else line
