"""The processes that started this one: a rank whose launcher was killed would train on, out of everybody's reach.

A launcher leaves its number in the environment, or is the parent. Polling suits all of them: `PR_SET_PDEATHSIG` cannot
name the launcher nor wait for a save, and the programs between a launcher and its ranks close a pipe's descriptors.
"""

import os
from collections.abc import Mapping

from data.processes import began

LAUNCHERS = "TRITRAIN_LAUNCHERS"
"""Variable with the numbers of the processes of this host that must live as long as the ranks do."""


def with_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which this process is one of the launchers."""
    return {**environment, LAUNCHERS: f"{environment.get(LAUNCHERS, '')} {os.getpid()}".strip()}


def launchers() -> dict[int, str | None]:
    """The launchers of this process, each with when it began; None if it has ended already."""
    found = {int(pid): began(int(pid)) for pid in os.environ.get(LAUNCHERS, "").split()}
    if "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_SIZE" in os.environ:  # of torchrun, of deepspeed
        found[os.getppid()] = began(os.getppid())
    return found
