"""Build a model as it computes in a precision: on the meta device, checked against its source, then filled.

Programs that load a model fill it block by block (`launcher.inference.load`). What measures a model, or learns from
one, shards it over the ranks, each of which reads its own share.
"""

from functools import partial
from pathlib import Path

import torch

from data.errors import DataError
from data.tokenizer import Tokenizer
from launcher.checkpoint.load import check_fits
from launcher.checkpoint.manifest import Precision
from launcher.checkpoint.source import Source
from launcher.engine.frozen import shard_frozen_
from launcher.formats.opened import Exportable
from launcher.formats.tokens import first_token_of, fitting_tokenizer, puts_first
from launcher.process.ranks import Ranks
from model.transformer import ModelConfig, Transformer
from quant.linear import QuantLinear, add_learned_scales_, quantize_, quantized_layers, set_strengths_
from quant.rounding import Scale


def tokenizer_for(opened: Exportable, path: str | Path | None) -> tuple[Tokenizer | None, int | None, bool, str | None]:
    """The tokenizer of a model, the token before a text, whether every text has it, and why there is no tokenizer.

    Tokens can be computed without a tokenizer, so only one that is named has to be readable.

    Args:
        opened: the model.
        path: a file or folder; None for the model's own.

    Raises:
        DataError: the tokenizer that is named is none, or of another model.
    """
    loaded, puts, problem = None, False, None
    if path is not None:
        loaded = fitting_tokenizer(path, opened.model)
        puts = puts_first(opened.source, loaded.path)
    elif opened.tokenizer is not None:
        try:
            loaded = fitting_tokenizer(opened.tokenizer, opened.model)
            puts = puts_first(opened.source, loaded.path)
        except DataError as error:
            problem = str(error)
    first = first_token_of(opened.source, None if loaded is None else loaded.end_of_document)
    return loaded, first, puts, problem


def unfilled_model(
    source: Source, config: ModelConfig, precision: Precision, dtype: torch.dtype, device: torch.device
) -> Transformer:
    """A model on the meta device that computes in a precision, and that a source can fill.

    Args:
        source: of the weights, and of learned scales.
        config: of the model.
        precision: what it computes in; learned scales are parameters beside their weights.
        dtype: of the parameters.
        device: where it will compute, on which the strengths are already.

    Raises:
        CheckpointError: the source does not fit; lists all that differs.
    """
    quantization = precision.quantization
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    if quantization is not None and quantization.learned:
        add_learned_scales_(model, quantization)
    check_fits(source, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    if quantization is not None:
        quantize_(model, quantization, device, rounding=precision.rounding)
        set_strengths_(model, precision.weight_strengths, precision.activation_strengths)
    return model


def sharded_model(
    source: Source,
    config: ModelConfig,
    precision: Precision,
    dtype: torch.dtype,
    ranks: Ranks,
    *,
    compile_blocks: bool = False,
    replicas: int = 1,
    offload: bool = False,
) -> Transformer:
    """A frozen model, sharded over all ranks, of which this rank has read its share; a collective.

    Layers that are stored as codes compute with the scales that are stored with these.

    Args:
        source: of the weights, as the next three for `unfilled_model`.
        config: of the model.
        precision: what it computes in.
        dtype: of the parameters.
        ranks: this rank among all.
        compile_blocks: whether each block is compiled.
        replicas: as of `launcher.config.engine.EngineConfig`.
        offload: keep the weights in host memory.

    Raises:
        CheckpointError: the source does not fit, or cannot be read.
    """
    model = unfilled_model(source, config, precision, dtype, ranks.device)
    if source.is_packed:
        for name, layer in quantized_layers(model).items():
            layer.__class__ = CodesLinear
            assert isinstance(layer, CodesLinear)
            layer.level = source.packed(f"{name}.weight")[1].to(ranks.device)
    if compile_blocks:
        for block in model.model.layers:
            block.compile()
    shard_frozen_(model, partial(source.read_finite, "weight"), ranks, replicas=replicas, offload=offload)
    return model


class CodesLinear(QuantLinear):
    """A layer whose weights are codes times a known scale."""

    level: torch.Tensor

    def rounding_scale(self, weight_OI: torch.Tensor) -> Scale:
        """The scale that was packed with the codes."""
        return Scale(self.level)
