"""Greets, and says where it runs."""

import os
import platform
import sys

print("hello", sys.argv[1])
print("on", platform.node(), "for the run", os.environ.get("MLFLOW_RUN_ID", "?"))
