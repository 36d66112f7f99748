"""The engine on DeepSpeed ZeRO, stages 0 to 3.

DeepSpeed 0.19.8 has a different layout of the fp32 state for each stage, and some defects; both are handled here and
nowhere else. Each departure from the plain use of DeepSpeed names what it works around.
"""

import contextlib
import io
import logging
import math
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.config.engine import EngineConfig
from launcher.config.optimizer import OptimizerConfig
from launcher.engine.adamw import create_state, parameter_groups, set_step_sizes
from launcher.engine.contract import MOMENTS, Engine, Shard
from launcher.engine.deepspeed_keys import check_keys
from launcher.engine.matrices import Piece
from launcher.engine.muon import MuonAdamW, build_optimizer
from launcher.errors import ConfigError
from launcher.plan.schedule import StepSizes
from model.distillation import Lesson
from model.preference import Reference
from model.size import is_matrix
from model.transformer import Output
from quant.keeper import CodeKeeper


def deepspeed_config(
    *,
    config: EngineConfig,
    optimizer: OptimizerConfig,
    compute_dtype: torch.dtype,
    micro_batch_sequences: int,
    num_micro_batches: int,
) -> dict[str, Any]:
    """The complete configuration for ``deepspeed.initialize``: derived keys, and the user's additional ones."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_sequences,
        "gradient_accumulation_steps": num_micro_batches,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": (config.deepspeed or {}).get("steps_per_print"),
        "bf16": {"enabled": compute_dtype == torch.bfloat16},
        # Stage 0 in fp32 is clipped by us, see ZeroEngine._plain_step; left out, this would be 1.
        "gradient_clipping": 0.0 if _is_plain(config, compute_dtype) else optimizer.max_grad_norm,
    }
    if config.zero_stage != 0:
        # Without it, gradients of several micro-batches are summed in bf16; stage 0 knows no other way.
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(config.deepspeed or {}, derived)


def _is_plain(config: EngineConfig, compute_dtype: torch.dtype) -> bool:
    """Return whether DeepSpeed steps the given optimizer directly, without a wrapper: stage 0 in fp32."""
    return config.zero_stage == 0 and compute_dtype != torch.bfloat16


def _merge(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    merged = dict(theirs)
    for key, value in ours.items():
        merged[key] = _merge(theirs.get(key, {}), value) if isinstance(value, dict) else value
    return merged


def is_no_skipped_step(record: logging.LogRecord) -> bool:
    """Filter DeepSpeed's log, which calls all skipped steps non-finite; what was skipped, we report ourselves."""
    return "OVERFLOW! Skipping step" not in record.getMessage()


