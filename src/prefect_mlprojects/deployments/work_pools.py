"""Work pools: the default one, and what a job template lets deployments and runs set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect_mlprojects.exceptions import InvalidInputError

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import WorkPool

DEFAULT_WORK_POOL = "mlprojects"
RESTRICTED_TEMPLATE: dict[str, Any] = {
    "job_configuration": {name: f"{{{{ {name} }}}}" for name in ("name", "labels", "stream_output")},
    "variables": {
        "type": "object",
        "properties": {
            "name": {"title": "Name", "type": "string", "description": "Name of the job."},
            "labels": {"title": "Labels", "type": "object", "additionalProperties": {"type": "string"}},
            "stream_output": {"title": "Stream Output", "type": "boolean", "default": True},
        },
        "additionalProperties": False,
    },
}
"""The job template of a process pool without ``command``, ``env`` and ``working_dir``, by which a job variable could replace the
flow, its settings and its policy."""
_OPEN = ("command", "env", "working_dir")


def open_template_note(pool: WorkPool) -> str | None:
    """Returns a line about a process pool whose job template lets deployments and runs set commands and variables, else None."""
    template = pool.base_job_template or {}
    known = (template.get("variables") or {}).get("properties") or {}
    if pool.type != "process" or not (found := [name for name in _OPEN if name in known]):
        return None
    return (
        f"Whoever starts runs on the work pool '{pool.name}' may set their {', '.join(found)}. `--restrict-pool` prevents that; "
        "see the part about shared workers in the documentation of deployments."
    )


async def restrict_work_pool(client: PrefectClient, pool: WorkPool) -> WorkPool:
    """Gives a process pool the template without commands and variables.

    Raises `InvalidInputError` for another type, or a template that was changed by hand.
    """
    from prefect.client.schemas.actions import WorkPoolUpdate

    configuration = (pool.base_job_template or {}).get("job_configuration") or {}
    changed = [name for name, value in configuration.items() if value != f"{{{{ {name} }}}}"]
    if pool.type != "process" or changed:
        why = f"its type is {pool.type}" if pool.type != "process" else f"its job template sets {', '.join(changed)}"
        raise InvalidInputError(
            f"The work pool '{pool.name}' can't be restricted: {why}. Remove command, env and working_dir from the variables of "
            "its job template by hand: `prefect work-pool update --base-job-template FILE`."
        )
    await client.update_work_pool(pool.name, WorkPoolUpdate(base_job_template=RESTRICTED_TEMPLATE))
    return await client.read_work_pool(pool.name)


def default_job_variables(pool: WorkPool) -> dict[str, Any]:
    """Returns overrides that our flow needs in a work pool's job template.

    Prefect copies the working directory before each run of a deployment without pull steps. A process worker starts runs in
    an empty one, but a container starts in its image's, which may be ``/``.
    """
    known = ((pool.base_job_template or {}).get("variables") or {}).get("properties") or {}
    if pool.type not in ("docker", "kubernetes") or "command" not in known:
        return {}
    return {"command": "sh -c 'cd \"$(mktemp -d)\" && exec prefect flow-run execute'"}


async def ensure_work_pool(client: PrefectClient, name: str | None, kind: str = "process") -> WorkPool:
    """Returns a work pool; creates the default one, of type `kind`, if it does not exist.

    Raises `InvalidInputError` if no other pool has the name.
    """
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.client.schemas.filters import WorkPoolFilter
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    wanted = name or DEFAULT_WORK_POOL
    try:
        return await client.read_work_pool(wanted)
    except ObjectNotFound:
        if name is not None and name != DEFAULT_WORK_POOL:
            known = [pool.name for pool in await client.read_work_pools(work_pool_filter=WorkPoolFilter())]
            raise InvalidInputError(
                f"No work pool {name!r} exists"
                + (f"; known: {', '.join(known)}" if known else "")
                + f". Create it with `prefect work-pool create {name} --type {kind}`."
            ) from None
        try:
            return await client.create_work_pool(
                WorkPoolCreate(
                    name=wanted,
                    type=kind,
                    description="Runs of MLflow projects (prefect-mlprojects).",
                    base_job_template=RESTRICTED_TEMPLATE if kind == "process" else {},
                )
            )
        except ObjectAlreadyExists:
            # Another process created it in the meantime.
            return await client.read_work_pool(wanted)
