"""Exports of folders: 16-bit weights for Hugging Face Transformers, or ternary codes in one of three formats.

Those of compressed-tensors and of MLX are in files of their own; BitNet's is here. Transformers computes its layers
with one of two classes, which take opposite scales:

- `bitlinear`: the codes of the input times those of the weights, divided by both scales; the file has 1 / level. In
  fp32 the products of codes are those of training, bit for bit, and the weights stay packed in memory.
- `autobitlinear`: the dequantized input times the codes, multiplied by the scale; the file has the level. The weights
  are unpacked when they are loaded.

The wrong scale loads without a word and computes nonsense, so what is written depends on the class alone.
"""

from collections.abc import Callable, Container, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from launcher.checkpoint.source import Source
from launcher.errors import CheckpointError
from launcher.formats.choices import ExportWeights, LinearClass
from launcher.formats.codes import CodedMatrices
from launcher.formats.compressed_tensors import compressed, compressed_config
from launcher.formats.hf_folder import Stored, stored_weights, to_json, write_folder
from launcher.formats.hf_source import dtype_name, listed, naming
from launcher.formats.mlx import grouped, mlx_config
from launcher.formats.model_card import Reader, model_card
from launcher.formats.open import computed_precision
from launcher.formats.opened import Exportable
from launcher.formats.provenance import source_record
from launcher.formats.tokens import folder_tokens
from launcher.plan.exports import (
    AS_WEIGHTS,
    NO_OTHER_WAY,
    coded_matrices,
    compressed_problems,
    mlx_recipe_problems,
    packing_problems,
    recipe_problems,
)
from model.hf import config_to_hf
from model.mlx import mlx_problems
from model.size import is_projection, parameter_shapes
from model.transformer import ModelConfig
from quant.codes import CODES_PER_BYTE, pack
from quant.compressed_tensors import InputBits, default_inputs
from quant.mlx import group_size_for

HfWeights = ExportWeights | Literal["packed", "compressed-tensors", "mlx"]


HOLDS: dict[HfWeights, str] = {
    "latent": "the 16-bit weights, of a ternary phase the latent ones, which are rounded to codes while it trains",
    "dequantized": "the ternary codes times their level as 16-bit weights; inputs of the layers are not quantized",
    "packed": "ternary codes in 2 bits, with the inputs of the layers rounded to 8 bits ({linear_class})",
    "compressed-tensors": "ternary codes in 2 bits, in the format of compressed-tensors; {inputs}",
    "mlx": "ternary codes in 2 bits, in the format of MLX; inputs of the layers are not quantized",
}
"""The descriptions of the weights in the model card."""

READERS: dict[HfWeights, Reader] = {
    "latent": "Transformers",
    "dequantized": "Transformers",
    "packed": "Transformers",
    "compressed-tensors": "Transformers",
    "mlx": "mlx-lm",
}
"""The program that each is written for."""

INPUTS: dict[InputBits, str] = {
    "int8": "inputs of the layers are rounded to 8 bits",
    "none": "inputs of the layers are not quantized",
}


def default_dtype(exportable: Exportable) -> torch.dtype:
    """The dtype that a run computes in; bf16 of other models."""
    config = exportable.config
    return torch.float32 if config and config.training.compute_dtype == "fp32" else torch.bfloat16


