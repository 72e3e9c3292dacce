"""A Databricks workspace over HTTP, for the real SDK: state, strict requests, real failures, and tasks that really run.

It speaks the REST API of https://docs.databricks.com/api/workspace: current user, OAuth for service principals, secrets, workspace
files, Unity Catalog volume files, DBFS, clusters (get), and Jobs 2.1/2.2 runs submit, get, get-output, cancel and list. Requests
are checked against the SDK's own types, fields that these do not know included. A submitted ``spark_python_task`` runs as a
process of this machine with the files that were uploaded; its libraries are installed, its secrets can be read, a repository of
``git_source`` is checked out, and calls of the MLflow API are passed on to a real MLflow server.

Its limits:

- No Spark and no machines: a cluster is a name; the driver is this machine, with this Python, and dies with its run.
- Nothing is mounted: ``/Workspace/``, ``/Volumes/`` and ``/dbfs/`` in a task's arguments are replaced by folders below ``root``.
  A program that has such a path from elsewhere does not find it.
- The driver's credentials for its own workspace are variables; on a cluster they come from the runtime.
- Permissions exist for home folders, runs and secret scopes only; every user may make clusters and write to every volume.
- Libraries are PyPI packages; others are taken and ignored. Cluster policies know ``fixed`` values only.
- Files go up in one piece: no multipart uploads, and so none above 50 MB on volumes. MLflow artifacts are not stored.
- Times are much shorter than the real ones, and what a failure looks like is written after Databricks' documentation.
"""

from tests.fakes.databricks_api.errors import Refusal
from tests.fakes.databricks_api.workspace import USER, FakeWorkspace

__all__ = ["USER", "FakeWorkspace", "Refusal"]
