"""One worker on this machine as a child process: the loop of Ray Train's workers, without Ray's processes.

Ray and Ray Train take 14 s more to start and stop, on two cores. A single worker of this machine needs none of what
they do: no rendezvous, no placement on other nodes. The child has what a Ray Train worker has: a process group (of
one), the same threads and GPUs, a replacement when it dies, a notice on SIGTERM.
"""

import contextlib
import logging
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, Final

from graftwork.cluster.private_ray import python_path, ray_is_private, ray_is_up
from graftwork.errors import GraftworkError, Interrupted, RunError
from graftwork.planning.hardware import visible_gpus
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.loop import train_as_worker
from graftwork.training.ray_resources import never_back, resources_per_worker, workers_that_fit
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import LoopResult, TrainJob

MAX_FAILURES: Final = 3
"""Times that a lost worker is replaced without a new checkpoint in between."""
COLLECTIVE_TIMEOUT_S: Final = 300
"""A worker that waits longer for another gives up (torch's default is 1800)."""
START_TIMEOUT_S: Final = 120
"""For all workers to be placed and alive; Ray's default of 60 s is short for a busy machine of two cores."""
OOM_SCORE = 1000
"""As Ray's workers have it: where memory runs out the kernel ends the worker, and its driver goes on."""
LAST_OUTPUT = 500
"""Characters of a crashed worker's output that its error shows."""
COMMAND = "import sys; from graftwork.training.local_worker import main; main(int(sys.argv[1]))"

log = logging.getLogger("graftwork.training")


def newest_step(job: TrainJob) -> int:
    """Step of the run's newest complete checkpoint; 0 without one."""
    assert job.run is not None, "a trial is not resumed"
    mark = Checkpoints(job.run).newest()
    return mark.step if mark else 0


def require_wanted(job: TrainJob) -> None:
    """Raise Interrupted where the workers left with a checkpoint because the job is to end, not a machine's time."""
    reason = job.fence.stop_reason(job.spec.checkpoints.outage_s) if job.fence is not None else None
    if reason is not None:
        raise Interrupted(f"training {job.spec.name}", f"it was asked to end ({reason})", "", "")


def lost_worker(job: TrainJob, where: str, why: str) -> RunError:
    """Return the error of a run whose workers failed once too often."""
    return RunError(
        f"training {job.spec.name}",
        f"{where} failed: {why}",
        f"lost workers are replaced while checkpoints are made, {MAX_FAILURES} times without one",
        "run the same command: it continues from the last checkpoint",
    )


class WorkerLost(Exception):
    """The child process died, or failed with an error that another try may not meet. `cause`: an error of ours."""

    def __init__(self, why: str, cause: GraftworkError | None = None) -> None:
        self.why, self.cause = why, cause
        super().__init__(why)

    def __reduce__(self) -> tuple[type["WorkerLost"], tuple[str, GraftworkError | None]]:
        return type(self), (self.why, self.cause)


@dataclass(frozen=True)
class GpuReservation:
    """Resources of this machine that the worker gets."""

    gpus: str | None
    """CUDA_VISIBLE_DEVICES of the worker; None leaves the environment's."""
    niceness: int = 0
    """As the workers of the Ray have it: training leaves the CPU to an endpoint of the same Ray as before."""


def needs_ray_train(spec: TrainSpec) -> bool:
    """Return whether the run's workers are Ray Train's: more than one, or one that a Ray of others' may place."""
    return spec.num_workers > 1 or (ray_is_up() and not ray_is_private())


def fit_in_process(job: TrainJob) -> LoopResult:
    """Run the job in a child process of this machine and wait for its end. Raises what `fit` raises.

    A lost worker is replaced from the newest checkpoint, `MAX_FAILURES` times without a new one.
    """
    workers_that_fit(job.spec)
    failures, reached = 0, newest_step(job)
    with _reserve_resources(job.spec) as reservation:
        while True:
            try:
                result = _run_child(job, reservation)
            except WorkerLost as lost:
                before, reached = reached, newest_step(job)
                failures = failures + 1 if reached == before else 1
                log.debug("run of %s: its worker failed", job.spec.name, exc_info=lost)
                if failures > MAX_FAILURES:
                    raise lost.cause or lost_worker(job, "its worker", lost.why) from lost
                continue
            if not result.preempted:
                return result
            require_wanted(job)


@contextlib.contextmanager
def _reserve_resources(spec: TrainSpec) -> Iterator[GpuReservation]:
    """Reserve a worker's resources: in a private Ray from what its other stages use, else this machine's first GPUs.

    Raises ClusterError where the private Ray has no room in time.
    """
    if not ray_is_up():
        yield GpuReservation(",".join(visible_gpus()[: math.ceil(spec.gpus)]) if spec.gpus else None)
        return
    import ray

    room = resources_per_worker(spec)
    holder: Any = ray.remote(num_cpus=room["CPU"], num_gpus=room.get("GPU", 0))(_Holder).remote()
    try:
        try:
            found = ray.get(holder.reservation.remote(), timeout=min(START_TIMEOUT_S, spec.recovery.deadline_s))
        except ray.exceptions.GetTimeoutError:
            raise never_back(spec) from None
        yield found if spec.gpus else replace(found, gpus=None)
    finally:
        ray.kill(holder)


