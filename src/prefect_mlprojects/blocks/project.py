"""A project, named once."""

from __future__ import annotations

from typing import Any

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, field_validator

from prefect_mlprojects._support.redaction import holds_secret
from prefect_mlprojects.blocks import logos
from prefect_mlprojects.runs.request import options_of, secret_uri_problem


def _option_fields() -> dict[str, Any]:
    fields = {
        option.name: {**option.json_schema(), "position": place} for place, option in enumerate(options_of("block"))
    }
    # Prefect knows a block's schema by its digest, which must not depend on which packages add backends here.
    del fields["backend"]["enum"]
    return fields


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

    model_config = ConfigDict(hide_input_in_errors=True)

    uri: str = Field(
        title="URI", description="A folder, a git repository or a zip archive, with an optional #sub/directory."
    )
    version: str | None = Field(default=None, description="A branch, tag or commit of a git project.")
    entry_point: str = Field(default="main", description="The entry point that runs when no other is named.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Values when the call gives none.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Run options when the run has none: env_manager, experiment_name, timeout …",
        json_schema_extra={"properties": _option_fields()},
    )

    @field_validator("uri")
    @classmethod
    def _holds_no_secret(cls, uri: str) -> str:
        if holds_secret(uri):
            # Everybody who may read the block sees its URI.
            raise ValueError(str(secret_uri_problem(uri)))
        return uri
