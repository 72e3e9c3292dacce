"""Suggestions for misspelt names, and time spans as texts."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from urllib.parse import SplitResult, urlsplit


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Returns the known name most similar to `name`, or None if none reaches `cutoff` (0 to 1, as in `difflib`)."""
    found = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def span(seconds: float, *, whole: bool = False) -> str:
    """Returns a time span as two units at most, such as ``3m05s``; `whole` as one, such as ``3m``."""
    if seconds < 60:
        return f"{seconds:.0f}s" if whole or seconds >= 10 else f"{seconds:.1f}s"
    for limit, size, unit, below_size, below in ((3600, 60, "m", 1, "s"), (86400, 3600, "h", 60, "m")):
        if seconds < limit:
            first, rest = divmod(int(seconds), size)
            return f"{first}{unit}" if whole else f"{first}{unit}{rest // below_size:02d}{below}"
    days, rest = divmod(int(seconds), 86400)
    return f"{days}d" if whole else f"{days}d{rest // 3600:02d}h"


def split_url(url: str) -> SplitResult:
    """As ``urlsplit``, but a malformed URL is all path, so that the place that uses it reports it."""
    try:
        return urlsplit(url)
    except ValueError:
        return SplitResult("", "", url, "", "")
