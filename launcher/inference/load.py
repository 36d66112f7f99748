"""Load a checkpoint or an export as a plain module, ready to compute.

Ternary layers become packed ones (`quant.packed`) block by block while they are read, so that memory never holds more
than the packed model and one block of the unpacked one.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.tokenizer import Tokenizer
from eval.sample import generate
from launcher.checkpoint.manifest import Precision
from launcher.checkpoint.source import Source, in_pieces
from launcher.config.automatic import compute_dtype_for
from launcher.engine.build import COMPUTE_DTYPES
from launcher.errors import CheckpointError, ConfigError
from launcher.formats.opened import Exportable, open_exportable
from launcher.inference.build import tokenizer_for, unfilled_model
from launcher.inference.text_model import TextModel
from launcher.run.automatic import device_of
from model.transformer import ModelConfig, Transformer
from quant.config import QuantConfig
from quant.held import SharedInput
from quant.linear import quantized_layers
from quant.packed import PackedLinear, freeze_, memory_bytes


@dataclass(frozen=True)
class LoadedModel(TextModel):
    """A model and its tokenizer, ready to use."""

    model: Transformer
    """In evaluation mode, without gradients."""
    config: ModelConfig
    tokenizer: Tokenizer | None
    first_token: int | None
    puts_first_token: bool
    tokenizer_problem: str | None
    source: Source
    """Where it was read; keeps the files of a tokenizer that are made for it."""

    @property
    def weights_bytes(self) -> int:
        """Memory of all parameters and codes."""
        return memory_bytes(self.model)

    def continuation(self, prompt_tokens: Sequence[int], **choice: Any) -> Iterator[int]:
        """Continue tokens; see `TextModel`."""
        return generate(self.model, prompt_tokens, **choice)


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    packed: bool | None = None,
    tokenizer: str | Path | None = None,
) -> LoadedModel:
    """Load a model to compute with.

    Args:
        path: a Tritrain checkpoint, or a run (its folder or a `Run`), of which the newest is taken; or a folder or GGUF
            file of another program, as `launcher.formats.open.open_source` takes them.
        dtype: of everything but the codes and their scales: bfloat16 or float32. None: bfloat16 where the device
            computes it in hardware, else float32, as `training.compute_dtype: auto`.
        device: where it computes.
        packed: True: ternary layers as codes in 2 bits. False: as in training, latent weights that are rounded at every
            call, which computes the same with 8 to 16 times the memory. None: packed where the model is ternary.
        tokenizer: a file or folder; by default the one that the model was trained with or exported with, if found.

    Raises:
        ConfigError: there is no such dtype or device.
        CheckpointError: there is no such model, it is damaged, or it cannot be had like this; says why.
        DataError: the tokenizer that is named is none, or of another model.
    """
    if dtype not in (None, torch.bfloat16, torch.float32):
        raise ConfigError(f"dtype is {dtype!r:.80}; must be torch.bfloat16, torch.float32 or, to have it chosen, None")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(f"device is {str(device)!r:.80}: {str(error).splitlines()[0]}") from error
    opened = open_exportable(os.fspath(path) if isinstance(path, os.PathLike) else str(path), ternary=False)
    source = opened.source
    dtype = dtype or COMPUTE_DTYPES[compute_dtype_for(device_of(device))[0]]
    precision = _precision(opened)
    if packed and precision.quantization is None and not source.is_packed:
        raise CheckpointError(
            f"{source.location} is a 16-bit model, without codes to pack; packed=None loads it unchanged"
        )
    if packed is False and source.is_packed:
        raise CheckpointError(f"{source.location} holds packed codes, and no latent weights to load with packed=False")
    model = unfilled_model(source, opened.model, precision, dtype, device)
    for depth, block in enumerate(model.model.layers):
        prefix = f"model.layers.{depth}."
        if source.is_packed:
            assert opened.quantization is not None
            _take_codes_(block, prefix, source, opened.quantization, dtype, device)
        _read_(block, prefix, source, dtype, device)
        if packed is not False and quantized_layers(block):
            try:
                freeze_(block)
            except ValueError as error:
                raise CheckpointError(f"{source.location}: {error}; packed=False loads it") from error
    _read_(model, "", source, dtype, device)
    found = tokenizer_for(opened, tokenizer)
    return LoadedModel(model.requires_grad_(False).eval(), opened.model, *found, source)


def _precision(opened: Exportable) -> Precision:
    """The precision of the weights that are not packed yet.

    Raises:
        CheckpointError: it is on a ramp.
    """
    source = opened.source
    if source.is_packed:
        return Precision.in_16_bits(opened.model.num_layers)
    if opened.quantization is not None and opened.strength < 1:
        raise CheckpointError(
            f"{source.location} is on a ramp, at strength {opened.strength:.3g} where it is least: neither a 16-bit "
            "model nor a ternary one; take a checkpoint from before the ramp or after it"
        )
    return opened.precision


def _take_codes_(
    block: nn.Module, prefix: str, source: Source, config: QuantConfig, dtype: torch.dtype, device: torch.device
) -> None:
    """Put the packed layers of a source into a block on the meta device."""
    shared = SharedInput()
    for name, layer in [(name, layer) for name, layer in block.named_modules() if isinstance(layer, nn.Linear)]:
        if re.search(config.include, f"{prefix}{name}"):
            packed_RI, level = source.packed(f"{prefix}{name}.weight")
            bias = None if layer.bias is None else _whole(source, f"{prefix}{name}.bias", dtype, device)
            parent, _, last = name.rpartition(".")
            packed_RI, level = packed_RI.to(device), level.to(device)
            frozen = PackedLinear(packed_RI, level, layer.out_features, bias=bias, config=config, shared_input=shared)
            setattr(block.get_submodule(parent), last, frozen)


def _read_(module: nn.Module, prefix: str, source: Source, dtype: torch.dtype, device: torch.device) -> None:
    """Read the parameters of a module that are still on the meta device."""
    for name, parameter in list(module.named_parameters()):
        if parameter.is_meta:
            parent, _, last = name.rpartition(".")
            value = _whole(source, f"{prefix}{name}", dtype, device)
            setattr(module.get_submodule(parent), last, nn.Parameter(value, requires_grad=False))


def _whole(source: Source, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a source, cast while it is read."""
    shape, filled = source.shapes[name], 0
    values = torch.empty(prod(shape), dtype=dtype, device=device)
    for piece in in_pieces(source, "weight", name):
        values[filled : filled + len(piece)] = piece
        filled += len(piece)
    return values.view(shape)
