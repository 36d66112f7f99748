"""File names inside files that others wrote, such as the shards that an index lists.

Whoever joins such a name to a folder reads, writes or deletes where the name says. So a name is a bare one, of an entry
of that very folder, or it is refused.
"""

import re
import unicodedata

MAX_NAME_BYTES = 255
"""Longest name of common file systems."""

DRIVE = re.compile(r"[A-Za-z]:")


def bare_name(name: object) -> str:
    """Return a name that comes from somebody's file, if it names an entry of the folder it is joined to.

    Refused are paths, drive letters, `.` and `..`, empty and overlong names, characters that do not print, and
    characters that become one of these where a file system normalizes names.

    Raises:
        ValueError: it is not such a name; quotes it, shortened and without unprintable characters.
    """
    if isinstance(name, str) and name.isprintable() and len(name.encode()) <= MAX_NAME_BYTES:
        plain = unicodedata.normalize("NFKC", name)
        if plain.strip(" .") and not {"/", "\\"} & {*plain, *name} and not DRIVE.match(plain):
            return name
    raise ValueError(f"names {name!r:.80}, which is not the bare name of a file or folder")
