"""Redacts secrets in texts: those in URLs, and those known by value."""

from __future__ import annotations

import re
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from prefect_mlprojects._support.secrets import MASK, Secret, reveal

_SHORTEST_SECRET = 4
# Names of environment variables, Spark properties and fields of a specification: PASSWORD, api-key, account.key, primary_key …
SECRET_NAME = re.compile(
    r"pass(word|wd|phrase)|secret|token|credential|(^|[._-])(pass|pwd|pw|auth|sas)($|[._-])"
    r"|(^|(api|access|account|primary|secondary|private|shared|encryption|signing)?[._-])key($|[._-])|apikey",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*)://(?P<userinfo>[^\s/?#'\"<>]*)@")
# Greedy up to the last "@" before the path: a password may contain "@", although it should be quoted.
_SECRET_PARAMETER = re.compile(
    r"(?P<lead>[?&;#](?:[\w.\-]*(?:password|passwd|pwd|secret|token|signature|credential|api[_\-]?key|access[_\-]?key)[\w.\-]*"
    r"|sig|auth|key)=)(?P<value>[^&;#\s'\"<>]+)",
    re.IGNORECASE,
)


def redact(text: str, *secrets: Secret) -> str:
    """Returns `text` with ``***`` in the place of secrets.

    Redacts `secrets` by value, and in every URL passwords, lone user names and query values such as ``token=…``. The user
    in ``ssh://git@host`` is kept; the one in ``https://NAME@host`` may be a token.
    """
    for value in sorted(_spellings(secrets), key=len, reverse=True):
        text = text.replace(value, MASK)
    return _SECRET_PARAMETER.sub(lambda match: match["lead"] + MASK, _USERINFO.sub(_redacted_userinfo, text))


def _spellings(secrets: tuple[Secret, ...]) -> set[str]:
    """Returns the secrets as they are, quoted for URLs, by line, and those within URLs."""
    values = {reveal(secret) for secret in secrets}
    values |= {reveal(each) for value in values if "://" in value for each in url_secrets(value)}
    values |= {line.strip() for value in values if "\n" in value for line in value.splitlines()}
    # Redacting shorter values would garble words.
    return {each for value in values for each in (value, quote(value, safe="")) if len(each) >= _SHORTEST_SECRET}


def url_secrets(url: str) -> list[Secret]:
    """Returns the secrets in a URL's user-info and query, both quoted and unquoted."""
    found = [_userinfo_secret(match) for match in _USERINFO.finditer(url)]
    found += [match["value"] for match in _SECRET_PARAMETER.finditer(url)]
    return [Secret(value) for value in dict.fromkeys([*found, *map(unquote, found)]) if value and value != MASK]


def is_secret(name: str, value: str) -> bool:
    """Returns whether a variable's or field's name says that it is a secret, or its value is a URL that holds one."""
    return bool(value) and (SECRET_NAME.search(name) is not None or holds_secret(value))


def holds_secret(url: str) -> bool:
    """Returns whether a URL holds a password, a lone user name or a secret query value."""
    return bool(url_secrets(url))


def _userinfo_secret(match: re.Match[str]) -> str:
    user, colon, password = match["userinfo"].partition(":")
    if colon:
        return password
    return "" if match["scheme"].lower().endswith("ssh") else user


def _redacted_userinfo(match: re.Match[str]) -> str:
    user, colon, _ = match["userinfo"].partition(":")
    if colon or _userinfo_secret(match):
        return f"{match['scheme']}://{user + colon if colon else ''}{MASK}@"
    return match[0]


def strip_user_info(url: str) -> str:
    """Returns a URL without user name and password, as MLflow records a repository's URL.

    Addresses without a scheme (``git@host:path``) are unchanged; secret query values are redacted.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return redact(url)
    if parts.scheme and "@" in parts.netloc:
        url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return redact(url)
