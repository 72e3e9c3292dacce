"""Where projects come from: URI -> working copy."""

from prefect_mlprojects.sources.base import Source, SourceKind, WorkingCopy, describe_working_copy
from prefect_mlprojects.sources.detection import absolute_uri, detect_source

__all__ = ["Source", "SourceKind", "WorkingCopy", "absolute_uri", "describe_working_copy", "detect_source"]
