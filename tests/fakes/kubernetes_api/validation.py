"""What a real API server refuses: unknown and missing fields, bad names, contradictions, changes of what can't change.

Fields and their types are those of the client library, which is generated from Kubernetes' published OpenAPI document. The
rules beyond it follow ``pkg/apis/*/validation`` of Kubernetes, as far as Jobs, their pods, ConfigMaps and Secrets need them.
"""

from __future__ import annotations

import base64
import binascii
import copy
import re
from typing import Any

from kubernetes import client

from .store import ApiError, Json, Resource

_LABEL_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_QUANTITY = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+|[numkMGTPE]|[KMGTPE]i)?")
_ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_DATA_KEY = re.compile(r"[-._a-zA-Z0-9]+")
_MAX_OBJECT = 1_048_576
_PATHS_OF_NUMBERS: dict[str, type | tuple[type, ...]] = {"int": int, "bool": bool, "str": str, "float": (int, float)}


def decode(body: Any, resource: Resource, *, strict: bool) -> Json:
    """Checks the shape of a body against the published types, and drops (or refuses) what they do not know."""
    if not isinstance(body, dict):
        raise ApiError(400, "BadRequest", "the body is not an object")
    for key, wanted in (("apiVersion", resource.api_version), ("kind", resource.kind)):
        if key in body and body[key] != wanted:
            raise ApiError(400, "BadRequest", f"{key} {body[key]!r} does not match the expected {wanted!r}")
    unknown: list[str] = []
    decoded = _shape(body, f"V1{resource.kind}" if resource.kind != "Event" else "CoreV1Event", "", unknown)
    if unknown and strict:
        fields = ", ".join(f'unknown field "{field}"' for field in unknown)
        head = f'{resource.kind} in version "{resource.version}" cannot be handled as a {resource.kind}'
        message = f"{head}: strict decoding error: {fields}"
        raise ApiError(400, "BadRequest", message)
    result: Json = decoded
    return result


def _shape(value: Any, kind: str, path: str, unknown: list[str]) -> Any:
    if value is None:
        return None
    if kind.startswith("list["):
        _demand(isinstance(value, list), path, "array", value)
        return [_shape(each, kind[5:-1], f"{path}[{index}]", unknown) for index, each in enumerate(value)]
    if kind.startswith("dict("):
        _demand(isinstance(value, dict), path, "object", value)
        inner = kind[5:-1].split(", ", 1)[1]
        return {key: _shape(each, inner, f"{path}.{key}", unknown) for key, each in value.items()}
    if kind in _PATHS_OF_NUMBERS:
        fits = isinstance(value, _PATHS_OF_NUMBERS[kind]) and (kind == "bool") == isinstance(value, bool)
        # Quantities are strings or numbers on the wire.
        _demand(fits or (kind == "str" and isinstance(value, int) and ".resources." in path), path, kind, value)
        return str(value) if kind == "str" else value
    model = getattr(client, kind, None)
    if model is None or not hasattr(model, "openapi_types"):
        return value
    _demand(isinstance(value, dict), path, "object", value)
    names = {wire: python for python, wire in model.attribute_map.items()}
    result: Json = {}
    for key, each in value.items():
        place = f"{path}.{key}".lstrip(".")
        if key not in names:
            unknown.append(place)
            continue
        shaped = _shape(each, model.openapi_types[names[key]], place, unknown)
        if shaped is not None:
            result[key] = shaped
    _require(model, result, names, path)
    return result


def _demand(fits: bool, path: str, kind: str, value: Any) -> None:
    if not fits:
        raise ApiError(
            400, "BadRequest", f"json: cannot unmarshal {type(value).__name__} into field {path} of type {kind}"
        )


def _require(model: Any, value: Json, names: dict[str, str], path: str) -> None:
    try:
        model(**{names[key]: each for key, each in value.items()})
    except ValueError as error:
        name = re.search(r"`(\w+)`", str(error))
        wire = model.attribute_map.get(name[1], name[1]) if name else "?"
        if model.__name__ in ("V1PodTemplateSpec", "V1Job") and wire == "metadata":
            return
        raise invalid("Object", "", f"{path}.{wire}".lstrip("."), "Required value") from None


