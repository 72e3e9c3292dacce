"""Follows a slope downhill; needs nothing but Python, and tells MLflow's run id when MLflow gave one."""

import os
import sys

rounds, rate = int(sys.argv[1]), float(sys.argv[2])
position = 10.0
for number in range(1, rounds + 1):
    position -= rate * 2 * (position - 3)
    print(f"round {number}: {position:.4f}")
print("MLflow run:", os.environ.get("MLFLOW_RUN_ID", "none"))
