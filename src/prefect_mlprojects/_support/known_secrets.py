"""Secrets that are known by value while runs use them, and their removal from texts and streams of output."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote, quote_plus

from prefect_mlprojects._support.secrets import MASK, Secret, Withheld, reveal

_SHORTEST_SECRET = 4  # Redacting shorter values would garble words.
_SHORTEST_INSIDE_WORDS = 8
# Passwords that every example has; redacting these words would garble output, and protect nothing.
_COMMON_WORDS = frozenset(
    {
        "admin",
        "changeme",
        "default",
        "example",
        "guest",
        "local",
        "localhost",
        "main",
        "mlflow",
        "model",
        "mysql",
        "none",
    }
    | {
        "null",
        "password",
        "postgres",
        "prefect",
        "public",
        "root",
        "secret",
        "test",
        "token",
        "true",
        "false",
        "train",
        "user",
    }
)


@dataclass(frozen=True)
class Spellings:
    """How secrets may be written: `texts` anywhere, `words` only between characters that are no part of a word."""

    texts: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


def spellings(values: Iterable[str]) -> Spellings:
    """Returns the spellings of secrets: as they are, by line, quoted for URLs, JSON and Python, and in base64."""
    return _spellings(frozenset(values))


@lru_cache(maxsize=32)
def _spellings(values: frozenset[str]) -> Spellings:
    lines = {line.strip() for value in values for line in value.splitlines()} | values
    texts, words = set[str](), set[str]()
    for line in lines:
        if len(line) < _SHORTEST_SECRET or line.casefold() in _COMMON_WORDS:
            continue
        escaped = {line, quote(line, safe=""), quote(line), quote_plus(line), json.dumps(line)[1:-1], repr(line)[1:-1]}
        (texts if len(line) >= _SHORTEST_INSIDE_WORDS else words).update(escaped)
        texts |= _base64(line)
    # The longest first: it may contain others.
    return Spellings(tuple(sorted(texts, key=len, reverse=True)), tuple(sorted(words, key=len, reverse=True)))


def _base64(value: str) -> set[str]:
    """Returns the parts of a longer text's base64 that only `value` determines, such as in ``Basic`` authentication."""
    data, found = value.encode("utf-8", "surrogatepass"), set[str]()
    for offset in range(3):
        whole = base64.b64encode(b"\0" * offset + data).decode().rstrip("=")
        first, last = (0, 2, 3)[offset], len(whole) - (1 if (offset + len(data)) % 3 else 0)
        if last - first >= _SHORTEST_INSIDE_WORDS:
            found |= {whole[first:last], whole[first:last].replace("+", "-").replace("/", "_")}
    return found


def replace_values(text: str, known: Spellings) -> str:
    """Returns a text with ``***`` in the place of each spelling."""
    for value in known.texts:
        if value in text:
            text = text.replace(value, MASK)
    for value in known.words:
        if value in text:
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", MASK, text)
    return text


def redact_known(text: str) -> str:
    """Returns a text without the secrets that are known by value; what else looks like one stays."""
    return replace_values(text, _current)


# https://acme@dev.azure.com/…: a name that is a word is none to redact in all output.
_PLAIN_NAME = re.compile(r"https?://([A-Za-z_.\-]{1,15})@", re.IGNORECASE)
_DOCUMENT = re.compile(r"\A\s*\{.*:|^\s*[\w-]+:\s.*\n", re.MULTILINE)
_OPAQUE_WORD = re.compile(r"(?=[^\W\d]*\d)[\w+/=.\-]{12,}")
_lock = threading.Lock()
_in_use: list[KnownSecrets] = []
_current = Spellings()


def known_secrets() -> Spellings:
    """Returns the spellings of the secrets that the runs of this process use now."""
    return _current


def _update() -> None:
    global _current
    values = {value for each in _in_use for value in each.values}
    _current = spellings(values) if values else Spellings()


class KnownSecrets:
    """The secrets of one run; while it is entered, `redact` knows them. Thread-safe."""

    def __init__(self) -> None:
        self.values: set[str] = set()

    def add(self, *secrets: Secret) -> None:
        """Adds secrets, and those within URLs and connection strings; ignores withheld values and plain URLs."""
        from prefect_mlprojects._support.redaction import url_secrets

        with _lock:
            for secret in secrets:
                value = reveal(secret)
                if isinstance(secret, Withheld) or not value:
                    continue
                inside = {reveal(each) for each in url_secrets(value)} - set(_PLAIN_NAME.findall(value))
                if _DOCUMENT.search(value):
                    # Of a kubeconfig, not each line is secret.
                    inside |= set(_OPAQUE_WORD.findall(value))
                self.values |= inside or ({value} if "://" not in value and not _DOCUMENT.search(value) else set())
            _update()

    def __enter__(self) -> KnownSecrets:
        with _lock:
            _in_use.append(self)
            _update()
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            _in_use.remove(self)
            _update()


class OutputRedactor:
    """Replaces known secrets in a stream of bytes, whose pieces may end within a secret."""

    def __init__(self) -> None:
        self._held = b""
        self._last = b""

    def feed(self, data: bytes, *, final: bool = False) -> bytes:
        """Takes the next bytes, and returns those that are known to be no part of a secret."""
        known, data = known_secrets(), self._held + data
        self._held = b""
        if not (known.texts or known.words) or not data:
            return data
        # Whether a word begins depends on the byte before it.
        data = _replaced(self._last + data, known, final=final)[len(self._last) :]
        kept = 0 if final else _open_end(data, known)
        data, self._held = data[: len(data) - kept], data[len(data) - kept :]
        self._last = data[-1:] or self._last
        return data

    def close(self) -> bytes:
        """Returns the remaining bytes at the end of the stream."""
        return self.feed(b"", final=True)


def _replaced(data: bytes, known: Spellings, *, final: bool) -> bytes:
    for value in _encoded(known.texts):
        if value in data:
            data = data.replace(value, MASK.encode())
    end = rb"(?!\w)" if final else rb"(?=\W)"
    for value in _encoded(known.words):
        if value in data:
            data = re.sub(rb"(?<!\w)" + re.escape(value) + end, MASK.encode(), data)
    return data


@lru_cache(maxsize=32)
def _encoded(texts: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(text.encode("utf-8", "surrogateescape") for text in texts)


def _open_end(data: bytes, known: Spellings) -> int:
    """Returns how many of the last bytes may be the beginning of a secret."""
    longest = 0
    for group, complete in ((known.texts, 0), (known.words, 1)):
        for value in _encoded(group):
            most = min(len(value) - 1 + complete, len(data))
            if most <= longest:
                continue
            tail = data[-most:]
            start = tail.find(value[:1])
            while start >= 0 and most - start > longest:
                if value.startswith(tail[start:]):
                    longest = most - start
                    break
                start = tail.find(value[:1], start + 1)
    return longest
