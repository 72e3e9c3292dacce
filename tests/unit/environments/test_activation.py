from __future__ import annotations

import os
from pathlib import Path

from prefect_mlprojects.environments.activation import activated_variables, local_variables

LOCATION = Path("/cache/environments/abc/1")


def test_activation_prepends_path_and_sets_virtual_env() -> None:
    variables = activated_variables({"PATH": "/usr/bin:/bin", "HOME": "/home/u"}, LOCATION)
    assert variables == {"PATH": f"{LOCATION}/bin:/usr/bin:/bin", "VIRTUAL_ENV": str(LOCATION), "HOME": "/home/u"}


def test_activation_removes_variables_of_own_environment(tmp_path: Path) -> None:
    own, active = tmp_path / "own", tmp_path / "active"
    for prefix in (own, active):
        (prefix / "bin").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(own / "bin")
    environ = {
        "PATH": os.pathsep.join((str(own / "bin"), str(active / "bin"), "/usr/bin", str(link), f"{own}/bin/")),
        "VIRTUAL_ENV": str(active),
        "VIRTUAL_ENV_PROMPT": "active",
        "PYTHONPATH": "/our/site-packages",
        "PYTHONHOME": "/our",
        "__PYVENV_LAUNCHER__": "/our/python",
        "CONDA_PREFIX": "/conda",
        "CONDA_PREFIX_1": "/conda/base",
        "CONDA_EXE": "/conda/bin/conda",
        "UV_PROJECT_ENVIRONMENT": "/our",
        "PREFECT__FLOW_RUN_ID": "1",
        "PREFECT_API_URL": "http://127.0.0.1:4200/api",
        "PREFECT_MLPROJECTS_CACHE_DIR": "/cache",
        "PIP_INDEX_URL": "https://example.org",
    }
    assert activated_variables(environ, LOCATION, own) == {
        "PATH": f"{LOCATION}/bin:/usr/bin",
        "VIRTUAL_ENV": str(LOCATION),
        "CONDA_EXE": "/conda/bin/conda",
        "PREFECT_API_URL": "http://127.0.0.1:4200/api",
        "PREFECT_MLPROJECTS_CACHE_DIR": "/cache",
        "PIP_INDEX_URL": "https://example.org",
    }


def test_without_a_path_the_default_one_is_kept() -> None:
    assert activated_variables({}, LOCATION)["PATH"] == f"{LOCATION}/bin:{os.defpath}"


def test_local_is_the_callers_environment_without_prefects_own_variables() -> None:
    environ = {"PATH": "/venv/bin", "VIRTUAL_ENV": "/venv", "PYTHONPATH": "/lib", "PREFECT__FLOW_RUN_ID": "1"}
    assert local_variables(environ) == {"PATH": "/venv/bin", "VIRTUAL_ENV": "/venv", "PYTHONPATH": "/lib"}
