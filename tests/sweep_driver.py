"""A sweep's driver in a process of its own, which tests kill.

Run as a program it runs a sweep, on the Ray at RAY_ADDRESS or a private one, and prints report or error as JSON.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from graftwork.errors import GraftworkError
from graftwork.storage.store import Store
from graftwork.tuning.spec import TuneSpec
from tests.process_races import ROOT
from tests.ray_cluster import environment
from tests.train_driver import end_with_parent

Record = dict[str, Any]


def start_sweep(spec: TuneSpec, more: Mapping[str, str] | None = None, address: str = "") -> "subprocess.Popen[str]":
    """Run a sweep on the Ray at `address`, without one on a private Ray of 2 CPUs."""
    ray = {"RAY_ADDRESS": address} if address else {}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "tests.sweep_driver", spec.model_dump_json()],
        cwd=ROOT,
        text=True,
        env={**environment(), "OMP_NUM_THREADS": "1", **(more or {}), **ray},
        stdin=pipe,
        stdout=pipe,
        stderr=subprocess.DEVNULL,
    )


def processes_of(driver: "subprocess.Popen[str]") -> list[psutil.Process]:
    """All that the driver has started."""
    return psutil.Process(driver.pid).children(recursive=True)


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that nobody has waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ledger_of(spec: TuneSpec) -> list[Record]:
    """The trials as they are written down; none before the first."""
    store = Store(spec.root)
    folders = [name for name in store.list("runs") if store.exists("runs", name, "trials.json")]
    found: list[Record] = store.read_json("runs", folders[0], "trials.json")["trials"] if folders else []
    return found


def folder_of(spec: TuneSpec) -> Path | None:
    """The sweep's folder on a local root, once it is there."""
    return next(Path(spec.root).glob(f"runs/{spec.name}-*"), None)


def main(spec_json: str) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    from graftwork.cluster.session import session
    from graftwork.tuning.run import tune

    try:
        with session("job" if os.environ.get("RAY_ADDRESS") else "local", num_cpus=2):
            report = tune(TuneSpec.model_validate_json(spec_json), on_progress=lambda p: _tell(p.trouble))
            print(json.dumps({"best_id": report.best_id, "trials": report.as_dict()["trials"]}))
    except GraftworkError as error:
        print(json.dumps({"error": type(error).__name__, "text": str(error)}))
        sys.exit(error.exit_code)


def _tell(trouble: str) -> None:
    if trouble:
        print(trouble, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
