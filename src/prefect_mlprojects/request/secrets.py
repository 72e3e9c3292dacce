"""Divides what a run is asked for into what the Prefect server may store, and what stays in memory or is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from prefect_mlprojects._support.redaction import holds_secret, redact_url
from prefect_mlprojects._support.secrets import MASK, Secret, Withheld, disclose, has_secret, reveal, reveal_all
from prefect_mlprojects.backends import get_backend
from prefect_mlprojects.backends.configuration import is_block_reference, load_backend_config, split_config
from prefect_mlprojects.backends.docker.arguments import split_arguments
from prefect_mlprojects.exceptions import BackendError, ParameterError, Problem
from prefect_mlprojects.request import RunRequest, holds_secret_url
from prefect_mlprojects.request.check import RunSecrets
from prefect_mlprojects.spec.project import ProjectParameter
from prefect_mlprojects.spec.secrets import REFERENCE_HELP, is_reference, shown_value
from prefect_mlprojects.spec.values import list_text


def split_parameters(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Secret]]:
    """Divides parameter values into what may be stored, and those that are a `Secret` or a URL with one."""
    # Prefect stores JSON, as a form sends it, so a path becomes text.
    public = {str(key): _plain(reveal_all(value)) for key, value in values.items()}
    marked = {str(key) for key, value in values.items() if has_secret(value)}
    secret = {
        name: Secret(_text(value))
        for name, value in public.items()
        if name in marked or (isinstance(value, str) and (holds_secret(value) or MASK in value))
    }
    return public | {
        name: shown_value(reveal(value), declared=name in marked) for name, value in secret.items()
    }, secret


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        items = [_plain(each) for each in value]
        # As one text, in which secrets are found as in others.
        return list_text(items) if holds_secret_url(items) else items
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _text(value: Any) -> str:
    return list_text(value) if isinstance(value, list) else str(value)


def separate_config(
    backend: str, config: Mapping[str, Any] | str | None
) -> tuple[Mapping[str, Any] | str, Mapping[str, Any]]:
    """Returns a backend's configuration with ``***`` for its secrets, and the keys that hold them.

    A block's name is returned unchanged. Raises `BackendError` if the backend is unknown or the configuration is malformed.
    """
    chosen = get_backend(backend)
    if isinstance(config, str) and is_block_reference(config):
        return config, {}
    loaded = load_backend_config(config, backend=backend)
    public, secrets = split_config(chosen.parse_config(loaded))
    urls = {name: value for name, value in public.items() if name not in secrets and holds_secret_url(value)}
    return public | {name: _redacted(value) for name, value in urls.items()}, secrets | urls


def _redacted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _redacted(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(each) for each in value]
    return redact_url(value) if isinstance(value, str) else value


def storable_request(headline: str, request: RunRequest, secrets: RunSecrets) -> RunRequest:
    """Returns a request with what is only withheld from ``run()``, for whoever stores it on purpose; refuses its secrets.

    Raises:
        ParameterError: Container arguments or parameters hold secrets.
        BackendError: The backend's configuration does.
    """
    arguments = {name: disclose(value) for name, value in secrets.docker_args.items()}
    refuse_secret_arguments(headline, arguments)
    refuse_secret_parameters(headline, secrets.parameters)
    config = {name: disclose(value) for name, value in secrets.backend_config.items()}
    if hidden := {name: value for name, value in config.items() if has_secret(value) or holds_secret_url(value)}:
        raise _stored_secrets(request.backend, hidden)
    written = request.backend_config
    stored = {**written, **config} if isinstance(written, Mapping) else written
    return replace(request, backend_config=stored, docker_args={**(request.docker_args or {}), **arguments} or None)


def storable_options(headline: str, options: Mapping[str, Any]) -> None:
    """Refuses run options with secrets, which the Prefect server would store; raises as `storable_request` does."""
    config = options.get("backend_config")
    if config:
        secrets = separate_config(str(options.get("backend") or "local"), config)[1]
        request = RunRequest("", backend=str(options.get("backend") or "local"), backend_config={})
        storable_request(headline, request, RunSecrets(backend_config=secrets))
    refuse_secret_arguments(headline, options.get("docker_args"))


def _stored_secrets(backend: str, names: Iterable[str]) -> BackendError:
    return BackendError(
        f"The configuration of the {backend} backend holds secrets ({', '.join(names)}), which would be stored on the Prefect "
        "server. Keep them in a block and give its name here, or give the configuration to run(), which keeps them in memory.",
        backend=backend,
    )


def refuse_secret_arguments(headline: str, docker_args: Mapping[str, Any] | None) -> None:
    """Raises `ParameterError` for container arguments with secrets, which the Prefect server would store."""
    kept = split_arguments(docker_args or {})[1]
    if secrets := [name for name, value in kept.items() if has_secret(disclose(value))]:
        fix = "give the variable's name alone (e=NAME): its value is copied from the environment where the run executes"
        problem = "the container argument {!r} holds a secret, which would be stored on the Prefect server"
        raise ParameterError(headline, [Problem(problem.format(name), parameter=name, fix=fix) for name in secrets])


def refuse_secret_parameters(headline: str, names: Iterable[str], *, declared: bool = False) -> None:
    """Raises `ParameterError` for parameters whose values hold a secret, which the Prefect server would store.

    `declared` says that the project declares them as secret.
    """
    problem = "the value of parameter '{}' is secret, and would be stored on the Prefect server"
    fix = f"give {REFERENCE_HELP}"
    if not declared:
        fix = f"declare the parameter with 'secret: true' in the MLproject file, and {fix}"
    if problems := [Problem(problem.format(name), parameter=name, fix=fix) for name in names]:
        raise ParameterError(headline, problems)


def withhold(
    request: RunRequest, secrets: RunSecrets, declared: Mapping[str, ProjectParameter] | None
) -> tuple[RunRequest, RunSecrets]:
    """Moves the values of secret parameters from a request to its secrets.

    Without the declarations (None: the project is not fetched yet) that is each value; the flow stores those that are not secret
    as soon as it has read the project.
    """
    kept = dict(secrets.parameters)
    for name, value in (request.parameters or {}).items():
        if name in kept or value is None or (isinstance(value, str) and is_reference(value)):
            continue
        if declared is None and not isinstance(value, bool):
            kept[name] = Withheld(_text(value))
        elif declared is not None and name in declared and declared[name].secret:
            kept[name] = Secret(_text(value))
    shown = {name: MASK for name in kept if name not in secrets.parameters}
    parameters = {**(request.parameters or {}), **shown}
    return replace(request, parameters=parameters), replace(secrets, parameters=kept)
