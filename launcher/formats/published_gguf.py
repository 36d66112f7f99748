"""Open GGUF files as they are published."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.gguf_tokenizer import gguf_tokenizer_file
from launcher.checkpoint.tensor_file import TensorFileError
from launcher.errors import CheckpointError
from launcher.formats.gguf_file import I2_S, MAGIC, GGUFFile
from launcher.formats.hf_source import naming
from launcher.formats.published import Coded, Published, codes_of_values, counted, named
from model.config import ModelConfig
from model.gguf import config_from_gguf, gguf_name, halves_of_rows
from model.gguf_rope import FACTORS
from model.size import is_projection, parameter_shapes
from quant.gguf import BLOCK_WIDTHS, Q2_0_TYPE

WIDTHS_OF_TYPES = {34: BLOCK_WIDTHS["tq1_0"], 35: BLOCK_WIDTHS["tq2_0"], Q2_0_TYPE: BLOCK_WIDTHS["q2_0"]}
"""Weights that share a level, by the numbers of the ternary types."""

DTYPES_OF_TYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Dtypes by the numbers of GGUF's types."""

BEGINNING = (
    *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    *("tekken", "chameleon"),
)
"""The byte-level vocabularies before whose texts llama.cpp puts the first token where a file does not say."""

NOT_COMPUTED = ("rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that change the rotary positions, as no model here does."""


def is_gguf(path: Path) -> bool:
    """Return whether a path is meant to be a GGUF file; it may still be damaged."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC or path.suffix == ".gguf"


class PublishedGGUF(Published):
    """A GGUF file.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.form = "GGUF file"
        self._path, self._file, self._names = path, None, {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        try:
            with naming(path):
                self._file = GGUFFile(path)
        except CheckpointError as error:
            self.problems.append(str(error))
            return
        file = self._file
        matrices = [entry.type_number for entry in file.entries.values() if len(entry.shape) > 1]
        self.stored_dtypes = frozenset(DTYPES_OF_TYPES[number] for number in matrices if number in DTYPES_OF_TYPES)
        self.form += f", architecture {file.fields.get('general.architecture')}"
        self._check_types(file)
        self.config = self._config(file)
        self._names = self._parameters(file, self.config)
        self.stored = list(self._names)
        self.only_ternary = True
        if not file.unknown_types and self.config:
            shown = {name: gguf_name(name, self.config) for name in parameter_shapes(self.config)}
            self.compare_names(shown, ignored=(FACTORS,))
        self._check_vocabulary(file)

    def _check_types(self, file: GGUFFile) -> None:
        for number in sorted(set(file.unknown_types.values())):
            names = [name for name, theirs in file.unknown_types.items() if theirs == number]
            whose = "bitnet.cpp's I2_S, which llama.cpp does not read" if number == I2_S else "which is not known"
            self.problems.append(f"{counted(names, 'tensor')} of type {number}, {whose}: {named(names)}")

    def _config(self, file: GGUFFile) -> ModelConfig | None:
        shapes = {name: entry.shape for name, entry in file.entries.items()}
        try:
            if other := [name for name in NOT_COMPUTED if name in shapes]:
                raise ValueError(f"{other[0]} changes the rotary positions, which is not computed here")
            factors = file.read(FACTORS) if FACTORS in shapes else None
            return config_from_gguf(file.fields, shapes, factors)
        except ValueError as error:
            self.notes.append(f"{error}; so names were not compared, and nothing was predicted")
            return None

    def _parameters(self, file: GGUFFile, config: ModelConfig | None) -> dict[str, str]:
        """Names of tensors in the file, by Hugging Face's where the architecture is known."""
        theirs = {gguf_name(name, config): name for name in parameter_shapes(config)} if config else {}
        return {theirs.get(name, name): name for name in file.entries}

    def _check_vocabulary(self, file: GGUFFile) -> None:
        tokens = file.fields.get("tokenizer.ggml.tokens")
        embedding = file.entries.get("token_embd.weight")
        if not isinstance(tokens, list) or embedding is None:
            if embedding is not None:
                self.problems.append("has no vocabulary (tokenizer.ggml.tokens); export it with its tokenizer")
            return
        self.vocabulary_size, rows = len(tokens), embedding.shape[0]
        if rows != len(tokens):
            self.problems.append(
                f"the vocabulary has {len(tokens)} tokens and the embedding {rows} rows, and llama.cpp wants as many; "
                "export it with the tokenizer that it was trained with"
            )
        for key in ("scores", "token_type"):
            other = file.fields.get(f"tokenizer.ggml.{key}")
            if isinstance(other, list) and len(other) != len(tokens):
                self.problems.append(f"tokenizer.ggml.{key} has {len(other)} entries for {len(tokens)} tokens")
        for key in ("bos", "eos", "unknown", "padding"):
            token = file.fields.get(f"tokenizer.ggml.{key}_token_id")
            if token is not None and not (type(token) is int and 0 <= token < len(tokens)):
                self.problems.append(
                    f"tokenizer.ggml.{key}_token_id {token!r} is no token of the vocabulary, which has 0 to "
                    f"{len(tokens) - 1}"
                )
        self.first_token = file.fields.get("tokenizer.ggml.bos_token_id")
        is_byte_level = file.fields.get("tokenizer.ggml.model") == "gpt2"
        usual = not is_byte_level or file.fields.get("tokenizer.ggml.pre") in BEGINNING
        self.puts_first_token = bool(file.fields.get("tokenizer.ggml.add_bos_token", usual))

    def tokenizer_file(self) -> Path | None:
        if self._file is None or self.vocabulary_size is None:
            return None
        self._folder = self._folder or tempfile.TemporaryDirectory()  # as long as the model is open
        return gguf_tokenizer_file(self._file.fields, Path(self._folder.name))

    def is_coded(self, name: str) -> bool:
        return self._file is not None and self._file.entries[self._names[name]].type_number in WIDTHS_OF_TYPES

    def read(self, name: str) -> Tensor | Coded:
        file: Any = self._file
        entry, config = file.entries[self._names[name]], self.config
        with naming(self._path):
            values = file.read(self._names[name])
            if not values.numel():
                raise TensorFileError(f"{name} is empty")
        if config is not None:
            values = halves_of_rows(values, name, config, file.fields["general.architecture"])
        if values.dim() != 2 or not (entry.type_number in WIDTHS_OF_TYPES or (config and is_projection(name))):
            return values
        width = WIDTHS_OF_TYPES.get(entry.type_number)
        if width is None:
            coded = codes_of_values(values)
            return values if coded is None else coded
        level = values.unflatten(1, (-1, width)).abs().amax(2)
        coded = codes_of_values(values, (width,))
        if coded is None and values.isfinite().all():
            raise CheckpointError(f"{self._path}: {self._names[name]} holds codes other than -1, 0 and +1")
        return Coded(values.sign().nan_to_num().to(torch.int8), level) if coded is None else coded
