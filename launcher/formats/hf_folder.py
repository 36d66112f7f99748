"""Write Hugging Face folders: `config.json`, safetensors in one file or several, and the files beside them.

Tensors are written a piece at a time. The folder is there when it is complete, not before (see `data.new_paths`); in a
remote store it has no `config.json` until then.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from launcher.checkpoint.load import check_fits
from launcher.checkpoint.location import create, new_location, reaching
from launcher.checkpoint.source import Source, in_pieces, start_checking
from launcher.checkpoint.tensor_file import write_tensors
from launcher.formats.hf_source import CONFIG, INDEX, WEIGHTS, dtype_name, naming
from model.hf import config_to_hf
from model.size import parameter_shapes
from model.transformer import ModelConfig

MAX_SHARD_BYTES = 5 * 10**9


class Stored(NamedTuple):
    """A tensor of the folder."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[Tensor]
    """What its bytes are, one after the other; made when they are written."""

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * self.dtype.itemsize


def rounding_note(source: Source, dtype: torch.dtype) -> str | None:
    """A sentence if writing weights in a dtype rounds those that a source has stored; None if it does not."""
    wider = source.stored_dtypes & {torch.float16, torch.float32}
    if dtype != torch.bfloat16 or not wider:
        return None
    return f"Weights in {' and '.join(sorted(map(dtype_name, wider)))} are rounded to bf16; --dtype fp32 keeps them."


def write_hf(
    source: Source,
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    quantization: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    tokens: Mapping[str, object] | None = None,
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` opens, and with the same parameters as the source.

    Of a ternary model these are the latent weights, rounded to ``dtype``, not the codes.

    Args:
        source: of the weights; its moments are not written.
        config: of its model.
        folder: to be written; must not be there.
        dtype: bfloat16, or float32 to round nothing.
        max_shard_bytes: a file holds no more, unless one tensor alone is larger; several files come with an index.
        quantization: the `quantization_config`, if Transformers is to round the weights while it computes.
        files: what else is put there, by name.
        tokens: the keys of `config.json` that name tokens.

    Raises:
        CheckpointError: no Hugging Face family has this configuration, the source does not fit it (all that differs is
            listed) or cannot be read, the folder is there already or cannot be written.
    """
    assert dtype in (torch.bfloat16, torch.float32), dtype
    with naming(folder):
        hf_config = config_to_hf(config) | dict(tokens or {}) | {"torch_dtype": dtype_name(dtype)}
    if quantization is not None:
        hf_config["quantization_config"] = quantization
    start_checking(source, ("weight",))
    write_folder(folder, hf_config, stored_weights(source, config, dtype), files, max_shard_bytes)


def stored_weights(source: Source, config: ModelConfig, dtype: torch.dtype) -> list[Stored]:
    """All weights of a model as they are in its source, rounded to ``dtype``.

    Raises:
        CheckpointError: the source does not fit the model; all that differs is listed.
    """
    shapes = parameter_shapes(config)
    check_fits(source, shapes)
    return [
        Stored(name, dtype, shape, (piece.to(dtype) for piece in in_pieces(source, "weight", name)))
        for name, shape in shapes.items()
    ]


def write_folder(
    folder: Path,
    hf_config: Mapping[str, Any],
    tensors: Sequence[Stored],
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder, all of it or nothing.

    Args:
        folder: to be written; must not be there.
        hf_config: the content of `config.json`.
        tensors: of all files together; the pieces are asked for in this order.
        files: what else is put there, by name.
        max_shard_bytes: a file holds no more, unless one tensor alone is larger; several files come with an index.

    Raises:
        CheckpointError: the folder is there already, or cannot be written, or a source not be read.
    """
    shards: list[list[Stored]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes

    with reaching(folder), new_location(folder) as building:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else WEIGHTS
            with create(building / name) as file:
                write_tensors(
                    file, [each[:3] for each in shard], (each.pieces for each in shard), {}, with_digests=False
                )
            weight_map |= {each.name: name for each in shard}
        if len(shards) > 1:
            total = {"total_size": sum(each.num_bytes for each in tensors)}
            write_bytes(building / INDEX, to_json({"metadata": total, "weight_map": weight_map}))
        for name, content in (files or {}).items():
            write_bytes(building / name, content)
        write_bytes(building / CONFIG, to_json(hf_config))


def to_json(content: Mapping[str, Any]) -> bytes:
    """A JSON file, to be read by people as well."""
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that has reached the disk, or the store, on return."""
    with create(path) as file:
        file.write(content)
