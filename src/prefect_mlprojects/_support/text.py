"""Suggestions for misspelt names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from urllib.parse import SplitResult, urlsplit


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Returns the known name most similar to `name`, or None if none reaches `cutoff` (0 to 1, as in `difflib`)."""
    found = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def split_url(url: str) -> SplitResult:
    """As ``urlsplit``, but a malformed URL is all path, so that the place that uses it reports it."""
    try:
        return urlsplit(url)
    except ValueError:
        return SplitResult("", "", url, "", "")
