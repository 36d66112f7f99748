"""How fast `prepare` turns text into shards, against tokenizers alone and against `datasets.map`.

Two tokenizers of one size are trained on the text: a SentencePiece model, and a byte-level BPE of the `tokenizers`
library, as GPT-2, Llama 3 and Qwen have. Each library that can read one encodes the texts, which are in memory; its
ids are compared with the first library's. `prepare` reads, checks, tokenizes, packs and writes, in
one process; `datasets.map` reads and tokenizes the same file with the same tokenizer, in batches, and writes its cache.
Numbers are MB/s per core: bytes of text over the processor seconds of the process with all of its threads. Each
repetition has its own part of the text, because some libraries remember words and texts; runs alternate.

    python benchmarks/prepare.py [--input python-stdlib] [--vocab 32000] [--megabytes 10] [--repeats 3]

`fastokens` takes part if it is installed.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, cycle
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from measure import interleaved, report

from data import fast_encoding
from data.readers import read_documents
from data.shards import PrepareConfig, prepare
from data.tokenizer import train_tokenizer
from data.tokenizer_json import tokenizer_files

Encode = Callable[[str], list[int]]


def byte_level(texts: list[str], vocab_size: int, path: Path) -> None:
    """Train a tokenizer like GPT-2's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def encoders(path: Path) -> dict[str, Encode]:
    """What can encode with a tokenizer's file, by library."""
    if path.suffix == ".model":
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return {"sentencepiece": model.encode}
    fast = tokenizers.Tokenizer.from_file(str(path))
    found: dict[str, Encode] = {"tokenizers": lambda text: fast.encode(text, add_special_tokens=False).ids}
    if importlib.util.find_spec("fastokens"):
        import fastokens

        other = fastokens.Tokenizer.from_file(str(path))
        found["fastokens"] = lambda text: other.encode(text, split_special_tokens=True).ids
    return found


def map_datasets(texts: Path, tokenizer: Path, folder: Path) -> None:
    """Tokenize as most do."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    rows = datasets.load_dataset("json", data_files=str(texts), split="train", cache_dir=str(folder))
    rows.map(lambda batch: fast(batch["text"]), batched=True, remove_columns=rows.column_names)


def run_prepare(sources: list[Path], tokenizer: Path, outs: Iterator[Path], is_fast: bool, turn: int) -> None:
    """Prepare one source, with `fastokens` if it is installed, or without."""
    name, fast_encoding.NAME = fast_encoding.NAME, fast_encoding.NAME if is_fast else "not_installed"
    prepare(PrepareConfig(inputs=(str(sources[turn]),), tokenizer=str(tokenizer)), 2048, next(outs))
    fast_encoding.NAME = name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", default=["python-stdlib"], help="what to prepare")
    parser.add_argument("--vocab", type=int, default=32000, help="tokens of each tokenizer")
    parser.add_argument("--megabytes", type=float, default=10, help="text to read")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    texts: list[str] = []
    num_bytes = 0
    for document in read_documents(arguments.input):
        texts.append(document.text)
        num_bytes += len(document.text.encode())
        if num_bytes > arguments.megabytes * 1e6:
            break
    repeats = arguments.repeats
    parts = [texts[number::repeats] for number in range(repeats)]
    megabytes = num_bytes / 1e6 / repeats
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = [folder / f"texts-{number}.jsonl" for number in range(repeats)]
        for source, part in zip(sources, parts, strict=True):
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        (folder / "bytes").mkdir()
        (folder / "converted").mkdir()
        paths = (folder / "tokenizer.model", folder / "converted/tokenizer.json", folder / "bytes/tokenizer.json")
        model, converted, in_bytes = paths
        train_tokenizer(texts, f"bpe:{arguments.vocab}", model)
        converted.write_bytes(tokenizer_files(model, vocab_size=1 << 20, max_sequence_length=1 << 20)["tokenizer.json"])
        byte_level(texts, arguments.vocab, in_bytes)

        variants: dict[str, Callable[[], Any]] = {}
        ids: dict[str, list[list[list[int]]]] = {}
        outs = (folder / f"out-{number}" for number in count())

        def add(name: str, run: Callable[[int], Any]) -> None:
            turns = cycle(range(repeats))
            variants[name] = lambda: run(next(turns))

        for kind, file, others in (("SentencePiece", model, [model, converted]), ("byte-level", in_bytes, [in_bytes])):
            for library, encode in [each for path in others for each in encoders(path).items()]:
                found = ids.setdefault(f"{kind}: {library}", [])
                add(
                    f"{kind}: {library}",
                    lambda turn, encode=encode, found=found: found.append([encode(text) for text in parts[turn]]),
                )
            for label, is_fast in (("prepare, own library", False), ("prepare", True)):
                add(f"{kind}: {label}", partial(run_prepare, sources, file, outs, is_fast))
            add(f"{kind}: datasets.map", lambda turn, path=others[-1]: map_datasets(sources[turn], path, next(outs)))
        seconds = interleaved(variants, repeats, of_process=True)

    rates = {name: megabytes / statistics.median(values) for name, values in seconds.items()}
    lines = [f"{num_bytes / 1e6:.1f} MB of text, {len(texts)} documents, {arguments.vocab} tokens.", ""]
    lines += ["| | MB/s per core | slowest to fastest | ids equal to the first |", "| --- | --- | --- | --- |"]
    for name, values in seconds.items():
        slowest, fastest = (megabytes / extreme(values) for extreme in (max, min))
        first = next(each for each in ids if each.split(":")[0] == name.split(":")[0])
        is_equal = "" if name not in ids else "yes" if ids[name] == ids[first] else "no"
        lines.append(f"| {name} | {rates[name]:.2f} | {slowest:.2f} to {fastest:.2f} | {is_equal} |")
    numbers = {
        "vocab": arguments.vocab,
        "megabytes_per_second": {name: round(rate, 3) for name, rate in rates.items()},
    }
    report("prepare", "\n".join(lines), numbers, ("sentencepiece", "tokenizers", "mosaicml-streaming", "datasets"))


if __name__ == "__main__":
    main()
