"""A project, named once."""

from __future__ import annotations

from typing import Any

from prefect.blocks.core import Block
from pydantic import Field

from prefect_mlprojects.blocks import logos


class MLflowProject(Block):
    """Where a project is, which version of it runs, and with which defaults; ``block://NAME`` stands for it.

    Example:
        Name it once, and run it by its name::

            from prefect_mlprojects.blocks import MLflowProject

            MLflowProject(uri="https://github.com/acme/churn", version="v2").save("churn")
            run("block://churn", parameters={"alpha": 0.1})
    """

    _block_type_name = "MLflow Project"
    _block_type_slug = "mlflow-project"
    _logo_url = logos.MLFLOW
    _description = "Where an MLflow project is, which version of it runs, and with which defaults."

    uri: str = Field(
        title="URI", description="A folder, a git repository or a zip archive, with an optional #sub/directory."
    )
    version: str | None = Field(default=None, description="A branch, tag or commit of a git project.")
    entry_point: str = Field(default="main", description="The entry point that runs when no other is named.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Values when the call gives none.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Run options when the call gives none: env_manager, experiment_name, timeout …",
    )
