"""Checkpoints of a run: written by every rank, whole once their marker is there; the newest whole one is gone on from.

    runs/<run>/checkpoints/checkpoint-<step>/
        adapter_config.json, adapter_model.safetensors (all weights: config.json, model*.safetensors),
        optimizer.pt, scheduler.pt, rng_state_<rank>.pth, trainer_state.json, COMMITTED.json
        under DeepSpeed in place of optimizer.pt: latest, global_step<step>/ with the shards of each rank

On a local root the trainer writes in place; on S3 it writes to a cache folder of its machine, and the ranks send them.
The .pt files are read with `weights_only=True` (by transformers), so nothing in them is executed.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from graftwork.storage import RunPaths
from graftwork.training.strategies.shards import writer_of

MARKER = "COMMITTED.json"
PREFIX = "checkpoint-"
KEEP = 2
"""Whole checkpoints kept; one would do, the second is for the disk that lies."""
_NOT_NEEDED = ("training_args.bin", "README.md", "zero_to_fp32.py", "zero_to_torch.py")
"""A pickle that nothing reads; a model card without content; copies of DeepSpeed's programs."""


@dataclass(frozen=True)
class CheckpointMark:
    """Content of the marker: what the trainer's own files do not say."""

    step: int
    elapsed_s: float
    """Seconds of training up to this step, over all attempts."""
    world_size: int


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run. All paths go through the run's store."""

    run: RunPaths

    def work_dir(self) -> Path:
        """Folder of this machine that the trainer writes to."""
        folder = self.run.store.local_dir(*self.run.checkpoints())
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def newest(self) -> CheckpointMark | None:
        """The last whole checkpoint; None before the first."""
        steps = self._whole()
        return self._mark(steps[-1]) if steps else None

    def fetch(self, step: int) -> Path:
        """Folder of this machine with the files of a whole checkpoint."""
        folder = self.work_dir() / _name(step)
        if not self.run.store.is_local:
            self.run.store.download(folder, *self._key(step))
        return folder

    @contextlib.contextmanager
    def adapter(self, step: int) -> Iterator[Path]:
        """A folder with the adapter of a whole checkpoint, or all weights with their config, and nothing else."""
        with tempfile.TemporaryDirectory(prefix="gw-adapter-") as name:
            folder = Path(name)
            for file in filter(is_of_model, self.run.store.list(*self._key(step))):
                self.run.store.download(folder / file, *self._key(step), file)
            yield folder

    def clear_unfinished(self) -> None:
        """Remove what a killed run left without a marker. Rank 0, before training."""
        whole = {_name(step) for step in self._whole()}
        for name in set(self.run.store.list(*self.run.checkpoints())) - whole:
            self.run.store.delete(*self.run.checkpoints(name))
        if not self.run.store.is_local:
            shutil.rmtree(self.work_dir(), ignore_errors=True)

    def send(self, step: int, rank: int) -> None:
        """Bring this rank's files to the store (S3 only): its random state and shards; rank 0 the rest."""
        folder = self.work_dir() / _name(step)
        for name in _NOT_NEEDED:
            (folder / name).unlink(missing_ok=True)
        if self.run.store.is_local:
            return
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            place = file.relative_to(folder)
            if writer_of(place.as_posix()) == rank:
                self.run.store.upload(file, *self._key(step), *place.parts)

    def commit(self, mark: CheckpointMark) -> None:
        """Write the marker, then drop all but the newest `KEEP`. Rank 0, once every rank has sent its files."""
        self.run.store.write_json(asdict(mark), *self._key(mark.step), MARKER)
        for step in self._whole()[:-KEEP]:
            self.run.store.delete(*self._key(step), MARKER)
            self.run.store.delete(*self._key(step))
        if not self.run.store.is_local:
            shutil.rmtree(self.work_dir() / _name(mark.step), ignore_errors=True)

    def _whole(self) -> list[int]:
        names = self.run.store.list(*self.run.checkpoints())
        steps = [int(name.removeprefix(PREFIX)) for name in names if name.removeprefix(PREFIX).isdigit()]
        return sorted(step for step in steps if self.run.store.exists(*self._key(step), MARKER))

    def _mark(self, step: int) -> CheckpointMark:
        return CheckpointMark(**self.run.store.read_json(*self._key(step), MARKER))

    def _key(self, step: int) -> tuple[str, ...]:
        return self.run.checkpoints(_name(step))


def is_of_model(name: str) -> bool:
    """Whether a checkpoint's file is what is published of it: the adapter, or all weights, and its config."""
    configs = ("adapter_config.json", "config.json", "generation_config.json", "model.safetensors.index.json")
    return name in configs or name.endswith(".safetensors")


def _name(step: int) -> str:
    return f"{PREFIX}{step}"
