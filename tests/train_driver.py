"""A driver in a process of its own, whose workers write down every row that they take.

Run as a program it trains a spec on the Ray at RAY_ADDRESS and prints the report, or the error, as JSON.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.training.objectives.protocol import WrappedRows
from graftwork.training.objectives.rows import PreparedData
from graftwork.training.spec import TrainSpec
from tests.process_races import ROOT
from tests.ray_cluster import environment

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CountedRows(WrappedRows):
    """Rows that note in a file of each worker process which of them make a batch."""

    folder: Path

    def collate(self, indices: Sequence[int], pad_id: int) -> "dict[str, torch.Tensor]":
        import torch.distributed as dist

        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        line = {"at": time.time(), "rank": rank, "world": world, "rows": [int(index) for index in indices]}
        with open(self.folder / f"{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        return super().collate(indices, pad_id)


def start_driver(
    spec: TrainSpec, address: str, noted: Path, extra: Mapping[str, str] | None = None
) -> "subprocess.Popen[str]":
    """Train a spec on the Ray at `address`; `noted` takes the rows."""
    noted.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.train_driver", spec.model_dump_json(), str(noted)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment(), "OMP_NUM_THREADS": "1", **(extra or {}), "RAY_ADDRESS": address},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def last_words(driver: "subprocess.Popen[str]", within_s: float) -> dict[str, Any]:
    """The report, or the error, of a driver that comes to its end."""
    driver.wait(within_s)
    assert driver.stdout is not None, "piped"
    lines = [line for line in driver.stdout.read().splitlines() if line.startswith("{")]
    assert lines, f"the driver ended with {driver.returncode} and said nothing"
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def end_with_parent() -> None:
    """End this process when the one that started it is gone, however that ended."""
    sys.stdin.read()
    os._exit(1)


def main(spec_json: str, noted: str) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    from graftwork.cluster.session import session
    from graftwork.errors import GraftworkError
    from graftwork.training import run
    from graftwork.training.objectives.rows import prepare

    def counted(spec: TrainSpec) -> PreparedData:
        data = prepare(spec)
        return replace(data, train=CountedRows(data.train, Path(noted)))

    setattr(run, "prepare", counted)  # noqa: B010  # mypy holds the module's names for fixed
    try:
        with session("job"):
            print(json.dumps(run.train(TrainSpec.model_validate_json(spec_json)).as_dict()))
    except GraftworkError as error:
        print(json.dumps({"error": type(error).__name__, "text": str(error)}))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
