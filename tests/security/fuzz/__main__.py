"""``scripts/fuzz``: fuzzes for a while, and prints the smallest input of each failure."""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from hypothesis import HealthCheck, given, settings
from tests.security.fuzz.targets import TARGETS


def main() -> int:
    """Fuzzes the chosen targets in turns; returns 1 if any failed."""
    parser = argparse.ArgumentParser(description="Fuzz what reads the files and values of other people.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default: 60)")
    options = parser.parse_args()
    if unknown := [name for name in options.targets if name not in TARGETS]:
        parser.error(f"no target {unknown[0]!r}")
    end, failed, rounds = time.monotonic() + options.minutes * 60, set[str](), 0
    while time.monotonic() < end:
        rounds += 1
        for name in options.targets or TARGETS:
            if name in failed or time.monotonic() > end:
                continue
            function, strategies = TARGETS[name]
            run = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))(
                given(**strategies)(function)
            )
            try:
                run()
            except Exception:
                traceback.print_exc()
                failed.add(name)
        print(f"round {rounds}: {', '.join(sorted(failed)) or 'nothing'} failed", file=sys.stderr, flush=True)
    return 1 if failed else 0


sys.exit(main())
