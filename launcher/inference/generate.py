"""`tritrain generate`: stream a model's text to the terminal."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from data.errors import DataError
from data.messages import printable
from eval.sample import pieces_of_text
from launcher.config.automatic import compute_dtype_for
from launcher.engine.build import COMPUTE_DTYPES
from launcher.errors import ConfigError
from launcher.formats.choices import Dtype, Runtime
from launcher.inference.load import load_model
from launcher.inference.text_model import TextModel
from launcher.process.console import human_bytes
from launcher.run.automatic import device_of


def open_model(
    path: str,
    *,
    runtime: Runtime = "tritrain",
    dtype: Dtype | None = None,
    packed: bool | None = None,
    tokenizer: str | Path | None = None,
) -> TextModel:
    """Load a model to generate text with; what was chosen for it is said on stderr.

    Args:
        path: see `launcher.inference.load.load_model`, as for the last two.
        runtime: what computes.
        dtype: of what is not ternary; None: chosen by the device.
        packed: whether ternary layers are codes in 2 bits.
        tokenizer: its file.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: the runtime is not installed, or has no such option.
        DataError: the tokenizer that is named is none, or of another model.
    """
    if runtime == "llama.cpp":
        for option, value in (("--dtype", dtype), ("--packed and --latent", packed)):
            if value is not None:
                raise ConfigError(f"{option}: only for --with tritrain; llama.cpp computes with codes and fp16")
        from launcher.inference.llama import load_llama

        return load_llama(path, tokenizer=tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen, reason = compute_dtype_for(device_of(device))
    loaded = load_model(path, dtype=COMPUTE_DTYPES[dtype or chosen], device=device, packed=packed, tokenizer=tokenizer)
    if dtype is None:
        sys.stderr.write(f"dtype: {chosen}, {reason}; --dtype chooses another\n")
    return loaded


def write_texts(model: TextModel, prompts: Sequence[str], *, as_json: bool = False, **choice: Any) -> None:
    """Continue prompts, one after the other: write their texts to stdout, and the speed of each to stderr.

    Each continuation is the one that the prompt has alone. Control characters are written as escapes: a model may have
    learned to write what a terminal obeys.

    Args:
        model: see `open_model`.
        prompts: the texts to continue; each is written before its continuation.
        as_json: write an object a line instead: ``prompt``, ``text``, ``tokens`` and ``seconds``, of the continuation.
        choice: see `eval.sample.generate`.

    Raises:
        CheckpointError: the model has no tokenizer.
        ConfigError: a prompt fills the context.
        DataError: a prompt is not text, or the tokenizer cannot be read.
    """
    tokenizer = model.required_tokenizer()
    as_tokens = []
    for number, prompt in enumerate(prompts, start=1):
        as_tokens.append(model.prompt_tokens(prompt))
        try:
            model.generate_tokens(as_tokens[-1], **choice)  # checks them, and computes nothing yet
        except ConfigError as error:
            raise ConfigError(f"prompt {number}: {error}" if len(prompts) > 1 else str(error)) from error
    for number, (prompt, prompt_tokens) in enumerate(zip(prompts, as_tokens, strict=True)):
        start = time.perf_counter()
        times: list[float] = []
        pieces = pieces_of_text(tokenizer, _timed(model.generate_tokens(prompt_tokens, **choice), times), prompt_tokens)
        if as_json:
            text = "".join(pieces)
            seconds = round(time.perf_counter() - start, 3)
            answer = {"prompt": prompt, "text": text, "tokens": len(times), "seconds": seconds}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
        else:
            sys.stdout.write(("\n" if number else "") + printable(prompt))
            for piece in pieces:
                sys.stdout.write(printable(piece))
                sys.stdout.flush()
            sys.stdout.write("\n")
        said = f"{len(times)} tokens, {human_bytes(model.weights_bytes)} of weights"
        if len(times) > 1:
            said += f", {(len(times) - 1) / (times[-1] - times[0]):.3g} tokens/s after the first"
        if len(prompt_tokens) + len(times) == model.config.max_sequence_length:
            said += f"; the context of {model.config.max_sequence_length} tokens is full"
        sys.stderr.write(f"{said}\n")


def _timed(tokens: Iterator[int], times: list[float]) -> Iterator[int]:
    """Tokens, whose times are noted."""
    for token in tokens:
        times.append(time.perf_counter())
        yield token


def texts_to_continue(prompt: str | None, file: Path | None) -> list[str]:
    """The prompt, or those of a file.

    Raises:
        ConfigError: both are named, or neither.
        DataError: see `read_prompts`.
    """
    if (prompt is None) == (file is None):
        raise ConfigError("name either a text to continue, or a file of such texts with --prompts")
    return [prompt] if prompt is not None else read_prompts(file)  # type: ignore[arg-type]


def read_prompts(file: Path) -> list[str]:
    """Prompts of a file: its lines, or of JSON lines (`.jsonl`) the ``prompt`` of each. Blank lines are left out.

    Raises:
        DataError: the file cannot be read, a line is no such object, or there is no prompt.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt: Any = line.removesuffix("\r")
        if file.suffix == ".jsonl":
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, TypeError, KeyError, RecursionError):
                prompt = None
            if not isinstance(prompt, str):
                raise DataError(f'{file}, line {number}: must be a JSON object with a text: {{"prompt": "..."}}')
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{file}: has no prompt; write one a line")
    return prompts
