"""Check URLs of object stores: they end up in configurations, logs and messages, so they may hold no secret.

Messages may also repeat the headers of a request, and the hub's tokens.

A text is looked at word by word and each word once, because a message may be long and of a stranger's making. Quotes
end a word, unless it is a URL, whose secrets may hold quotes; then only those around it stay.
"""

import re

WORDS = re.compile(r"\S+")

BETWEEN_QUOTES = re.compile(r"""[^'"]+""")

CLOSING_QUOTE = re.compile(r"""['"][^\w'"]*$""")

URL = re.compile(r"[\w+.-]*\w:/")

SCHEME = re.compile(r"\w:/{1,2}")
"""With one slash too: `pathlib` writes URLs like this."""

USER = re.compile(
    r"""[^/:]* : (?!\d+(?:[/?\#]|$))             # user:password, but not host:port
      | (?<=http://) [^/@]+ (?=@) | (?<=https://) [^/@]+ (?=@)  # a token alone
    """,
    re.VERBOSE,
)
"""The beginning of the user part of a URL that holds a secret. The part ends at the last `@`, since a password may hold
any character."""

QUERY_OF_PATH = re.compile(r"\?(?=[\w.%~-]*=)[^<>)]+")
"""The query of a path: an error may repeat a URL without its host."""

TOKEN = re.compile(
    r"""\b hf_[a-z0-9]{16,}                                      # of the Hugging Face hub
      | (?P<scheme> \b bearer \s{1,4}
        | \b authorization ['"]? \s? [:=,] \s? b?['"]? (?: (?:basic|bearer|token) \s )? ) [^\s'",]{16,}
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""A secret outside a URL."""


def url_problem(url: str) -> str | None:
    """Say what is wrong with a URL that carries credentials; None if it does not."""
    if URL.match(url) and (_without_password(url) != url or "?" in url or re.search(r"#[\w.%~-]*=", url)):
        return (
            f"{_without_query(_without_password(url))}: holds a password or a query, and would carry it into logs; "
            "credentials belong into the environment or the store's own configuration files"
        )
    return None


def redacted(text: str) -> str:
    """A message of a library, without the secrets in it: passwords, queries and fragments of URLs, and tokens."""
    shown = TOKEN.sub(lambda found: f"{found['scheme'] or ''}***", text)
    return WORDS.sub(lambda word: _redacted_word(word[0]), shown)


def _redacted_word(word: str) -> str:
    if SCHEME.search(word) is None:
        return BETWEEN_QUOTES.sub(lambda part: QUERY_OF_PATH.sub("?***", part[0]), word)
    closing = CLOSING_QUOTE.search(word)
    end = closing.start() if closing else len(word)
    return _without_query(_without_password(word[:end])) + word[end:]


def _without_password(word: str) -> str:
    end = word.rfind("@")
    for scheme in SCHEME.finditer(word, 0, max(end, 0)):
        if USER.match(word, scheme.end(), end + 1):
            return f"{word[: scheme.end()]}***{word[end:]}"
    return word


def _without_query(word: str) -> str:
    scheme = SCHEME.search(word)
    assert scheme is not None
    address, mark, secret = re.split(r"([?#])", word[scheme.end() :] + "?", maxsplit=1)
    return f"{word[: scheme.end()]}{address}?***" if len(secret) > 1 and mark else word
