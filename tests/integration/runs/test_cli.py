"""The command ``mlprojects``, started as users start it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.services.waiting import wait_for

Run = Callable[..., "subprocess.CompletedProcess[str]"]
LOCAL = ("--env-manager", "local")


def test_run_prints_project_output_on_stdout_and_the_rest_on_stderr(mlprojects: Run, greet: str) -> None:
    done = mlprojects("run", greet, "-P", "name=a=b", *LOCAL)
    assert (done.returncode, done.stdout) == (0, "hello a=b\n"), done.stderr
    for words in ("fetch", "resolve-env", "validate-params", "execute", "succeeded", "flow run", "mlprojects ui"):
        assert words in done.stderr


def test_failed_run_exits_with_1(mlprojects: Run, greet: str) -> None:
    done = mlprojects("run", greet, "-e", "fail", *LOCAL)
    assert done.returncode == 1
    assert "exit code 3" in done.stderr
    assert "Traceback" not in done.stderr


def test_project_that_init_makes_of_a_script_runs(mlprojects: Run, workspace: Path) -> None:
    folder = workspace / "made"
    folder.mkdir()
    (folder / "fit.py").write_text(
        "import argparse\n"
        "if __name__ == '__main__':\n"
        "    parser = argparse.ArgumentParser()\n"
        "    parser.add_argument('--alpha', type=float, default=0.1)\n"
        "    parser.add_argument('--verbose', action='store_true')\n"
        "    print(vars(parser.parse_args()))\n"
    )
    made = mlprojects("init", str(folder))
    assert made.returncode == 0, made.stderr
    assert "Next: mlprojects describe" in made.stderr
    done = mlprojects("run", str(folder), "-P", "verbose=yes")
    assert (done.returncode, done.stdout) == (0, "{'alpha': 0.1, 'verbose': True}\n"), done.stderr
    again = mlprojects("init", str(folder))
    assert (again.returncode, "MLproject: the file exists" in again.stderr) == (2, True)


@pytest.fixture
def packaged(workspace: Path) -> Path:
    """A project that needs a package, which is in its folder as a wheel."""
    project = workspace / "packaged"
    project.mkdir()
    (project / "MLproject").write_text(
        "python_env: env.yaml\nentry_points: {main: {command: python -c 'import tiny'}}\n"
    )
    (project / "env.yaml").write_text("dependencies: [--no-index, ./tiny-1.0-py3-none-any.whl]\n")
    with zipfile.ZipFile(project / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.py", "")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    return project


def test_build_output_is_hidden_unless_build_fails(mlprojects: Run, packaged: Path) -> None:
    env = {"PREFECT_MLPROJECTS_CACHE_DIR": str(packaged.parent / "cache")}
    done = mlprojects("run", str(packaged), env=env)
    assert done.returncode == 0, done.stderr
    assert "Building an environment: uv" in done.stderr
    assert "tiny==1.0" not in done.stderr
    run = next(line.split("/")[-1] for line in done.stderr.splitlines() if line.startswith("Flow run: "))
    assert "tiny==1.0" in mlprojects("logs", run).stdout
    (packaged / "env.yaml").write_text("dependencies: [--no-index, ./tiny-1.0-py3-none-any.whl, nosuchpackage]\n")
    done = mlprojects("run", str(packaged), env=env)
    assert done.returncode == 1
    assert done.stderr.index("Building an environment") < done.stderr.index("nosuchpackage")
    # Once: in the output, or in the message, which has its last lines.
    assert sum("nosuchpackage was not found" in line for line in done.stderr.splitlines()) == 1


def test_missing_module_error_names_environment_file(mlprojects: Run, packaged: Path) -> None:
    (packaged / "MLproject").write_text(
        "python_env: env.yaml\nentry_points: {main: {command: python -c 'import tiny.missing'}}\n"
    )
    (packaged / "env.yaml").write_text("dependencies: [--no-index, 'tiny; python_version < \"3\"']\n")
    done = mlprojects("run", str(packaged), env={"PREFECT_MLPROJECTS_CACHE_DIR": str(packaged.parent / "cache")})
    assert done.returncode == 1
    assert f"Add the package that contains 'tiny' to {packaged}/env.yaml." in done.stderr
    assert "'tiny' is only required where python_version < \"3\"." in done.stderr


def test_build_output_in_script_is_hidden_unless_build_fails(mlprojects: Run, packaged: Path) -> None:
    env = {**os.environ, "PREFECT_MLPROJECTS_CACHE_DIR": str(packaged.parent / "cache")}
    code = f"import prefect_mlprojects; prefect_mlprojects.run({str(packaged)!r})"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Building an environment: uv" in done.stderr
    assert "tiny==1.0" not in done.stderr
    (packaged / "env.yaml").write_text("dependencies: [--no-index, nosuchpackage]\n")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stderr.index("Building an environment") < done.stderr.index("nosuchpackage")


def test_run_json_prints_the_result(mlprojects: Run, greet: str, tracked: Callable[[str], Any]) -> None:
    done = mlprojects("run", greet, "--json", *LOCAL)
    facts = json.loads(done.stdout)
    assert (facts["status"], facts["exit_code"]) == ("FINISHED", 0)
    assert tracked(facts["run_id"]).info.status == "FINISHED"
    assert "hello world" in done.stderr


def test_detached_run_is_controlled_by_its_id(mlprojects: Run, greet: str) -> None:
    started = mlprojects("run", greet, "-e", "sleep", "--detach", *LOCAL)
    assert started.returncode == 0, started.stderr
    run = started.stdout.strip()
    assert mlprojects("status", run).stdout.startswith("RUNNING\n")
    cancelled = mlprojects("cancel", run)
    assert (cancelled.returncode, cancelled.stdout) == (0, "KILLED\n"), cancelled.stderr
    waited = mlprojects("wait", run, "--json")
    assert waited.returncode == 130
    assert json.loads(waited.stdout)["status"] == "KILLED"
    assert "Command: echo started; sleep 600" in mlprojects("logs", run).stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_exits_with_130_and_summary(number: signal.Signals, greet: str, workspace: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "from prefect_mlprojects.cli import main; main()", "run", greet, "-e", "sleep", *LOCAL],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    marks = [line.split()[0] for line in errors.splitlines() if line[:1] in "✓✗■"]
    assert marks == ["✓", "✓", "✓", "■"]
    said = errors[errors.index("Cancelling ...") :]
    for words in ("was cancelled", "flow run    http://", "MLflow run  "):
        assert words in said
    from mlflow.tracking import MlflowClient

    (run,) = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).search_runs(["0"])
    assert run.info.status == "KILLED"


def test_ctrl_c_sends_sigint_before_sigterm(workspace: Path) -> None:
    (workspace / "MLproject").write_text("entry_points:\n  main: {command: 'python signals.py'}\n")
    (workspace / "signals.py").write_text(
        "import signal, sys, time\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, lambda n, frame: print(signal.Signals(n).name, flush=True))\n"
        "print('started', flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", "from prefect_mlprojects.cli import main; main()", "run", ".", *LOCAL],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PREFECT_MLPROJECTS_GRACE_PERIOD": "2"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=120)[0] == "SIGINT\nSIGTERM\n"
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "-P", "flag"], "write -P flag=VALUE"),
        (["run", "-P", "a=1", "-P", "a=2"], "more than once"),
        (["run", "no/such/folder"], "no/such/folder"),
        (["run", "{greet}", "-e", "mian"], "main"),
        (["run", "{greet}/.."], "tests/projects#greet"),
        (["run", "{greet}", "-P", "times=1.5"], "whole number"),
        (["run", "{greet}", "-b", "moon"], "available: local"),
        (["run", "{greet}", "-c", "{{"], "backend configuration"),
        (["rnu"], "Did you mean 'run'"),
        (["env", "prune"], "Select what to remove"),
    ],
)
def test_bad_input_exits_with_2(arguments: list[str], words: str, mlprojects: Run, greet: str) -> None:
    done = mlprojects(*[each.replace("{greet}", greet) for each in arguments])
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\n\tentry_points:\n", "MLproject:2: error: not valid YAML"),
        ("name: x\nname: y\n", "MLproject:2: error: the key 'name' is given twice, first in line 1"),
        ("", "MLproject: error: the file is empty"),
        ("- a\n- b\n", "must be a mapping"),
        ("python_env: a\nconda_env: b\n", "MLproject:2: error: a project has at most one environment"),
        ("entry_points:\n  main:\n    command: 'echo {nme}'\n    parameters: {name: string}\n", "did you mean {name}?"),
        ("entry_pionts: {}\n", "MLproject:1: warning: unknown key 'entry_pionts'"),
    ],
)
def test_validate_is_a_linter(text: str, words: str, mlprojects: Run, workspace: Path) -> None:
    (workspace / "MLproject").write_text(text)
    done = mlprojects("validate")
    assert done.returncode == (0 if "warning" in words else 1)
    assert words in done.stdout
    assert "Traceback" not in done.stderr


def test_plan_and_describe_execute_nothing(mlprojects: Run, greet: str, workspace: Path) -> None:
    plan = json.loads(mlprojects("plan", greet, "-P", "name=$(x)", "--json", *LOCAL).stdout)
    assert plan["command"] == "python greet.py '$(x)' 1"
    described = json.loads(mlprojects("describe", greet, "--json").stdout)
    count = described["entry_points"]["needs"]["parameters"][0]
    assert {key: count[key] for key in ("name", "type", "required", "default")} == {
        "name": "count",
        "type": "int",
        "required": True,
        "default": None,
    }
    assert not (workspace / "mlflow.db").exists()


def test_unreachable_servers_are_named(mlprojects: Run, greet: str) -> None:
    done = mlprojects("run", greet, *LOCAL, env={"PREFECT_API_URL": "http://me:secret@127.0.0.1:9/api"})
    assert done.returncode == 1
    assert "127.0.0.1:9/api can't be reached" in done.stderr
    assert "secret" not in done.stderr
    done = mlprojects("run", greet, *LOCAL, env={"MLFLOW_TRACKING_URI": "http://me:secret@127.0.0.1:9"})
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stderr
    assert "secret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_unusable_server_folder_is_named(mlprojects: Run, greet: str, workspace: Path) -> None:
    (workspace / "file").write_text("")
    variables = {"PREFECT_MLPROJECTS_SERVER_DIR": str(workspace / "file" / "x"), "PREFECT_API_URL": ""}
    done = mlprojects("run", greet, *LOCAL, env=variables)
    assert done.returncode == 1
    assert "PREFECT_MLPROJECTS_SERVER_DIR" in done.stderr
    assert "Traceback" not in done.stderr


def test_server_env_and_completion_commands_succeed(mlprojects: Run) -> None:
    assert "is running: http://127.0.0.1:" in mlprojects("server", "status").stdout
    assert mlprojects("env", "list").returncode == 0
    for shell in ("bash", "zsh", "fish"):
        assert "_MLPROJECTS_COMPLETE" in mlprojects("completion", shell).stdout


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"PYTHONIOENCODING": "ascii", "TERM": "dumb"}, "ünï…"),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "ascii"),
    ],
)
def test_ascii_terminal_gets_ascii_output(variables: dict[str, str], name: str, mlprojects: Run, greet: str) -> None:
    done = mlprojects("run", greet, "--json", *LOCAL, env=variables)
    assert done.returncode == 0, done.stderr
    steps = [line for line in done.stderr.splitlines() if line.startswith("+ ")]
    assert {line.split()[1] for line in steps} == {"fetch", "resolve-env", "validate-params", "execute"}
    run = json.loads(done.stdout)["flow_run_id"]
    assert done.stderr.isascii()
    for arguments in (["logs", run], ["plan", greet, "-P", f"name={name}"], ["describe", greet]):
        shown = mlprojects(*arguments, env=variables)
        assert (shown.returncode, "Traceback" in shown.stderr) == (0, False), shown.stderr


def test_help_imports_neither_prefect_nor_mlflow() -> None:
    code = (
        "import sys\nfrom prefect_mlprojects.cli import main\n"
        "try:\n    main(['run', '--help'])\nfinally:\n"
        "    print([name for name in ('prefect', 'mlflow', 'yaml', 'rich', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_live_display_on_a_terminal(greet: str, workspace: Path) -> None:
    import pty

    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "from prefect_mlprojects.cli import main; main()", "run", greet, *LOCAL],
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(terminal)
    shown = b""
    deadline = time.monotonic() + 90
    try:
        while time.monotonic() < deadline:
            if not select.select([controller], [], [], 1)[0]:
                continue
            try:
                data = os.read(controller, 65536)
            except OSError:
                break
            if not data:
                break
            shown += data
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    text = shown.decode()
    assert "hello world" in text
    assert text.count("✓") >= 4


@pytest.mark.parametrize("lines", [0, 2])
def test_run_continues_after_its_terminal_closed(lines: int, greet: str, workspace: Path) -> None:
    code = "from prefect_mlprojects.cli import main; main()"
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", greet, "-e", "lines", *LOCAL], stdout=writer, stderr=writer, cwd=workspace
    )
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = [stream.readline() for _ in range(lines)]
    assert len(said) == lines
    assert process.wait(120) == 0
    from mlflow.tracking import MlflowClient

    (run,) = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).search_runs(["0"])
    assert run.info.status == "FINISHED"


def test_logs_follow_a_run_in_order_to_its_end(mlprojects: Run, workspace: Path) -> None:
    (workspace / "MLproject").write_text(
        """
