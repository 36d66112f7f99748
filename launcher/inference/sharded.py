"""A checkpoint or an export, ready to be measured: its model sharded over the ranks, its tokenizer, and its name.

A checkpoint of ours computes as in the last step that was trained: in its run's compute dtype, with the quantization of
its phase at the strength that it had, so that a ternary model is measured with its integer products. A folder of
Hugging Face computes in bf16, or in fp32 where it says so; a packed one with the codes and scales that it holds.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from data.tokenizer import Tokenizer, load_tokenizer
from eval.rows import BATCH_TOKENS, CPU_BATCH_TOKENS, Scorer
from launcher.checkpoint.load import mismatches
from launcher.checkpoint.location import reaching, to_location
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.writer import MANIFEST, checkpoints_under
from launcher.config.sections import Config
from launcher.engine.build import COMPUTE_DTYPES
from launcher.engine.frozen import shard_frozen_
from launcher.errors import CheckpointError
from launcher.formats.hf_source import CONFIG, HuggingFaceSource
from launcher.formats.opened import Exportable, open_exportable
from launcher.plan.plan import Plan, make_plan
from launcher.process.ranks import Ranks
from launcher.run.rollbacks import read_rollbacks
from model.transformer import ModelConfig, Transformer
from quant.config import BITNET
from quant.linear import QuantLinear, add_learned_scales_, quantize_, quantized_layers, set_strengths_
from quant.rounding import Scale

HASHED_AT_ONCE = 64 * 2**20


@dataclass(frozen=True)
class Subject:
    """A model to be measured."""

    location: str
    identity: str
    """Tells this model from any other: the digest of its files."""
    step: int | None
    """Steps that a checkpoint of ours has been trained; None for others."""
    run: Path | None
    """The folder of its run, where that was found."""
    tokenizer: Tokenizer
    scorer: Scorer


def locations_of(text: str, *, every: bool) -> list[str]:
    """What is to be measured: a folder as it is, or all checkpoints of a run if every one is asked for.

    Raises:
        CheckpointError: every one is asked for where there is none.
    """
    folder = to_location(text)
    if not every:
        return [text]
    with reaching(folder):
        found = checkpoints_under(folder)
        if (folder / MANIFEST).is_file() or not found:
            raise CheckpointError(f"{text}: is no run with checkpoints, and --all asks for all of a run's")
    return [str(checkpoint) for checkpoint in found]


def open_subject(text: str, ranks: Ranks, tokenizer: str | None = None) -> Subject:
    """Open a model and shard it over all ranks; a collective.

    Args:
        text: a checkpoint of ours, or a run, of which the newest is taken; or a folder of Hugging Face.
        ranks: this rank among all.
        tokenizer: file or folder; None takes the one that the model was trained with or exported with.

    Raises:
        CheckpointError: it is none of these, or damaged, or its tokenizer is not to be found.
        DataError: the tokenizer is none.
    """
    opened = open_exportable(text, ternary=False)
    found = tokenizer or opened.tokenizer
    if found is None:
        raise CheckpointError(
            f"{opened.source.location}: its tokenizer is not to be found, neither tokenizer.model nor tokenizer.json; "
            "name it with --tokenizer"
        )
    loaded = load_tokenizer(found)
    if loaded.vocab_size > opened.model.vocab_size:
        raise CheckpointError(
            f"{loaded.path}: has {loaded.vocab_size} tokens and the model {opened.model.vocab_size}; it is the "
            "tokenizer of another model. Name the right one with --tokenizer"
        )
    model, source = _sharded(opened, ranks), opened.source
    manifest = source.manifest if isinstance(source, CheckpointReader) else None
    return Subject(
        location=source.location,
        identity=manifest["digest"] if manifest else digest_of_folder(Path(source.location)),
        step=manifest["step"] if manifest else None,
        run=opened.run,
        tokenizer=loaded,
        scorer=scorer_of(
            lambda tokens_BT, labels_BT: (
                model(tokens_BT.to(ranks.device), labels_BT.to(ranks.device), reduction="none").token_nll
            ),
            opened.model,
            ranks,
        ),
    )


def scorer_of(token_nll: Callable[[Tensor, Tensor], Tensor], config: ModelConfig, ranks: Ranks) -> Scorer:
    """A scorer of a model that all ranks run together."""
    return Scorer(
        token_nll=token_nll,
        window_tokens=config.max_sequence_length,
        rank=ranks.rank,
        world_size=ranks.world_size,
        reduce_sum=dist.all_reduce,
        batch_tokens=CPU_BATCH_TOKENS if ranks.device.type == "cpu" else BATCH_TOKENS,
    )


def _sharded(opened: Exportable, ranks: Ranks) -> Transformer:
    source, dtype = opened.source, torch.float32
    if opened.config is not None:
        dtype = COMPUTE_DTYPES[opened.config.training.compute_dtype]
    elif stored_dtype(Path(source.location)) == "bfloat16":
        dtype = torch.bfloat16
    with torch.device("meta"):
        model = Transformer(opened.model).to(dtype)
        if opened.quantization is not None and opened.quantization.learned:
            add_learned_scales_(model, opened.quantization)
            model.to(dtype)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if problems := list(mismatches(source, set(shapes), shapes)):
        raise CheckpointError(f"{source.location} does not hold the model that it describes:\n" + "\n".join(problems))
    if opened.quantization is not None:
        assert opened.config is not None
        assert isinstance(source, CheckpointReader)
        quantize_(model, opened.quantization, ranks.device)
        set_strengths_(model, *plan_of(source, opened.config, opened.run).strengths_at(source.manifest["step"] - 1))
    elif isinstance(source, HuggingFaceSource) and source.ternary:
        compute_with_codes_(model, source, ranks.device)
    shard_frozen_(model, partial(source.read, "weight"), ranks)
    return model


def plan_of(reader: CheckpointReader, config: Config, run: Path | None) -> Plan:
    """The plan by which a checkpoint was trained."""
    attempts = {phase: rollback.attempts for phase, rollback in read_rollbacks(run).items()} if run else {}
    return make_plan(config, reader.manifest["world_size"], attempts)


class CodesLinear(QuantLinear):
    """A layer whose weights are code times scale already, so that nothing is left to be found out."""

    level: torch.Tensor

    def rounding_scale(self, weight_OI: torch.Tensor) -> Scale:
        """The scale that was packed with the codes."""
        return Scale(self.level)


def compute_with_codes_(model: Transformer, source: HuggingFaceSource, device: torch.device) -> None:
    """Make the layers of a ternary folder multiply codes by 8-bit activations, as Transformers does.

    Packed layers have the scales that are stored with their codes, others find their own while they compute.
    """
    include = "|".join(f"^{re.escape(name.removesuffix('.weight'))}$" for name in source.ternary)
    quantize_(model, replace(BITNET, include=include), device)
    if source.is_packed:
        for name, layer in quantized_layers(model).items():
            layer.__class__ = CodesLinear
            assert isinstance(layer, CodesLinear)
            layer.level = source.packed(f"{name}.weight")[1].to(device)


def stored_dtype(folder: Path) -> str:
    """The dtype that a folder of Hugging Face says it is to compute in."""
    told = json.loads((folder / CONFIG).read_bytes())
    return str(told.get("dtype") or told.get("torch_dtype") or "float32")


def digest_of_folder(folder: Path) -> str:
    """Of the bytes of a model's files, in the order of their names."""
    digest = xxhash.xxh3_128()
    for path in sorted([folder / CONFIG, *folder.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(HASHED_AT_ONCE):
                digest.update(chunk)
    return digest.hexdigest()
