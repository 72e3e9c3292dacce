"""Downloads what MLflow keeps: artifacts of runs, registered models, files of Databricks' file system."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit


def download_artifacts(uri: str, folder: Path, tracking_uri: str | None) -> Path:
    """Downloads into an empty folder, and returns the local file or folder.

    The store is `tracking_uri`; None means the one that this process uses.

    Raises:
        Exception: Whatever MLflow raises.
    """
    import mlflow
    from mlflow import artifacts

    registry_uri = mlflow.get_registry_uri()
    if tracking_uri is not None and registry_uri == mlflow.get_tracking_uri():
        # No registry was set apart from the tracking store, so the models are where the runs are.
        registry_uri = tracking_uri
    if tracking_uri is not None and _is_plain_model(uri, registry_uri):
        uri = _model_location(uri, tracking_uri, registry_uri)
    local = artifacts.download_artifacts(
        artifact_uri=uri, dst_path=str(folder), tracking_uri=tracking_uri, registry_uri=registry_uri
    )
    return Path(local)


def _is_plain_model(uri: str, registry_uri: str) -> bool:
    parts = urlsplit(uri)
    return parts.scheme == "models" and not parts.netloc and not registry_uri.startswith(("databricks", "uc:"))


def _model_location(uri: str, tracking_uri: str, registry_uri: str) -> str:
    """Returns where a model's files are. MLflow would ask this process's registry, whatever registry it is given."""
    from mlflow import MlflowClient
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    client = MlflowClient(tracking_uri=tracking_uri, registry_uri=registry_uri)
    # A version's files may be those of a logged model, which is a separate model.
    while _is_plain_model(uri, registry_uri):
        model, path = ModelsArtifactRepository.split_models_uri(uri)  # type: ignore[no-untyped-call]  # MLflow has no types here
        found = get_model_name_and_version(client, model)  # type: ignore[no-untyped-call]
        if len(found) == 1:
            location = client.get_logged_model(found[0]).artifact_location
        else:
            location = client.get_model_version_download_uri(*found)
        uri = f"{location.rstrip('/')}/{path}" if path else location
    return uri


def check_store(tracking_uri: str) -> None:
    """Asks a store for one experiment, with the credentials in its URI.

    Raises:
        MlflowException: It refused, or could not be reached.
    """
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=tracking_uri).search_experiments(max_results=1)
