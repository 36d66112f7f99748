"""Commands on data."""

from pathlib import Path
from typing import Annotated

import typer

from data.config import Compression, Content, Packing, TooLong
from launcher.cli.arguments import JsonOption, local_target, path
from launcher.errors import ConfigError
from launcher.process.console import Console


def prepare(
    inputs: Annotated[list[str], typer.Argument(help="Files, folders, hf:NAME:SPLIT or python-stdlib.")],
    out: Annotated[str, typer.Option(help="Folder to create, or the URL of one in a store.")],
    tokenizer: Annotated[str, typer.Option(help="Tokenizer file or hf:NAME; bpe:VOCAB or unigram:VOCAB trains one.")],
    content: Annotated[
        Content, typer.Option(help="The inputs hold text, chats to learn answers from, or pairs to prefer one of.")
    ] = "text",
    chat_template: Annotated[
        str | None,
        typer.Option(help="File with the template of chats and pairs; default: that beside the tokenizer."),
    ] = None,
    too_long: Annotated[
        TooLong,
        typer.Option(help="A chat or pair longer than a row: an error, left out, or, a chat, cut at its end."),
    ] = "error",
    add_token: Annotated[
        list[str] | None,
        typer.Option(help="Add this special token to the tokenizer, such as one of the template; may be repeated."),
    ] = None,
    end_of_document: Annotated[
        str | None, typer.Option(help="Token that ends a document; default: the one that the tokenizer's files name.")
    ] = None,
    lossy_tokenizer: Annotated[
        bool, typer.Option("--lossy-tokenizer", help="Accept a tokenizer that does not give the text back.")
    ] = False,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 2048,
    packing: Annotated[
        Packing, typer.Option(help="Cut rows from the stream of documents, or keep documents whole.")
    ] = "stream",
    deduplicate: Annotated[
        bool, typer.Option("--deduplicate", help="Leave out documents whose text has come before.")
    ] = False,
    decontaminate: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave out documents that share 13 words in a row with examples of these tasks, files or data sets; "
            "may be repeated."
        ),
    ] = None,
    task_data: Annotated[
        Path | None,
        typer.Option(parser=path, help="Folder of JSON lines, TASK_SPLIT.jsonl, for tasks; default: the hub."),
    ] = None,
    compression: Annotated[Compression, typer.Option(help="Compression of the shards.")] = "none",
    validation_fraction: Annotated[float, typer.Option(help="Fraction of the documents to hold out.")] = 0.0,
    validation_input: Annotated[
        list[str] | None, typer.Option(help="Hold out this whole input; may be repeated.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of tokenizing processes.")] = 1,
    on: Annotated[
        str | None,
        typer.Option(
            help="Share the work: shared-folder, with all processes that run this command; dask://HOST:PORT, a cluster."
        ),
    ] = None,
    scratch: Annotated[str | None, typer.Option(help="For a URL: local folder to make the files in.")] = None,
) -> None:
    """Tokenize text, chats or pairs into shards for training."""
    from data.shards import PrepareConfig
    from launcher.commands.decontamination import ngrams_of_sets
    from launcher.commands.prepare import prepare_with_progress
    from launcher.commands.upload import is_url, prepare_in_store

    try:
        config = PrepareConfig(
            inputs=tuple(inputs),
            tokenizer=tokenizer,
            content=content,
            chat_template=chat_template,
            too_long=too_long,
            add_tokens=tuple(add_token or ()),
            end_of_document=end_of_document,
            lossy_tokenizer=lossy_tokenizer,
            packing=packing,
            deduplicate=deduplicate,
            decontaminate=tuple(decontaminate or ()),
            compression=compression,
            validation_fraction=validation_fraction,
            validation_inputs=tuple(validation_input or ()),
            workers=workers,
        )
    except ValueError as error:
        raise ConfigError("\n".join(f"{key}: {problem}" for key, problem in error.args[0].items())) from error
    ngrams = ngrams_of_sets(config.decontaminate, None if task_data is None else str(task_data))
    console = Console(silent=False)
    if is_url(out):
        folder = None if scratch is None else local_target(scratch, "--scratch")
        prepare_in_store(config, sequence_length, out, folder, console, on, ngrams)
    else:
        prepare_with_progress(config, sequence_length, local_target(out, "--out"), console, on=on, ngrams=ngrams)
    console.line(f"{out} is ready. List it in data.sources, with data.sequence_length: {sequence_length}")


def inspect(
    folder: Annotated[str, typer.Argument(help="Prepared folder, or the URL of one.", show_default=False)],
    rows: Annotated[int, typer.Option(min=1, help="Rows of each split to read, the first ones.")] = 4096,
    samples: Annotated[int, typer.Option(min=0, help="Rows to decode.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Show what a prepared folder holds: counts, lengths of documents, padding, use of the vocabulary, text."""
    from launcher.commands.inspection import inspect as inspect_folder

    inspect_folder(folder, Console(silent=False), num_rows=rows, num_samples=samples, as_json=as_json)
