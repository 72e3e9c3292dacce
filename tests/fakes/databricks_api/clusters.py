"""Clusters and their policies, as far as a run needs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.fakes.databricks_api.errors import Refusal, invalid, no_endpoint, only


class Clusters:
    """``/api/2.1/clusters``: https://docs.databricks.com/api/workspace/clusters.

    Attributes:
        all: The clusters that exist, by id, as the API shows them.
        policies: The policies that exist: id -> field -> the value that it must have.
    """

    def __init__(self) -> None:
        self.all: dict[str, dict[str, Any]] = {
            "c-1": {"cluster_name": "shared", "spark_version": "15.4.x-scala2.12", "state": "RUNNING"}
        }
        self.policies: dict[str, dict[str, Any]] = {}

    def answer(self, method: str, name: str, values: Mapping[str, Any]) -> Any:
        """Answers a request."""
        if method != "GET" or name != "get":
            raise no_endpoint(method, f"/api/2.1/clusters/{name}")
        only(values, (), ("cluster_id",))
        self._exists(values["cluster_id"])
        return {"cluster_id": values["cluster_id"], **self.all[values["cluster_id"]]}

    def _exists(self, cluster_id: str) -> None:
        if cluster_id not in self.all:
            raise invalid(f"Cluster {cluster_id} does not exist")

    def check(self, new: Mapping[str, Any] | None, existing: str | None) -> None:
        """Checks what a task is to run on."""
        if existing is not None:
            self._exists(existing)
        if new is None:
            return
        spec = dict(new)
        policy_id = spec.get("policy_id")
        if policy_id is not None:
            if policy_id not in self.policies:
                raise Refusal(403, "PERMISSION_DENIED", f"You are not authorized to use cluster policy {policy_id}.")
            for name, value in self.policies[policy_id].items():
                if spec.get("apply_policy_default_values"):
                    spec.setdefault(name, value)
                if spec.get(name) != value:
                    raise invalid(
                        f"Cluster validation error: Validation failed for {name}, the value must be {value} "
                        f'(is "{spec.get(name)}")'
                    )
        if "spark_version" not in spec:
            raise invalid(
                "Cluster validation error: Missing required field: settings.cluster_spec.new_cluster.spark_version"
            )
        if not {"num_workers", "autoscale"} & set(spec) and not spec.get("is_single_node"):
            raise invalid("Cluster validation error: Missing required field: settings.cluster_spec.new_cluster.size")
        if not {"node_type_id", "instance_pool_id"} & set(spec) and "driver_node_type_id" not in spec:
            raise invalid(
                "Cluster validation error: Missing required field: settings.cluster_spec.new_cluster.node_type_id"
            )
