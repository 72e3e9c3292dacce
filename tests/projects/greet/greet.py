"""Greets, on both streams."""

import sys

name, times = sys.argv[1], int(sys.argv[2])
for _ in range(times):
    print(f"hello {name}")
print("done", file=sys.stderr)
