"""Another user of this machine, as whom the tests attack; it needs root."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

NAME = "nobody"


def need_second_user() -> pwd.struct_passwd:
    """The other user; skips where the tests do not run as root, or there is no such user."""
    if os.geteuid() != 0:
        pytest.skip("only root can run commands as another user")
    try:
        return pwd.getpwnam(NAME)
    except KeyError:
        pytest.skip(f"this machine has no user {NAME}")


def run_as_second_user(*argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a command as the other user, with a bare environment."""
    user = need_second_user()
    return subprocess.run(
        argv,
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
        env={"PATH": os.defpath, "HOME": "/"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=check,
    )


def give_to_second_user(path: Path) -> None:
    """Makes the other user the owner of a file or folder."""
    user = need_second_user()
    os.chown(path, user.pw_uid, user.pw_gid)


def python_for_everyone() -> str:
    """A Python that the other user may run: this environment may be below a private folder."""
    return "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
