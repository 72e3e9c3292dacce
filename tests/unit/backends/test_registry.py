"""Finding backends by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prefect_mlprojects.backends import available_backends, get_backend
from prefect_mlprojects.backends.local import LocalBackend
from prefect_mlprojects.exceptions import BackendError


def test_local_backend_is_first() -> None:
    assert available_backends()[0] == "local"
    assert isinstance(get_backend("local"), LocalBackend)


def test_get_backend_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(BackendError, match=r"no backend 'locl'.*local.*Did you mean 'local'"):
        get_backend("locl")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            "from prefect_mlprojects import Backend\n"
            "class Moon(Backend):\n    name = 'moon'\n    def environment_kind(self, request): return 'moon'\n"
            "    def plan(self, *a): ...\n    def prepare(self, *a): ...\n    def execute(self, *a): ...\n",
            "Moon moon",
        ),
        ("raise RuntimeError('no air')\n", "package moon-base can't be loaded: RuntimeError: no air"),
        (
            "class Moon:\n    def execute(self, *a): ...\n",
            "is a Moon, which is not a subclass of prefect_mlprojects.Backend",
        ),
        (
            "from prefect_mlprojects import Backend\nclass Moon(Backend):\n    def plan(self, *a): ...\n",
            "can't be loaded: TypeError: Can't instantiate abstract class Moon",
        ),
    ],
)
def test_get_backend_of_an_installed_package_is_loaded_or_refused(code: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "moon.py").write_text(code)
    info = tmp_path / "moon_base-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moon-base\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[prefect_mlprojects.backends]\nmoon = moon:Moon\n")
    script = (
        "from prefect_mlprojects.backends import available_backends, get_backend\n"
        "try:\n    print(type(get_backend('moon')).__name__, *available_backends()[-1:])\n"
        "except Exception as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert expected in done.stdout
