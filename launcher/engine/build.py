"""Build an engine from a plan, in the order that has become standard.

Meta device, quantize, activation checkpointing, compile per block, shard, materialize; weights come last, from
`launcher.engine.contract.load_weights` or a checkpoint.
"""

import functools
import re
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from launcher.engine.compiling import compile_blocks_, compiled_function
from launcher.engine.contract import Engine
from launcher.plan.course import Phase
from launcher.plan.plan import Plan
from launcher.process.ranks import Ranks
from model.loss import gradient_of_logits
from model.transformer import Transformer
from quant.linear import add_learned_scales_, quantize_

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_engine(plan: Plan, phase: Phase | None, ranks: Ranks) -> Engine:
    """Build the model of ``phase``, sharded over all ranks, without weights.

    Before the first phase (None) the model is in 16 bits.
    """
    config = plan.config
    with torch.device("meta"):
        model = Transformer(config.model)
    for other in plan.phases:
        if other.quantization is not None and other.quantization.learned:
            add_learned_scales_(model, other.quantization)
    ternary = own_rate_parameters(model, plan)
    if phase is not None and phase.quantization is not None:
        quantize_(model, phase.quantization, ranks.device, rounding=phase.transition.ramp.rounding)
    blocks = list(model.model.layers)
    for block in blocks:
        if config.training.activation_checkpointing:
            checkpoint_activations_(block)
    if config.training.compile is True:
        compile_blocks_(blocks)
        model.gradient_of_logits = compiled_function(gradient_of_logits)
    compute_dtype = COMPUTE_DTYPES[config.training.compute_dtype]
    muon = None
    if plan.has_muon:
        muon = (phase or plan.phases[config.checkpoint.start_phase]).optimizer == "muon"
    if config.engine.name == "fsdp2":
        from launcher.engine.fsdp import FSDPEngine

        return FSDPEngine(
            model,
            blocks,
            optimizer=config.optimizer,
            config=config.engine,
            compute_dtype=compute_dtype,
            device=ranks.device,
            ternary=ternary,
            compiled=config.training.compile is True,
            muon=muon,
        )
    from launcher.engine.zero import ZeroEngine

    return ZeroEngine(
        model,
        optimizer=config.optimizer,
        config=config.engine,
        compute_dtype=compute_dtype,
        device=ranks.device,
        micro_batch_sequences=config.training.micro_batch_sequences,
        num_micro_batches=plan.most_micro_batches,
        ternary=ternary,
        compiled=config.training.compile is True,
        muon=muon,
    )


def own_rate_parameters(model: nn.Module, plan: Plan) -> set[str]:
    """Names of the parameters to which `optimizer.ternary_learning_rate_factor` applies; empty if it is not set.

    They have groups of their own throughout the run, because DeepSpeed cannot regroup parameters later.
    """
    if plan.config.optimizer.ternary_learning_rate_factor is None:
        return set()
    [include] = {phase.quantization.include for phase in plan.phases if phase.quantization}
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(include, name)
        for parameter, _ in module.named_parameters()
    }


def checkpoint_activations_(block: nn.Module) -> None:
    """Make ``block`` save only its inputs for the backward pass; parameter names do not change."""
    forward = block.forward

    # A function of its own: `checkpoint` called from outside of one is left out of what is compiled, block and all.
    @functools.wraps(forward)
    def checkpointed(*inputs: Any, **options: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    block.forward = checkpointed