def invalid(kind: str, name: str, field: str, message: str) -> ApiError:
    """The answer 422 about one field."""
    return ApiError(
        422,
        "Invalid",
        f'{kind} "{name}" is invalid: {field}: {message}',
        {"name": name, "kind": kind, "causes": [{"reason": "FieldValueInvalid", "message": message, "field": field}]},
    )


def validate(body: Json, resource: Resource) -> None:
    """Checks what the types can't say.

    Raises:
        ApiError: 422, naming the field.
    """
    metadata = body.get("metadata") or {}
    name = metadata.get("name") or ""

    def fail(field: str, message: str) -> ApiError:
        return invalid(resource.kind, name, field, message)

    pattern, longest = (_LABEL_NAME, 63) if resource.kind == "Namespace" else (_SUBDOMAIN, 253)
    if not name:
        raise fail("metadata.name", "Required value: name or generateName is required")
    if len(name) > longest or not pattern.fullmatch(name):
        raise fail(
            "metadata.name",
            f'Invalid value: "{name}": a lowercase RFC 1123 name must consist of lower case alphanumeric characters',
        )
    _validate_labels(metadata.get("labels") or {}, "metadata.labels", fail)
    for key in metadata.get("annotations") or {}:
        _validate_key(key, "metadata.annotations", fail)
    for index, owner in enumerate(metadata.get("ownerReferences") or []):
        for field in ("apiVersion", "kind", "name", "uid"):
            if not owner.get(field):
                raise fail(f"metadata.ownerReferences[{index}].{field}", "Required value")
    if resource.kind == "Job":
        _validate_job(body, fail)
    elif resource.kind == "Pod":
        _validate_pod_spec(body["spec"], "spec", fail)
    elif resource.kind in ("ConfigMap", "Secret"):
        _validate_data(body, resource, fail)


def _validate_key(key: str, path: str, fail: Any) -> None:
    prefix, slash, name = key.rpartition("/")
    if slash and (len(prefix) > 253 or not _SUBDOMAIN.fullmatch(prefix)):
        raise fail(path, f'Invalid value: "{key}": prefix part must be a lowercase RFC 1123 subdomain')
    if len(name) > 63 or not _QUALIFIED.fullmatch(name):
        raise fail(path, f'Invalid value: "{key}": name part must consist of alphanumeric characters, at most 63')


def _validate_labels(labels: dict[str, str], path: str, fail: Any) -> None:
    for key, value in labels.items():
        _validate_key(key, path, fail)
        if len(value) > 63 or not _LABEL_VALUE.fullmatch(value):
            raise fail(
                path,
                f'Invalid value: "{value}": a valid label must be at most 63 alphanumeric characters, "-", "_" or "."',
            )


def _validate_job(body: Json, fail: Any) -> None:
    spec = body.get("spec")
    if not spec:
        raise fail("spec.template.spec.containers", "Required value")
    if len(body["metadata"]["name"]) > 63:
        raise fail(
            "spec.template.labels", f'Invalid value: "{body["metadata"]["name"]}": must be no more than 63 characters'
        )
    for field in ("backoffLimit", "ttlSecondsAfterFinished", "completions", "parallelism"):
        if (spec.get(field) or 0) < 0:
            raise fail(f"spec.{field}", f"Invalid value: {spec[field]}: must be greater than or equal to 0")
    if spec.get("activeDeadlineSeconds") is not None and spec["activeDeadlineSeconds"] < 1:
        raise fail("spec.activeDeadlineSeconds", "Invalid value: must be greater than 0")
    if spec.get("selector") and not spec.get("manualSelector"):
        raise fail("spec.selector", "Invalid value: `selector` must not be set without `manualSelector`")
    template = spec.get("template") or {}
    _validate_labels((template.get("metadata") or {}).get("labels") or {}, "spec.template.metadata.labels", fail)
    pod = template.get("spec")
    if not pod:
        raise fail("spec.template.spec.containers", "Required value")
    policy = pod.get("restartPolicy") or "Always"
    if policy not in ("Never", "OnFailure"):
        raise fail(
            "spec.template.spec.restartPolicy", f'Unsupported value: "{policy}": supported values: "OnFailure", "Never"'
        )
    _validate_pod_spec(pod, "spec.template.spec", fail)


