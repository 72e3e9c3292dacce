"""Runs pods as local processes that look like containers.

Each container is a process tree in mount and PID namespaces of its own (``unshare``), in a private root folder: the system's
``/usr`` (read-only), ``/etc`` and ``/dev`` stand for the image, ``/tmp`` and ``/mlflow`` are the container's own, and volumes
are bind mounts. So commands really run, with real exit codes, signals, PID 1's rules for SIGTERM, and output.

An image that the node does not hold is pulled from its registry, with the pod's pull secrets (``registry.py``), and its files are
the container's.

Limits: all other images hold the same files (those of this machine); the network, users and capabilities are the machine's;
stdout and stderr are one pipe; memory is watched rather than limited by a cgroup. It needs Linux, and root or unprivileged user
namespaces.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from .registry import pull_image
from .store import Json, Store, now
from .validation import quantity_value

NODE = "double-node"
CAPACITY = {"cpu": 8.0, "memory": 32 * 2.0**30, "ephemeral-storage": 100 * 2.0**30}
IMAGE_PULL_SECONDS = 0.2

_IMAGE_NAME = re.compile(
    r"([a-z0-9]+([._:-][a-z0-9]+)*/)*[a-z0-9]+([._-]+[a-z0-9]+)*(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
_EXPANSION = re.compile(r"\$(?:\$|\(([^()]*)\))")
_ENTER = r"""
set -e
root=$1 workdir=$2
shift 2
mount --make-rprivate /
if [ ! -e "$root/.pulled" ]; then
for link in bin lib lib64 sbin; do
  if [ -L "/$link" ]; then ln -sfn "$(readlink "/$link")" "$root/$link"
  elif [ -d "/$link" ]; then mkdir -p "$root/$link"; mount --rbind "/$link" "$root/$link"; fi
done
for folder in usr etc; do mkdir -p "$root/$folder"; mount --rbind "/$folder" "$root/$folder"; done
mount -o remount,bind,ro "$root/usr" 2>/dev/null || true
fi
mkdir -p "$root/dev"
mount --rbind /dev "$root/dev"
mkdir -p "$root/proc" "$root/tmp"
chmod 1777 "$root/tmp"
mount -t proc proc "$root/proc"
while [ "$1" != -- ]; do
  mkdir -p "$root$2"
  mount --bind "$1" "$root$2"
  if [ "$3" = ro ]; then mount -o remount,bind,ro "$root$2" 2>/dev/null || true; fi
  shift 3
done
shift
mkdir -p "$root$workdir"
exec chroot "$root" /bin/sh -c 'cd "$0" && exec "$@"' "$workdir" "$@"
"""


class LogBuffer:
    """A container's log, as a node keeps it: lines with the time at which they came."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.lines: list[tuple[int, bytes]] = []
        self.ended = False

    def add(self, line: bytes) -> None:
        with self.changed:
            self.lines.append((time.time_ns(), line))
            self.changed.notify_all()

    def end(self) -> None:
        with self.changed:
            self.ended = True
            self.changed.notify_all()


def stamp(nanoseconds: int) -> bytes:
    """Writes a time as the kubelet does: RFC 3339 with nine digits."""
    seconds, rest = divmod(nanoseconds, 10**9)
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S").encode() + b".%09dZ" % rest


def expand(text: str, variables: dict[str, str]) -> str:
    """Expands ``$(NAME)`` as the kubelet does; an unknown name stays, ``$$`` is ``$``.

    The rules: ``third_party/forked/golang/expansion/expand.go`` of Kubernetes.
    """

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return variables.get(match[1], match[0])

    return _EXPANSION.sub(replace, text)


