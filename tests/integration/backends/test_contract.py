"""The backend contract: the same cases on each backend."""

from __future__ import annotations

import signal
import uuid
from pathlib import Path

import pytest
from tests.services.backend_harness import BackendHarness
from tests.services.waiting import wait_for

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.exceptions import ExecutionException
from prefect_mlprojects.types import FailureCategory, StopSignal

pytestmark = pytest.mark.integration

HOSTILE_VALUES = {
    "quotes": 'it\'s "so" `id` $(id) ${HOME} $$ \\ \\n',
    "syntax": "a; exit 3 && b | c > d & * ? [x] {y} #z !! ~",
    "option": "--flag=-x",
    "space": "  two  spaces\tand a tab ",
    "newline": "one\ntwo",
    "unicode": "Größe 日本 🎉",
    "expansion": "$(MLFLOW_RUN_ID) $$(MLFLOW_RUN_ID) %s {{x}}",
    "empty": "",
}


def test_success_has_no_category(harness: BackendHarness) -> None:
    outcome = harness.run("echo out; echo err >&2")

    assert outcome.succeeded, (outcome, harness.recorder.reports)
    assert (outcome.ending, outcome.exit_code, outcome.signal, outcome.category) == ("exited", 0, None, None)
    assert sorted(harness.lines) == sorted(outcome.output_tail) == ["err", "out"]
    if harness.separates_streams:
        assert (harness.recorder.stdout, harness.recorder.stderr) == ("out\n", "err\n")


def test_exit_code_is_the_commands(harness: BackendHarness) -> None:
    flow_run_id = str(uuid.uuid4())

    outcome = harness.run("echo going down; exit 3", flow_run_id=flow_run_id)

    assert (outcome.ending, outcome.exit_code, outcome.signal) == ("exited", 3, None)
    assert outcome.category == FailureCategory.USER_CODE
    assert "exit code 3" in outcome.cause
    assert outcome.output_tail == ("going down",)
    assert harness.remaining(flow_run_id) == []


def test_signal_is_named(harness: BackendHarness) -> None:
    outcome = harness.run("""sh -c 'kill -9 $$'; exit $?""")

    assert (outcome.ending, outcome.signal) == ("exited", signal.SIGKILL)
    assert "SIGKILL" in outcome.cause
    assert outcome.category == FailureCategory.USER_CODE


def test_missing_program_is_explained(harness: BackendHarness) -> None:
    outcome = harness.run("no-such-program")

    assert (outcome.ending, outcome.exit_code, outcome.category) == ("exited", 127, FailureCategory.USER_CODE)
    assert "not found" in outcome.advice


def test_output_is_complete_and_in_order(harness: BackendHarness) -> None:
    command = "i=0; while [ $i -lt 2000 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done; sleep 1; printf end"

    assert harness.run(command).succeeded

    recorder = harness.recorder
    lines = [*recorder.stdout.splitlines(), *recorder.stderr.splitlines()]
    assert [line for line in lines if line.startswith("out")] == [f"out {each}" for each in range(2000)]
    assert [line for line in lines if line.startswith("err")] == [f"err {each}" for each in range(2000)]
    assert (len(lines), recorder.stdout.endswith("\nend")) == (4001, True)


def test_output_arrives_while_the_command_runs(harness: BackendHarness) -> None:
    thread, outcomes, stop = harness.start("echo begun; sleep 1000", str(uuid.uuid4()))

    harness.wait_for_output(b"begun\n")

    assert outcomes == []
    stop.request("seen")
    thread.join(60)
    assert outcomes[0].ending == "stopped"


def test_timeout_ends_the_command(harness: BackendHarness) -> None:
    flow_run_id = str(uuid.uuid4())

    outcome = harness.run("echo begun; sleep 1000", flow_run_id=flow_run_id, timeout=8)

    assert (outcome.ending, outcome.category) == ("timed-out", FailureCategory.TIMEOUT)
    assert "longer than its timeout" in outcome.cause
    assert outcome.output_tail[:1] == ("begun",)
    assert harness.remaining(flow_run_id) == []


def test_cancel_before_the_preparation_starts_nothing(harness: BackendHarness) -> None:
    flow_run_id, stop = str(uuid.uuid4()), StopSignal()
    stop.request("enough")

    try:
        outcome = harness.run("echo begun", flow_run_id=flow_run_id, stop=stop, prepare_stop=stop)
    except ExecutionException:
        pass
    else:
        assert outcome.ending == "stopped"

    assert harness.recorder.data == b""
    assert harness.remaining(flow_run_id) == []


def test_cancel_before_the_execution_starts_nothing(harness: BackendHarness) -> None:
    flow_run_id, stop = str(uuid.uuid4()), StopSignal()
    stop.request("enough")

    outcome = harness.run("echo begun", flow_run_id=flow_run_id, stop=stop)

    assert (outcome.ending, outcome.cause, outcome.category) == ("stopped", "enough", FailureCategory.CANCELLED)
    assert harness.recorder.data == b""
    assert harness.remaining(flow_run_id) == []


