"""Gather ternary weights under FSDP2 as packed codes of 2 bits instead of latent weights of 16.

A ternary layer at full strength computes with its codes and their scale alone, so that nothing else need be sent: an
eighth of the bytes, and bit for bit the same results. Each rank rounds its own rows, once a step, and keeps them
packed. A scale needs the whole matrix; of that, ranks exchange a sum of each row, or for a median how often each
magnitude occurs, from which every rank makes the same scale to the last bit, and the one that a whole matrix has
(`quant.rounding`). A gathered layer is packed in memory too, which makes it small enough to stay gathered over all
micro-batches of a step, between which weights do not change; so does what is outside of blocks, which a pass needs from
end to end anyway.

FSDP2 has two hooks on a sharded tensor for what is sent of it and what becomes of it. They serve tensors of one kind
for ever; here, a parameter goes back and forth. What FSDP2 remembers of it from gather to gather, the buffer and the
parameter that layers see, is therefore kept in two versions that are exchanged between steps. The one for codes is a
parameter of the weight's shape and dtype without memory: it takes gradients, which are reduced as ever.

Dimensions: O output features, I input features, J = I / 4 bytes of a row.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_param import ExtensionsData

from quant.codes import to_held
from quant.config import QuantConfig, gather_problems
from quant.held import HeldCodes
from quant.linear import QuantLinear
from quant.rounding import (
    Scale,
    magnitude_counts,
    scale_from_counts,
    scale_from_sums,
    scale_sums,
    weight_codes,
)


class _Remembered(NamedTuple):
    """What FSDP2 has of a parameter from one gather to the next."""

    outputs: list[Tensor]
    unsharded: nn.Parameter | None


class GatheredCodes(HeldCodes):
    """Codes of a whole weight, of which each rank has made its own rows.

    Args:
        out_features: rows of the whole weight.
    """

    own_rows: Tensor
    """Of this rank's rows, with rows of padding that make it as long as the first rank's."""

    def __init__(self, out_features: int) -> None:
        self._out_features = out_features

    def receive(self, rows: Tensor) -> None:
        """Take the rows of all ranks, of which the last may be padding."""
        self.codes = rows[: self._out_features]


class CodeGather:
    """Decides before each step which layers are gathered as codes, and has the codes ready.

    Args:
        model: the root module, under `fully_shard`.
        blocks: those of its modules, each under `fully_shard`, whose linear layers may be quantized later on.
        group: the ranks that a block is sharded over.
        reshard_after_forward: whether blocks that are gathered in 16 bits are freed after the forward pass.
        compiled: whether to compile what rounds the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        group: dist.ProcessGroup,
        *,
        reshard_after_forward: bool,
        compiled: bool,
    ) -> None:
        self.fresh = False
        """Whether the codes are those of the weights; to be unset by whoever changes weights."""
        self._model: Any = model  # fully_shard changed the classes to ones with its methods
        self._blocks: Sequence[Any] = blocks
        self._group = group
        self._reshard_after_forward = reshard_after_forward
        # Of the layers of a block at once: to call what is compiled takes longer than what a GPU does for one layer.
        self._sums = torch.compile(sums_of_rows, dynamic=False) if compiled else sums_of_rows
        self._scales_of_sums = torch.compile(scales_of_sums, dynamic=False) if compiled else scales_of_sums
        self._rounded_rows = torch.compile(rounded_rows, dynamic=False) if compiled else rounded_rows
        self._params: dict[nn.Module, Any] = {}
        self._block_of: dict[nn.Module, Any] = {}
        for block in self._blocks:
            for param in _fsdp_params(block):
                layer = param._module_info.module
                if isinstance(layer, nn.Linear) and param._module_info.param_name == "weight":
                    self._params[layer], self._block_of[layer] = param, block
        self._others = dict.fromkeys(self._params, _Remembered([], None))
        self._coded: list[QuantLinear] = []
        self._kept: set[Any] = set()
        self._codes: dict[QuantLinear, GatheredCodes] = {}

    @torch.no_grad()
    def prepare(self) -> None:
        """Choose what is gathered from here on, and round the weights again if they have changed.

        To be called by all ranks alike before each forward pass. Layers on a ramp are gathered in 16 bits, and so are
        those that a probe looks at, as long as it does.
        """
        coded = [
            layer
            for layer in self._params
            if isinstance(layer, QuantLinear) and all(map(_computes_with_codes, _sharers(layer)))
        ]
        if self.fresh and coded == self._coded and all(layer.held is not None for layer in coded):
            return
        self._model._get_fsdp_state()._lazy_init()  # may make other tensors of the shards, without hooks
        for module in (self._model, *self._blocks):
            module.reshard()
            module.set_reshard_after_backward(True, recurse=False)
        for layer in {*self._coded} ^ {*coded}:
            self._exchange(layer, in_codes=layer not in self._codes)
        self._coded = coded
        self._kept = {self._model, *(self._block_of[layer] for layer in coded)} if coded else set()
        for block in self._blocks:
            block.set_reshard_after_forward(self._reshard_after_forward and block not in self._kept, recurse=False)
        if coded:
            # As compiled as ever: a measurement forces all else to be eager, and training goes on with these codes.
            with torch.compiler.set_stance("default"):
                self._round()
        self.fresh = True

    def keep(self, keep: bool) -> None:
        """Return whether what is gathered once a step stays gathered after the next backward pass."""
        for module in self._kept:
            module.set_reshard_after_backward(not keep, recurse=False)

    def _exchange(self, layer: QuantLinear, *, in_codes: bool) -> None:
        """Let FSDP2 gather the layer's weight in the other form than before."""
        param = self._params[layer]
        local = param._sharded_local_tensor
        remembered = self._others[layer]
        self._others[layer] = _Remembered(param.all_gather_outputs, param.__dict__.pop("_unsharded_param", None))
        before, (param.all_gather_outputs, unsharded) = self._others[layer].unsharded, remembered
        if in_codes:
            codes = self._codes[layer] = GatheredCodes(layer.out_features)
            param._extensions_data = ExtensionsData()
            # A hook that takes the mesh alone may send another shape than that of the padded shard. Hooks that held the
            # layer would be a circle through the tensor's own attributes, which is never freed.
            local.fsdp_pre_all_gather = lambda mesh: ((codes.own_rows,), None)
            local.fsdp_post_all_gather = lambda outputs, *_, out: codes.receive(outputs[0])
            if unsharded is None:
                dtype = param.mp_policy.param_dtype or local.dtype
                unsharded = nn.Parameter(torch.zeros((), dtype=dtype, device=local.device).expand(param._orig_size))
        else:
            del local.fsdp_pre_all_gather, local.fsdp_post_all_gather, self._codes[layer]
            layer.held = None
        if unsharded is not None:
            if before is not None:  # a sum over micro-batches goes on
                unsharded.grad, before.grad = before.grad, None
            param._unsharded_param = unsharded

    def _round(self) -> None:
        """Round this rank's rows of the layers that are gathered as codes. A collective."""
        blocks = [list(layers) for _, layers in groupby(self._coded, self._block_of.__getitem__)]
        scales = self._scales(blocks)
        for layers in blocks:
            locals_RI, of_block = [self._local(layer) for layer in layers], [scales[layer] for layer in layers]
            codes = self._rounded_rows(locals_RI, of_block, layers[0].quant_config)
            for layer, scale, rows in zip(layers, of_block, codes, strict=True):
                padding = self._padded_rows(layer) - len(rows)
                layer.held = self._codes[layer]
                layer.held.scale, layer.held.own_rows = scale, F.pad(rows, (0, 0, 0, padding)) if padding else rows

    def _scales(self, blocks: Sequence[Sequence[QuantLinear]]) -> dict[nn.Module, Scale]:
        """The scale of each layer that is gathered as codes, from the rows of all ranks. A collective."""
        config = self._coded[0].quant_config
        parts: dict[nn.Module, Tensor] = {}  # what each layer's scale is made from, of the whole matrix
        if config.weights == "absmedian":
            counts = torch.stack([magnitude_counts(self._local(layer)) for layer in self._coded])
            dist.all_reduce(counts, group=self._group)
            parts.update(zip(self._coded, counts, strict=True))
            together = [torch.stack([parts[sharer] for sharer in _sharers(layer)]) for layer in self._coded]
            found = [scale_from_counts(counts.sum(0), config) for counts in together]
            return dict(zip(self._coded, found, strict=True))
        padded_rows = [self._padded_rows(layer) for layer in self._coded]
        sums = [sums_R for layers in blocks for sums_R in self._sums([self._local(layer) for layer in layers], config)]
        own = torch.zeros(sum(padded_rows), dtype=torch.float64, device=sums[0].device)
        rows = [part[: len(sums_R)] for part, sums_R in zip(own.split(padded_rows), sums, strict=True)]
        torch._foreach_copy_(rows, sums)
        everyones = own.new_empty(dist.get_world_size(self._group), len(own))
        dist.all_gather([*everyones], own, group=self._group)
        for layer, columns in zip(self._coded, everyones.split(padded_rows, 1), strict=True):
            parts[layer] = columns.flatten()[: layer.out_features]  # rank after rank; the last have the padding
        scales: dict[nn.Module, Scale] = {}
        for layers in blocks:
            whole = [[parts[sharer] for sharer in _sharers(layer)] for layer in layers]
            found = self._scales_of_sums(whole, [layer.in_features for layer in layers], config)
            scales.update(zip(layers, found, strict=True))
        return scales

    def _local(self, layer: nn.Module) -> Tensor:
        """This rank's rows of the layer's weight."""
        local_RI: Tensor = self._params[layer]._sharded_local_tensor
        return local_RI

    def _padded_rows(self, layer: nn.Linear) -> int:
        return math.ceil(layer.out_features / dist.get_world_size(self._group))


