"""Starts the ranks of one machine with torch's elastic agent, and says in a sentence how they ended.

`python -m launcher.torchrun NUM_RANKS SCRIPT ARGUMENT...` is `torchrun --standalone --nproc-per-node NUM_RANKS`, with
time for a signalled run to save, and without the agent's table of failures.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

SECONDS_TO_SAVE = 600
"""How long ranks may take to save after a signal, before they are killed."""


def main(num_ranks: int, command: list[str]) -> int:
    """Run ``command`` as that many ranks; returns the exit code of the first one that failed."""
    logging.disable(logging.ERROR)  # the agent's own words for a stop and for a failed rank; ours are below
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",  # a container's own name may lead nowhere, and ranks would wait for it for ever
        run_id="tritrain",
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2",
        shutdown_timeout=SECONDS_TO_SAVE,
    )
    try:
        elastic_launch(config, sys.executable)("-u", *command)
    except SignalException:
        return 3
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"rank {rank} (process {failure.pid}) was killed by signal {-failure.exitcode}", file=sys.stderr)  # noqa: T201
            return 1
        return int(failure.exitcode)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
