"""Tokenize the parts of a prepared folder on the workers of a cluster of Dask."""

import time
from collections.abc import Callable
from concurrent.futures import CancelledError

from data.errors import DataError
from data.parts import SECONDS_BETWEEN_LOOKS, Patience, SharedParts, Told, parts_in_words

PREFIX = "dask://"
CONNECT_SECONDS = 30
WORKER_SECONDS = 30
"""A cluster may have no workers for this long."""
ANSWER_SECONDS = 10
"""The progress reports a wait for the cluster this often."""


def tokenize_on(url: str, parts: SharedParts, tokenize: Callable[[int], None], told: Told) -> None:
    """Tokenize all parts that are missing, and return when they are complete.

    Args:
        url: `dask://HOST:PORT` of the scheduler. Its workers see inputs and output under the same paths, and have the
            same versions installed.
        parts: of the folder.
        tokenize: tokenizes the part of a number; it is sent to the workers.
        told: called when a part is complete, and every few seconds.

    Raises:
        DataError: Dask is not installed, the scheduler does not answer or is lost, it has no workers, or these are lost
            again and again, do not fit, or do nothing.
    """
    try:
        from distributed import Client, KilledWorker, wait
        from distributed.comm import CommClosedError
    except ImportError as error:
        raise DataError("--on dask://...: needs Dask: pip install -e '.[dask]'") from error
    try:
        client = Client(f"tcp://{url.removeprefix(PREFIX)}", timeout=CONNECT_SECONDS)
    except (OSError, TimeoutError, ValueError) as error:
        raise DataError(f"{url}: no scheduler of Dask answers there within {CONNECT_SECONDS} s") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=WORKER_SECONDS)
            patience = Patience(parts)
            while missing := parts.missing:
                told(len(parts.parts) - len(missing), "")
                numbers = dict(zip(client.map(tokenize, missing, pure=False), missing, strict=True))
                pending = set(numbers)
                try:
                    while pending:
                        try:
                            done, pending = wait(pending, ANSWER_SECONDS, "FIRST_COMPLETED")
                        except TimeoutError:
                            client.wait_for_workers(1, timeout=WORKER_SECONDS)
                            waited_for = parts_in_words({numbers[each]: "the cluster" for each in pending})
                            told(len(parts.parts) - len(parts.missing), waited_for)
                            patience.waited(ANSWER_SECONDS, waited_for)
                            continue
                        for future in done:
                            if future.status != "finished":  # else there is nothing to fetch
                                future.result()
                        told(len(parts.parts) - len(parts.missing), "")
                finally:
                    client.cancel(list(numbers))
                if parts.missing == missing:  # other processes have them
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                    patience.waited(SECONDS_BETWEEN_LOOKS, parts_in_words(dict.fromkeys(missing, "other processes")))
        except TimeoutError as error:
            raise DataError(
                f"{url}: has had no worker for {WORKER_SECONDS} s. Start some with `dask worker`, with the same "
                "versions; the same command goes on with the parts that are left"
            ) from error
        except KilledWorker as error:
            raise DataError(
                f"{url}: workers were lost again and again, perhaps because their memory was full; the same command "
                "goes on with the parts that are left"
            ) from error
        except (CancelledError, CommClosedError) as error:
            raise DataError(
                f"{url}: the scheduler was lost; the same command goes on with the parts that are left"
            ) from error