def export_hf(
    exportable: Exportable,
    folder: Path,
    *,
    weights: HfWeights,
    dtype: torch.dtype | None = None,
    linear_class: LinearClass = "bitlinear",
    inputs: InputBits | None = None,
    tokenizer: Path | None,
    license_name: str | None = None,
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained`, or mlx-lm, opens without any of Tritrain's code.

    Args:
        exportable: opened with ``ternary`` for all but latent weights.
        folder: to be written; must not be there.
        weights: `latent`, to go on training; `dequantized`, codes times their level as plain weights, to run with
            inputs that are not quantized; or 2-bit codes: `packed` for Transformers' BitNet layers,
            `compressed-tensors`, or `mlx`.
        dtype: of what is not packed, and what Transformers computes in by default. By default the one that the run
            computes in, which loses nothing; latent weights are in fp32 while they train, which loses bits in bf16.
        linear_class: what computes `packed` weights.
        inputs: what `compressed-tensors` has done to the inputs of layers; None: `quant.compressed_tensors`' default.
        tokenizer: its file; None leaves it out.
        license_name: of the weights, for the model card.

    Raises:
        CheckpointError: Transformers cannot express the model or its recipe (all reasons are listed), or the folder is
            there already, or cannot be written.
        DataError: the tokenizer cannot be expressed exactly, or is of another model.
    """
    model, quantization, source = exportable.model, exportable.quantization, exportable.source
    if weights == "latent" and source.is_packed:
        raise CheckpointError(f"{source.location} holds packed codes, and no latent weights; {AS_WEIGHTS}")
    dtype = dtype or default_dtype(exportable)
    tensors = stored_weights(source, model, dtype)
    quantized: dict[str, object] = {}
    if weights != "latent":
        assert quantization is not None
        matrices = CodedMatrices(source, model, quantization)
        inputs = inputs or default_inputs(quantization)
        if problems := _problems(exportable, matrices, weights, linear_class, inputs):
            raise CheckpointError(listed(f"{source.location}: {READERS[weights]} cannot compute this", problems))
        names = [tensor.name for tensor in tensors]
        written: Callable[[Stored], list[Stored]]
        if weights == "packed":
            quantized["quantization_config"] = quantization_config(matrices.names, names, linear_class, mode="offline")
            written = partial(packed, matrices=matrices, linear_class=linear_class)
        elif weights == "compressed-tensors":
            quantized["quantization_config"] = compressed_config(quantization, matrices.names, names, inputs)
            written = partial(compressed, matrices=matrices)
        elif weights == "mlx":
            group_size = group_size_for((source.shapes[name][1] for name in matrices.names), quantization)
            assert group_size is not None, "checked above"
            quantized["quantization"] = mlx_config(group_size)
            written = partial(grouped, matrices=matrices, group_size=group_size)
        else:
            written = partial(dequantized, matrices=matrices)
        tensors = [each for tensor in tensors for each in (written(tensor) if tensor.name in matrices else [tensor])]
    holds = HOLDS[weights].format(linear_class=linear_class, inputs=INPUTS[inputs or "none"])
    hf_config, files = common_files(
        exportable, folder, dtype, holds, READERS[weights], tokenizer=tokenizer, license_name=license_name
    )
    write_folder(folder, hf_config | quantized, tensors, files)


def common_files(
    exportable: Exportable,
    folder: Path,
    dtype: torch.dtype,
    holds: str,
    reader: Reader,
    *,
    tokenizer: Path | None,
    license_name: str | None,
) -> tuple[dict[str, object], dict[str, bytes]]:
    """What every folder has beside the weights: the content of `config.json`, and the other files by name.

    Args:
        exportable: the model.
        folder: for messages.
        dtype: of what is not codes.
        holds: what the weights are, for the model card.
        reader: the program that the folder is for.
        tokenizer: its file; None leaves it out.
        license_name: of the weights.

    Raises:
        CheckpointError: no family of Hugging Face has this configuration.
        DataError: the tokenizer cannot be expressed exactly, or is of another model.
    """
    named, files = folder_tokens(exportable, tokenizer)
    with naming(folder):
        hf_config = config_to_hf(exportable.model) | named | {"torch_dtype": dtype_name(dtype)}
    record = source_record(exportable.source)
    card = model_card(exportable, record, holds, reader, has_tokenizer=tokenizer is not None, license_name=license_name)
    return hf_config, files | {"README.md": card.encode(), "provenance.json": to_json(record)}


def _problems(
    exportable: Exportable, matrices: CodedMatrices, weights: HfWeights, linear_class: LinearClass, inputs: InputBits
) -> list[str]:
    """Why a format cannot hold the codes of a model, or their product with the level."""
    model, quantization, shapes = exportable.model, matrices.config, exportable.source.shapes
    if weights == "packed":
        problems = packing_problems(model, matrices.names, shapes, linear_class)
        return recipe_problems(quantization, packed=True) + problems
    if weights == "compressed-tensors":
        return compressed_problems(quantization, inputs)
    if weights == "mlx":
        return mlx_problems(model) + mlx_recipe_problems(quantization, matrices.names, shapes)
    return recipe_problems(quantization, packed=False)


def online_quantization(source: Source, model: ModelConfig) -> dict[str, object] | None:
    """The part of `config.json` that makes Transformers round latent weights as a source's model does; None in 16 bits.

    Raises:
        CheckpointError: Transformers cannot; all reasons are listed.
    """
    precision = computed_precision(source)
    if precision is None or precision.quantization is None:
        return None
    quantization = precision.quantization
    problems = recipe_problems(quantization, packed=True)
    coded = coded_matrices(model, quantization)
    if source.is_packed:
        problems.append("the folder holds packed codes, and no latent weights")
    elif quantization.levels != "ternary" or quantization.weights != "absmean":
        problems.append(f"weights {quantization.weights}: weights are rounded by their absmean; {NO_OTHER_WAY}")
    if quantization.fused:
        problems.append(f"fused true: each matrix has a scale of its own; {NO_OTHER_WAY}")
    if precision.strength < 1:
        problems.append(f"it is on a ramp, at strength {precision.strength:.3g}; {NO_OTHER_WAY}")
    if problems:
        raise CheckpointError(
            listed(f"{source.location}: Transformers cannot round weights like this; use `tritrain export`", problems)
        )
    return quantization_config(coded, parameter_shapes(model), "autobitlinear", mode="online")


def quantization_config(
    coded: Container[str], names: Iterable[str], linear_class: LinearClass, *, mode: Literal["offline", "online"]
) -> dict[str, object]:
    """The part of `config.json` that makes Transformers unpack codes (mode `offline`), or round weights (`online`)."""
    left_out = [name.removesuffix(".weight") for name in names if is_projection(name) and name not in coded]
    return {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": mode,
        # Without a list Transformers leaves out what comes last in the model, which in OLMo is a projection.
        "modules_to_not_convert": ["lm_head", *left_out],
    }


def packed(tensor: Stored, matrices: CodedMatrices, linear_class: LinearClass) -> list[Stored]:
    """A matrix as its packed codes, and the scale beside them, which is always fp32."""
    O, I = tensor.shape  # noqa: E741
    scales: list[Tensor] = []

    def codes() -> Iterator[Tensor]:
        codes_OI, level = matrices.codes(tensor.name)
        scales.append((level if linear_class == "autobitlinear" else level.reciprocal()).reshape(1))
        yield pack(codes_OI)

    return [
        Stored(tensor.name, torch.uint8, (O // CODES_PER_BYTE, I), codes()),
        Stored(f"{tensor.name}_scale", torch.float32, (1,), scales),  # filled by then: codes are written first
    ]


def dequantized(tensor: Stored, matrices: CodedMatrices) -> list[Stored]:
    """A matrix as its codes times their level."""

    def weights() -> Iterator[Tensor]:
        yield matrices.dequantized(tensor.name).to(tensor.dtype)

    return [tensor._replace(pieces=weights())]
