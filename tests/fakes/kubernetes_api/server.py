"""A Kubernetes API server over real HTTP, strict where a client can get it wrong.

It knows Namespaces, Pods with logs, ConfigMaps, Secrets, Events, ServiceAccounts with tokens, ResourceQuotas for pods, Jobs,
Roles and RoleBindings; watches with versions, bookmarks and expiry; dry runs; strict field validation; label and field selectors;
propagation policies and owner references; RBAC. Limits: no TLS, no ``limit``/``continue``, no server-side apply, strategic
merge patches are merge patches, no finalizers but ``foregroundDeletion``. The node's limits stand in ``kubelet.py``.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.services.kubeconfig import make_kubeconfig

from .controllers import Controllers, delete_gracefully
from .kubelet import Kubelet, stamp
from .rbac import Access
from .store import RESOURCES, ApiError, Json, Resource, Store, not_found, now
from .validation import decode, invalid, validate, validate_update, with_defaults

_PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/))?/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<sub>[^/]+))?)?"
)


class KubernetesDouble:
    """A cluster of one node that listens on a port of 127.0.0.1.

    Args:
        images: The images that its node holds.
    """

    def __init__(self, images: set[str]) -> None:
        self.store = Store()
        self.access = Access(self.store)
        self.kubelet = Kubelet(self.store, images, self.record)
        self._controllers = Controllers(self.store, self.create_pod, self.record)
        self.closing = threading.Event()
        double = self

        class Handler(_Handler):
            cluster = double

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()
        self.store.create("namespaces", {"metadata": {"name": "default"}, "status": {"phase": "Active"}})

    def close(self) -> None:
        """Ends everything; no process of a pod is left."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._controllers.close()
        self.kubelet.close()

    def kubeconfig(self, token: str | None = None, server: str | None = None) -> Json:
        """Returns a kubeconfig for the administrator, or for a token."""
        return make_kubeconfig({"server": server or self.url}, {"token": token or self.access.admin_token})

    def record(self, kind: str, about: Json, about_kind: str, reason: str, message: str) -> None:
        """Records an event."""
        metadata = about["metadata"]
        involved = {"kind": about_kind, **{key: metadata[key] for key in ("name", "namespace", "uid")}}
        self.store.create(
            "events",
            {
                "metadata": {"name": f"{metadata['name']}.{secrets.token_hex(6)}", "namespace": metadata["namespace"]},
                "involvedObject": involved,
                "type": kind,
                "reason": reason,
                "message": message,
                "lastTimestamp": now(),
                "count": 1,
            },
        )

    def create_pod(self, body: Json) -> Json:
        """Creates a pod with the admission of the real server: quota and service account."""
        namespace, resource = body["metadata"]["namespace"], RESOURCES["pods"]
        body = with_defaults(decode(body, resource, strict=True), resource)
        validate(body, resource)
        account = body["spec"]["serviceAccountName"]
        name = body["metadata"]["name"]
        if self.store.find("serviceaccounts", namespace, account) is None:
            raise ApiError(
                403,
                "Forbidden",
                f'pods "{name}" is forbidden: error looking up service account {namespace}/{account}: '
                f'serviceaccount "{account}" not found',
            )
        used = sum(
            each["status"].get("phase") not in ("Succeeded", "Failed") for each in self.store.list("pods", namespace)
        )
        self.check_quota(resource, namespace, name, "pods", used)
        return self.store.create("pods", body)

    def check_quota(self, resource: Resource, namespace: str, name: str, counted: str, used: int) -> None:
        """Refuses an object more than a quota of the namespace allows."""
        for quota in self.store.list("resourcequotas", namespace):
            limit = (quota.get("spec") or {}).get("hard", {}).get(counted)
            if limit is not None and used + 1 > int(limit):
                raise ApiError(
                    403,
                    "Forbidden",
                    f'{resource.qualified} "{name}" is forbidden: exceeded quota: {quota["metadata"]["name"]}, requested: '
                    f"{counted}=1, used: {counted}={used}, limited: {counted}={limit}",
                )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: KubernetesDouble

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in http.server
        return

    def _answer(self, code: int, body: Json) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length) if length else b""
        try:
            self._route(raw)
        except ApiError as error:
            self._answer(error.code, error.status())
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _serve

    def _route(self, raw: bytes) -> None:
        parts = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        match = _PATH.fullmatch(parts.path)
        user = self.cluster.access.user(self.headers.get("Authorization") or "")
        resource = RESOURCES.get(match["plural"]) if match else None
        if match is None or resource is None or (match["group"] or "") != resource.group:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        namespace, name, sub = match["namespace"] or "", match["name"] or "", match["sub"] or ""
        watching = self.query.get("watch") in ("true", "True", "1")
        verb = {
            "GET": "get" if name else ("watch" if watching else "list"),
            "POST": "create",
            "PATCH": "patch",
            "PUT": "update",
            "DELETE": "delete" if name else "deletecollection",
        }[self.command]
        self.cluster.access.check(user, verb, resource, sub, namespace)
        body = json.loads(raw) if raw else {}
        if sub == "log" and verb == "get":
            self._log(namespace, name)
        elif sub == "token" and verb == "create":
            self.cluster.store.get("serviceaccounts", namespace, name)
            self._answer(201, {"status": {"token": self.cluster.access.token_for(namespace, name)}})
        elif sub == "eviction" and verb == "create":
            self._answer(201, self._evict(namespace, name))
        elif verb == "get":
            self._answer(200, self.cluster.store.get(resource.plural, namespace, name))
        elif verb == "list":
            items = [each for each in self.cluster.store.list(resource.plural, namespace) if self._selects(each)]
            metadata = {"resourceVersion": str(self.cluster.store.version)}
            kind = f"{resource.kind}List"
            self._answer(200, {"apiVersion": resource.api_version, "kind": kind, "metadata": metadata, "items": items})
        elif verb == "watch":
            self._watch(resource, namespace)
        elif verb == "create":
            self._answer(201, self._create(resource, namespace, body))
        elif verb == "patch":
            self._answer(200, self._patch(resource, namespace, name, body))
        elif verb == "delete":
            self._delete(resource, namespace, name, body)
        else:
            raise ApiError(405, "MethodNotAllowed", f"the double does not serve {verb}")

    def _create(self, resource: Resource, namespace: str, body: Any) -> Json:
        cluster, store = self.cluster, self.cluster.store
        strict = self.query.get("fieldValidation") == "Strict"
        body = decode(body, resource, strict=strict)
        metadata = body.setdefault("metadata", {})
        if not metadata.get("name") and metadata.get("generateName"):
            # As the real one: a prefix, cut to leave room, and five letters (k8s.io/apiserver/pkg/storage/names).
            metadata["name"] = metadata["generateName"][:58] + secrets.token_hex(3)[:5]
        if resource.namespaced:
            if metadata.setdefault("namespace", namespace) != namespace:
                raise ApiError(
                    400, "BadRequest", "the namespace of the object does not match the namespace on the request"
                )
            place = store.find("namespaces", "", namespace)
            if place is None:
                raise not_found(RESOURCES["namespaces"], namespace)
            if "deletionTimestamp" in place["metadata"]:
                raise ApiError(
                    403, "Forbidden", f"unable to create new content in namespace {namespace}: it is being terminated"
                )
        validate(body, resource)
        if resource.kind == "Pod":
            return cluster.create_pod(body)
        body = with_defaults(body, resource)
        if resource.kind == "Namespace":
            body["status"] = {"phase": "Active"}
        elif resource.kind == "ResourceQuota":
            body["status"] = {"hard": dict(body["spec"]["hard"]), "used": dict.fromkeys(body["spec"]["hard"], "0")}
        elif resource.kind == "Job":
            cluster.check_quota(
                resource, namespace, metadata["name"], "count/jobs.batch", len(store.list("jobs", namespace))
            )
        return store.create(resource.plural, body, dry_run=self.query.get("dryRun") == "All")

    def _patch(self, resource: Resource, namespace: str, name: str, patch: Any) -> Json:
        if not isinstance(patch, dict) or "merge-patch" not in (self.headers.get("Content-Type") or ""):
            raise ApiError(415, "UnsupportedMediaType", "the double knows merge patches only")

        def change(old: Json) -> None:
            merged = _merge(old, patch)
            decode(merged, resource, strict=self.query.get("fieldValidation") == "Strict")
            validate(merged, resource)
            validate_update(old, merged, resource)
            old.clear()
            old.update(merged)

        return self.cluster.store.update(resource.plural, namespace, name, change)

    def _delete(self, resource: Resource, namespace: str, name: str, options: Json) -> None:
        store = self.cluster.store
        found = store.get(resource.plural, namespace, name)
        wanted = (options.get("preconditions") or {}).get("uid")
        if wanted and wanted != found["metadata"]["uid"]:
            raise ApiError(409, "Conflict", f"Precondition failed: UID in precondition: {wanted}")
        policy = options.get("propagationPolicy") or self.query.get("propagationPolicy") or "Background"
        if policy not in ("Foreground", "Background", "Orphan"):
            raise invalid("DeleteOptions", "", "propagationPolicy", f'Unsupported value: "{policy}"')
        if resource.kind == "Pod":
            grace = options.get("gracePeriodSeconds", self.query.get("gracePeriodSeconds"))
            delete_gracefully(store, namespace, name, None if grace is None else int(grace))
        elif resource.kind == "Namespace" or policy == "Foreground":

            def mark(body: Json) -> None:
                body["metadata"].setdefault("deletionTimestamp", now())
                if resource.kind == "Namespace":
                    body["status"] = {"phase": "Terminating"}
                else:
                    body["metadata"]["finalizers"] = ["foregroundDeletion"]

            self._answer(200, store.update(resource.plural, namespace, name, mark))
            return
        else:
            if policy == "Orphan":
                _orphan(store, found)
            store.remove(resource.plural, namespace, name)
        self._answer(200, {"kind": "Status", "apiVersion": "v1", "status": "Success", "details": {"name": name}})

    def _evict(self, namespace: str, name: str) -> Json:
        """Adds the condition that an eviction through the API adds, and deletes the pod."""

        def change(pod: Json) -> None:
            condition = {
                "type": "DisruptionTarget",
                "status": "True",
                "reason": "EvictionByEvictionAPI",
                "message": "Eviction API: evicting",
                "lastTransitionTime": now(),
            }
            pod["status"].setdefault("conditions", []).append(condition)

        self.cluster.store.update("pods", namespace, name, change)
        delete_gracefully(self.cluster.store, namespace, name)
        return {"kind": "Status", "apiVersion": "v1", "status": "Success"}

    def _selects(self, body: Json) -> bool:
        labels = body["metadata"].get("labels") or {}
        for term in filter(None, self.query.get("labelSelector", "").split(",")):
            if "!=" in term:
                key, value = term.split("!=", 1)
                if labels.get(key) == value:
                    return False
            elif "=" in term:
                key, value = term.replace("==", "=").split("=", 1)
                if labels.get(key) != value:
                    return False
            elif (term.lstrip("!") in labels) == term.startswith("!"):
                return False
        for term in filter(None, self.query.get("fieldSelector", "").split(",")):
            key, value = term.split("=", 1)
            found: Any = body
            for part in key.split("."):
                found = found.get(part) if isinstance(found, dict) else None
            if found != value:
                return False
        return True

    def _begin_stream(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n" % len(data) + data + b"\r\n")
        self.wfile.flush()

    def _watch(self, resource: Resource, namespace: str) -> None:
        store, plural = self.cluster.store, resource.plural
        self._begin_stream("application/json")

        def send(kind: str, body: Json) -> None:
            self._chunk(json.dumps({"type": kind, "object": body}).encode() + b"\n")

        version = self.query.get("resourceVersion", "")
        since = int(version or 0)
        if since == 0:
            since = store.version
            for each in store.list(plural, namespace):
                if self._selects(each):
                    send("ADDED", each)
        shown = {each["metadata"]["uid"] for each in store.list(plural, namespace) if self._selects(each)}
        try:
            seconds = float(self.query.get("timeoutSeconds", 1800))
            for change in store.changes(plural, since, seconds, self.cluster.closing.is_set):
                if change is None:
                    mark = {"apiVersion": resource.api_version, "kind": resource.kind}
                    if self.query.get("allowWatchBookmarks") in ("true", "True"):
                        send("BOOKMARK", {**mark, "metadata": {"resourceVersion": str(store.version)}})
                    continue
                body = change.object
                if namespace and body["metadata"].get("namespace") != namespace:
                    continue
                uid, matches = body["metadata"]["uid"], self._selects(body)
                if matches:
                    send(change.type, body)
                    shown.add(uid)
                elif uid in shown:
                    shown.discard(uid)
                    send("DELETED", body)
        except ApiError as error:
            send("ERROR", error.status())
        self._chunk(b"")

    def _log(self, namespace: str, name: str) -> None:
        pod = self.cluster.store.get("pods", namespace, name)
        containers = [each["name"] for each in [*(pod["spec"].get("initContainers") or []), *pod["spec"]["containers"]]]
        container = self.query.get("container") or (containers[0] if len(containers) == 1 else "")
        if container not in containers:
            raise ApiError(
                400, "BadRequest", f"a container name must be specified for pod {name}, choose one of: {containers}"
            )
        logs = self.cluster.kubelet.logs(pod["metadata"]["uid"], container)
        index = -2 if self.query.get("previous") == "true" else -1
        if len(logs) < -index:
            what = "previous terminated container" if index == -2 else "container"
            raise ApiError(
                400, "BadRequest", f'{what} "{container}" in pod "{name}" is waiting to start: ContainerCreating'
            )
        tail = self.query.get("tailLines")
        since = 0
        if "sinceTime" in self.query:
            since = int(datetime.fromisoformat(self.query["sinceTime"].replace("Z", "+00:00")).timestamp()) * 10**9
        log, follow, position = logs[index], self.query.get("follow") == "true", 0
        stamped, begun = self.query.get("timestamps") == "true", False
        while True:
            with log.changed:
                if follow and position == len(log.lines) and not log.ended:
                    log.changed.wait(0.5)
                lines, ended = log.lines[position:], log.ended
            if tail is not None and not position:
                lines = lines[max(0, len(lines) - int(tail)) :]
                position = len(log.lines) - len(lines)
            position += len(lines)
            data = b"".join((stamp(at) + b" " if stamped else b"") + line for at, line in lines if at >= since)
            if data:
                # As the kubelet: not even the headers are sent before there is a line.
                if not begun:
                    self._begin_stream("text/plain")
                    begun = True
                self._chunk(data)
            if not follow or self.cluster.closing.is_set() or (ended and not lines):
                break
        if not begun:
            self._begin_stream("text/plain")
        self._chunk(b"")


def _merge(old: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merge(result.get(key), value)
    return result


def _orphan(store: Store, owner: Json) -> None:
    for plural in ("pods", "secrets", "configmaps"):
        for each in store.list(plural, owner["metadata"]["namespace"]):

            def drop(body: Json) -> None:
                owners = body["metadata"].get("ownerReferences") or []
                body["metadata"]["ownerReferences"] = [one for one in owners if one["uid"] != owner["metadata"]["uid"]]

            store.update(plural, each["metadata"]["namespace"], each["metadata"]["name"], drop)
