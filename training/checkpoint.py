"""Checkpoints of a run on its store: complete once their marker is there, which records the sha256 of every file.

    runs/<run>/checkpoints/checkpoint-<step>/
        adapter_config.json, adapter_model.safetensors (all weights: config.json, model*.safetensors),
        optimizer.pt, scheduler.pt, rng_state_<rank>.pth, trainer_state.json, COMMITTED.json
        under DeepSpeed in place of optimizer.pt: latest, global_step<step>/ with the shards of each rank

On a local root the trainer writes in place; on S3 it writes to a cache folder of its machine, which
`AsyncCheckpointSaver` uploads. The .pt files are read with `weights_only=True` (by transformers), so nothing in them is
executed; DeepSpeed 0.19 unpickles its own shards, so a root with such runs belongs to people who may run code.
"""

import contextlib
import hashlib
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from graftwork.cluster.jobs.fencing import Fence, SupersededError
from graftwork.errors import GraftworkError, RunError, StorageError
from graftwork.storage.local import files_under
from graftwork.storage.store import RunPaths
from graftwork.training.spec import CheckpointSpec
from graftwork.training.worker_messages import StepLog, all_gather_object, gather_results, rank_and_world

_BLOCK = 2**20
Shapes = Counter[tuple[int, ...]]
"""Number of tensors of each shape in a checkpoint."""


@dataclass(frozen=True)
class FileSum:
    """A file's content, as the marker records it."""

    size_bytes: int
    sha256: str


def checksum_of(path: Path, *, sync: bool = False) -> FileSum:
    """Size and sha256, read in blocks (which lets other threads compute). sync: the file is on the disk afterwards."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return FileSum(size, digest.hexdigest())


def differences(folder: Path, files: Mapping[str, FileSum]) -> list[str]:
    """A phrase for each file that is missing or other than recorded."""
    found = []
    for name, expected in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != expected.size_bytes:
            found.append(f"{name} has {path.stat().st_size} bytes of {expected.size_bytes}")
        elif checksum_of(path) != expected:
            found.append(f"{name} has another sha256")
    return found


def shapes_of(model: Any) -> Shapes:
    """Shapes of all trained tensors: whole ones, also where a strategy shards them."""
    return Counter(tuple(getattr(p, "ds_shape", p.shape)) for p in model.parameters() if p.requires_grad)


def _values(shapes: Shapes) -> int:
    """Number of values in tensors of these shapes: transformers 5.24 saves fused experts as one tensor an expert."""
    return sum(count * math.prod(shape) for shape, count in shapes.items())


def faults_of_weights(folder: Path, trained: Shapes) -> list[str]:
    """Why the saved weights are not those of a model in training: too few, of other shapes, not finite, all zero."""
    import torch
    from safetensors import safe_open

    shapes: Shapes = Counter()
    nonzero, faults = False, []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # no mapping: it can't be iterated over
                tensor = tensors.get_tensor(name)
                shapes[tuple(tensor.shape)] += 1
                nonzero = nonzero or bool(tensor.any())
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    faults.append(f"{name} is not finite")
    lacking, other = trained - shapes, shapes - trained
    apart: Shapes = Counter({shape: count for shape, count in lacking.items() if len(shape) == 3})  # of fused experts
    if apart != lacking or _values(apart) > _values(other):
        shape, count = next(iter((lacking - apart or lacking).items()))
        faults.append(
            f"{lacking.total()} of {trained.total()} trained tensors are missing, e.g. {count} of shape {shape}"
        )
    if not nonzero:
        faults.append("every number is 0")
    return faults


MARKER = "COMMITTED.json"
PREFIX = "checkpoint-"
_NOT_NEEDED = ("training_args.bin", "README.md", "zero_to_fp32.py", "zero_to_torch.py")
"""A pickle that nothing reads; a model card without content; copies of DeepSpeed's programs."""


