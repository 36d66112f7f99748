"""Prepared folders to batches: the same samples in every global batch, whatever the number of ranks.

The order of the training rows is `streaming.StreamingDataset`'s. Everything that it would derive from the machine is
given to it explicitly, so that the order is a function of the data and the configuration alone, and the position in it
is one integer: the sequences that all ranks together have consumed since the start. An epoch is a whole number of
global batches; each global batch is the next stretch of the order, of which every rank reads its part.

Dimensions: B sequences of a micro-batch on one rank, T tokens of a sequence.
"""

import hashlib
import json
import math
import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from data.config import Content, DataConfig, PrepareConfig
from data.errors import DataError
from data.labels import IGNORED_LABEL, MARKED, Labels, inputs_and_labels
from data.light_streaming import import_streaming
from data.mixture import Source, rows_per_epoch
from data.prepared import TOKEN_BYTES, TRAIN, VALIDATION, no_held_out_text
from data.shards import prepare
from data.shared_memory import numbered
from data.sources import OpenSource, local_leader_first, open_sources
from data.transfer import widened

if TYPE_CHECKING:
    from data.reading import FetchingReader, LocalReader

__all__ = [
    "IGNORED_LABEL",
    "MARKED",
    "DataConfig",
    "DataError",
    "PrepareConfig",
    "Source",
    "TrainingData",
    "token_bytes",
    "validation_rows",
]

# What decides the order besides the configuration. A change of either must change the fingerprint.
ORDER_VERSION = 1
SHUFFLE_ALGORITHM = "py1e"

CPU = torch.device("cpu")


