"""Tokenize the parts of a prepared folder on the workers of a cluster of Dask."""

from collections.abc import Callable

from data.errors import DataError
from data.parts import SharedParts

PREFIX = "dask://"
CONNECT_SECONDS = 30


def tokenize_on(url: str, parts: SharedParts, tokenize: Callable[[int], None], told: Callable[[int], None]) -> None:
    """Tokenize all parts that are missing, and return when they are complete.

    Args:
        url: `dask://HOST:PORT` of the scheduler. Its workers see inputs and output under the same paths, and have the
            same versions installed.
        parts: of the folder.
        tokenize: tokenizes the part of a number; it is sent to the workers.
        told: called with the number of parts that are complete.

    Raises:
        DataError: Dask is not installed, the scheduler does not answer, or workers are lost again and again.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError as error:
        raise DataError("--on dask://...: needs Dask; install tritrain[dask]") from error
    try:
        client = Client(f"tcp://{url.removeprefix(PREFIX)}", timeout=CONNECT_SECONDS)
    except (OSError, TimeoutError, ValueError) as error:
        raise DataError(f"{url}: no scheduler of Dask answers there within {CONNECT_SECONDS} s") from error
    with client:
        while missing := parts.missing:
            futures = client.map(tokenize, missing, pure=False)
            try:
                for future in as_completed(futures):
                    future.result()
                    told(len(parts.parts) - len(parts.missing))
            except KilledWorker as error:
                raise DataError(
                    f"{url}: workers were lost again and again, perhaps because their memory was full; the same "
                    "command goes on with the parts that are left"
                ) from error
            finally:
                client.cancel(futures)
