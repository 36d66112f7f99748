"""Put SubLN into a 16-bit model that was trained without it, as BitDistill does (arXiv 2510.13998), with fitted gains.

SubLN is a norm before the attention-output and the down projections. It divides each token by its own root mean square,
which no constant gain undoes, so in general the model with it is another function. The closest start that treats
tokens alike gives each norm one gain: the median over tokens of the root mean square that the projection's input has.
Then half of the tokens come out larger than they were and half smaller. With a gain of 1 the projections would see
inputs of another size altogether.

Where a norm follows the projection (`norm_position: post`), it takes out the factor that is left, and the model
computes the same function, up to `norm_eps`.

The model runs block by block in fp32, with one block in memory, once with SubLN and once without. Both losses are
reported, so that the price is known before a step is trained.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from data.labels import IGNORED_LABEL
from launcher.checkpoint.source import Source
from launcher.errors import CheckpointError
from launcher.formats.hf_source import EMBEDDING, HEAD
from launcher.formats.open import check_model, is_ternary
from model.config import ModelConfig
from model.loss import token_nll
from model.rotary import rotary_tables
from model.size import parameter_shapes
from model.transformer import NORMS, Block

Module = TypeVar("Module", bound=nn.Module)

INPUTS = {"self_attn.o_proj": "self_attn.attn_sub_norm", "mlp.down_proj": "mlp.ffn_sub_norm"}
"""The norm before each projection."""


class Insertion(NamedTuple):
    """Gains of SubLN's norms, and what the model predicts with and without them."""

    gains: dict[str, float]
    """By the name of the parameter; the same for all of its elements."""
    nats_before: float
    """Loss of the model as it is, nats per label that counts in the sequences that were measured."""
    nats_after: float
    """Loss with SubLN."""

    def sentence(self, num_sequences: int) -> str:
        """For people."""
        return (
            f"SubLN was put in, with gains from {num_sequences} training sequences, on which the loss is "
            f"{self.nats_before:.4f} nats per token without it and {self.nats_after:.4f} with it, before any step."
        )


def lacks_sub_norms(source: Source, model: ModelConfig) -> bool:
    """Return whether a model has SubLN, and its source none."""
    return model.sub_norm and not any(name.removesuffix(".weight").endswith("_sub_norm") for name in source.shapes)


def check_takes_sub_norms(source: Source, model: ModelConfig) -> None:
    """Check that SubLN can be put into a source without; no weight is read.

    Raises:
        CheckpointError: the source is ternary, or not this model.
    """
    if is_ternary(source):
        raise CheckpointError(
            f"{source.location} is ternary; SubLN can be put into 16-bit weights alone. Set model.sub_norm to false, "
            "or begin with the 16-bit model"
        )
    check_model(source, replace(model, sub_norm=False))


@torch.no_grad()
def measure_sub_norms(
    source: Source, model: ModelConfig, texts: Sequence[tuple[Tensor, Tensor]], device: torch.device
) -> Insertion:
    """Measure the gains with which SubLN changes a model least.

    Args:
        source: a model without SubLN, in 16 bits.
        model: the same with SubLN.
        texts: tokens and labels of each, as `data.labels.texts_of` has them.
        device: where a block computes.

    Raises:
        CheckpointError: as `check_takes_sub_norms`.
    """
    check_takes_sub_norms(source, model)
    plain = replace(model, sub_norm=False)
    embedding_VD = _read(source, EMBEDDING, device)
    hidden = [embedding_VD[tokens_T.to(device)][None] for tokens_T, _ in texts]
    changed = [x_BTD.clone() for x_BTD in hidden]
    tables = rotary_tables(model, max(len(tokens_T) for tokens_T, _ in texts), device)
    gains: dict[str, float] = {}
    for depth in range(model.num_layers):
        prefix = f"model.layers.{depth}."
        before, after = (_block(config, prefix, source, device) for config in (plain, model))
        sizes: dict[str, list[Tensor]] = {name: [] for name in INPUTS}
        for name, found in sizes.items():
            before.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, found=found: found.append(_root_mean_square(inputs[0], model.norm_eps))
            )
        hidden = [before(x_BTD, *(table[: x_BTD.shape[1]] for table in tables)) for x_BTD in hidden]
        for name, found in sizes.items():
            gain = float(torch.cat(found).median())
            gains[f"{prefix}{INPUTS[name]}.weight"] = gain
            after.get_parameter(f"{INPUTS[name]}.weight").fill_(gain)
        changed = [after(x_BTD, *(table[: x_BTD.shape[1]] for table in tables)) for x_BTD in changed]
    norm = _filled(NORMS[model.norm](model.hidden_size, model), "model.norm.", source, device)
    head_VD = embedding_VD if model.tie_embeddings else _read(source, HEAD, device)
    num_counted = sum(int((labels_T != IGNORED_LABEL).sum()) for _, labels_T in texts)
    sums = [
        sum(
            float(token_nll(norm(x_BTD)[0], head_VD, labels_T.to(device), model.loss_chunk_tokens).double().sum())
            for x_BTD, (_, labels_T) in zip(outputs, texts, strict=True)
        )
        for outputs in (hidden, changed)
    ]
    return Insertion(gains, sums[0] / num_counted, sums[1] / num_counted)


def insert_sub_norms_(source: Source, model: ModelConfig, gains: dict[str, float]) -> None:
    """Let a source have these norms too, and no moments any more, which these would lack."""
    shapes = parameter_shapes(model)
    source.shapes = {name: shapes[name] for name in shapes if name in source.shapes or name in gains}
    source.constants, source.has_moments, source.averaged_tokens = gains, False, None


def _root_mean_square(x_BTF: Tensor, eps: float) -> Tensor:
    return (x_BTF.pow(2).mean(-1) + eps).sqrt().flatten()


def _block(config: ModelConfig, prefix: str, source: Source, device: torch.device) -> Block:
    return _filled(Block(config), prefix, source, device)


def _filled(module: Module, prefix: str, source: Source, device: torch.device) -> Module:
    for name, parameter in module.named_parameters():
        if f"{prefix}{name}" in source.shapes:
            parameter.copy_(_read(source, f"{prefix}{name}", torch.device("cpu")))
    return module.to(device).eval()


def _read(source: Source, name: str, device: torch.device) -> Tensor:
    shape = source.shapes[name]
    return source.read_finite("weight", name, 0, prod(shape)).view(shape).to(device)
