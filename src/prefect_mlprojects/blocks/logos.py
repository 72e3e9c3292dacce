"""The pictures of block types in Prefect's UI: those that Prefect's own packages show for the same services."""

from __future__ import annotations

from typing import Any

# Any: Prefect declares a URL's type, and makes a text one itself.
GIT: Any = "https://git-scm.com/images/logos/downloads/Git-Icon-1788C.png"
DOCKER: Any = "https://cdn.sanity.io/images/3ugk85nk/production/14a315b79990200db7341e42553e23650b34bb96-250x250.png"
KUBERNETES: Any = "https://raw.githubusercontent.com/PrefectHQ/prefect/420d0d6a78bb6df1fc18bcf188fdad43c1d22ea9/assets/block-logos/kubernetes.png"
DATABRICKS: Any = (
    "https://images.ctfassets.net/gm98wzqotmnx/5GTHI1PH2dTiantfps6Fnc/1c750fab7f4c14ea1b93a62b9fea6a94/"
    "databricks_logo_icon_170295.png?h=250"
)
MLFLOW: Any = "https://raw.githubusercontent.com/mlflow/mlflow/refs/heads/master/assets/logo.svg"
