"""How fast `prepare` turns text into shards, against the tokenizer alone.

The baseline is the least that anyone could do: a loop that calls SentencePiece's `encode` on the same texts, already in
memory, with the same model, and keeps nothing. `prepare` reads, hashes, tokenizes, packs and writes, in one process, so
both are MB/s of one core. Their runs alternate, so that a slow moment of the machine falls on both.

    python benchmarks/prepare.py [--input python-stdlib] [--tokenizer bpe:4096] [--sequence-length 2048] [--repeats 5]
"""

import argparse
import statistics
import tempfile
from itertools import count
from pathlib import Path

import sentencepiece
from measure import interleaved, report

from data.readers import read_documents
from data.shards import PrepareConfig, prepare


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

        outs = (Path(folder, str(repeat)) for repeat in count())
        seconds = interleaved(
            {
                "sentencepiece encode": encode_only,
                "prepare": lambda: prepare(config, arguments.sequence_length, next(outs)),
            },
            arguments.repeats,
        )

    rates = {name: num_bytes / 1e6 / statistics.median(values) for name, values in seconds.items()}
    ratio = rates["prepare"] / rates["sentencepiece encode"]
    lines = [f"{num_bytes / 1e6:.1f} MB of text, {len(texts)} documents, {arguments.repeats} rounds.", ""]
    lines += ["| | MB/s per core | slowest to fastest |", "| --- | --- | --- |"]
    for name, values in seconds.items():
        slowest, fastest = (num_bytes / 1e6 / extreme(values) for extreme in (max, min))
        lines.append(f"| {name} | {rates[name]:.2f} | {slowest:.2f} to {fastest:.2f} |")
    lines.append(f"| ratio of the medians | {ratio:.2f} | |")
    numbers = {
        "input": arguments.input,
        "megabytes_per_second": {name: round(rate, 3) for name, rate in rates.items()},
        "ratio": round(ratio, 3),
    }
    report("prepare", "\n".join(lines), numbers, ("sentencepiece", "mosaicml-streaming", "numpy"))


if __name__ == "__main__":
    main()
