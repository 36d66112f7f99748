"""`prepare` in processes that are killed at chosen moments."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

LENGTH = 16

SMALL = """
    from data import encoding, resume, shards, writers

    encoding.CHUNK_CHARS, writers.SHARD_BYTES, shards.SECONDS_BETWEEN_RECORDS = 3000, 4000, 0.0
"""
"""Many pieces of work, shards and records of a small text."""

KILLED = """
    import itertools, json, os, signal, sys
    from pathlib import Path
    from data.config import PrepareConfig
    from data.light_streaming import import_streaming

    import_streaming()
    from streaming import MDSWriter

    def counted(owner, name, count, after):
        # The process dies before or after the call of this number.
        call, numbers = getattr(owner, name), itertools.count(1)

        def calling(*args, **kwargs):
            number = next(numbers)
            if number == count and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if number == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, calling)

    OWNERS = {"flush_shard": MDSWriter, "finish": MDSWriter, "record": shards, "replace": os, "unlink": Path}

    def attempt(options, out, point):
        # In a process of its own; returns what it died of.
        if (process := os.fork()) == 0:
            if point:
                options["workers"] = point.pop()
                counted(OWNERS[point[0]], *point)
            shards.prepare(PrepareConfig(**options), %d, Path(out))
            os._exit(0)
        return os.waitpid(process, 0)[1]

    if __name__ == "__main__":
        options, out, points = json.loads(sys.argv[1])
        print(json.dumps([attempt(options, out, point) for point in points]))
"""


def run_killed(folder: Path, options: dict, out: Path, points: list) -> list[int]:
    """Prepare once for each point, at which the process is killed; None lets it end. What the processes died of."""
    script = folder / "killed.py"
    script.write_text(textwrap.dedent(SMALL) + textwrap.dedent(KILLED % LENGTH))
    argument = json.dumps([options, str(out), points])
    done = subprocess.run([sys.executable, str(script), argument], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
