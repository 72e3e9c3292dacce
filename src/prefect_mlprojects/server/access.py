"""The password of the embedded server, and the one-time links by which a browser gets it.

The password stands in the file ``auth`` of the server's folder. A link carries a code in its fragment, which browsers do not
send: the page behind it exchanges the code for the password, once.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from pathlib import Path
from urllib.parse import urlsplit

from prefect_mlprojects._support.files import write_private
from prefect_mlprojects._support.secrets import Secret, reveal

LOGIN_PATH = "/mlprojects-login"
LINK_SECONDS = 8 * 3600
"""How long a link can be used, at most once."""

_FILE = "auth"
_known: dict[str, Secret] = {}


def read_auth(directory: Path) -> Secret | None:
    """Returns the password of the server in a folder, as ``user:password``; None if it has none."""
    try:
        return Secret((directory / _FILE).read_text(encoding="utf-8").strip()) or None
    except OSError:
        return None


def write_auth(directory: Path, auth: Secret | None) -> None:
    """Stores the password of the server in a folder; None removes it."""
    if auth is None:
        (directory / _FILE).unlink(missing_ok=True)
    else:
        write_private(directory / _FILE, reveal(auth))


def new_auth() -> Secret:
    """Returns a random password."""
    return Secret(f"mlprojects:{secrets.token_urlsafe(32)}")


def remember_auth(api_url: str, auth: Secret | None) -> None:
    """Lets clients of this process use a password for an API."""
    if auth is None:
        _known.pop(_plain(api_url), None)
    else:
        _known[_plain(api_url)] = auth


def _plain(api_url: str) -> str:
    """Returns an API's URL in one spelling: Prefect's clients add a slash, and people write localhost."""
    return api_url.rstrip("/").replace("//localhost:", "//127.0.0.1:").replace("//[::1]:", "//127.0.0.1:")


def known_auth(api_url: str) -> Secret | None:
    """Returns the password for an embedded server's API; None for another server, whose password is a Prefect setting."""
    return _known.get(_plain(api_url))


def password_for(api_url: str, configured: str | None) -> str | None:
    """Returns an API's password: an embedded server's own, else the configured one, unless that is an embedded server's."""
    if (auth := known_auth(api_url)) is not None:
        return reveal(auth)
    # A process may use the embedded server first, and then another one, for which its password is nothing.
    return None if any(reveal(each) == configured for each in _known.values()) else configured


def login_link(url: str | None) -> str | None:
    """Returns a link that opens a page of an embedded server logged in, once; other URLs unchanged."""
    parts = urlsplit(url or "")
    base = f"{parts.scheme}://{parts.netloc}"
    auth = known_auth(f"{base}/api")
    if auth is None:
        return url
    return f"{base}{LOGIN_PATH}#{_code(auth, int(time.time()), secrets.token_hex(8))}{parts.path.rstrip('/')}"


def _code(auth: Secret, issued: int, nonce: str) -> str:
    text = f"{issued:x}.{nonce}"
    return f"{text}.{hmac.new(reveal(auth).encode(), text.encode(), hashlib.sha256).hexdigest()[:32]}"


class LoginCodes:
    """The codes that a server has accepted; each is good once, and none from before this object was made."""

    def __init__(self, auth: Secret) -> None:
        self._auth = auth
        self._started = int(time.time())
        self._used: set[str] = set()

    def use(self, code: str) -> bool:
        """Returns whether a code is valid, and makes it invalid."""
        issued, _, rest = code.partition(".")
        nonce = rest.partition(".")[0]
        try:
            at = int(issued, 16)
        except ValueError:
            return False
        if not hmac.compare_digest(_code(self._auth, at, nonce).encode(), code.encode("utf-8", "replace")):
            return False
        fresh = self._started <= at and time.time() - at < LINK_SECONDS and nonce not in self._used
        self._used.add(nonce)
        return fresh

    def marker(self) -> str:
        """Returns the value of the cookie that says that a browser has the password; it gives no access."""
        return hashlib.sha256(b"cookie of " + reveal(self._auth).encode()).hexdigest()[:16]
