"""`tritrain generate`: stream a model's text to the terminal."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.messages import printable
from eval.sample import pieces_of_text
from launcher.config.automatic import compute_dtype_for
from launcher.engine.build import COMPUTE_DTYPES
from launcher.errors import ConfigError
from launcher.formats.choices import Dtype
from launcher.inference.load import load_model
from launcher.process.console import human_bytes
from launcher.run.automatic import device_of
from quant.packed import memory_bytes


def write_text(
    path: str,
    prompt: str,
    *,
    dtype: Dtype | None,
    packed: bool | None,
    tokenizer: str | Path | None,
    **choice: Any,
) -> None:
    """Continue a prompt: write the text to stdout, and its speed to stderr.

    Control characters are written as escapes: a model may have learned to write what a terminal obeys.

    Args:
        path: see `launcher.inference.load.load_model`, as for the next three.
        prompt: the text to continue; it is written first.
        dtype: of what is not ternary; None: chosen by the device, which is said on stderr.
        packed: whether ternary layers are codes in 2 bits.
        tokenizer: its file.
        choice: see `eval.sample.generate`.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: the prompt fills the context.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen, reason = compute_dtype_for(device_of(device))
    loaded = load_model(path, dtype=COMPUTE_DTYPES[dtype or chosen], device=device, packed=packed, tokenizer=tokenizer)
    prompt_tokens = loaded.prompt_tokens(prompt)
    assert loaded.tokenizer is not None
    if dtype is None:
        sys.stderr.write(f"dtype: {chosen}, {reason}; --dtype chooses another\n")
    try:
        tokens = loaded.generate_tokens(prompt_tokens, **choice)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    times = [time.perf_counter()]

    def timed() -> Iterator[int]:
        for token in tokens:
            times.append(time.perf_counter())
            yield token

    sys.stdout.write(printable(prompt))
    for piece in pieces_of_text(loaded.tokenizer, timed(), prompt_tokens):
        sys.stdout.write(printable(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
    num_tokens, room = len(times) - 1, loaded.config.max_sequence_length - len(prompt_tokens)
    said = f"{num_tokens} tokens, {human_bytes(memory_bytes(loaded.model))} of weights"
    if num_tokens > 1:
        said += f", {(num_tokens - 1) / (times[-1] - times[1]):.3g} tokens/s after the first"
    if num_tokens == room:
        said += f"; the context of {loaded.config.max_sequence_length} tokens is full"
    sys.stderr.write(f"{said}\n")