class WaitingError(Exception):
    """A container can't be created yet."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Container:
    """One instance of a container: its process and its log."""

    def __init__(
        self, command: list[str], env: dict[str, str], root: Path, workdir: str, mounts: list[tuple[str, str, str]]
    ) -> None:
        self.log = LogBuffer()
        self.started_at = now()
        self.finished_at = ""
        self.oom = False
        self._killed = False
        words = ["unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL"]
        if os.geteuid() != 0:
            words.insert(1, "--map-root-user")
        root.mkdir(parents=True, exist_ok=True)
        flat = [word for mount in mounts for word in mount]
        self.process = subprocess.Popen(
            [*words, "/bin/sh", "-c", _ENTER, "enter", str(root), workdir, *flat, "--", *command],
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp", **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self.log.add(line)

    def wait(self, memory: float | None = None) -> int:
        """Returns the exit code as a container runtime reports it."""
        while True:
            try:
                code = self.process.wait(0.05 if memory else None)
                break
            except subprocess.TimeoutExpired:
                if memory and self._resident() > memory:
                    self.oom = True
                    self.kill(signal.SIGKILL)
        self._reader.join(5)
        self.log.end()
        self.finished_at = now()
        if self._killed and code == 1:
            # unshare can't end by SIGKILL as its child did, and exits with 1.
            return 137
        return 128 - code if code < 0 else code

    def _children(self, pid: int) -> list[int]:
        try:
            text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        except OSError:
            return []
        return [int(each) for each in text.split()]

    def _resident(self) -> int:
        waiting, total = self._children(self.process.pid), 0
        while waiting:
            pid = waiting.pop()
            waiting += self._children(pid)
            try:
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            except (OSError, IndexError):
                continue
        return total

    def kill(self, number: signal.Signals) -> None:
        """Signals the container's PID 1."""
        self._killed = self._killed or number == signal.SIGKILL
        for pid in self._children(self.process.pid):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


