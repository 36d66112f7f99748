"""How fast the loader delivers rows, without a model: against mosaicml-streaming alone and against a memory map.

One process reads rows of random tokens as one rank would, in shuffled order, and does nothing with them. Three readers:

- `tritrain`: `data.loader.TrainingData`, as a run uses it: int64 micro-batches with labels;
- `streaming`: a `StreamingDataset` with its defaults but for the shuffle, in a `DataLoader` of as many workers, which
  widens rows to int64 and cuts them in two as a training loop would;
- `memory map`: the rows in one file of the operating system's, in random order, copied and widened. It is the limit.

Each measurement is a process of its own, in turns; numbers are medians. `wait` is the share of the time that a consumer
of 1 M tokens a second, which works in between, waits for its next micro-batch, after the first. Processor time is that
of the reader with its workers.

    python benchmarks/loader.py [--rows 20000] [--length 2048] [--workers 1] [--repeats 3]
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import report
from torch import Tensor

from data.config import DataConfig
from data.light_streaming import import_streaming
from data.mixture import Source

READERS = ("tritrain", "streaming", "memory map")
MICRO_BATCH = 32
"""Of 65,536 tokens: a process that takes a million a second has large ones."""
CONSUMED_PER_SECOND = 1e6
VOCAB = 300


def write_folder(folder: Path, rows: int, length: int) -> None:
    """A prepared folder of random tokens, and the same rows as one array."""
    from data.shards import PrepareConfig, prepare

    text = folder / "text.txt"
    text.write_text("A row of this folder is filled with other tokens below.\n" * (length // 8))
    prepare(PrepareConfig(inputs=(str(text),), tokenizer="bpe:300"), length, folder / "prepared")
    repeat_rows(folder / "prepared", rows, length)


def repeat_rows(prepared: Path, rows: int, length: int) -> None:
    """Put random rows in the place of those of a prepared folder, and beside it as one array."""
    import_streaming()
    from streaming import MDSWriter

    manifest = json.loads((prepared / "manifest.json").read_text())
    tokens = np.random.default_rng(1).integers(0, manifest["vocab_size"], (rows, length + 1), dtype=np.uint16)
    np.save(prepared.parent / "rows.npy", tokens)
    train = prepared / "train"
    for path in train.iterdir():
        path.unlink()
    columns = {"tokens": f"ndarray:uint16:{length + 1}"}
    with MDSWriter(out=str(train), columns=columns, hashes=["sha256"], size_limit=1 << 26) as writer:
        for row in tokens:
            writer.write({"tokens": row})
    split = manifest["splits"]["train"]
    split |= {"rows": rows, "fingerprint": hashlib.sha256((train / "index.json").read_bytes()).hexdigest()}
    (prepared / "manifest.json").write_text(json.dumps(manifest))


def batches_of(reader: str, folder: Path, length: int, workers: int) -> Iterator[Any]:
    """Micro-batches of a reader, without end."""
    if reader == "tritrain":
        from data.loader import TrainingData

        config = DataConfig(
            sources=(Source(path=str(folder / "prepared")),), sequence_length=length, workers=workers, validation_rows=0
        )
        return iter(
            TrainingData(
                config,
                vocab_size=VOCAB,
                global_batch_sequences=MICRO_BATCH,
                micro_batch_sequences=MICRO_BATCH,
                rank=0,
                world_size=1,
            )
        )
    if reader == "streaming":
        return _streamed(folder, workers)
    return _mapped(folder)


def _streamed(folder: Path, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    import_streaming()  # without its readers of images, which an image library of another version breaks
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    dataset = StreamingDataset(local=str(folder / "prepared" / "train"), shuffle=True, batch_size=MICRO_BATCH)
    loader = DataLoader(dataset, batch_size=MICRO_BATCH, num_workers=workers, persistent_workers=workers > 0)
    while True:
        for batch in loader:
            rows = batch["tokens"].to(torch.int64)
            yield rows[:, :-1], rows[:, 1:]


def _mapped(folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    stored = np.load(folder / "rows.npy", mmap_mode="r", allow_pickle=False)
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(stored))
        for begin in range(0, len(order) - MICRO_BATCH + 1, MICRO_BATCH):
            rows = torch.from_numpy(stored[order[begin : begin + MICRO_BATCH]].astype(np.int64))
            yield rows[:, :-1], rows[:, 1:]


def measured(reader: str, folder: Path, rows: int, length: int, workers: int) -> dict[str, float]:
    """Read all rows once at full speed, then for ten seconds at the consumer's."""
    began = time.perf_counter()
    batches = batches_of(reader, folder, length, workers)
    next(batches)
    first = time.perf_counter() - began
    num_batches = rows // MICRO_BATCH - 1
    used, began = _processor_seconds(), time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    seconds, processor = time.perf_counter() - began, _processor_seconds() - used
    tokens = num_batches * MICRO_BATCH * length
    step = MICRO_BATCH * length / CONSUMED_PER_SECOND
    return {
        "first batch, s": first,
        "M tokens/s": tokens / seconds / 1e6,
        "processor s per M tokens": processor / tokens * 1e6,
        "wait, %": _waited(batches, step),
        "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _waited(batches: Iterator[Any], step_seconds: float) -> float:
    """Percent of the time."""
    waited, began = 0.0, time.perf_counter()
    while (now := time.perf_counter()) - began < 10:
        while time.perf_counter() < now + step_seconds:
            pass
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
    return 100 * waited / (time.perf_counter() - began)


def _processor_seconds() -> float:
    """Of this process and of its children, which are at work."""
    total = time.process_time()
    me = os.getpid()
    ticks = os.sysconf("SC_CLK_TCK")
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == me:
            total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def main() -> None:
    """Measure all readers in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reader", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        found = measured(options.reader, options.folder, options.rows, options.length, options.workers)
        print(json.dumps(found))
        return
    results: dict[str, list[dict[str, float]]] = {reader: [] for reader in READERS}
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), options.rows, options.length)
        for _ in range(options.repeats):
            for reader in READERS:
                command = [sys.executable, __file__, "--reader", reader, "--folder", folder]
                for name in ("rows", "length", "workers"):
                    command += [f"--{name}", str(getattr(options, name))]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                results[reader].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        reader: {name: statistics.median(each[name] for each in found) for name in found[0]}
        for reader, found in results.items()
    }
    names = list(next(iter(medians.values())))
    lines = [f"| | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    lines += [
        f"| {reader} | {' | '.join(f'{found[name]:.3g}' for name in names)} |" for reader, found in medians.items()
    ]
    ratio = medians["tritrain"]["M tokens/s"] / medians["memory map"]["M tokens/s"]
    text = (
        f"{options.rows:,} rows of {options.length:,} tokens of 2 bytes, micro-batches of {MICRO_BATCH}, "
        f"{options.workers} workers, one rank; medians of {options.repeats} processes each, in turns.\n\n"
        + "\n".join(lines)
        + f"\n\nTritrain reads at {ratio:.2f} times the rate of the memory map."
    )
    report("loader", text, {"runs": results}, packages=("torch", "mosaicml-streaming"))


if __name__ == "__main__":
    main()
