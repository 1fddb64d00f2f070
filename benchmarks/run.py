"""Runs the benchmarks, each in a process of its own, and tells which goals are met.

    python -m benchmarks.run                   all of them, about 70 minutes on two idle cores
    python -m benchmarks.run zipf start        these
    python -m benchmarks.run --table           nothing: only the table of what benchmarks/results holds

Each writes `benchmarks/results/NAME.json` ({run_info, result, meta_info}) and runs alone as `python -m
benchmarks.NAME`; `--help` there says what it measures. Goals: benchmarks/goals.py. Figures of a busy machine mean
little: every file records the load average before and after.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.table import rows, shown

ROOT = Path(__file__).parents[1]
BENCHMARKS = (
    "start",
    "plan_cold",
    "job_status",
    "engine_decode",
    "engine_decode_bf16",
    "adapter_load",
    "swap_stall",
    "prompt_flood",
    "zipf",
    "adapter_kinds",
    "memory_plan",
    "memory_runs",
    "training_speed",
    "ray_overhead",
    "checkpoint_stall",
    "advice",
    "rag",
    "experiment",
    "sequential",
    "latency_runs",
    "strategies",
    "together",
    "search",
    "asha",
    "early_stops",
    "lora_without_regret",
    "tune_overhead",
    "live_changes",
)
RECORDINGS = ("sweep_curves", "house")
"""Taken by hand, and no timing: losses that others are computed from (two hours), and the structure of the code."""
TIMEOUT_S = 900


def run(name: str) -> bool:
    """Runs one; whether it ended well."""
    print(f"== {name}", flush=True)
    began = time.perf_counter()
    try:
        code = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=ROOT, timeout=TIMEOUT_S).returncode
    except subprocess.TimeoutExpired:
        code = None
    said = "took longer than it may" if code is None else f"exit {code}" if code else "done"
    print(f"== {name}: {said} after {time.perf_counter() - began:.0f} s", flush=True)
    return code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    failed = [] if args.table else [name for name in args.names or BENCHMARKS if not run(name)]
    print(shown(rows()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