class Kubelet:
    """The only node: schedules pods, runs them, and ends them.

    Args:
        store: The cluster's objects.
        images: The images that the node holds; a name that is not among them can't be pulled.
        record: Records an event: namespace, kind, object, type, reason, message.
    """

    def __init__(self, store: Store, images: set[str], record: Callable[[str, Json, str, str, str], None]) -> None:
        self._store = store
        self.images = images
        self._record = record
        self._pulled: dict[str, Path] = {}
        self._pulling = threading.Lock()
        self._directory = Path(tempfile.mkdtemp(prefix="double-node-"))
        self._logs: dict[tuple[str, str], list[LogBuffer]] = {}
        self._running: dict[str, list[Container]] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Kills all pods."""
        self._stopping.set()
        with self._store.changed:
            self._store.changed.notify_all()
        self._thread.join()
        for containers in list(self._running.values()):
            for container in list(containers):
                container.kill(signal.SIGKILL)
        for thread in list(self._threads.values()):
            thread.join(10)
        shutil.rmtree(self._directory, ignore_errors=True)

    def logs(self, uid: str, container: str) -> list[LogBuffer]:
        """Returns the logs of a container's instances, the oldest first."""
        return self._logs.get((uid, container), [])

    def running(self) -> int:
        """Returns how many containers run."""
        return sum(
            container.process.poll() is None for each in list(self._running.values()) for container in list(each)
        )

    def _run(self) -> None:
        while not self._stopping.is_set():
            for pod in self._store.list("pods"):
                uid = pod["metadata"]["uid"]
                if uid not in self._threads:
                    self._threads[uid] = threading.Thread(target=self._run_pod, args=(pod,), daemon=True)
                    self._threads[uid].start()
            with self._store.changed:
                self._store.changed.wait(0.5)

    def _current(self, pod: Json) -> Json | None:
        found = self._store.find("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])
        return found if found is not None and found["metadata"]["uid"] == pod["metadata"]["uid"] else None

    def _deleted(self, pod: Json) -> bool:
        current = self._current(pod)
        return self._stopping.is_set() or current is None or "deletionTimestamp" in current["metadata"]

    def _status(self, pod: Json, change: Callable[[Json], Any]) -> None:
        current = self._current(pod)
        if current is None:
            return
        self._store.update(
            "pods", pod["metadata"]["namespace"], pod["metadata"]["name"], lambda body: change(body["status"])
        )

    def _run_pod(self, pod: Json) -> None:
        # A real node takes this long and longer (scheduling, sandbox, network): a client that has just submitted a Job can list
        # its pod before a container that does nothing has ended.
        time.sleep(1.0)
        try:
            if self._schedule(pod):
                self._run_containers(pod)
        finally:
            current = self._current(pod)
            while (
                current is not None and not self._stopping.is_set() and "deletionTimestamp" not in current["metadata"]
            ):
                with self._store.changed:
                    self._store.changed.wait(0.5)
                current = self._current(pod)
            if current is not None:
                self._store.remove("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])

    def _schedule(self, pod: Json) -> bool:
        told = False
        while not self._deleted(pod):
            problem = _misfit(pod["spec"])
            if problem is None:

                def bind(body: Json) -> None:
                    body["spec"]["nodeName"] = NODE
                    body["status"]["phase"] = "Pending"
                    _condition(body["status"], "PodScheduled", "True")

                self._store.update("pods", pod["metadata"]["namespace"], pod["metadata"]["name"], bind)
                self._record(
                    "Normal", pod, "Pod", "Scheduled", f"Successfully assigned {pod['metadata']['name']} to {NODE}"
                )
                return True
            message = (
                f"0/1 nodes are available: {problem}. preemption: 0/1 nodes are available: 1 Preemption is not helpful for "
                "scheduling."
            )
            self._status(pod, partial(_unschedulable, message=message))
            if not told:
                self._record("Warning", pod, "Pod", "FailedScheduling", message)
                told = True
            with self._store.changed:
                self._store.changed.wait(0.5)
        return False

    def _run_containers(self, pod: Json) -> None:
        spec, uid = pod["spec"], pod["metadata"]["uid"]
        self._running[uid] = []
        sidecars: list[threading.Thread] = []
        folder = self._directory / uid
        self._status(pod, lambda status: _initial(status, spec))
        volumes = self._mount_volumes(pod, folder)
        if volumes is None:
            return
        for container in spec.get("initContainers") or []:
            if container.get("restartPolicy") == "Always":
                sidecars.append(self._start_thread(pod, container, volumes, folder, "initContainerStatuses"))
            elif self._run_container(pod, container, volumes, folder, "initContainerStatuses") != 0:
                if not self._deleted(pod):
                    self._status(pod, lambda status: status.update(phase="Failed"))
                return
        self._status(pod, lambda status: _condition(status, "Initialized", "True"))
        threads = [self._start_thread(pod, each, volumes, folder, "containerStatuses") for each in spec["containers"]]
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)
                if self._deleted(pod):
                    self._terminate(pod, threads)
        for running in list(self._running[uid]):
            running.kill(signal.SIGTERM)
        for thread in sidecars:
            thread.join(1)
        for running in list(self._running[uid]):
            running.kill(signal.SIGKILL)
        self._status(pod, _finish)
        shutil.rmtree(folder, ignore_errors=True)

    def _terminate(self, pod: Json, threads: list[threading.Thread]) -> None:
        current = self._current(pod)
        grace = (
            0
            if current is None or self._stopping.is_set()
            else current["metadata"].get("deletionGracePeriodSeconds", 30)
        )
        for running in list(self._running[pod["metadata"]["uid"]]):
            running.kill(signal.SIGTERM)
        deadline = time.monotonic() + grace
        for thread in threads:
            while thread.is_alive() and time.monotonic() < deadline and not self._stopping.is_set():
                thread.join(0.1)
        for running in list(self._running[pod["metadata"]["uid"]]):
            running.kill(signal.SIGKILL)
        for thread in threads:
            thread.join(10)

    def _start_thread(self, *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=self._run_container, args=arguments, daemon=True)
        thread.start()
        return thread

    def _mount_volumes(self, pod: Json, folder: Path) -> dict[str, Path] | None:
        """Makes the volumes; waits for what does not exist yet, as the kubelet does."""
        namespace, told = pod["metadata"]["namespace"], False
        while not self._deleted(pod):
            volumes: dict[str, Path] = {}
            missing = ""
            for volume in pod["spec"].get("volumes") or []:
                place = folder / "volumes" / volume["name"]
                place.mkdir(parents=True, exist_ok=True)
                place.chmod(0o777)
                if "configMap" in volume:
                    missing = missing or self._write(place, "configmaps", namespace, volume["configMap"]["name"])
                elif "secret" in volume:
                    missing = missing or self._write(place, "secrets", namespace, volume["secret"]["secretName"])
                elif "hostPath" in volume:
                    place = Path(volume["hostPath"]["path"])
                volumes[volume["name"]] = place
            if not missing:
                return volumes
            if not told:
                self._record("Warning", pod, "Pod", "FailedMount", f"MountVolume.SetUp failed for volume: {missing}")
                told = True
            with self._store.changed:
                self._store.changed.wait(0.3)
        return None

    def _write(self, place: Path, plural: str, namespace: str, name: str) -> str:
        found = self._store.find(plural, namespace, name)
        if found is None:
            return f'{plural[:-1]} "{name}" not found'
        encoded = dict(found.get("binaryData") or {}) | (dict(found.get("data") or {}) if plural == "secrets" else {})
        for key, value in encoded.items():
            (place / key).write_bytes(base64.b64decode(value))
        if plural == "configmaps":
            for key, value in (found.get("data") or {}).items():
                (place / key).write_text(value)
        return ""

    def _run_container(self, pod: Json, spec: Json, volumes: dict[str, Path], folder: Path, place: str) -> int | None:
        """Runs a container to its end, with its restarts; returns its exit code, None when the pod was deleted first."""
        restarts = 0
        while True:
            created = self._create_container(pod, spec, volumes, folder, place, restarts)
            if created is None:
                return None
            limit = ((spec.get("resources") or {}).get("limits") or {}).get("memory")
            code = created.wait(quantity_value(limit) if limit else None)
            reason = "OOMKilled" if created.oom else ("Completed" if code == 0 else "Error")
            ended = {
                "exitCode": code,
                "reason": reason,
                "startedAt": created.started_at,
                "finishedAt": created.finished_at,
            }
            policy = spec.get("restartPolicy") or pod["spec"]["restartPolicy"]
            if self._deleted(pod) or policy == "Never" or (policy == "OnFailure" and code == 0):
                self._state(pod, place, spec, {"terminated": ended}, restarts)
                return code
            waiting = {"reason": "CrashLoopBackOff", "message": "back-off restarting failed container"}
            self._state(pod, place, spec, {"waiting": waiting}, restarts, last={"terminated": ended})
            # As a real node, which begins to wait with the second restart only.
            time.sleep(0.5 * restarts)
            restarts += 1

    def _create_container(
        self, pod: Json, spec: Json, volumes: dict[str, Path], folder: Path, place: str, restarts: int
    ) -> Container | None:
        tries = 0
        while not self._deleted(pod):
            try:
                pulled = self._pull(pod, spec)
                env = self._environment(pod, spec)
                break
            except WaitingError as error:
                reason = error.reason
                if reason == "ErrImagePull" and tries % 2:
                    reason = "ImagePullBackOff"
                if not tries:
                    self._record("Warning", pod, "Pod", "Failed", str(error))
                tries += 1
                self._state(pod, place, spec, {"waiting": {"reason": reason, "message": str(error)}}, restarts)
                with self._store.changed:
                    self._store.changed.wait(0.3)
        else:
            return None
        # As in busybox's image: no entrypoint, and a command that arguments take the place of.
        words = [*(spec.get("command") or []), *(spec.get("args") or [])] or ["/bin/sh"]
        command = [expand(each, env) for each in words]
        mounts = []
        for mount in spec.get("volumeMounts") or []:
            source = volumes[mount["name"]] / mount.get("subPath", "")
            source.mkdir(parents=True, exist_ok=True) if not source.exists() else None
            mounts.append((str(source), mount["mountPath"], "ro" if mount.get("readOnly") else "rw"))
        root = folder / "roots" / f"{spec['name']}-{restarts}"
        if pulled is not None:
            shutil.copytree(pulled, root, symlinks=True)
            (root / ".pulled").touch()
        container = Container(command, env, root, spec.get("workingDir") or "/", mounts)
        self._logs.setdefault((pod["metadata"]["uid"], spec["name"]), []).append(container.log)
        self._running[pod["metadata"]["uid"]].append(container)
        self._state(pod, place, spec, {"running": {"startedAt": container.started_at}}, restarts)
        self._status(
            pod,
            lambda status: status.update(phase="Running", startTime=now()) if place == "containerStatuses" else None,
        )
        return container

    def _pull(self, pod: Json, spec: Json) -> Path | None:
        """Returns the files of an image that was pulled, None for one that the node holds."""
        image = spec["image"]
        if not _IMAGE_NAME.fullmatch(image):
            raise WaitingError(
                "InvalidImageName", f'Failed to apply default image tag "{image}": couldn\'t parse image name'
            )
        if image in self.images:
            return None
        if spec["imagePullPolicy"] == "Never":
            raise WaitingError(
                "ErrImageNeverPull", f'Container image "{image}" is not present with pull policy of Never'
            )
        with self._pulling:
            if image not in self._pulled:
                logins: Json = {}
                for reference in pod["spec"].get("imagePullSecrets") or []:
                    secret = self._store.find("secrets", pod["metadata"]["namespace"], reference["name"]) or {}
                    text = (secret.get("data") or {}).get(".dockerconfigjson", "")
                    logins |= json.loads(base64.b64decode(text)).get("auths", {}) if text else {}
                target = self._directory / "images" / str(len(self._pulled))
                try:
                    pull_image(image, logins, target)
                except (OSError, ValueError, KeyError) as error:
                    time.sleep(IMAGE_PULL_SECONDS)
                    raise WaitingError("ErrImagePull", f'failed to pull and unpack image "{image}": {error}') from None
                self._pulled[image] = target
        return self._pulled[image]

    def _environment(self, pod: Json, spec: Json) -> dict[str, str]:
        namespace, env = pod["metadata"]["namespace"], dict[str, str]()
        for variable in spec.get("env") or []:
            source = variable.get("valueFrom") or {}
            if "secretKeyRef" in source:
                value = self._referred("secrets", namespace, source["secretKeyRef"], encoded=True)
            elif "configMapKeyRef" in source:
                value = self._referred("configmaps", namespace, source["configMapKeyRef"], encoded=False)
            elif "fieldRef" in source:
                found: Any = pod
                for part in source["fieldRef"]["fieldPath"].split("."):
                    found = found.get(part, "") if isinstance(found, dict) else ""
                value = str(found)
            else:
                value = expand(variable.get("value") or "", env)
            if value is not None:
                env[variable["name"]] = value
        return env

    def _referred(self, plural: str, namespace: str, reference: Json, *, encoded: bool) -> str | None:
        found = self._store.find(plural, namespace, reference["name"])
        value = ((found or {}).get("data") or {}).get(reference["key"])
        if value is None:
            if reference.get("optional"):
                return None
            if found is None:
                raise WaitingError("CreateContainerConfigError", f'{plural[:-1]} "{reference["name"]}" not found')
            key = reference["key"]
            raise WaitingError(
                "CreateContainerConfigError", f"couldn't find key {key} in {plural} {namespace}/{reference['name']}"
            )
        return base64.b64decode(value).decode() if encoded else str(value)

    def _state(self, pod: Json, place: str, spec: Json, state: Json, restarts: int, last: Json | None = None) -> None:
        def change(status: Json) -> None:
            for each in status.get(place) or []:
                if each["name"] == spec["name"]:
                    if last is not None:
                        each["lastState"] = last
                    each |= {
                        "state": state,
                        "restartCount": restarts,
                        "ready": "running" in state,
                        "started": "running" in state,
                    }

        self._status(pod, change)


def _initial(status: Json, spec: Json) -> None:
    for place, kind in (("initContainerStatuses", "initContainers"), ("containerStatuses", "containers")):
        if spec.get(kind):
            status[place] = [
                {
                    "name": each["name"],
                    "image": each["image"],
                    "imageID": "",
                    "ready": False,
                    "restartCount": 0,
                    "state": {
                        "waiting": {"reason": "PodInitializing" if spec.get("initContainers") else "ContainerCreating"}
                    },
                    "lastState": {},
                }
                for each in spec[kind]
            ]


def _finish(status: Json) -> None:
    ends = [each["state"].get("terminated") for each in status.get("containerStatuses") or []]
    if all(ends):
        status["phase"] = "Succeeded" if all(end["exitCode"] == 0 for end in ends if end) else "Failed"
    elif status.get("phase") == "Running":
        status["phase"] = "Failed"


def _condition(status: Json, kind: str, value: str, reason: str = "", message: str = "") -> None:
    conditions = [each for each in status.get("conditions") or [] if each["type"] != kind]
    previous = next((each for each in status.get("conditions") or [] if each["type"] == kind), None)
    new = {"type": kind, "status": value, **({"reason": reason, "message": message} if reason else {})}
    if previous is not None and {key: previous.get(key) for key in new} == new:
        return
    status["conditions"] = [*conditions, {**new, "lastTransitionTime": now()}]


def _misfit(spec: Json) -> str | None:
    """Says, in the scheduler's words, why the node can't take a pod; None when it can."""
    for key, value in (spec.get("nodeSelector") or {}).items():
        if (key, value) != ("kubernetes.io/os", "linux"):
            return "1 node(s) didn't match Pod's node affinity/selector"
    for resource, capacity in CAPACITY.items():
        wanted = 0.0
        for container in spec["containers"]:
            resources = container.get("resources") or {}
            quantity = (resources.get("requests") or {}).get(resource) or (resources.get("limits") or {}).get(resource)
            wanted += quantity_value(quantity) if quantity else 0.0
        if wanted > capacity:
            return f"1 Insufficient {resource}"
    return None


def _unschedulable(status: Json, message: str) -> None:
    _condition(status, "PodScheduled", "False", "Unschedulable", message)
