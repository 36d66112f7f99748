"""Generation by llama.cpp: the model is written to a temporary GGUF file, and llama.cpp computes its logits.

Tokenizing, choosing tokens and ending a text are Tritrain's own, so that every option means the same, and any tokenizer
will do. Logits differ by llama.cpp's arithmetic: see `launcher.formats.gguf_export`.
"""

import atexit
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from eval.sample import continuation
from launcher.errors import CheckpointError, ConfigError
from launcher.formats.gguf_export import export_gguf
from launcher.formats.opened import Exportable, open_exportable
from launcher.inference.build import tokenizer_for
from launcher.inference.text_model import TextModel
from model.config import ModelConfig
from quant.gguf import BlockType

FASTEST: tuple[BlockType, ...] = ("tq2_0", "q2_0")
"""Ternary types, fastest on CPUs first; what neither can hold is written in half precision."""


@dataclass(frozen=True)
class LlamaModel(TextModel):
    """A model in llama.cpp."""

    llama: Any
    """`llama_cpp.Llama`."""
    file_bytes: int
    config: ModelConfig
    tokenizer: Tokenizer | None
    first_token: int | None
    puts_first_token: bool
    tokenizer_problem: str | None = None

    @property
    def weights_bytes(self) -> int:
        """Size of the GGUF file."""
        return self.file_bytes

    def continuation(self, prompt_tokens: Sequence[int], **choice: Any) -> Iterator[int]:
        """Continue tokens; see `TextModel`."""
        return continuation(self.next_logits, prompt_tokens, self.config.max_sequence_length, **choice)

    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits [V] of the token that follows; those of tokens that llama.cpp has seen already are kept."""
        import llama_cpp
        import numpy as np

        seen = self.llama.input_ids[: self.llama.n_tokens].tolist()
        kept = next((place for place, (a, b) in enumerate(zip(seen, tokens, strict=False)) if a != b), len(seen))
        self.llama.n_tokens = min(kept, len(tokens) - 1)
        self.llama.eval(tokens[self.llama.n_tokens :])
        logits = llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, shape=(self.config.vocab_size,)).copy())


def load_llama(path: str, *, tokenizer: str | Path | None = None) -> LlamaModel:
    """Load a model into llama.cpp.

    Args:
        path: as for `launcher.inference.load.load_model`.
        tokenizer: likewise.

    Raises:
        ConfigError: `llama-cpp-python` or `gguf` is not installed.
        CheckpointError: the model cannot be loaded, or not be written as GGUF.
        DataError: the tokenizer that is named is none, or of another model.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise ConfigError(
            "--with llama.cpp needs the `llama-cpp-python` package: pip install -e '.[llama]', which compiles llama.cpp"
        ) from error
    opened = open_exportable(path, ternary=False)
    loaded, first_token, puts_first_token, problem = tokenizer_for(opened, tokenizer)
    with tempfile.TemporaryDirectory(prefix="tritrain-") as folder:
        file, start = Path(folder, "model.gguf"), time.perf_counter()
        into = _write(opened, file)
        num_bytes = file.stat().st_size
        sys.stderr.write(f"llama.cpp: the model was written as {into} in {time.perf_counter() - start:.1f} s\n")
        threads = torch.get_num_threads()
        llama = llama_cpp.Llama(
            str(file),
            n_ctx=opened.model.max_sequence_length,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=-1,
            verbose=False,
        )  # which keeps the pages of the file
    atexit.register(llama.close)  # later, its module is gone already
    return LlamaModel(llama, num_bytes, opened.model, loaded, first_token, puts_first_token, problem)


def _write(opened: Exportable, to: Path) -> BlockType:
    """Write the smallest file that holds the model; returns its type.

    Embedding and head are in half precision, so that a continuation is the model's own.
    """
    if opened.quantization is not None:
        for into in FASTEST:
            with contextlib.suppress(CheckpointError):
                export_gguf(opened, to, into=into, embeddings="f16", tokenizer=None)
                return into
    export_gguf(opened, to, into="f16", tokenizer=None)
    return "f16"
