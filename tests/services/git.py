"""Runs git as the author of the tests' repositories."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def git(folder: Path, *arguments: str) -> str:
    """Runs git in a folder and returns its output; neither the user's configuration nor ``GIT_*`` variables apply."""
    identity = {"NAME": "A", "EMAIL": "a@example.com"}
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
        **{f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in identity.items()},
        "GIT_CONFIG_GLOBAL": os.devnull,
    }
    # Git clones submodules from file URLs only if this is allowed (CVE-2022-39253).
    command = ["git", "-c", "protocol.file.allow=always", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.strip()
