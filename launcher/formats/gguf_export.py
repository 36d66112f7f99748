"""Write GGUF files, for llama.cpp and everything built on it: codes and levels, tensor by tensor.

A ternary file holds the codes that training computed with, every one of them, and their levels in half precision. What
differs from training then is llama.cpp's own arithmetic: it rounds the inputs of a layer to 8 bits by blocks of 256
instead of by token, and keeps keys and values in half precision.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data.new_paths import TakenError, new_file
from launcher.checkpoint.load import check_fits
from launcher.checkpoint.location import reaching
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.source import Source, in_pieces
from launcher.errors import CheckpointError, ConfigError
from launcher.formats.choices import EmbeddingType
from launcher.formats.codes import CodedMatrices
from launcher.formats.hf_source import listed
from launcher.formats.opened import Exportable
from launcher.formats.provenance import name_of
from launcher.formats.tokens import gguf_tokens
from launcher.plan.exports import EMBEDDINGS, default_embeddings, gguf_problems, gguf_types
from model.gguf import gguf_architecture, gguf_metadata, gguf_name, gguf_rows
from model.gguf_rope import FACTORS, rope_factors
from model.size import parameter_shapes
from quant.gguf import (
    BLOCK_BYTES,
    BLOCK_WIDTHS,
    TERNARY_TYPES,
    BlockType,
    StoredType,
    file_type,
    ggml_type,
    recipe_problem,
    to_blocks,
)


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of the file, before its values are read."""

    name: str
    parameter: str
    """Tritrain's name of it; `rope_freqs.weight`, which is none, has its own."""
    shape: tuple[int, ...]
    into: StoredType

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in the file."""
        return prod(self.shape) // BLOCK_WIDTHS[self.into] * BLOCK_BYTES[self.into]


def export_gguf(
    opened: Exportable,
    to: Path,
    *,
    into: BlockType = "tq2_0",
    embeddings: EmbeddingType | None = None,
    tokenizer: Path | None,
    license_name: str | None = None,
) -> str:
    """Write a GGUF file; it has its name when it is complete, see `data.new_paths`.

    Args:
        opened: with ``ternary`` for the ternary types.
        to: the file.
        into: type of the projections. f16 and q8_0 take codes times their level of a ternary phase, else the weights.
        embeddings: type of the embedding and the head; by default f16 beside f16, else q8_0.
        tokenizer: its file; None for a program that gives tokens to llama.cpp.
        license_name: of the weights.

    Returns:
        A sentence about what was written.

    Raises:
        ConfigError: the `gguf` package is missing.
        CheckpointError: llama.cpp would compute something else than the model; or the source cannot be read, or the
            file not be written.
        DataError: llama.cpp would tokenize differently.
    """
    _require_gguf()
    embeddings = embeddings or default_embeddings(into)
    coded = _coded(opened, into)
    tensors = _tensors(opened, coded, into, embeddings)
    general = {"name": name_of(opened.source), "file_type": file_type(into), "quantization_version": 2}
    if license_name:
        general["license"] = license_name
    metadata: dict[str, object] = {f"general.{key}": value for key, value in general.items()}
    metadata |= gguf_metadata(opened.model)
    metadata |= {"tokenizer.ggml.model": "none"} if tokenizer is None else gguf_tokens(opened, tokenizer)
    if isinstance(opened.source, CheckpointReader):
        metadata |= {
            "tritrain.step": opened.source.manifest.step,
            "tritrain.digest": opened.source.manifest.digest,
        }
    values = (_values(opened, coded, tensor) for tensor in tensors)
    _write(to, gguf_architecture(opened.model), metadata, tensors, values)
    num_codes = sum(prod(tensor.shape) for tensor in tensors if coded and tensor.parameter in coded)
    total = sum(prod(tensor.shape) for tensor in tensors)
    held = "are codes" if into in TERNARY_TYPES else "are codes times their level"
    return f"{num_codes / total:.1%} of {total:,} weights {held}, as {into}; embedding and head as {embeddings}."


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError("GGUF files need the `gguf` package: pip install -e '.[gguf]'") from error


def _coded(opened: Exportable, into: BlockType) -> CodedMatrices | None:
    """The matrices that become codes, or codes times their level; None in 16 bits."""
    quantization, at = opened.quantization, opened.source.location
    if quantization is None:
        return None
    if opened.strength < 1:
        raise CheckpointError(
            f"{at} is on a ramp, at strength {opened.strength:.3g}: it computes with a mix of its weights and "
            "their codes, which llama.cpp cannot do; train it to the end of the ramp"
        )
    if problem := recipe_problem(quantization, into):
        raise CheckpointError(f"{at} cannot be written as {into}: quantization.{problem}")
    return CodedMatrices(opened.source, opened.model, quantization)


def _tensors(
    opened: Exportable, coded: CodedMatrices | None, into: BlockType, embeddings: EmbeddingType
) -> list[GGUFTensor]:
    """The tensors of the file, in order.

    Raises:
        CheckpointError: there is no graph for the model, or rows are of no width that the types can have.
    """
    config, at = opened.model, opened.source.location
    shapes = parameter_shapes(config)
    types = gguf_types(shapes, coded.names if coded else (), into, embeddings)
    if problems := gguf_problems(config, types):
        raise CheckpointError(listed(f"{at} cannot be written as GGUF", problems))
    check_fits(opened.source, shapes)
    tensors = [GGUFTensor(gguf_name(name, config), name, shapes[name], kind) for name, kind in types.items()]
    if gguf_architecture(config) == "olmo2" and config.tie_embeddings:  # its graph has no tied head
        tensors.append(GGUFTensor("output.weight", "model.embed_tokens.weight", tensors[0].shape, embeddings))
    if (factors := rope_factors(config)) is not None:
        tensors.append(GGUFTensor(FACTORS, FACTORS, tuple(factors.shape), "f32"))
    return tensors


def _values(opened: Exportable, coded: CodedMatrices | None, tensor: GGUFTensor) -> NDArray[np.generic]:
    """The bytes of a tensor, as an array."""
    source, name = opened.source, tensor.parameter
    if name == FACTORS:  # of no parameter
        factors = rope_factors(opened.model)
        assert factors is not None
        return to_blocks(factors, tensor.into)
    try:
        if coded and name in coded:
            return to_blocks(gguf_rows(coded.dequantized(name), name, opened.model), tensor.into)
        if name.startswith(EMBEDDINGS):  # the largest matrices by far, so they are not held in fp32
            block_width = BLOCK_WIDTHS[tensor.into]
            pieces = (piece.view(-1, block_width) for piece in in_pieces(source, "weight", name))
            return np.concatenate([to_blocks(piece, tensor.into) for piece in pieces])
        return to_blocks(gguf_rows(_read(source, name), name, opened.model), tensor.into)
    except ValueError as error:
        raise CheckpointError(f"{source.location}: {name}: {error}") from error


def _read(source: Source, name: str) -> Tensor:
    shape = source.shapes[name]
    return source.read_finite("weight", name, 0, prod(shape)).view(shape)


def _write(
    to: Path,
    architecture: str,
    metadata: Mapping[str, object],
    tensors: list[GGUFTensor],
    values: Iterator[NDArray[np.generic]],
) -> None:
    """Write the file; nothing is left of one that fails."""
    from gguf import GGUFValueType, GGUFWriter

    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    try:
        with reaching(to), new_file(to) as building:
            writer = GGUFWriter(building, architecture)
            for key, value in metadata.items():
                if isinstance(value, list):
                    writer.add_array(key, value)
                else:
                    writer.add_key_value(key, value, kinds.get(type(value), GGUFValueType.STRING))
            for tensor in tensors:
                # Its dtype stands for nothing where the type is given.
                writer.add_tensor_info(
                    tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, ggml_type(tensor.into)
                )
            try:
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for array in values:
                    writer.write_tensor_data(array)
                writer.close()
            except BaseException:
                with contextlib.suppress(OSError):  # where the disk is full, closing fails as well
                    writer.close()
                raise
    except TakenError as error:
        raise CheckpointError(str(error)) from error
