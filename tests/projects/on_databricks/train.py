"""Says hello, notes it in the MLflow run over plain HTTP, waits, and exits as it is told."""

import json
import os
import sys
import time
import urllib.request

name, code, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
print(f"hello {name}", flush=True)
print("to stderr", file=sys.stderr, flush=True)
tag = {"run_id": os.environ["MLFLOW_RUN_ID"], "key": "seen.by", "value": name}
request = urllib.request.Request(
    os.environ["MLFLOW_TRACKING_URI"] + "/api/2.0/mlflow/runs/set-tag",
    data=json.dumps(tag).encode(),
    headers={"Content-Type": "application/json"},
)
urllib.request.urlopen(request, timeout=30).close()
time.sleep(seconds)
sys.exit(code)
