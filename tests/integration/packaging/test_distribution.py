"""The built distributions: what is in them, and that a plain unlocked install of the wheel works."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(["uv", "build", "--out-dir", str(out), str(ROOT)], check=True, capture_output=True)
    return out


def test_wheel_and_sdist_contain_package_once(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    (sdist,) = distributions.glob("*.tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    modules = {
        f"prefect_mlprojects/{path.relative_to(ROOT / 'src' / 'prefect_mlprojects')}"
        for path in (ROOT / "src" / "prefect_mlprojects").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert modules <= in_wheel
    assert {f"src/{module}" for module in modules} <= in_sdist
    # The links in the root show the architecture; they must not become packages.
    tops = {name.split("/", 1)[0] for name in in_wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"prefect_mlprojects"}


@pytest.fixture
def installed(distributions: Path, tmp_path: Path) -> Iterator[Path]:
    """A new environment with the wheel, installed without a lock."""
    (wheel,) = distributions.glob("*.whl")
    subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(["uv", "pip", "install", "--quiet", "--python", str(python), str(wheel)], check=True)
    yield python
    subprocess.run([python, "-m", "prefect_mlprojects", "server", "stop"], env=home(tmp_path), check=False)


def home(folder: Path) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW", "VIRTUAL_ENV"))
    }
    return {**kept, "HOME": str(folder), "PREFECT_MLPROJECTS_SERVER_PORT": "4291"}


def test_unlocked_install_starts_server_and_runs_project(installed: Path, tmp_path: Path) -> None:
    project = ROOT / "tests" / "projects" / "greet"
    done = subprocess.run(
        [installed.parent / "mlprojects", "run", project, "--env-manager", "local"],
        cwd=tmp_path,
        env=home(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "hello world\n"), done.stderr
    assert "mlprojects server stop" in done.stderr


def test_first_readme_command_in_clean_clone_succeeds(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    line = next(
        line for line in (clone / "README.md").read_text().splitlines() if line.startswith("pip install uv && ")
    )
    command = line.removeprefix("pip install uv && ")
    # What is downloaded already need not be downloaded again; the home is empty all the same.
    cache = subprocess.run(["uv", "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip()
    environment = {**home(tmp_path), "UV_CACHE_DIR": cache}
    try:
        done = subprocess.run(
            ["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "rmse" in done.stdout
        for words in ("rmse", "flow run", "/runs/flow-run/", "MLflow run", "mlprojects ui"):
            assert words in done.stderr
    finally:
        subprocess.run(["uv", "run", "mlprojects", "server", "stop"], cwd=clone, env=environment, check=False)
