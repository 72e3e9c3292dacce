"""What somebody may have meant by a name that there is not."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Returns the known name that is most like another, or None when none is like it.

    Args:
        name: The name that is not known.
        known: The names that are.
        cutoff: How like it must be, from 0 to 1, as ``difflib`` measures it.
    """
    found = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None
