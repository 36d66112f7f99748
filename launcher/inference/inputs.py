"""What a run reads, with a look into the checkpoints: what is missing, or cannot be used, before anything is built.

`tritrain plan` shows it, and a run does not start with it: text that is tokenized for hours is of no use to a model
with a smaller vocabulary, and a teacher that cannot teach is no surprise for the second day. Checkpoints are opened as
they are when the run needs them, but only their headers and configurations are read.
"""

from collections.abc import Iterator

from data.errors import DataError
from launcher.config.sections import Config
from launcher.errors import USER_ERRORS
from launcher.plan.course import make_course
from launcher.plan.inputs import NamedCheckpoint, missing_inputs, named_checkpoints
from launcher.run.folder import is_complete_run
from launcher.run.requeue import read_lines


def check_inputs(config: Config) -> None:
    """Make sure that everything that a run reads is there and can be used.

    Raises:
        DataError: lists every problem, each with the key that names the file or folder.
    """
    if problems := input_problems(config):
        raise DataError("\n".join(f"{key}: {problem}" for key, problem in problems))


def input_problems(config: Config, *, with_remote: bool = False) -> list[tuple[str, str]]:
    """List what a run cannot read, or cannot use: pairs of a key and a sentence that says what would be right.

    A run that is complete reads nothing any more.

    Args:
        config: of the run.
        with_remote: whether the first start opens checkpoints in remote stores as well. Later ones do not: what a run
            with checkpoints in a store still needs is not known here, and may be gone once it is done with.
    """
    if is_complete_run(config):
        return []
    missing = missing_inputs(config)
    keys = {key for key, _ in missing}
    has_begun = bool(read_lines(config.run.path / "saves.jsonl", "step"))
    to_open = [
        named
        for named in named_checkpoints(config)
        if named.key not in keys and (named.path is not None or (with_remote and not has_begun))
    ]
    return [*missing, *(_checkpoint_problems(config, to_open, has_begun=has_begun) if to_open else ())]


def _checkpoint_problems(
    config: Config, to_open: list[NamedCheckpoint], *, has_begun: bool
) -> Iterator[tuple[str, str]]:
    # These need torch, which takes seconds to import.
    from launcher.formats.open import open_source
    from launcher.formats.start import check_start
    from launcher.formats.teacher import teacher_model
    from launcher.inference.start import complete_shapes_
    from launcher.inference.vocabulary import grow_shapes_

    for named in to_open:
        is_start = named.text == config.checkpoint.start_from
        try:
            if named.is_begun_with and not has_begun:  # what a run began with may have trained on since
                source = open_source(named.text)
                complete_shapes_(source, config)
                check_start(source, make_course(config))
            if named.teaches is not None:
                source = open_source(named.text)
                if is_start:
                    grow_shapes_(source, config)
                teacher_model(source, config, named.teaches)
        except USER_ERRORS as error:
            yield named.key, str(error)