@pytest.mark.parametrize("phase", ["report", "tag", "output"])
def test_cancel_ends_the_command_in_each_phase(harness: BackendHarness, phase: str) -> None:
    flow_run_id = str(uuid.uuid4())
    command = "echo begun; sleep 1; echo more; sleep 1000"

    outcome = harness.run_and_stop(command, flow_run_id, lambda kind: kind in (phase, "output"))

    assert (outcome.ending, outcome.cause, outcome.category) == ("stopped", "enough", FailureCategory.CANCELLED)
    assert harness.remaining(flow_run_id) == []


def test_cancel_kills_a_command_that_ignores_it(harness: BackendHarness) -> None:
    flow_run_id = str(uuid.uuid4())
    command = "trap '' TERM INT; echo begun; while true; do sleep 1; done"

    outcome = harness.run_and_stop(command, flow_run_id, lambda kind: kind == "output")

    assert (outcome.ending, outcome.category) == ("stopped", FailureCategory.CANCELLED)
    assert harness.remaining(flow_run_id) == []


_CHECKPOINT = "trap 'sleep 1; echo checkpoint; exit 0' TERM; echo begun; while :; do sleep 0.1; done"
_STOPPED_COMMANDS = {
    "handler": _CHECKPOINT,
    "two-programs": f'sh -c "{_CHECKPOINT}" && echo uploaded',
    "subshell": f"({_CHECKPOINT}); echo after",
    "grandchild": f'sh -c "({_CHECKPOINT}) & wait; exit 0"; sleep 1000',
}


@pytest.mark.parametrize("case", _STOPPED_COMMANDS)
def test_stopped_command_handles_sigterm_in_each_process(harness: BackendHarness, case: str) -> None:
    flow_run_id = str(uuid.uuid4())
    harness.config = {**harness.config, **harness.long_grace}

    outcome = harness.run_and_stop(_STOPPED_COMMANDS[case], flow_run_id, lambda kind: b"begun" in harness.recorder.data)

    assert (outcome.ending, outcome.category) == ("stopped", FailureCategory.CANCELLED)
    # Shells also report that their sleep was terminated.
    assert [line for line in harness.lines if line in ("begun", "checkpoint", "uploaded", "after")] == [
        "begun",
        "checkpoint",
    ]
    assert harness.remaining(flow_run_id) == []


def test_killed_client(harness: BackendHarness, tmp_path: Path) -> None:
    flow_run_id = str(uuid.uuid4())
    command = "i=0; while [ $i -lt 6 ]; do echo line $i; i=$((i+1)); sleep 0.7; done"
    client = harness.start_client(command, flow_run_id)
    assert client.stdout is not None
    assert client.stdout.readline() == b"line 0\n"

    client.kill()
    client.wait()
    client.stdout.close()

    if not harness.survives_client:
        wait_for(lambda: not harness.remaining(flow_run_id), "the command's end", 30)
        return
    assert harness.remaining(flow_run_id)
    outcome = harness.run(command, flow_run_id=flow_run_id)
    assert outcome.succeeded, (outcome, harness.recorder.reports)
    assert harness.lines == [f"line {each}" for each in range(6)]
    assert harness.remaining(flow_run_id) == []


def test_hostile_values_reach_the_command_as_they_are(harness: BackendHarness) -> None:
    values = list(HOSTILE_VALUES.values())
    command = "printf '<%s>\\n' " + " ".join(f"{{{name}}}" for name in HOSTILE_VALUES)
    if harness.passes_variables:
        harness.child_env.update({f"HOSTILE_{name}": value for name, value in HOSTILE_VALUES.items() if value})
        command += "".join(f' "$HOSTILE_{name}"' for name in HOSTILE_VALUES)
        values *= 2

    outcome = harness.run(command, HOSTILE_VALUES)

    assert outcome.succeeded, (outcome, harness.recorder.reports)
    assert harness.recorder.data.decode() == "".join(f"<{value}>\n" for value in values)


def test_links_out_of_the_project_lead_to_their_files(harness: BackendHarness, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "rows.csv").write_text("1,2\n")
    (outside / "again").symlink_to(outside)
    (harness.folder / "data").symlink_to(outside)
    (harness.folder / "rows.csv").symlink_to("../outside/deep/rows.csv")

    outcome = harness.run("cat rows.csv data/deep/rows.csv data/again/deep/rows.csv")

    assert outcome.succeeded, (outcome, harness.recorder.reports)
    assert harness.lines == ["1,2"] * 3


@pytest.mark.parametrize("ending", ["exit 0", "exit 3", "sleep 1000"])
def test_secret_is_seen_by_the_command_only(harness: BackendHarness, ending: str) -> None:
    marker = f"marker-{uuid.uuid4()}"
    harness.child_env["MLFLOW_TRACKING_TOKEN"] = Secret(marker)
    command = f'printf %s "$MLFLOW_TRACKING_TOKEN" | wc -c; sleep 2; {ending}'
    thread, outcomes, stop = harness.start(command, str(uuid.uuid4()))
    harness.wait_for_output(b"\n")

    seen = harness.visible() + _process_list()
    if ending == "sleep 1000":
        stop.request("enough")
    thread.join(60)

    assert harness.lines[0].strip() == (str(len(marker)) if harness.passes_variables else "0")
    for text in (seen, harness.visible(), str(outcomes), str(harness.recorder), "\n".join(harness.recorder.reports)):
        assert marker not in text


def _process_list() -> str:
    lines = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                lines.append((entry / "cmdline").read_text(errors="replace"))
            except OSError:
                continue
    return "\n".join(lines)
