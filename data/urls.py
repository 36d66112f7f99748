"""Check URLs of object stores: they end up in configurations, logs and messages, so they may hold no secret."""

import re

PASSWORD = re.compile(
    r"""(?P<scheme>\w://)
        (?: [^\s'"/:]* : (?!\d+(?:[/?\#]|$)) [^\s'"]*      # user:password, but not host:port
          | (?<=http://) [^\s'"/@]+ | (?<=https://) [^\s'"/@]+  # a token alone
        ) @""",
    re.VERBOSE,
)
"""What stands before the host of a URL, up to its last `@`: a password may hold any character."""

QUERY = re.compile(r"""(?P<place>\w://[^\s'"?\#]*)[?\#][^\s'"]+|[?\#](?=[\w.%~-]*=)[^\s'"<>)]+""")
"""The query or fragment of a URL, or of a path, which is where signatures and tokens are."""


def url_problem(url: str) -> str | None:
    """Say what is wrong with a URL that carries credentials; None if it does not."""
    if "://" in url and (PASSWORD.search(url) or "?" in url or re.search(r"#[\w.%~-]*=", url)):
        return (
            f"{redacted(url)}: holds a password or a query, and would carry it into logs; credentials belong into the "
            "environment or the store's own configuration files"
        )
    return None


def redacted(text: str) -> str:
    """A message of a library, without the secrets of the URLs in it."""
    text = PASSWORD.sub(r"\g<scheme>***@", text)
    return QUERY.sub(lambda found: f"{found['place'] or ''}?***", text)