class TrainingData:
    """An endless iterator of micro-batches `(tokens_BT, labels_BT)`, int64, across epochs.

    `labels_BT[b, t]` is the token that follows `tokens_BT[b, t]`. All ranks must construct it, after the process group
    was initialized and with the environment of torchrun (`RANK`, `WORLD_SIZE`, `LOCAL_WORLD_SIZE`); a single process
    needs neither.

    Args:
        config: what to read.
        vocab_size: the model's; the tokenizer's must fit in.
        global_batch_sequences: the stretch of the order that ranks share: sequences of one optimizer step over all
            ranks or, if steps differ, the greatest common divisor of theirs.
        micro_batch_sequences: B. The order of a rank's sequences does not depend on it.
        rank: this process.
        world_size: number of processes.
        first_sequence: how many sequences were consumed before, a multiple of `global_batch_sequences`.
        device: where micro-batches are to be.

    Raises:
        DataError: a folder is missing, damaged or of another sequence length, tokenizer or vocabulary.
    """

    config: DataConfig
    """What is read."""
    fingerprint: str
    """A hash of everything that determines the order of the samples. Positions carry over only if it is equal."""
    tokenizer_path: Path
    """The tokenizer that made the tokens."""
    epoch_sequences: int
    """Sequences of one epoch over all ranks."""
    first_token: int | None
    """The token with which documents begin, if they are to be kept apart; of chats `MARKED`."""
    content: Content
    """What rows are; of chats and of pairs answers alone count."""
    has_padding: bool
    """Whether the number of labels that count differs between rows."""

    def __init__(
        self,
        config: DataConfig,
        *,
        vocab_size: int,
        global_batch_sequences: int,
        micro_batch_sequences: int,
        rank: int,
        world_size: int,
        first_sequence: int = 0,
        device: torch.device = CPU,
    ) -> None:
        assert global_batch_sequences % (micro_batch_sequences * world_size) == 0
        assert first_sequence % global_batch_sequences == 0
        _check_launch(config, rank, world_size)
        self.config = config
        sources = _open(config, vocab_size, rank)
        self.tokenizer_path = sources[0].tokenizer_path
        self.content = _content(sources)
        self.first_token = _first_token(config, sources)
        labels = _labels(sources)
        self.has_padding = labels is not None
        rows = _rows_of_epoch(config, sources, global_batch_sequences)
        self.epoch_sequences = sum(rows)
        self.fingerprint = _fingerprint(config, sources, rows, global_batch_sequences)

        import_streaming()
        from data.reading import BLOCK_TOKENS, FetchingReader, LocalReader
        from data.rows import RowDataset

        rank_sequences = global_batch_sequences // world_size
        number = ExitStack()
        with numbered(rank, number):
            dataset = RowDataset(
                streams=[source.stream(choose) for source, choose in zip(sources, rows, strict=True)],
                batch_size=rank_sequences,
                num_canonical_nodes=config.canonical_nodes,
                shuffle=config.shuffle,
                shuffle_algo=SHUFFLE_ALGORITHM,
                shuffle_seed=config.shuffle_seed,
                shuffle_block_size=config.shuffle_block_rows,
                partition_algo="relaxed",
                sampling_method="balanced",
                batching_method="random",
            )
        dataset.vocab_size, dataset.holds_chats = vocab_size, self.content != "text"
        dataset.position = divmod(first_sequence, self.epoch_sequences)
        block_rows = micro_batch_sequences * -(-BLOCK_TOKENS // (micro_batch_sequences * config.sequence_length))
        if any(source.is_cached for source in sources):
            self._reader: LocalReader | FetchingReader = FetchingReader(
                dataset, rank_sequences, block_rows, config.workers
            )
        else:
            self._reader = LocalReader(dataset, block_rows, config.workers)
        self._drawn: deque[NDArray[np.int64]] = deque()
        self._batches = _endless(self._reader, micro_batch_sequences, labels, device, self._drawn, len(sources))
        self._finalizer = weakref.finalize(self, _close, self._reader, number)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the only iterator; asking again continues at its position."""
        return self._batches

    def drawn(self, num_micro_batches: int) -> Tensor:
        """Return the rows of each source in the next micro-batches that were not asked about yet, int64, [sources].

        They must have been read.
        """
        return torch.from_numpy(np.sum([self._drawn.popleft() for _ in range(num_micro_batches)], axis=0))

    def close(self) -> None:
        """Stop the processes and threads that read ahead; this also happens when the program ends."""
        self._finalizer()


def validation_rows(
    config: DataConfig, *, vocab_size: int, micro_batch_sequences: int, rank: int, world_size: int
) -> list[tuple[Tensor, Tensor]]:
    """Return this rank's part of the held-out rows, as micro-batches `(tokens_BT, labels_BT)`, int64.

    The rows are the first `config.validation_rows` when the sources' validation splits are read in turns, a row of each
    at a time. All ranks together get each row once, and every rank gets the same number of batches of the same shape:
    what is missing at the end is filled with rows whose labels are all `IGNORED_LABEL`.

    Raises:
        DataError: no source has a validation split, or one cannot be opened.
    """
    sources = _open(config, vocab_size, rank)
    counts = [min(source.num_rows(VALIDATION), config.validation_rows) for source in sources]
    in_turns = sorted((row, turn) for turn, count in enumerate(counts) for row in range(count))[
        : config.validation_rows
    ]
    if not in_turns:
        raise DataError(no_held_out_text(source.path for source in config.sources))
    with local_leader_first(rank):
        taken = np.bincount([turn for _, turn in in_turns], minlength=len(sources))
        splits = {
            turn: source.read_first_rows(VALIDATION, int(taken[turn]))
            for turn, source in enumerate(sources)
            if taken[turn]  # a source without held-out text has no files of it
        }
    rows = torch.from_numpy(np.stack([splits[turn][row] for row, turn in in_turns]))
    per_round, uncounted = world_size * micro_batch_sequences, _labels(sources)
    batches = []
    for begin in range(rank * micro_batch_sequences, math.ceil(len(rows) / per_round) * per_round, per_round):
        micro = rows[begin : begin + micro_batch_sequences]
        tokens_BT = torch.zeros(micro_batch_sequences, config.sequence_length, dtype=torch.int64)
        labels_BT = torch.full_like(tokens_BT, IGNORED_LABEL)
        tokens_BT[: len(micro)], labels_BT[: len(micro)] = inputs_and_labels(micro, uncounted)
        batches.append((tokens_BT, labels_BT))
    return batches


def held_out_first_token(config: DataConfig, vocab_size: int) -> int | None:
    """Return the token with which documents begin in the rows of `validation_rows`; see `TrainingData.first_token`."""
    return _first_token(config, open_sources(config.sources, config.cache, config.sequence_length, vocab_size))


def first_training_rows(config: DataConfig, *, vocab_size: int, num_rows: int) -> tuple[Tensor, Tensor, int | None]:
    """Return rows of the training splits, in turns, in the order in which they are stored.

    One process of a machine at a time may call it. There are fewer rows if the sources hold no more.

    Returns:
        Tokens and labels as those of `TrainingData`, int64, [num_rows, sequence_length], and its `first_token`.

    Raises:
        DataError: a source cannot be opened, or a row not be read.
    """
    if config.prepare:
        prepare(config.prepare, config.sequence_length, Path(config.sources[0].path))
    sources = open_sources(config.sources, config.cache, config.sequence_length, vocab_size)
    counts = [min(source.num_rows(TRAIN), num_rows) for source in sources]
    turns = [turn for _, turn in sorted((row, turn) for turn, count in enumerate(counts) for row in range(count))]
    taken = np.bincount(turns[:num_rows], minlength=len(sources))
    rows = [source.read_first_rows(TRAIN, count) for source, count in zip(sources, taken, strict=True) if count]
    tokens = torch.from_numpy(np.concatenate(rows).astype(np.int64))
    return *inputs_and_labels(tokens, _labels(sources)), _first_token(config, sources)


def token_bytes(config: DataConfig, vocab_size: int) -> Tensor:
    """Return the UTF-8 bytes that each token stands for, float64, [vocab_size]; 0 for special and unused ids.

    See `data.tokenizer.Tokenizer.token_bytes`. They are integers unless the tokenizer is lossy.
    """
    source = open_sources(config.sources, config.cache, config.sequence_length, vocab_size)[0]
    sizes = torch.zeros(vocab_size, dtype=torch.float64)
    path, count = source.folder / TOKEN_BYTES, source.manifest["vocab_size"]
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)  # a header may claim more than there is memory
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: damaged, or no array of numbers; copy or prepare the folder again") from error
    if stored.shape != (count,) or stored.dtype.kind not in "iuf":
        raise DataError(f"{path}: holds {stored.dtype} {stored.shape} instead of {count} counts of bytes")
    sizes[:count] = torch.from_numpy(stored.astype(np.float64))
    return sizes


def fingerprints(
    config: DataConfig, mixtures: Sequence[DataConfig], *, vocab_size: int, global_batch_sequences: int, rank: int
) -> list[str]:
    """Check the mixtures that a run reads one after another, and return the fingerprint of each.

    Only small files are read. All ranks must call it.

    Args:
        config: the data of the run, with which they must agree.
        mixtures: the data of its phases.
        vocab_size: as of `TrainingData`.
        global_batch_sequences: as of `TrainingData`.
        rank: this process.

    Raises:
        DataError: as of `TrainingData`, or they do not agree in tokenizer and end of documents.
    """
    named = {source.path: source for each in (config, *mixtures) for source in each.sources}
    with local_leader_first(rank):
        opened = open_sources(list(named.values()), config.cache, config.sequence_length, vocab_size)
    by_path = dict(zip(named, opened, strict=True))
    found = []
    for mixture in mixtures:
        sources = [by_path[source.path] for source in mixture.sources]
        _content(sources)
        rows = _rows_of_epoch(mixture, sources, global_batch_sequences)
        found.append(_fingerprint(mixture, sources, rows, global_batch_sequences))
    return found


def _endless(
    reader: "LocalReader | FetchingReader",
    micro_batch_sequences: int,
    counted: Labels,
    device: torch.device,
    drawn: deque[NDArray[np.int64]],
    num_sources: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        try:
            for rows, sources in reader:  # once around is one epoch
                of_micro = sources.reshape(-1, micro_batch_sequences)
                drawn.extend(np.stack([(of_micro == source).sum(1) for source in range(num_sources)], axis=1))
                tokens, labels = inputs_and_labels(widened(rows, device), counted)
                yield from zip(tokens.split(micro_batch_sequences), labels.split(micro_batch_sequences), strict=True)
        except DataError as error:  # a worker's comes with its traceback in the message
            raise DataError(str(error).strip().rpartition(f"{DataError.__module__}.DataError: ")[2]) from error


def _content(sources: Sequence[OpenSource]) -> Content:
    """Return what the rows of a mixture are.

    Raises:
        DataError: not all are the same.
    """
    kinds: list[Content] = sorted({each.content for each in sources})
    paths = [", ".join(each.source.path for each in sources if each.content == kind) for kind in kinds]
    if len(kinds) > 1:
        raise DataError(f"{paths[0]}: holds {kinds[0]}, and {paths[1]} {kinds[1]}; a phase trains on one of both")
    return kinds[0]


def _first_token(config: DataConfig, sources: list[OpenSource]) -> int | None:
    if _content(sources) != "text":
        return MARKED
    return sources[0].manifest["end_of_document"] if config.documents == "masked" else None


def _labels(sources: list[OpenSource]) -> Labels:
    if _content(sources) != "text":
        return "marked"
    packed = [source for source in sources if source.manifest["options"].get("packing") == "best-fit"]
    return packed[0].manifest["end_of_document"] if packed else None


def _rows_of_epoch(config: DataConfig, sources: Sequence[OpenSource], global_batch_sequences: int) -> tuple[int, ...]:
    """Return how many rows of each source an epoch of a mixture holds."""
    return rows_per_epoch(
        [source.num_rows(TRAIN) for source in sources],
        [source.weight for source in config.sources],
        # Canonical nodes get equal parts of an epoch, or `streaming` would repeat samples to make them equal.
        math.lcm(global_batch_sequences, config.canonical_nodes),
    )


def _close(reader: "LocalReader | FetchingReader", number: ExitStack) -> None:
    reader.close()
    dataset = reader.dataset
    for lock in (dataset._shared_barrier.filelock_path, dataset._cache_filelock_path):
        Path(lock).unlink(missing_ok=True)  # `streaming` leaves them for ever, and takes them for signs of a live run
    number.close()


def _check_launch(config: DataConfig, rank: int, world_size: int) -> None:
    """Check what `streaming` takes from the environment, where a wrong value would repeat data or hang."""
    assumed = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"} if world_size == 1 else {}
    found = {name: os.environ.get(name, assumed.get(name)) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    if found["RANK"] != str(rank) or found["WORLD_SIZE"] != str(world_size) or found["LOCAL_WORLD_SIZE"] is None:
        raise RuntimeError(
            f"the environment says {found}, but this is rank {rank} of {world_size}; start with torchrun, or set RANK, "
            "WORLD_SIZE and LOCAL_WORLD_SIZE as it does"
        )
    if world_size > 1 and not dist.is_initialized():
        raise RuntimeError("initialize the process group before the data; otherwise `streaming` starts one of its own")
    nodes = world_size // int(found["LOCAL_WORLD_SIZE"])
    if config.canonical_nodes % nodes and nodes % config.canonical_nodes:
        raise DataError(
            f"canonical_nodes: {config.canonical_nodes} and the number of nodes, {nodes}, do not divide each other; "
            f"choose 1 or a multiple of {nodes}"
        )


def _open(config: DataConfig, vocab_size: int, rank: int) -> list[OpenSource]:
    """Prepare if asked to, then open every source."""
    if config.prepare:
        prepare(config.prepare, config.sequence_length, Path(config.sources[0].path))
    with local_leader_first(rank):
        return open_sources(config.sources, config.cache, config.sequence_length, vocab_size)


def _fingerprint(
    config: DataConfig, sources: list[OpenSource], rows: tuple[int, ...], global_batch_sequences: int
) -> str:
    order = {
        "version": ORDER_VERSION,
        "sources": [source.manifest["splits"][TRAIN]["fingerprint"] for source in sources],
        "rows_per_epoch": rows,
        "tokenizer": sources[0].manifest["tokenizer"]["fingerprint"],
        "end_of_document": sources[0].manifest["end_of_document"],
        "sequence_length": config.sequence_length,
        "global_batch_sequences": global_batch_sequences,
        "shuffle": [SHUFFLE_ALGORITHM, config.shuffle_block_rows] if config.shuffle else None,
        "shuffle_seed": config.shuffle_seed,
        "canonical_nodes": config.canonical_nodes,
    }
    return hashlib.sha256(json.dumps(order, sort_keys=True).encode()).hexdigest()