def sums_of_rows(weights_RI: Sequence[Tensor], config: QuantConfig) -> list[Tensor]:
    """`scale_sums` of the rows that a rank has of each weight."""
    return [scale_sums(weight_RI, config) for weight_RI in weights_RI]


def scales_of_sums(sums: Sequence[Sequence[Tensor]], widths: Sequence[int], config: QuantConfig) -> list[Scale]:
    """The scale of each weight, from the sums of all rows that share it."""
    return [scale_from_sums(torch.cat([*parts]), width, config) for parts, width in zip(sums, widths, strict=True)]


def rounded_rows(weights_RI: Sequence[Tensor], scales: Sequence[Scale], config: QuantConfig) -> list[Tensor]:
    """Codes of some rows of each weight, as they are sent."""
    pairs = zip(weights_RI, scales, strict=True)
    return [to_held(weight_codes(weight_RI, scale, config), config.levels) for weight_RI, scale in pairs]


def _computes_with_codes(layer: nn.Module) -> bool:
    if not isinstance(layer, QuantLinear) or layer.mode != "codes" or layer.probe is not None:
        return False
    return not gather_problems(layer.quant_config)


def _sharers(layer: QuantLinear) -> tuple[nn.Linear, ...]:
    """The layers that have one scale with this one, itself included."""
    return layer.sharers or (layer,)


def _fsdp_params(module: Any) -> list[Any]:
    """What FSDP2 keeps of each parameter that it gathers with ``module``."""
    state = module._get_fsdp_state()
    # PyTorch 2.11 has one group.
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [param for group in groups for param in group.fsdp_params]
