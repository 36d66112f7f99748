"""Real ranks that stay: groups of several sizes, each of which answers one question after another."""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from ranks import CONTEXT, TIMEOUT_SECONDS, _rank


def _serve(rank: int, world_size: int, connections: list[Any], function: Callable[..., Any]) -> None:
    connection = connections[rank]
    while (question := connection.recv()) is not None:
        try:
            connection.send(function(rank, world_size, *question))
        except Exception as error:
            connection.send(error)


class RankPool:
    """Groups of ranks by their size, started when they are first asked.

    Args:
        function: what a rank does with a question, as of `ranks.run_ranks`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._folder = function, tempfile.TemporaryDirectory()
        self._queue = CONTEXT.Queue()  # of the errors with which ranks end
        self._groups: dict[int, tuple[list[Any], list[Any]]] = {}

    def ask(self, world_size: int, *question: Any) -> list[Any]:
        """Return what the function gives on each rank."""
        if world_size not in self._groups:
            self._groups[world_size] = self._start(world_size)
        connections, _ = self._groups[world_size]
        for connection in connections:
            connection.send(question)
        answers = []
        for connection in connections:
            assert connection.poll(TIMEOUT_SECONDS), "a rank does not answer"
            answers.append(connection.recv())
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def _start(self, world_size: int) -> tuple[list[Any], list[Any]]:
        ours, theirs = zip(*(CONTEXT.Pipe() for _ in range(world_size)), strict=True)
        store = f"{self._folder.name}/{world_size}"
        arguments = (list(theirs), self._function)
        processes = [
            CONTEXT.Process(target=_rank, args=(self._queue, store, rank, world_size, world_size, _serve, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for connection in theirs:
            connection.close()  # else the end of a rank would not be the end of what it sends
        return list(ours), processes

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connections, processes in self._groups.values():
            for connection in connections:
                with suppress(BrokenPipeError):
                    connection.send(None)
            for process in processes:
                process.join(20)
                process.kill()
        self._folder.cleanup()