def _validate_pod_spec(pod: Json, path: str, fail: Any) -> None:  # noqa: C901 - one rule after another, as the server has them
    volumes: set[str] = set()
    for index, volume in enumerate(pod.get("volumes") or []):
        place = f"{path}.volumes[{index}]"
        if not _LABEL_NAME.fullmatch(volume["name"]):
            raise fail(f"{place}.name", f'Invalid value: "{volume["name"]}"')
        if volume["name"] in volumes:
            raise fail(f"{place}.name", f'Duplicate value: "{volume["name"]}"')
        if len(volume) != 2:
            raise fail(place, "Required value: must specify exactly one volume type")
        volumes.add(volume["name"])
    if not pod.get("containers"):
        raise fail(f"{path}.containers", "Required value")
    names: set[str] = set()
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(pod.get(kind) or []):
            place = f"{path}.{kind}[{index}]"
            name = container["name"]
            if len(name) > 63 or not _LABEL_NAME.fullmatch(name):
                raise fail(f"{place}.name", f'Invalid value: "{name}": a lowercase RFC 1123 label')
            if name in names:
                raise fail(f"{place}.name", f'Duplicate value: "{name}"')
            names.add(name)
            _validate_container(container, place, volumes, fail)
    for index, secret in enumerate(pod.get("imagePullSecrets") or []):
        if not secret.get("name"):
            raise fail(f"{path}.imagePullSecrets[{index}].name", "Required value")
    if (pod.get("terminationGracePeriodSeconds") or 0) < 0:
        raise fail(f"{path}.terminationGracePeriodSeconds", "Invalid value: must be greater than or equal to 0")


def _validate_container(container: Json, path: str, volumes: set[str], fail: Any) -> None:  # noqa: C901 - one rule after another, as the server has them
    if not container.get("image"):
        raise fail(f"{path}.image", "Required value")
    if container["image"] != container["image"].strip():
        raise fail(
            f"{path}.image", f'Invalid value: "{container["image"]}": must not have leading or trailing whitespace'
        )
    for index, variable in enumerate(container.get("env") or []):
        place = f"{path}.env[{index}]"
        if not _ENV_NAME.fullmatch(variable["name"]):
            raise fail(f"{place}.name", f'Invalid value: "{variable["name"]}"')
        if variable.get("value") and variable.get("valueFrom"):
            raise fail(f"{place}.valueFrom", "Invalid value: may not be specified when `value` is not empty")
    paths: set[str] = set()
    for index, mount in enumerate(container.get("volumeMounts") or []):
        place = f"{path}.volumeMounts[{index}]"
        if mount["name"] not in volumes:
            raise fail(f"{place}.name", f'Not found: "{mount["name"]}"')
        if mount["mountPath"] in paths:
            raise fail(f"{place}.mountPath", f'Invalid value: "{mount["mountPath"]}": must be unique')
        if ".." in (mount.get("subPath") or "").split("/") or (mount.get("subPath") or "").startswith("/"):
            raise fail(f"{place}.subPath", "Invalid value: must be a relative path without '..'")
        paths.add(mount["mountPath"])
    resources = container.get("resources") or {}
    for kind in ("requests", "limits"):
        for name, quantity in (resources.get(kind) or {}).items():
            if not _QUANTITY.fullmatch(str(quantity)):
                # The real server fails to decode it.
                raise ApiError(
                    400,
                    "BadRequest",
                    f"quantities must match the regular expression: {path}.resources.{kind}[{name}]: {quantity}",
                )
            limit = (resources.get("limits") or {}).get(name)
            if kind == "requests" and limit is not None and quantity_value(quantity) > quantity_value(limit):
                raise fail(
                    f"{path}.resources.requests",
                    f'Invalid value: "{quantity}": must be less than or equal to {name} limit of {limit}',
                )


_UNITS = {
    "": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50, "Ei": 2.0**60,
}  # fmt: skip