@dataclass(frozen=True)
class CheckpointMark:
    """Content of the marker: what the trainer's own files do not say."""

    step: int
    elapsed_s: float
    """Seconds of training up to this step, over all attempts."""
    world_size: int
    strategy: str = "ddp"
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Figures of this step, `loss` and what was evaluated at it."""
    files: Mapping[str, FileSum] = field(default_factory=dict)
    """By path in the checkpoint's folder."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run. All paths go through the run's store."""

    run: RunPaths

    def work_dir(self) -> Path:
        """Folder of this machine that the trainer writes to."""
        folder = self.run.store.local_dir(*self.run.checkpoints())
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def folder(self, step: int) -> Path:
        """Where on this machine a checkpoint's files are written and fetched to."""
        return self.work_dir() / f"{PREFIX}{step}"

    def newest(self) -> CheckpointMark | None:
        """The last complete checkpoint; None before the first."""
        return next(iter(self.marks(last=1)), None)

    def marks(self, last: int | None = None) -> list[CheckpointMark]:
        """Complete checkpoints, by step; with `last` only so many of the newest."""
        store, found = self.run.store, []
        names = [name for name in store.list(*self.run.checkpoints()) if name.startswith(PREFIX)]
        numbers = [int(number) for name in names if (number := name.removeprefix(PREFIX)).isdigit()]
        steps = sorted(step for step in numbers if store.exists(*self._key(step), MARKER))
        for step in steps if last is None else steps[len(steps) - min(last, len(steps)) :]:
            record = store.read_json(*self._key(step), MARKER)
            files = {name: FileSum(**sum_) for name, sum_ in record["files"].items()}
            found.append(CheckpointMark(**{**record, "files": files}))
        return found

    def fetch(self, mark: CheckpointMark) -> list[str]:
        """Bring a complete checkpoint's files to its folder of this machine. Returns what is not as the marker says."""
        folder = self.folder(mark.step)
        if not self.run.store.is_local:
            there = {"/".join(parts) for parts in self.run.store.tree(*self._key(mark.step))}
            for name in sorted(there & mark.files.keys()):
                self.run.store.download_file(folder / name, *self._key(mark.step), *name.split("/"))
        return differences(folder, mark.files)

    @contextlib.contextmanager
    def model_files(self, step: int) -> Iterator[Path]:
        """A folder with the adapter of a complete checkpoint, or all weights with their config, and nothing else.

        Raises StorageError when the checkpoint is missing or a file is damaged.
        """
        mark = next((mark for mark in self.marks() if mark.step == step), None)
        if mark is None:
            raise StorageError(
                f"checkpoint {self.run.store.path(*self._key(step))}",
                f"it has no {MARKER}",
                "a checkpoint is complete once its marker is written",
                "run the same command: it continues from the newest complete checkpoint",
            )
        files = {name: found for name, found in mark.files.items() if is_of_model(name)}
        with tempfile.TemporaryDirectory(prefix="gw-adapter-") as name:
            folder = Path(name)
            for file in files:
                self.run.store.download_file(folder / file, *self._key(step), file)
            if found := differences(folder, files):
                raise StorageError(
                    f"adapter of {self.run.store.path(*self._key(step))}",
                    "; ".join(found),
                    "a file must have the sha256 that its checkpoint recorded",
                    f"run the same command after deleting {MARKER} there: the last steps are taken again",
                )
            yield folder

    def clear_unfinished(self) -> list[CheckpointMark]:
        """Remove what a killed run left without a marker; return the complete ones. Rank 0, before training."""
        marks = self.marks()
        for name in set(self.run.store.list(*self.run.checkpoints())) - {f"{PREFIX}{mark.step}" for mark in marks}:
            self.run.store.delete(*self.run.checkpoints(name))
        return marks

    def clear_cache(self) -> None:
        """Remove what a killed run left in this machine's cache (S3 only). One rank a machine, before training."""
        if not self.run.store.is_local:
            shutil.rmtree(self.work_dir(), ignore_errors=True)

    def send(self, step: int) -> dict[str, FileSum]:
        """Bring a checkpoint's files from this machine's folder to the store. Returns their sums."""
        folder = self.folder(step)
        if not folder.is_dir():
            return {}  # a machine whose workers write nothing of their own
        for name in _NOT_NEEDED:
            (folder / name).unlink(missing_ok=True)
        sums = {"/".join(parts): checksum_of(folder.joinpath(*parts), sync=True) for parts in files_under(folder)}
        if not self.run.store.is_local:
            for name in sums:
                self.run.store.upload(folder / name, *self._key(step), *name.split("/"))
            shutil.rmtree(folder, ignore_errors=True)
        return sums

    def commit(self, mark: CheckpointMark) -> None:
        """Write the marker: from now on the checkpoint is complete. Rank 0, once every file has been sent.

        Figures that are NaN or infinite are left out: JSON has no such numbers.
        """
        metrics = {name: value for name, value in mark.metrics.items() if math.isfinite(value)}
        self.run.store.write_json(asdict(replace(mark, metrics=metrics)), *self._key(mark.step), MARKER)

    def drop(self, step: int) -> None:
        """Remove a checkpoint, its marker first."""
        self.run.store.delete(*self._key(step), MARKER)
        self.run.store.delete(*self._key(step))

    def _key(self, step: int) -> tuple[str, ...]:
        return self.run.checkpoints(f"{PREFIX}{step}")


def is_of_model(name: str) -> bool:
    """Return whether a checkpoint's file is published: the adapter, or all weights, and its config."""
    configs = ("adapter_config.json", "config.json", "generation_config.json", "model.safetensors.index.json")
    return name in configs or name.endswith(".safetensors")


