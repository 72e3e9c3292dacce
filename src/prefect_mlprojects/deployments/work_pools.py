"""Work pools: where the runs of deployments wait for a worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect_mlprojects.deployments.specification import DEFAULT_WORK_POOL
from prefect_mlprojects.exceptions import PrefectServerError

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import WorkPool


def default_job_variables(pool: WorkPool) -> dict[str, Any]:
    """What runs of our flow change of a work pool's job template by default.

    Prefect copies the working directory before each run of a deployment without pull steps. A process worker starts its runs
    in an empty one; a container starts in its image's, which may be ``/``.

    Args:
        pool: The work pool, as Prefect's client has it.
    """
    known = ((pool.base_job_template or {}).get("variables") or {}).get("properties") or {}
    if pool.type not in ("docker", "kubernetes") or "command" not in known:
        return {}
    return {"command": "sh -c 'cd \"$(mktemp -d)\" && exec prefect flow-run execute'"}


async def ensure_work_pool(client: PrefectClient, name: str | None, kind: str = "process") -> WorkPool:
    """Returns the work pool; the default pool is made when there is none of that name.

    Args:
        client: Prefect's client.
        name: The pool; None for the default one.
        kind: The type of a pool that is made.

    Raises:
        PrefectServerError: There is no pool of that name.
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
            raise PrefectServerError(
                f"There is no work pool {name!r}"
                + (f"; there are {', '.join(known)}" if known else "")
                + f". Make it with: prefect work-pool create {name} --type {kind}",
                api_url=str(client.api_url),
            ) from None
        try:
            return await client.create_work_pool(
                WorkPoolCreate(name=wanted, type=kind, description="Runs of MLflow projects (prefect-mlprojects).")
            )
        except ObjectAlreadyExists:
            # Another process made it a moment ago.
            return await client.read_work_pool(wanted)
