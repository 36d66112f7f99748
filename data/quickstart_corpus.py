"""Read a corpus that every machine has: the source code of Python's standard library.

It needs no download and no license question, is real text with long-range structure, and at about 10 MB is just big
enough to see a small model learn. It differs between versions of Python, so losses on it compare within one version.
"""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

NAME = "python-stdlib"
"""What names this corpus on the command line and in a configuration."""

# Other people's packages, bytecode, and test cases, some of which are invalid on purpose.
EXCLUDED_FOLDERS = frozenset({"__pycache__", "idlelib", "lib2to3", "site-packages", "dist-packages", "test", "tests"})


def read_standard_library() -> Iterator[tuple[str, str]]:
    """Yield (path relative to the library, text) of every source file, in the order of the paths.

    Files that are empty or not UTF-8 are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED_FOLDERS]
        paths += [Path(folder, name).relative_to(root) for name in files if name.endswith(".py")]
    for path in sorted(paths):
        try:
            text = (root / path).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            yield path.as_posix(), text