def surplus(marks: list[CheckpointMark], keep: CheckpointSpec) -> list[int]:
    """Steps of the checkpoints that the spec does not keep: neither among the newest nor among the best.

    A metric that is NaN or infinite has no order: its checkpoint is none of the best.
    """
    measured = [mark for mark in marks if math.isfinite(mark.metrics.get(keep.metric, math.nan))]
    measured.sort(key=lambda mark: mark.metrics[keep.metric], reverse=keep.higher_is_better)
    kept = {mark.step for mark in measured[: keep.keep_best]}
    kept |= set(sorted(mark.step for mark in marks)[-keep.keep_last :])
    return [mark.step for mark in marks if mark.step not in kept]


# Each rank has one thread for it. The threads talk over a gloo group of their own, as torch's asynchronous distributed
# checkpoints do, so that they never meet the training's collectives.


SEND_S = 3600
"""Most seconds that one machine waits for the files of another, an outage left out."""


class CheckpointLost(RunError):
    """A checkpoint could not be completed. Raised on all ranks at the same step."""


class AsyncCheckpointSaver:
    """Uploads and commits checkpoints in the background, one at a time. Every rank has one and calls it alike."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        keep: CheckpointSpec,
        trained: Shapes,
        log: StepLog,
        fence: Fence | None = None,
        *,
        sends: bool,
    ) -> None:
        """Collective. `trained`: shapes that each checkpoint holds. `sends`: this rank sends its machine's files."""
        import torch.distributed as dist

        self._checkpoints, self._keep, self._trained, self._log = checkpoints, keep, trained, log
        self._sends, self._fence = sends, fence
        self._rank, world = rank_and_world()
        patience = timedelta(seconds=keep.outage_s + SEND_S)
        self._group = dist.new_group(backend="gloo", timeout=patience) if world > 1 else None
        self._marks = {mark.step: mark for mark in all_gather_object(checkpoints.marks() if self._rank == 0 else [])[0]}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, mark: CheckpointMark) -> None:
        """Take over files that every rank has written. Waits for the checkpoint before. Raises CheckpointLost, and
        SupersededError where another attempt of the job is at work."""
        self.wait()
        self._pending = self._pool.submit(self._upload_and_commit, mark)

    def wait(self) -> None:
        """Return once all checkpoints are complete. Raises CheckpointLost, and again in every later call of `save`."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Finish what was taken over and tidy up. Raises nothing: a run that failed has an error of its own."""
        with contextlib.suppress(Exception):
            self.wait()
        self._pool.shutdown()
        if self._sends:
            self._checkpoints.clear_cache()

    def _upload_and_commit(self, mark: CheckpointMark) -> None:
        """Send the files of every machine, then commit on rank 0 and drop what the spec does not keep."""
        try:
            sent = gather_results(lambda: self._send(mark.step), self._group)
            complete = replace(mark, files={name: kept for part in sent for name, kept in part.items()})
            gather_results(lambda: self._commit(complete), self._group)
        except SupersededError:
            raise
        except GraftworkError as error:
            raise self._lost_error(mark.step, error) from error

    def _send(self, step: int) -> dict[str, FileSum]:
        faults = faults_of_weights(self._checkpoints.folder(step), self._trained) if self._rank == 0 else []
        if faults:
            raise RunError(f"weights of step {step}", "; ".join(faults[:3]))
        return self._checkpoints.send(step) if self._sends else {}

    def _commit(self, mark: CheckpointMark) -> None:
        if self._rank == 0:
            if self._fence is not None:
                self._fence.require(self._keep.outage_s)
            if not self._checkpoints.run.store.is_local:
                self._log.flush(mark.step)
            self._checkpoints.commit(mark)
        self._marks[mark.step] = mark
        for step in surplus(list(self._marks.values()), self._keep):
            del self._marks[step]
            if self._rank == 0:
                self._checkpoints.drop(step)

    def _lost_error(self, step: int, cause: GraftworkError) -> CheckpointLost:
        last = max((known for known in self._marks if known < step), default=None)
        kept = f"the checkpoint of step {last} is the last complete one" if last else "there is no complete checkpoint"
        return CheckpointLost(
            f"checkpoint of step {step} of run {self._checkpoints.run.run_id}",
            f"{cause.subject}: {cause.problem}; {kept}",
            f"storage may be out of reach for checkpoints.outage_s={self._keep.outage_s:g} seconds, and a checkpoint "
            "holds every trained tensor, finite and not all zero",
            f"{cause.hint + '; then ' if cause.hint else ''}run the same command: it continues from "
            + (f"step {last}" if last else "the start"),
        )