class _Holder:
    """Ray actor that has a worker's resources while a child process of the driver uses them."""

    def reservation(self) -> GpuReservation:
        """GPUs as Ray assigned them to this actor, and its niceness."""
        return GpuReservation(os.environ.get("CUDA_VISIBLE_DEVICES", ""), os.nice(0))


def _run_child(job: TrainJob, reservation: GpuReservation) -> LoopResult:
    """One child process from its start to its end. Raises WorkerLost, and the errors that the loop ends with."""
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryDirectory(prefix="gw-train-") as folder, Connection(ours.detach()) as wire:
        output = Path(folder) / "output.txt"
        with theirs, output.open("wb") as out:
            child = subprocess.Popen(
                [sys.executable, "-P", "-c", COMMAND, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=_environment(job.spec, reservation),
                cwd=folder,  # as Ray Train does: libraries that write into the current folder leave nothing behind
            )
        try:
            wire.send_bytes(pickle.dumps((job, reservation.niceness)))
            outcome = wire.recv()
        except (EOFError, ConnectionError):
            raise WorkerLost(_last_words(child.wait(), output)) from None
        finally:
            child.kill()  # Ctrl-C; a child that has sent its outcome has nothing left to do
            child.wait()
    if isinstance(outcome, LoopResult):
        return outcome
    raise outcome


def _environment(spec: TrainSpec, reservation: GpuReservation) -> dict[str, str]:
    """The child's environment: what Ray sets for a worker, where this process has not set it."""
    usual = {"OMP_NUM_THREADS": str(max(1, int(spec.cpus_per_worker))), "TOKENIZERS_PARALLELISM": "false"}
    devices = {"CUDA_VISIBLE_DEVICES": reservation.gpus} if reservation.gpus is not None else {}
    paths = [python_path(), *filter(None, sys.path)]
    return {**usual, **os.environ, **devices, "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, paths)))}


def _last_words(status: int, output: Path) -> str:
    """The reason for which a child ended without an outcome, from its exit status as `subprocess` reports it."""
    if status == -signal.SIGKILL:
        return "it ended with signal 9 (SIGKILL), as the kernel ends a process where memory runs out"
    how = f"it ended with exit code {status}"
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else "unknown"
        how = f"it ended with signal {-status} ({name})"
    tail = output.read_text(encoding="utf-8", errors="replace").strip()[-LAST_OUTPUT:]
    return f"{how}; its last output: {tail}" if tail else how


def main(handle: int) -> None:
    """The child: take a job from the wire, train, send what came of it. Never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the driver decides
    notice = threading.Event()

    def note(_number: int, _frame: FrameType | None) -> None:
        """Take the first SIGTERM as a notice to save and leave; the second one ends the process."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        notice.set()

    signal.signal(signal.SIGTERM, note)
    wire = Connection(handle)
    try:
        job, niceness = pickle.loads(wire.recv_bytes())
    except EOFError:
        os._exit(1)
    threading.Thread(target=_end_with_driver, args=(wire,), name="driver", daemon=True).start()
    os.nice(max(0, niceness - os.nice(0)))
    with contextlib.suppress(OSError):  # no such file but on Linux
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE), encoding="ascii")
    outcome: LoopResult | Exception
    try:
        _form_group_of_one(job.spec)
        outcome = train_as_worker(job, None, notice.is_set)
    except Exception as error:  # whatever it is: the driver replaces the worker, or reports the error
        traceback.print_exc()
        cause = error if isinstance(error, GraftworkError) else None
        outcome = WorkerLost(f"{type(error).__name__}: {error}"[-2000:], cause)
    with contextlib.suppress(OSError):
        wire.send(outcome)
    os._exit(0)


def _end_with_driver(wire: Connection) -> None:
    """End this process when its driver is gone, however that ended: another one may go on with the run."""
    with contextlib.suppress(EOFError, OSError):
        wire.recv_bytes()
    os._exit(1)


def _form_group_of_one(spec: TrainSpec) -> None:
    """A process group as Ray Train's: ZeRO and FSDP2 need one, and the Trainer takes one of several GPUs by its rank.

    Its store is this process' memory, and gloo is bound to loopback: no other machine can reach it.
    """
    import psutil
    import torch.distributed as dist

    os.environ.update(RANK="0", LOCAL_RANK="0", NODE_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cuda:0" if spec.gpus else "cpu"
    loopback = [name for name, found in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in found)]
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    if spec.gpus:
        import torch

        torch.cuda.set_device(0)
    dist.init_process_group(
        "nccl" if spec.gpus else "gloo",
        store=dist.HashStore(),  # type: ignore[attr-defined]  # torch 2.x does not list it in __all__
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
