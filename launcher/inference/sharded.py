"""Open a checkpoint or an export to be measured: its model, sharded over the ranks, and its tokenizer.

A Tritrain checkpoint computes as in its last training step: in its run's compute dtype, with the quantization of
its phase at the strength that it had, so that a ternary model is measured with its integer products. A folder of
Hugging Face computes in bf16, or in fp32 where it says so; a packed one with the codes and scales that it holds.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from data.tokenizer import Tokenizer
from eval.rows import BATCH_TOKENS, CPU_BATCH_TOKENS, Scorer
from eval.tasks import digest_of
from launcher.checkpoint.folders import checkpoints_under, is_checkpoint
from launcher.checkpoint.location import reaching, to_location
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.source import Source
from launcher.engine.build import COMPUTE_DTYPES
from launcher.errors import CheckpointError
from launcher.formats.deepspeed_native import DeepSpeedSource
from launcher.formats.hf_source import CONFIG, dtype_name, read_json
from launcher.formats.onnx_export import GRAPH
from launcher.formats.onnx_graph import DATA
from launcher.formats.opened import Exportable, open_exportable
from launcher.formats.published_onnx import is_onnx
from launcher.formats.tokens import first_token_of, fitting_tokenizer, puts_first
from launcher.inference.build import sharded_model
from launcher.process.ranks import Ranks
from launcher.run.automatic import concrete
from model.transformer import ModelConfig, Transformer

HASHED_AT_ONCE = 64 * 2**20


@dataclass(frozen=True)
class Subject:
    """A model to be measured."""

    location: str
    identity: str
    """Tells this model from any other: the digest of its files."""
    step: int | None
    """Steps that a Tritrain checkpoint was trained for; None for others."""
    run: Path | None
    """The folder of its run, where that was found."""
    tokenizer: Tokenizer
    first_token: int
    """The token before a text."""
    puts_first_token: bool
    """Whether the tokenizer puts it in front of every text."""
    computation: dict[str, Any]
    """How its results are computed, beside its files: `key_of` in `launcher.inference.measure`."""
    scorer: Scorer
    model: Transformer
    """Sharded over all ranks."""
    ranks: Ranks


def locations_of(text: str, *, every: bool) -> list[str]:
    """The models to be measured: the one in a folder, or all checkpoints of a run.

    Raises:
        CheckpointError: every one is asked for where there is none.
    """
    folder = to_location(text)
    if not every:
        return [text]
    with reaching(folder):
        found = checkpoints_under(folder)
        if is_checkpoint(folder) or not found:
            raise CheckpointError(f"{text}: is not a run with checkpoints, which --all needs")
    return [str(checkpoint) for checkpoint in found]


def open_measurable(text: str, tokenizer: str | None = None) -> tuple[Exportable, Tokenizer]:
    """Find a model and its tokenizer, and verify every byte of a Tritrain checkpoint.

    Args:
        text: a Tritrain checkpoint, or a run, of which the newest is taken; or an export.
        tokenizer: file or folder; None takes the one that the model was trained with or exported with.

    Raises:
        CheckpointError: it is none of these, or damaged, or its tokenizer is not to be found.
        DataError: the tokenizer is none, or of another model.
    """
    opened = open_exportable(text, ternary=False)
    found = tokenizer or opened.tokenizer
    if found is None:
        raise CheckpointError(
            f"{opened.source.location}: its tokenizer was not found (no tokenizer.model or tokenizer.json); "
            "name it with --tokenizer"
        )
    return opened, fitting_tokenizer(found, opened.model)


def open_subject(text: str, ranks: Ranks, tokenizer: str | None = None) -> Subject:
    """Open a model to measure text and shard it over all ranks; a collective.

    Of a run that keeps documents apart, a text ends where its end token stands, as in training.

    Args:
        text: see `open_measurable`, as for the last and for errors.
        ranks: this rank among all.
        tokenizer: of the model.
    """
    opened, loaded = open_measurable(text, tokenizer)
    subject = subject_of(opened, loaded, ranks)
    if opened.config is not None and opened.config.data.documents == "masked":
        subject.model.model.first_token = loaded.end_of_document
    return subject


def subject_of(opened: Exportable, loaded: Tokenizer, ranks: Ranks) -> Subject:
    """Shard a model that `open_measurable` has opened over all ranks; a collective.

    All that stands before a token is seen from it: a chat may end each of its turns with the end of a document.
    """
    source = opened.source
    dtype = compute_dtype_of(opened, ranks)
    model = sharded_model(source, opened.model, opened.precision, dtype, ranks)

    def nll_and_misses(tokens_BT: Tensor, labels_BTA: Tensor) -> tuple[Tensor, Tensor]:
        found = model(tokens_BT.to(ranks.device), labels_BTA.to(ranks.device), reduction="greedy")
        return found.token_nll, found.token_misses

    manifest = source.manifest if isinstance(source, CheckpointReader) else None
    first_token = first_token_of(source, loaded.end_of_document)
    assert first_token is not None
    scorer = scorer_of(
        lambda tokens_BT, labels_BT: (
            model(tokens_BT.to(ranks.device), labels_BT.to(ranks.device), reduction="none").token_nll
        ),
        opened.model,
        ranks,
    )
    return Subject(
        location=source.location,
        identity=manifest.digest if manifest else digest_of_files(files_of(source)),
        step=manifest.step if manifest else None,
        run=opened.run,
        tokenizer=loaded,
        first_token=first_token,
        puts_first_token=puts_first(source, loaded.path),
        computation={
            "tokenizer": loaded.fingerprint,
            "end_of_document": loaded.end_of_document,
            "first_token": first_token,
            "window_tokens": scorer.window_tokens,
            "precision": digest_of([asdict(opened.model), asdict(opened.precision)]),
            "dtype": dtype_name(dtype),
            "device": ranks.device.type,
        },
        scorer=replace(scorer, token_nll_and_misses=nll_and_misses),
        model=model,
        ranks=ranks,
    )


@contextmanager
def gathered(subject: Subject) -> Iterator[None]:
    """Hold all of a model on every rank, so that each can run it by itself; a collective at both ends."""
    model, device = subject.model, subject.ranks.device
    register_fsdp_forward_method(model, "next_logits")
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_forward(False)
    model.next_logits(torch.zeros(1, 1, dtype=torch.int64, device=device), model.new_cache(1, 1))
    try:
        yield
    finally:
        for block in model.model.layers:
            assert isinstance(block, FSDPModule)
            block.set_reshard_after_forward(True)
            block.reshard()


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


def compute_dtype_of(opened: Exportable, ranks: Ranks) -> torch.dtype:
    """The dtype that a model is measured in: its run's, or the one that its folder says; a collective.

    A run that was converted and has not trained yet may have none: then it is the one that it would begin with here.
    """
    if opened.config is not None:
        return COMPUTE_DTYPES[concrete(opened.config, ranks)[0].training.compute_dtype]
    return torch.bfloat16 if stored_dtype(to_location(opened.source.location)) == "bfloat16" else torch.float32


def stored_dtype(place: Path) -> str:
    """The dtype that a folder says it is to compute in; a GGUF file, whose programs add in fp32, says none."""
    if place.is_file():
        return "float32"
    told = read_json(place / CONFIG)
    return str(told.get("dtype") or told.get("torch_dtype") or "float32")


def files_of(source: Source) -> list[Path]:
    """The files of a model: a GGUF file, or `config.json` and weights, which DeepSpeed may have written beside it."""
    folder = to_location(source.location)
    if folder.is_file():
        return [folder]
    if is_onnx(folder):
        return [folder / CONFIG, folder / GRAPH, folder / DATA]
    weights = source.folder.glob("*.pt") if isinstance(source, DeepSpeedSource) else folder.glob("*.safetensors")
    return [folder / CONFIG, *weights]


def digest_of_files(paths: Iterable[Path]) -> str:
    """The digest of a model's files, in the order of their names."""
    digest = xxhash.xxh3_128()
    for path in sorted(paths):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(HASHED_AT_ONCE):
                digest.update(chunk)
    return digest.hexdigest()
