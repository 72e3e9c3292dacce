"""The one place that takes secrets out of URIs and of texts that quote them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

MASK = "***"

_USERINFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*)://(?P<userinfo>[^\s/?#'\"<>]*)@")
# Greedy up to the last "@" before the path: a password may hold "@", although it should be quoted there.

_SECRET_PARAMETER = re.compile(
    r"(?P<lead>[?&;#](?:[\w.\-]*(?:password|passwd|pwd|secret|token|signature|credential|api[_\-]?key|access[_\-]?key)[\w.\-]*"
    r"|sig|auth|key)=)(?P<value>[^&;#\s'\"<>]+)",
    re.IGNORECASE,
)


def mask_text(text: str) -> str:
    """Masks what is secret in the URIs of a text: passwords, lone user names, and query values such as ``token=…``.

    The user in ``ssh://git@host`` stays; the one in ``https://NAME@host`` is masked, because tokens are given so.

    Args:
        text: Any text: a URI, a message of a library, a line of output.
    """
    return _SECRET_PARAMETER.sub(lambda match: match["lead"] + MASK, _USERINFO.sub(_masked_userinfo, text))


def mask_uri(uri: str) -> str:
    """Masks what is secret in one URI; see ``mask_text``.

    Args:
        uri: A URI, or a path.
    """
    return mask_text(uri)


def _masked_userinfo(match: re.Match[str]) -> str:
    scheme, userinfo = match["scheme"], match["userinfo"]
    user, colon, _ = userinfo.partition(":")
    if colon:
        return f"{scheme}://{user}:{MASK}@"
    if userinfo and not scheme.lower().endswith("ssh"):
        return f"{scheme}://{MASK}@"
    return match[0]


def strip_credentials(url: str) -> str:
    """Removes user name and password from a URL, as MLflow does before it records a repository's URL.

    Addresses without a scheme (``git@host:path``) are left as they are; secret query values are masked.

    Args:
        url: A URL as git or a user writes it.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return mask_text(url)
    if parts.scheme and "@" in parts.netloc:
        url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return mask_text(url)