entry_points:
  main:
    command: >-
      for i in 1 2 3 4 5 6 7 8; do echo out $i; echo err $i >&2; sleep 1; done; until test -e go; do sleep 0.1; done; echo last
"""
    )
    run = mlprojects("run", ".", "--detach", *LOCAL).stdout.strip()
    process = subprocess.Popen(
        [sys.executable, "-c", "from prefect_mlprojects.cli import main; main()", "logs", "-f", run],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines, early = [], False
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if lines[-1] == "out 4":
            early = mlprojects("status", run).stdout.startswith("RUNNING\n")
            (workspace / "go").touch()
    assert process.wait() == 0
    assert early
    program = [line for line in lines if line.startswith(("out", "err", "last"))]
    assert program == [f"{stream} {number}" for number in range(1, 9) for stream in ("out", "err")] + ["last"]
    stored = mlprojects("logs", run).stdout.splitlines()
    assert stored == lines
    assert stored[-1].startswith("Finished in state")

    assert mlprojects("logs", run, "--stdout-only", "--tail", "2").stdout.splitlines() == ["out 8", "last"]
    stamped = mlprojects("logs", run, "--stdout-only", "--timestamps").stdout.splitlines()
    assert stamped == sorted(stamped)
    assert stamped[0].endswith("Z out 1")


def test_own_settings_are_not_passed_to_the_project(mlprojects: Run, greet: str) -> None:
    done = mlprojects("run", greet, "-e", "variables", *LOCAL, env={"MLFLOW_EXPERIMENT_NAME": "of-the-caller"})
    names = {line.partition("=")[0] for line in done.stdout.splitlines()}
    assert "PREFECT_API_URL" in names
    assert not names & {
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL",
        "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED",
        "PREFECT_MLPROJECTS_OWN_VARIABLES",
        # MLflow would let it win over the experiment of the run.
        "MLFLOW_EXPERIMENT_NAME",
    }
    chosen = mlprojects(
        "run", greet, "-e", "variables", *LOCAL, env={"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR"}
    )
    assert "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL=ERROR" in chosen.stdout.splitlines()


def test_ui_serves_the_current_store(mlprojects: Run, greet: str, workspace: Path, unused_port: int) -> None:
    run_id = json.loads(mlprojects("run", greet, "--json", *LOCAL).stdout)["run_id"]
    command = [
        sys.executable,
        "-c",
        "from prefect_mlprojects.cli import main; main()",
        "ui",
        "--port",
        str(unused_port),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("Prefect: http://")
            assert process.stdout.readline().startswith(f"MLflow:  http://127.0.0.1:{unused_port}")
            address = f"http://127.0.0.1:{unused_port}/api/2.0/mlflow/runs/get?run_id={run_id}"

            def found() -> bool:
                with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
                    return bool(json.load(answer)["run"]["info"]["status"] == "FINISHED")
                return False

            wait_for(found, "MLflow's server", 120)
        finally:
            process.send_signal(signal.SIGINT)
