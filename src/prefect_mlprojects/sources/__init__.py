"""Where projects come from: URI -> working copy."""

from prefect_mlprojects.sources.base import Source, SourceKind, WorkingCopy
from prefect_mlprojects.sources.detection import detect_source

__all__ = ["Source", "SourceKind", "WorkingCopy", "detect_source"]
