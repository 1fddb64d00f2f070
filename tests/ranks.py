"""Two or more processes that train as ranks of one gloo group, several jobs one after the other.

A process of its own imports the trainers once (8 CPU seconds) and forks the ranks before anything is computed.
"""

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.training.worker_messages import LoopResult, TrainJob
from tests.ports import free_port

ROOT = Path(__file__).parents[1]
WITHIN_S = 240


@dataclass(frozen=True)
class Task:
    """What all ranks do together."""

    job: TrainJob
    stop_at: int | None = None
    """Ask the loop to stop after this step, which makes a checkpoint."""


@dataclass(frozen=True)
class Ended:
    """How a task ended on rank 0."""

    result: LoopResult
    steps: tuple[int, ...]
    """Steps that were taken now, not by an earlier task of the same run."""

    @property
    def losses(self) -> list[float]:
        return [loss for _, loss in self.result.train_loss]


def train_on(world: int, tasks: Mapping[str, Task], folder: Path) -> dict[str, Ended]:
    """Do the tasks in their order. Fails with the traceback of the first rank that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tasks.pickle").write_bytes(pickle.dumps(dict(tasks)))
    program = f"import sys; from tests.ranks import main; sys.exit(main({str(folder)!r}, {world}, {free_port()}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=WITHIN_S
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    ended: dict[str, Ended] = pickle.loads((folder / "ended.pickle").read_bytes())
    return ended


def main(place: str, world: int, port: int) -> int:
    """Fork the ranks and wait for them; the first that fails ends the others."""
    import deepspeed  # noqa: F401, I001
    import torch

    import trl.trainer.sft_trainer  # noqa: F401

    from graftwork.training.objectives import trainer  # noqa: F401

    torch.set_num_threads(1)
    crew = [pid for rank in range(world) if (pid := _forked(Path(place), rank, world, port))]
    failed = 0
    while crew and not failed:
        pid, status = os.wait()
        crew.remove(pid)
        failed = os.waitstatus_to_exitcode(status)
    for pid in crew:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return failed


def _forked(folder: Path, rank: int, world: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _work(folder, rank, world, port)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _work(folder: Path, rank: int, world: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch.distributed as dist

    dist.init_process_group("gloo")
    tasks: dict[str, Task] = pickle.loads((folder / "tasks.pickle").read_bytes())
    ended = {name: _done(task) for name, task in tasks.items()}
    if rank == 0:
        (folder / "ended.pickle").write_bytes(pickle.dumps(ended))
    dist.destroy_process_group()


def _done(task: Task) -> Ended:
    from graftwork.training.loop import run_steps

    seen: list[int] = []

    def report(step: Any) -> bool:
        seen.append(step.step)
        return task.stop_at is None or step.step < task.stop_at

    result = run_steps(task.job, report)
    forget_strategy()
    return Ended(result, tuple(seen))


def forget_strategy() -> None:
    """Drop what accelerate and transformers keep for a process that trains once."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    for key in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        os.environ.pop(key, None)
