"""Redacts secrets in texts: by value those that are known, by pattern those that look like one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit, urlunsplit

from prefect_mlprojects._support.known_secrets import known_secrets, replace_values, spellings
from prefect_mlprojects._support.secrets import MASK, Secret, Withheld, reveal
from prefect_mlprojects.exceptions import Problem
from prefect_mlprojects.settings import public_variables

# Names of environment variables, Spark properties and fields of a specification: PASSWORD, api-key, account.key, primary_key …
SECRET_NAME = re.compile(
    r"pass(word|wd|phrase)|secret|token(?!iz)|credential|(^|[._-])(pass|pwd|pw|pin|jwt|auth|sas|dsn)($|[._-])"
    r"|(^|(api|access|account|primary|secondary|private|shared|encryption|signing)?[._-])key($|[._-])|apikey",
    re.IGNORECASE,
)
_SHORTEST_VARIABLE = 8
_SWITCH = re.compile(r"(true|false|yes|no|on|off|none|null|auto)?", re.IGNORECASE)
_QUANTITY = re.compile(r"[+-]?\d{0,9}(\.\d{1,9})?(e[+-]?\d{1,3}|[kmgtp]?i?b?|%|ms|s|h|d)?", re.IGNORECASE)
# A long text of letters and digits, as tokens are: dapi…, base64, or the three parts of a JSON Web Token.
_OPAQUE = re.compile(r"(?=\D*\d)(?=[^A-Za-z]*[A-Za-z])(?!/)[\w+/=~-]{20,}|eyJ[\w-]+\.[\w-]+\.[\w-]*")
_PATH = re.compile(r"(/[\w.\-]+){2,}/?")
# {{secrets/scope/key}} of Databricks, {{ prefect.blocks.secret.name }} and {{ $NAME }} of Prefect.
_REFERENCE = re.compile(r"\{\{\s*(secrets/[^/}]+/[^}]+|prefect\.blocks\.[^}]+|\$\w+)\s*\}\}")

# What may follow the "@" of a URL's user-info, and a digest of an image, which looks like a host.
_HOST = r"@(?!sha\d+:)(?=(?:[\w.\-]+|\[[0-9A-Fa-f:.%]+\]|(?=[/?]))(?:[:/?#\s'\"<>,;()\[\]{}&|\\`*…]|$))"
_PORT = r"(?!\d{1,5}(?:[/?#;,\s'\"<>)\]]|$))"
_DATABASE = re.compile(
    r"(?:postgres(?:ql)?|mysql|mariadb|mssql|oracle|snowflake|redshift|clickhouse|mongodb|rediss?|amqps?|sqlite)(?:\+\w+)?$",
    re.IGNORECASE,
)
_WEB = re.compile(r"(?<![\w.\-])(?:[a-z]{2,8}\+)?https?$", re.IGNORECASE)
_QUERY_NAME = re.compile(
    r"password|passwd|passphrase|pwd|secret|token(?!s|iz)|signature|credential|bearer|jwt"
    r"|(api|access|private|account|shared)[_\-]?(access)?[_\-]?key|^(sig|auth|key|pw)$",
    re.IGNORECASE,
)
_WEAK_QUERY_NAME = re.compile(r"pass|code", re.IGNORECASE)
_NO_SECRET = re.compile(
    r"(none|null|true|false|password|passwd|pwd|token|str|string|\*+|x+|\.+)?[)\]}.,:]*", re.IGNORECASE
)

_Match: TypeAlias = "re.Match[str]"


def _is_credential(match: _Match) -> bool:
    return _NO_SECRET.fullmatch(match["value"]) is None


def _is_secret_parameter(match: _Match) -> bool:
    name = unquote(match["name"])
    weak = match["lead"] in "?&" and _WEAK_QUERY_NAME.fullmatch(name) is not None
    return (weak or _QUERY_NAME.search(name) is not None) and match["value"] != MASK


def _is_password(match: _Match) -> bool:
    return match["value"] != MASK


def _scheme(match: _Match) -> str:
    return match.string[max(0, match.start() - 40) : match.start()]


def _is_database_password(match: _Match) -> bool:
    return match["value"] != MASK and _DATABASE.search(_scheme(match)) is not None


def _is_lone_token(match: _Match) -> bool:
    return match["value"] != MASK and _WEB.search(_scheme(match)) is not None


# Signs of which a text (in lower case) has one if a pattern can match, the pattern with its group ``value``, and whether a match is
# a secret. Quantifiers are bounded: a line of a megabyte takes no longer than a megabyte of lines.
_PATTERNS = (
    # user:password@ of a URL. A password may contain "/", "?", "#" and quotes, and "@", although they should be quoted.
    (("@",), re.compile(rf"://[^\s/?#'\"<>:@]*:{_PORT}(?P<value>(?:(?!://)\S){{1,400}}?){_HOST}"), _is_password),
    (
        ("@",),
        re.compile(rf"://[^\s/?#'\"<>:@]*:{_PORT}(?P<value>(?:(?!://)[^\n@]){{1,100}}?){_HOST}"),
        _is_database_password,
    ),
    # A lone name in front of the host may be a token: https://TOKEN@host.
    (("@",), re.compile(r"://(?P<value>[^\s/?#'\"<>:@]+)@"), _is_lone_token),
    (
        ("/t/",),
        re.compile(
            r"://[^\s'\"]{1,400}?/t/(?P<value>[^\s/'\"?#:]+)(?!/\d+(?:[/?#\s'\").,]|$))(?=/|(?<=\d)(?:[\s'\"]|$))"
        ),
        _is_password,
    ),
    (
        ("=",),
        re.compile(r"(?P<lead>[?&;#])(?P<name>[\w.\-%\[\]]{1,80})=(?P<value>[^&;#\s'\"<>]+)"),
        _is_secret_parameter,
    ),
    (
        ("%3d",),
        re.compile(r"(?:pwd|password)%3D(?P<value>%7B.{1,400}?%7D|.{1,400}?)(?=%3B|%26|[&;\s'\"<>]|$)", re.IGNORECASE),
        _is_password,
    ),
    (
        (
            "password=",
            "passwd=",
            "passphrase=",
            "pwd=",
            "accountkey=",
            "accesskey=",
            "signature=",
            "client_secret=",
            "access_key=",
        ),
        re.compile(
            r"(?:password|passwd|passphrase|pwd|accountkey|sharedaccess(?:key|signature)|client_secret|secret_access_key)="
            r"(?P<value>\{[^}\n]{1,400}\}|'[^'\n]{1,400}'|\"[^\"\n]{1,400}\"|[^\s;&'\"]+)",
            re.IGNORECASE,
        ),
        _is_credential,
    ),
    (
        ("authorization",),
        re.compile(
            r"\bauthorization['\"]?\s{0,3}[:=]\s{0,3}b?['\"]?(?:(?:bearer|basic|token|apikey)\s+(?P<value>[^\s'\",;]+))",
            re.IGNORECASE,
        ),
        _is_credential,
    ),
    (
        ("authorization", "api-key", "auth-token", "access-token", "private-token", "vault-token"),
        re.compile(
            r"\b(?:authorization|(?:x-)?(?:api-key|auth-token|access-token|private-token|vault-token))['\"]?\s{0,3}:\s{0,3}b?['\"]?"
            r"(?P<value>(?!(?:bearer|basic|token|apikey)\b)(?:(?=[^\s'\",;]*\d)[^\s'\",;]{6,}|[^\s'\",;]{16,}))",
            re.IGNORECASE,
        ),
        _is_credential,
    ),
    (
        ("bearer ",),
        re.compile(r"\b[Bb]earer\s+(?P<value>(?=[^\s]*\d)[\w.~+/=\-]{8,}|[\w.~+/=\-]{24,})"),
        _is_credential,
    ),
    (("basic ",), re.compile(r"\bBasic\s+(?P<value>(?=[^\s]*[\d=])[A-Za-z0-9+/]{8,}={0,2})"), _is_credential),
    # user:password@host:port, as proxies are written.
    (
        ("@",),
        re.compile(
            r"(?<![\w/:.@\-+%])(?=[\d.\-+%]*[A-Za-z_])[\w.\-+%]{1,100}:(?P<value>[^\s/@:'\"<>,;()\[\]]{1,200})"
            r"@(?!sha\d+:)[\w.\-]+:\d{1,5}(?![\w.])"
        ),
        _is_password,
    ),
    (
        ("private key",),
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?P<value>.{1,20000}?)-----END", re.DOTALL),
        _is_password,
    ),
    (
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xox", "dapi", "hf_", "eyj"),
        re.compile(
            r"\b(?P<value>gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w\-]{16,}|xox[abprs]-[\w\-]{10,}|dapi[0-9a-f]{30,}"
            r"|hf_[A-Za-z0-9]{25,}|eyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*)"
        ),
        _is_password,
    ),
)


def _likely(text: str) -> Iterator[tuple[re.Pattern[str], Callable[[_Match], bool]]]:
    """Yields the patterns that can match in a text."""
    lowered = text.lower()
    for signs, pattern, is_secret_match in _PATTERNS:
        if any(sign in lowered for sign in signs):
            yield pattern, is_secret_match


def redact(text: str, *secrets: Secret) -> str:
    """Returns `text` with ``***`` in the place of secrets.

    By value it redacts `secrets` and those of the runs of this process (`known_secrets`), also as they are written in URLs and
    headers; by pattern passwords and tokens in URLs, connection strings and headers. The user in ``ssh://git@host`` is kept;
    the one in ``https://NAME@host`` may be a token.
    """
    known = known_secrets()
    for each in (known, spellings(_with_parts(secrets))) if secrets else (known,):
        text = replace_values(text, each)
    for pattern, is_secret_match in _likely(text):
        text = pattern.sub(partial(_masked, is_secret_match), text)
    return text


def _masked(is_secret_match: Callable[[_Match], bool], match: _Match) -> str:
    if not is_secret_match(match):
        return match[0]
    start, end = match.span("value")
    return f"{match[0][: start - match.start()]}{MASK}{match[0][end - match.start() :]}"


def _with_parts(secrets: tuple[Secret, ...]) -> Iterator[str]:
    """Yields the texts of secrets, and the passwords and tokens in those that are URLs or connection strings."""
    for secret in secrets:
        yield reveal(secret)
        yield from map(reveal, url_secrets(reveal(secret)))


def redact_error(error: BaseException) -> None:
    """Redacts the message and the attributes of an error, and of those that it was raised from, in place."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        current.args = tuple(map(_redacted, current.args))
        for name, value in vars(current).items():
            setattr(current, name, _redacted(value))
        current = current.__cause__ or current.__context__


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, tuple):
        return tuple(map(_redacted, value))
    if isinstance(value, Problem):
        return replace(value, message=redact(value.message), fix=_redacted(value.fix), value=_redacted(value.value))
    return value


