"""Tokenize the parts of a prepared folder on the workers of a cluster of Dask."""

import time
from collections.abc import Callable
from concurrent.futures import CancelledError

from data.errors import DataError
from data.parts import SECONDS_BETWEEN_LOOKS, SharedParts

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
        DataError: Dask is not installed, the scheduler does not answer or is lost, it has no workers, or these are lost
            again and again, or do not fit.
    """
    try:
        from distributed import Client, KilledWorker, wait
    except ImportError as error:
        raise DataError("--on dask://...: needs Dask; install tritrain[dask]") from error
    try:
        client = Client(f"tcp://{url.removeprefix(PREFIX)}", timeout=CONNECT_SECONDS)
    except (OSError, TimeoutError, ValueError) as error:
        raise DataError(f"{url}: no scheduler of Dask answers there within {CONNECT_SECONDS} s") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
            while missing := parts.missing:
                told(len(parts.parts) - len(missing))
                futures = pending = set(client.map(tokenize, missing, pure=False))
                try:
                    while pending:
                        try:
                            done, pending = wait(pending, CONNECT_SECONDS, "FIRST_COMPLETED")
                        except TimeoutError:
                            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
                            continue
                        for future in done:
                            future.result()
                        told(len(parts.parts) - len(parts.missing))
                finally:
                    client.cancel(list(futures))
                time.sleep(SECONDS_BETWEEN_LOOKS if parts.missing == missing else 0)  # other processes have them
        except TimeoutError as error:
            raise DataError(
                f"{url}: has had no worker for {CONNECT_SECONDS} s. Start some with `dask worker`, with the same "
                "versions; the same command goes on with the parts that are left"
            ) from error
        except KilledWorker as error:
            raise DataError(
                f"{url}: workers were lost again and again, perhaps because their memory was full; the same command "
                "goes on with the parts that are left"
            ) from error
        except CancelledError as error:
            raise DataError(
                f"{url}: the scheduler was lost; the same command goes on with the parts that are left"
            ) from error
