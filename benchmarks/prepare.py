"""How fast `prepare` turns text into shards, against the tokenizer alone.

The baseline is the least that anyone could do: a loop that calls SentencePiece's `encode` on the same texts, already in
memory, with the same model, and keeps nothing. `prepare` reads, hashes, tokenizes, packs and writes, in one process, so
both are MB/s of one core. Their runs alternate, so that a slow moment of the machine falls on both.

    python benchmarks/prepare.py [--input python-stdlib] [--tokenizer bpe:4096] [--sequence-length 2048] [--repeats 5]
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import sentencepiece

from data.readers import read_documents
from data.shards import PrepareConfig, prepare


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", default=["python-stdlib"], help="what to prepare")
    parser.add_argument(
        "--tokenizer", default="bpe:4096", help="a SentencePiece .model file, bpe:VOCAB or unigram:VOCAB"
    )
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    texts = [document.text for document in read_documents(arguments.input)]
    num_bytes = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory() as folder:
        # Trains the tokenizer and imports everything, neither of which is measured.
        first = PrepareConfig(inputs=tuple(arguments.input), tokenizer=arguments.tokenizer)
        manifest = prepare(first, arguments.sequence_length, Path(folder, "first"))
        tokenizer = Path(folder, "first", manifest["tokenizer"]["file"])
        model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        config = PrepareConfig(inputs=tuple(arguments.input), tokenizer=str(tokenizer))

        def encode_only() -> None:
            for text in texts:
                model.encode(text)

        encode_seconds, prepare_seconds = [], []
        for repeat in range(arguments.repeats):
            out = Path(folder, str(repeat))
            encode_seconds.append(seconds_of(encode_only))
            prepare_seconds.append(seconds_of(partial(prepare, config, arguments.sequence_length, out)))

    rates = {
        "sentencepiece encode": num_bytes / 1e6 / statistics.median(encode_seconds),
        "prepare": num_bytes / 1e6 / statistics.median(prepare_seconds),
    }
    ratio = rates["prepare"] / rates["sentencepiece encode"]
    print("| | MB/s per core | slowest to fastest run |\n| --- | --- | --- |")
    for name, seconds in zip(rates, (encode_seconds, prepare_seconds), strict=True):
        slowest, fastest = (num_bytes / 1e6 / extreme(seconds) for extreme in (max, min))
        print(f"| {name} | {rates[name]:.2f} | {slowest:.2f} to {fastest:.2f} |")
    print(f"| ratio of the medians | {ratio:.2f} | |\n")
    packages = ("sentencepiece", "mosaicml-streaming", "numpy")
    result = {
        "input": arguments.input,
        "tokenizer": arguments.tokenizer,
        "sequence_length": arguments.sequence_length,
        "text_megabytes": round(num_bytes / 1e6, 2),
        "documents": len(texts),
        "repeats": arguments.repeats,
        "megabytes_per_second": {name: round(rate, 3) for name, rate in rates.items()},
        "ratio": round(ratio, 3),
        "cpu": cpu_model(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
