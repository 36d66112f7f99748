"""Check URLs of object stores: they end up in configurations, logs and messages, so they may hold no secret."""

import re

SECRET = re.compile(r"(?P<before>\w://)[^\s'\"@]*:[^\s'\"@]*@|\?[^\s'\"]+")
"""A name with a password before the host, or a query, which is where signatures and tokens are."""


def url_problem(url: str) -> str | None:
    """Say what is wrong with a URL that carries credentials; None if it does not."""
    if "://" in url and SECRET.search(url):
        return (
            f"{redacted(url)}: holds a password or a query, and would carry it into logs; credentials belong into the "
            "environment or the store's own configuration files"
        )
    return None


def redacted(text: str) -> str:
    """A message of a library, without the secrets of the URLs in it."""
    return SECRET.sub(lambda found: f"{found['before']}***@" if found["before"] else "?***", text)