class ZeroEngine(Engine):
    """Shards ``model`` by DeepSpeed over the ranks of the default process group.

    Args:
        model: on the meta device, as for `launcher.engine.fsdp.FSDPEngine`.
        optimizer: configuration of the optimizer.
        config: configuration of the engine.
        compute_dtype: bf16 (with fp32 masters) or fp32.
        device: where to compute.
        micro_batch_sequences: sequences of one micro-batch on this rank.
        num_micro_batches: micro-batches of one step, at most. DeepSpeed gets the number, but never divides by it or
            counts to it: `backward` says which micro-batch is the last.
        ternary: names of the parameters that have a learning rate of their own.
        compiled: whether to compile what rounds the weights.
        muon: whether Muon updates matrices now; None if it does in no phase of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: OptimizerConfig,
        config: EngineConfig,
        compute_dtype: torch.dtype,
        device: torch.device,
        micro_batch_sequences: int,
        num_micro_batches: int,
        ternary: Collection[str] = (),
        compiled: bool = False,
        muon: bool | None = None,
    ) -> None:
        import deepspeed
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

        if MuonAdamW not in ZERO_SUPPORTED_OPTIMIZERS:  # else DeepSpeed warns that it does not know it
            ZERO_SUPPORTED_OPTIMIZERS.append(MuonAdamW)
        deepspeed.utils.logger.setLevel(logging.WARNING)
        deepspeed.utils.logger.addFilter(is_no_skipped_step)
        if device.type == "cpu":
            # Else the first init compiles a shared-memory op for minutes, and a killed build hangs every later run.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
        settings = deepspeed_config(
            config=config,
            optimizer=optimizer,
            compute_dtype=compute_dtype,
            micro_batch_sequences=micro_batch_sequences,
            num_micro_batches=num_micro_batches,
        )
        check_keys(settings)
        self.device = device
        self.stage = config.zero_stage
        self.group = dist.group.WORLD if self.stage and dist.get_world_size() > 1 else None
        self.is_plain = _is_plain(config, compute_dtype)
        self.max_grad_norm = optimizer.max_grad_norm
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for module in model.modules():
            module.to_empty(device=device, recurse=False)
            # DeepSpeed would do so itself but for stage 3, whose weights it leaves as they are, and computes with them.
            module._apply(lambda tensor: tensor.to(compute_dtype), recurse=False)
            if self.stage == 3 and any(True for _ in module.parameters(recurse=False)):
                # One layer at a time, so that the whole model is never there.
                deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=compute_dtype)
        groups = parameter_groups(
            ((name, len(self._shapes[name]), parameter) for name, parameter in model.named_parameters()),
            optimizer,
            ternary,
            with_muon=muon is not None,
        )
        self.inner = build_optimizer(groups, optimizer, fused=True, muon=muon, device=device)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory use, whatever its log level
            self._engine, self._outer, *_ = deepspeed.initialize(model=model, optimizer=self.inner, config=settings)
        self.model = self._engine.module
        if self.stage == 0 and compute_dtype == torch.bfloat16:
            # Its constructor runs a step on zeros, which leaves Adam one step ahead.
            for state in self.inner.state.values():
                state["step"].zero_()
        if isinstance(self.inner, MuonAdamW):
            self.muon = self.inner
            self.muon.find_matrices(self._matrices(), self.group)
            self.muon.turn(on=bool(muon))
        if self.stage in (1, 2):
            self._outer.check_grad_overflow = True  # in fp32 DeepSpeed would not look for non-finite gradients
        self._codes = CodeKeeper(self.model, whole=self.stage != 3, compiled=compiled)
        self._limit: Tensor | None = None
        self._norm: Any = math.nan
        if not self.is_plain:
            self._watch_norm()

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        reduction: str = "mean",
        teacher: Lesson | Reference | None = None,
    ) -> Output:
        self._codes.prepare()
        return self._engine(tokens_BT, labels_BT, reduction=reduction, teacher=teacher)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    @torch.no_grad()
    def gradient_squares(self) -> dict[str, Tensor]:
        parts = {}
        for name, parameter in self.model.named_parameters():
            gradient = self._gradient_part(parameter)
            if gradient is not None:
                parts[name] = gradient.to(self.device, torch.float32).norm().square()
        return parts

    def _gradient_part(self, parameter: Any) -> Tensor | None:
        """This rank's part of a parameter's reduced gradient, before DeepSpeed's step clips and frees it."""
        outer = self._outer
        if self.stage == 0:  # the whole gradient is on every rank, and one may count it
            return parameter.grad if dist.get_rank() == 0 else None
        if self.stage == 3:
            return outer.get_local_fp32_grad_for_param(parameter)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
        part = mapping.lp_fragment_address
        # With bf16 accumulation of its own, DeepSpeed keeps the whole parameter's gradient on each rank.
        return gradient.narrow(0, part.start, part.numel) if gradient.numel() > part.numel else gradient

    def step(
        self,
        sizes: StepSizes,
        *,
        grad_norm_limit: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        self._codes.fresh = False
        set_step_sizes(self.inner, sizes)
        self._limit, self._norm = grad_norm_limit, math.nan
        if self.is_plain:
            return self._plain_step()
        self._engine.step()
        skipped = bool(self._outer.overflow)
        norm = float(self._norm if skipped else self._engine.get_global_grad_norm())
        return self._scalar(norm if math.isfinite(norm) and norm >= 0 else math.nan), self._scalar(float(skipped))

    def _plain_step(self) -> tuple[Tensor, Tensor]:
        """Step at stage 0 in fp32, where DeepSpeed neither reports nor checks the gradient norm."""
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        skipped = not bool(grad_norm.isfinite()) or self._is_beyond_limit(grad_norm)
        if skipped:
            self._engine.zero_grad()
        else:
            self._engine.step()
        return grad_norm.float(), self._scalar(float(skipped))

    def _is_beyond_limit(self, grad_norm: Any) -> bool:
        """Record the gradient norm of this step, and return whether it exceeds this step's limit."""
        self._norm = grad_norm
        return self._limit is not None and bool(grad_norm > self._limit)

    def _watch_norm(self) -> None:
        """Make DeepSpeed skip a step because of its gradient norm, as it does when the norm is not finite.

        Its optimizers skip a step whose norm they find to be -1, their word for an invalid one. Each computes it in a
        method of its own, which is replaced, in this one object, by one that asks us as well.
        """
        outer = self._outer

        def replace(owner: Any, method: str, watched: Callable[[Any], Any]) -> None:
            theirs = getattr(owner, method)
            setattr(owner, method, lambda *args, **kwargs: watched(theirs(*args, **kwargs)))

        def combined(norms: Any) -> Tensor:
            return torch.linalg.vector_norm(torch.stack([torch.as_tensor(n, dtype=torch.float32) for n in norms]))

        if hasattr(outer, "scaled_global_norm"):  # stages 1 and 2

            def watch_norm(norm: Tensor) -> Tensor:
                return norm.new_tensor(-1.0) if self._is_beyond_limit(norm) else norm

            replace(outer, "scaled_global_norm", watch_norm)
        elif hasattr(outer, "get_grads_for_norm"):  # stage 1 in bf16, which has all reduced gradients on each rank

            def watch_gradients(found: Any) -> Any:
                if self._limit is None or not isinstance(found, tuple):  # in a tuple they are for the norm
                    return found
                gradients, experts = found
                beyond = self._is_beyond_limit(combined(torch._foreach_norm(gradients)))
                return ([torch.full_like(self._norm, torch.inf)] if beyond else gradients), experts

            replace(outer, "get_grads_for_norm", watch_gradients)
        elif self.stage == 3:

            def watch_groups(norms: list[Tensor]) -> list[Tensor]:
                if self._limit is None or any(norm < 0 for norm in norms):
                    return norms
                return [torch.full_like(self._norm, -1)] if self._is_beyond_limit(combined(norms)) else norms

            replace(outer, "_get_norm_groups", watch_groups)
        else:  # bf16 of stage 0 looks for overflow before it has a norm

            def watch_overflow(overflow: bool) -> bool:
                if overflow or self._limit is None:
                    return overflow
                gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
                return self._is_beyond_limit(combined(torch._foreach_norm(gradients)))

            replace(outer.overflow_checker, "check", watch_overflow)

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=self.device)

    def own_shards(self) -> Iterator[Shard]:
        for name, parameter in self.model.named_parameters():
            located = self._locate(parameter)
            if located is None:
                continue
            master, offset, start, length = located
            shape = self._shapes[name]
            state = create_state(self.inner, master, variance=self.has_variance(name, shape))
            held = {"weight": master.detach()} | {kind: state[kind] for kind in MOMENTS if kind in state}
            yield Shard(
                name=name,
                shape=shape,
                start=start,
                tensors={kind: tensor.view(-1)[offset : offset + length] for kind, tensor in held.items()},
                step=state["step"],
                primary=self.stage != 0 or dist.get_rank() == 0,
            )

    def _locate(self, parameter: Any) -> tuple[Tensor, int, int, int] | None:
        """Where this rank keeps its part of a parameter.

        Returns:
            The fp32 master that the optimizer updates (flat above stage 0), the part's offset in it, the part's first
            element in the flattened parameter, and its length; None if this rank has no part.
        """
        outer = self._outer
        if self.stage == 0:
            master = parameter if self.is_plain else self._stage0_masters[id(parameter)]
            return master, 0, 0, parameter.numel()
        if self.stage == 3:
            group, offset, length = outer.grad_position[outer.get_param_id(parameter)]
            start = dist.get_rank() * parameter.ds_tensor.ds_numel
            length = min(length, parameter.ds_numel - start)
            return (outer.fp32_partitioned_groups_flat[group], offset, start, length) if length > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        address, part = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
        return self._masters[mapping.param_group_index], address.start, part.start, part.numel

    def _matrices(self) -> dict[Tensor, list[Piece]]:
        """The matrices that Muon can update, by the tensor of the optimizer that this rank's parts of them lie in."""
        pieces: dict[Tensor, list[Piece]] = {}
        for name, parameter in self.model.named_parameters():
            if is_matrix(name, len(shape := self._shapes[name])):
                located = self._locate(parameter) or (self._master_of_others(parameter), 0, 0, 0)
                master, offset, start, length = located
                pieces.setdefault(master, []).append(Piece(name, shape, start, length, offset))
        return pieces

    def _master_of_others(self, parameter: Any) -> Tensor:
        """The flat fp32 tensor of the group of a parameter, of which this rank has no part."""
        outer = self._outer
        if self.stage == 3:
            group = outer.grad_position[outer.get_param_id(parameter)][0]
            return outer.fp32_partitioned_groups_flat[group]
        groups = getattr(outer, "bit16_groups", None) or outer.bf16_groups
        return self._masters[next(i for i, group in enumerate(groups) if any(each is parameter for each in group))]

    @property
    def _masters(self) -> list[Tensor]:
        """The flat fp32 tensor of each group, in stages 1 and 2."""
        outer = self._outer
        return getattr(outer, "single_partition_of_fp32_groups", None) or outer.fp32_groups_flat_partition

    @cached_property
    def _stage0_masters(self) -> dict[int, Tensor]:
        return {
            id(low): high
            for lows, highs in zip(self._outer.fp16_groups, self._outer.fp32_groups, strict=True)
            for low, high in zip(lows, highs, strict=True)
        }

    @torch.no_grad()
    def refresh_weights(self) -> None:
        self._codes.fresh = False
        outer = self._outer
        if self.is_plain:
            return
        if self.stage == 0:
            masters = self._stage0_masters
            for parameter in self.model.parameters():
                parameter.copy_(masters[id(parameter)])
        elif self.stage == 3:
            outer._partition_all_parameters()
            for group in range(len(outer.fp16_groups)):
                outer._reassign_or_swap_out_partitioned_parameters(group)
            if outer.persistent_parameters:
                outer.persistent_parameters[0].all_gather(outer.persistent_parameters)
            self._forget_gradients()
        else:
            outer.update_lp_params()
        self._check_places()

    def _forget_gradients(self) -> None:
        """Clear the gradients of stage 3, which takes the last one that it had for a parameter that has none any more.

        Those are learned scales, in a phase that does not use them.
        """
        outer = self._outer
        outer.grad_partitions_flat_buffer.zero_()
        if outer.offload_optimizer:
            outer.norm_for_param_grads.clear()
            for flat in outer.fp32_partitioned_groups_flat:
                if flat.grad is not None:
                    flat.grad.zero_()

    def _check_places(self) -> None:
        """Make sure that the state is where `_locate` says: what is written there must be what the model computes with.

        Some settings lay it out in another way than DeepSpeed's own tables say.

        Raises:
            ConfigError: it is elsewhere, on any rank.
        """
        wrong = sum(not self._is_in_place(parameter) for parameter in self.model.parameters())
        total = torch.tensor(wrong, device=self.device)
        dist.all_reduce(total)
        if total:
            raise ConfigError(
                f"engine.deepspeed: with these keys DeepSpeed keeps {int(total)} parts of fp32 weights elsewhere than "
                "its tables say; leave out what changes the layout"
            )

    def _is_in_place(self, parameter: Any) -> bool:
        located = self._locate(parameter)
        if located is None:
            return True
        master, offset, start, length = located
        computed = parameter.ds_tensor[:length] if self.stage == 3 else parameter.view(-1)[start : start + length]
        same = computed == master.view(-1)[offset : offset + length].to(computed)
        return bool((same | ~computed.isfinite()).all())
