"""Configuration of preparation and of training data. Needs neither torch nor numpy."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from data.mixture import Source, sources_problem
from data.strict import STRICT

TRAINED_SPEC = re.compile(r"(bpe|unigram):([1-9][0-9]*)")
"""A tokenizer that is yet to be trained: its algorithm and the size of its vocabulary."""


Packing = Literal["stream", "best-fit"]
Compression = Literal["none", "zstd"]
Content = Literal["text", "chats", "pairs"]
TooLong = Literal["error", "drop", "truncate"]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The text that becomes token shards, and how."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    inputs: tuple[str, ...]
    """Files, folders, `hf:NAME[:CONFIG]:SPLIT` or `python-stdlib`."""

    tokenizer: str
    """A SentencePiece `.model`, a `tokenizer.json`, `hf:NAME` for that of a model on the Hugging Face hub, or
    `bpe:VOCAB` / `unigram:VOCAB` to train one on the inputs."""

    content: Content = "text"
    """`text`; `chats`: JSON lines, Parquet files and data sets with `messages`, of which a model learns the
    assistant's answers; or `pairs`: such records with `prompt`, and with a `chosen` and a `rejected` answer. Rows of
    both are packed best-fit, and chats do not see one another."""

    chat_template: str | None = None
    """For chats and pairs: a file with their template, in Jinja; null: the one in the tokenizer's folder."""

    too_long: TooLong = "error"
    """A chat or a pair that does not fit into a row: `error`, or `drop` it, or `truncate` a chat."""

    add_tokens: tuple[str, ...] = ()
    """Special tokens to add to the tokenizer, such as `<|im_start|>` of a chat template. All folders of a run need the
    same."""

    end_of_document: str | None = None
    """Token that ends a document, such as `<|endoftext|>`; by default the one that the tokenizer's files name, and
    `</s>` for a trained tokenizer."""

    lossy_tokenizer: bool = False
    """Accept a tokenizer that does not give the text back, such as one that normalizes it. Bits per byte are then right
    on average over the text only."""

    validation_fraction: float = 0.0
    """Share of the documents that is held out; which ones depends on their text alone, so equal texts stay together."""

    validation_inputs: tuple[str, ...] = ()
    """Inputs that are held out as a whole, instead of a fraction."""

    packing: Packing = "stream"
    """`stream`: rows are cut from the stream of all documents, and most begin in the middle of one; or `best-fit`:
    documents that fit into a row stay whole, and the rest of a row is padding."""

    deduplicate: bool = False
    """Leave out a document if an earlier one, in the order of the inputs, has the same text, held-out text included."""

    decontaminate: tuple[str, ...] = ()
    """Leave out a document if it shares 13 consecutive words with an example of these evaluation sets: JSON lines,
    Parquet files, folders of them or `hf:` data sets. `tritrain prepare` takes names of tasks, too."""

    compression: Compression = "none"
    """`zstd` makes shards smaller, and verifies their SHA-256 at each reading; training then needs `data.cache`."""

    workers: int = 1
    """Processes that tokenize. The result is the same for any number."""

    def __post_init__(self) -> None:
        problems: dict[str, str] = {}
        if not self.inputs:
            problems["inputs"] = "is empty; name at least one file, folder, hf: data set or python-stdlib"
        if re.match("(bpe|unigram):", self.tokenizer) and not TRAINED_SPEC.fullmatch(self.tokenizer):
            problems["tokenizer"] = f"{self.tokenizer!r} lacks the size of the vocabulary; write bpe:32000, for example"
        if not self.tokenizer:
            problems["tokenizer"] = "is empty; give a tokenizer's file, bpe:VOCAB or unigram:VOCAB"
        if self.end_of_document is not None and TRAINED_SPEC.fullmatch(self.tokenizer):
            problems["end_of_document"] = "is for a tokenizer's file; one that is trained ends documents with </s>"
        if any(name != name.strip() or not name for name in self.add_tokens):
            problems["add_tokens"] = f"is {[*self.add_tokens]}; a token has a name, without spaces around it"
        elif len({*self.add_tokens}) < len(self.add_tokens):
            problems["add_tokens"] = f"is {[*self.add_tokens]}; name each token once"
        if not 0 <= self.validation_fraction < 1:
            problems["validation_fraction"] = f"is {self.validation_fraction}; must be 0 or more and below 1"
        if self.validation_inputs and self.validation_fraction:
            problems["validation_inputs"] = "excludes validation_fraction; remove one of them"
        if self.content != "text":
            if TRAINED_SPEC.fullmatch(self.tokenizer):
                problems["tokenizer"] = (
                    f"is {self.tokenizer}, but {self.content} need a tokenizer that is there; name its file"
                )
            if self.lossy_tokenizer:
                problems["lossy_tokenizer"] = f"is for text; {self.content} are not compared"
            if self.content == "pairs" and self.too_long == "truncate":
                problems["too_long"] = "is truncate, but pairs are compared as a whole; choose error or drop"
        elif self.chat_template is not None:
            problems["chat_template"] = "is for chats; set content to chats"
        elif self.too_long != "error":
            problems["too_long"] = f"is {self.too_long}, which is for chats; set content to chats"
        if self.workers < 1:
            problems["workers"] = f"is {self.workers}; must be 1 or more; 1 tokenizes in this process"
        if problems:
            raise ValueError(problems)

    @property
    def holds_text_out(self) -> bool:
        """Whether there is to be a validation split."""
        return bool(self.validation_fraction or self.validation_inputs)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The prepared folders for training and validation, and the order of their rows."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    sources: tuple[Source, ...]
    """The prepared folders to mix, for training as far as phases do not name their own, and for held-out text."""

    sequence_length: int
    """Tokens of one sequence, as the folders were prepared with."""

    prepare: PrepareConfig | None = None
    """How to make the folder of the only source if it does not exist yet."""

    documents: Literal["joined", "masked"] = "joined"
    """Documents that share a row: `joined`, each token sees all before it; or `masked`, it sees its own document alone,
    and positions begin anew with each."""

    validation_rows: int = 256
    """At most this many held-out sequences are read in one evaluation, the same ones each time."""

    shuffle: bool = True
    """Whether to shuffle rows, differently in each epoch; otherwise they come in the order of the text, source by
    source."""

    shuffle_seed: int = 0
    """Seed of the shuffling, and of the choice of rows from a source of which only a part is used."""

    shuffle_block_rows: int = 1 << 18
    """Shuffling moves rows at most about this far, so that few shards are needed at a time."""

    canonical_nodes: int = 1
    """Parts into which an epoch is divided for nodes to download. It is fixed for a run, and must divide the number of
    nodes or be a multiple of it. With 1 every node downloads every shard."""

    workers: int = 1
    """Threads per rank that read ahead where files are slow, or processes if a source is fetched or decompressed; 0
    reads in the training process when rows are needed."""

    cache: str | None = None
    """Folder on each node's own disk for the shards of remote sources; one folder for one run."""

    def __post_init__(self) -> None:
        problems: dict[str, str] = {}
        if problem := sources_problem(self.sources):
            problems["sources"] = problem
        if self.prepare and len(self.sources) != 1:
            problems["prepare"] = (
                f"makes the folder of one source, but there are {len(self.sources)}; prepare them first"
            )
        if self.prepare and any(source.is_remote for source in self.sources):
            problems["prepare"] = "makes a local folder, but the source is a URL; prepare it beforehand and upload it"
        if self.cache is None and any(source.is_remote for source in self.sources):
            problems["cache"] = "is needed for a remote source; name a folder on each node's own disk"
        for name, least in {
            "sequence_length": 1, "validation_rows": 0, "shuffle_seed": 0, "shuffle_block_rows": 2,
            "canonical_nodes": 1, "workers": 0,
        }.items():  # fmt: skip
            if getattr(self, name) < least:
                problems[name] = f"is {getattr(self, name)}; must be {least} or more"
        if problems:
            raise ValueError(problems)