def environment_secrets() -> list[Secret]:
    """Returns the secrets in this process's variables: values under a secret's name that are no paths, and those within URLs."""
    found: list[Secret] = []
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= _SHORTEST_VARIABLE:
            found += [Secret(value)] if is_secret(name, value) and not os.path.exists(value) else []  # noqa: PTH110 - any text
        else:
            found += url_secrets(value)
    return found


def url_secrets(url: str) -> list[Secret]:
    """Returns the secrets in a URL or another text, both quoted and unquoted."""
    found = [
        match["value"]
        for pattern, is_secret_match in _likely(url)
        for match in pattern.finditer(url)
        if is_secret_match(match)
    ]
    found += _whole_password(url)
    return [Secret(value) for value in dict.fromkeys([*found, *map(unquote, found)]) if value and value != MASK]


_WHOLE_URL = re.compile(rf"[A-Za-z][\w+.\-]*://[^/?#:@\s]*:{_PORT}(?P<value>[^\n]+)@[^@\n]*")


def _whole_password(url: str) -> list[str]:
    """Returns the password of a text that is one URL: all up to the last "@", or to the first as SQLAlchemy reads it."""
    match = _WHOLE_URL.fullmatch(url)
    if match is None or "://" in match["value"] or re.match(r"[\w.\-]+@?[/?#]", match["value"]):
        return []
    return [match["value"]] if MASK not in match["value"] else []