def quantity_value(text: str | int) -> float:
    """Reads a quantity such as ``500m`` or ``2Gi``."""
    match = re.fullmatch(r"([+-]?[\d.]+(?:[eE][+-]?\d+)?)([A-Za-z]*)", str(text))
    assert match is not None, text
    return float(match[1]) * _UNITS[match[2]]


def _validate_data(body: Json, resource: Resource, fail: Any) -> None:
    total = 0
    for field in ("data", "binaryData", "stringData"):
        for key, value in (body.get(field) or {}).items():
            if len(key) > 253 or not _DATA_KEY.fullmatch(key):
                raise fail(
                    f"{field}[{key}]",
                    f'Invalid value: "{key}": a valid config key must consist of alphanumeric characters',
                )
            encoded = field == "binaryData" or (resource.kind == "Secret" and field == "data")
            try:
                total += len(base64.b64decode(value, validate=True) if encoded else value.encode())
            except binascii.Error:
                raise ApiError(400, "BadRequest", f"illegal base64 data in {field}.{key}") from None
    if total > _MAX_OBJECT:
        raise fail("data" if resource.kind == "Secret" else "", f"Too long: may not be more than {_MAX_OBJECT} bytes")
    is_docker_config = resource.kind == "Secret" and body.get("type") == "kubernetes.io/dockerconfigjson"
    if is_docker_config and ".dockerconfigjson" not in (body.get("data") or {}):
        raise fail("data[.dockerconfigjson]", "Required value")


def validate_update(old: Json, new: Json, resource: Resource) -> None:
    """Checks that nothing immutable was changed.

    Raises:
        ApiError: 422, naming the field.
    """
    name = old["metadata"]["name"]
    for field in ("name", "namespace", "uid", "creationTimestamp"):
        if new["metadata"].get(field) != old["metadata"].get(field):
            if field == "uid":
                wanted, found = new["metadata"].get("uid"), old["metadata"]["uid"]
                message = f"Precondition failed: UID in precondition: {wanted}, UID in object meta: {found}"
                raise ApiError(409, "Conflict", message)
            raise invalid(resource.kind, name, f"metadata.{field}", "field is immutable")
    if resource.kind == "Job":
        for field in ("template", "selector", "completions", "completionMode"):
            if new["spec"].get(field) != old["spec"].get(field):
                raise invalid("Job", name, f"spec.{field}", "field is immutable")
    if resource.kind in ("ConfigMap", "Secret") and old.get("immutable") and new.get("data") != old.get("data"):
        raise invalid(resource.kind, name, "data", "field is immutable when `immutable` is set")


def with_defaults(body: Json, resource: Resource) -> Json:
    """Returns a body with what the server fills in."""
    body = copy.deepcopy(body)
    if resource.kind == "Job":
        spec = body["spec"]
        for field, value in (
            ("backoffLimit", 6),
            ("completions", 1),
            ("parallelism", 1),
            ("suspend", False),
            ("completionMode", "NonIndexed"),
        ):
            spec.setdefault(field, value)
        _default_pod(spec["template"]["spec"])
        body["status"] = {}
    elif resource.kind == "Pod":
        _default_pod(body["spec"])
        body.setdefault("status", {"phase": "Pending"})
    elif resource.kind == "Secret":
        body.setdefault("type", "Opaque")
        for key, value in (body.pop("stringData", None) or {}).items():
            body.setdefault("data", {})[key] = base64.b64encode(value.encode()).decode()
    return body


def _default_pod(pod: Json) -> None:
    pod.setdefault("restartPolicy", "Always")
    pod.setdefault("terminationGracePeriodSeconds", 30)
    pod.setdefault("serviceAccountName", "default")
    for container in [*(pod.get("initContainers") or []), *pod["containers"]]:
        last = container["image"].rpartition("/")[2]
        mutable = "@" not in last and (":" not in last or last.endswith(":latest"))
        container.setdefault("imagePullPolicy", "Always" if mutable else "IfNotPresent")
        container.setdefault("resources", {})
        container.setdefault("terminationMessagePath", "/dev/termination-log")
