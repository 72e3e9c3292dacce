"""``mlprojects completion``, and what shells complete: names in the project, and on a Prefect server that is running.

A server is never started for a completion, and whatever fails completes nothing. Prefect is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import split_arg_string

from prefect_mlprojects.cli.tables import pass_on

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from prefect_mlprojects.server.rest import RestApi

_SECONDS = 1.5
"""How long a server may take to answer."""

_RUNS = 50
_Complete = Callable[[click.Context, click.Parameter, str], "list[CompletionItem]"]


def _completer(find: Callable[[click.Context, str], Iterator[tuple[str, str]]]) -> _Complete:
    """Returns what click calls for an argument; `find` yields values and their descriptions."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001 - click's signature
        from click.shell_completion import CompletionItem

        try:
            found = dict(find(context, incomplete))
        except Exception:  # noqa: BLE001 - a shell has no place for an error
            return []
        return [CompletionItem(value, help=text) for value, text in found.items() if value.startswith(incomplete)]

    return complete


def _running_api() -> RestApi:
    """Returns the API of the configured Prefect server, or of the embedded one if it runs; raises `LookupError`."""
    from prefect_mlprojects.server.process import configured_api, server_status
    from prefect_mlprojects.server.rest import RestApi

    api_url = configured_api()
    if api_url is None:
        found = server_status()
        if found.address is None or not found.healthy:
            raise LookupError
        api_url = found.address.api_url
    return RestApi(api_url, _SECONDS)


def _runs(context: click.Context, incomplete: str) -> Iterator[tuple[str, str]]:  # noqa: ARG001 - the signature of finders
    from prefect_mlprojects.runs.references import LAST, newest_runs, short_ids

    records = newest_runs(_running_api(), limit=_RUNS)
    ids = short_ids(records)
    yield LAST, "the run that was started last"
    for record in records:
        yield ids[record.id], f"{record.name} {record.shown_status}"
    for record in records if incomplete else ():
        yield record.name, record.shown_status


def _deployments(context: click.Context, incomplete: str) -> Iterator[tuple[str, str]]:  # noqa: ARG001 - the signature of finders
    from prefect_mlprojects.request import FLOW_NAME

    for each in _running_api().post("/deployments/filter", {"flows": {"name": {"any_": [FLOW_NAME]}}, "limit": 200}):
        yield each["name"], f"work pool {each['work_pool_name']}" if each.get("work_pool_name") else "served"


def _work_pools(context: click.Context, incomplete: str) -> Iterator[tuple[str, str]]:  # noqa: ARG001 - the signature of finders
    for each in _running_api().post("/work_pools/filter", {"limit": 200}):
        yield each["name"], str(each["type"])


def _entry_points(context: click.Context, incomplete: str) -> Iterator[tuple[str, str]]:  # noqa: ARG001 - the signature of finders
    for name, entry_point in _project_of(context).entry_points.items():
        yield name, entry_point.command.strip().partition("\n")[0]


def _parameters(context: click.Context, incomplete: str) -> Iterator[tuple[str, str]]:  # noqa: ARG001 - the signature of finders
    words = _words_before(context)
    if deployment := words.get("deployment"):
        from prefect_mlprojects.request import FLOW_NAME

        found = _running_api().get(f"/deployments/name/{FLOW_NAME}/{deployment}")
        fields = found["parameter_openapi_schema"]["properties"]["parameters"]["properties"]
        yield from ((f"{name}=", str(field.get("type", ""))) for name, field in fields.items())
        return
    entry_point = _project_of(context).entry_points[str(words.get("entry_point") or "main")]
    for name, parameter in entry_point.parameters.items():
        yield f"{name}=", str(parameter.type)


def _project_of(context: click.Context) -> Any:
    from prefect_mlprojects.spec import load_project

    words = _words_before(context)
    uris = words.get("uris") or [words["uri"] or "."]
    return load_project(str(uris[0]).split("#", 1)[0])


def _words_before(context: click.Context) -> dict[str, Any]:
    """Returns the parameters in the words before the option that is completed; click gives up at one without a value."""
    words = split_arg_string(os.environ.get("COMP_WORDS", ""))
    words = words[words.index(str(context.info_name)) + 1 :]
    last = max((index for index, word in enumerate(words) if word.startswith("-")), default=len(words))
    return context.command.make_context(context.info_name, words[:last], resilient_parsing=True).params


complete_runs = _completer(_runs)
complete_deployments = _completer(_deployments)
complete_work_pools = _completer(_work_pools)
complete_entry_points = _completer(_entry_points)
complete_parameters = _completer(_parameters)


def complete_values(values: Callable[[], tuple[str, ...]]) -> _Complete:
    """Returns what completes a closed set of values."""
    return _completer(lambda _context, _incomplete: ((name, "") for name in values()))


def complete_blocks(slug: str) -> _Complete:
    """Returns what completes the names of a type's blocks."""

    def find(context: click.Context, incomplete: str) -> Iterator[tuple[str, str]]:  # noqa: ARG001 - the signature of finders
        wanted = {"block_types": {"slug": {"any_": [slug]}}, "include_secrets": False, "limit": 200}
        for each in _running_api().post("/block_documents/filter", wanted):
            if each.get("name"):
                yield each["name"], slug

    return _completer(find)


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print the completion script of a shell.

    For bash: add `eval "$(mlprojects completion bash)"` to ~/.bashrc.
    """
    from click.shell_completion import BashComplete, FishComplete, ZshComplete

    from prefect_mlprojects.cli import group

    completion = {"bash": BashComplete, "fish": FishComplete, "zsh": ZshComplete}[shell]
    pass_on(completion(group, {}, "mlprojects", "_MLPROJECTS_COMPLETE").source())