def holds_secret(url: str) -> bool:
    """Returns whether a URL or another text holds a password, a token or a secret query value."""
    return bool(url_secrets(url))


def redact_url(url: str) -> str:
    """Returns one URL with its secrets redacted, also those that could not be found in a longer text."""
    return redact(url, *url_secrets(url))


def is_secret(name: str, value: str) -> bool:
    """Returns whether a variable or field looks like a secret: by its name, or by a value that is a token or a URL with one.

    A switch (``true``) is none, whatever its name; neither is a number of tokens, a reference to a secret, and what the setting
    ``PREFECT_MLPROJECTS_PUBLIC_VARIABLES`` names.
    """
    if _SWITCH.fullmatch(value) or _REFERENCE.fullmatch(value) or name in public_variables():
        return False
    if SECRET_NAME.search(name):
        return not (re.search(r"tokens($|[._-])", name, re.IGNORECASE) and _QUANTITY.fullmatch(value))
    return holds_secret(value)


def mark_variable(name: str, value: str) -> str | Secret:
    """Returns an environment variable's value as what it is: public, a `Secret`, or `Withheld`.

    Public are switches, quantities, absolute paths, references to secrets, and what ``PREFECT_MLPROJECTS_PUBLIC_VARIABLES``
    names. A `Secret` is what looks like one. Anything else may be a short password under a plain name, so it is `Withheld`.
    """
    if is_secret(name, value) or (name not in public_variables() and _OPAQUE.fullmatch(value)):
        return Secret(value)
    public = any(pattern.fullmatch(value) for pattern in (_SWITCH, _QUANTITY, _REFERENCE, _PATH))
    return value if public or name in public_variables() else Withheld(value)


def strip_user_info(url: str) -> str:
    """Returns a URL without user name and password, as MLflow records a repository's URL.

    Addresses without a scheme (``git@host:path``) are unchanged; secret query values are redacted.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return redact_url(url)
    if parts.scheme and "@" in parts.netloc:
        url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return redact_url(url)
