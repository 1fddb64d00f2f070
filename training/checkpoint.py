"""Checkpoints of a run on its store: whole once their marker is there, which records the sha256 of every file.

    runs/<run>/checkpoints/checkpoint-<step>/
        adapter_config.json, adapter_model.safetensors (all weights: config.json, model*.safetensors),
        optimizer.pt, scheduler.pt, rng_state_<rank>.pth, trainer_state.json, COMMITTED.json
        under DeepSpeed in place of optimizer.pt: latest, global_step<step>/ with the shards of each rank

On a local root the trainer writes in place; on S3 it writes to a cache folder of its machine, which is sent
(checkpoint_save.py). The .pt files are read with `weights_only=True` (by transformers), so nothing in them is executed;
DeepSpeed 0.19 unpickles its own shards, so a root with such runs belongs to people who may run code.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from graftwork.errors import StorageError
from graftwork.storage import RunPaths
from graftwork.training.checkpoint_files import FileSum, differences, sums_of
from graftwork.training.checkpoint_spec import CheckpointSpec

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
        return self.work_dir() / _name(step)

    def newest(self) -> CheckpointMark | None:
        """The last whole checkpoint; None before the first."""
        steps = self._complete_steps()
        return self._mark(steps[-1]) if steps else None

    def marks(self) -> list[CheckpointMark]:
        """All whole checkpoints, by step."""
        return [self._mark(step) for step in self._complete_steps()]

    def fetch(self, mark: CheckpointMark) -> list[str]:
        """Bring a whole checkpoint's files to its folder of this machine. Returns what is not as the marker says."""
        folder = self.folder(mark.step)
        if not self.run.store.is_local:
            there = {"/".join(parts) for parts in self.run.store.tree(*self._key(mark.step))}
            for name in sorted(there & mark.files.keys()):
                self.run.store.download_file(folder / name, *self._key(mark.step), *name.split("/"))
        return differences(folder, mark.files)

    @contextlib.contextmanager
    def adapter(self, step: int) -> Iterator[Path]:
        """A folder with the adapter of a whole checkpoint, or all weights with their config, and nothing else.

        Raises StorageError when a file is damaged.
        """
        files = {name: found for name, found in self._mark(step).files.items() if is_of_model(name)}
        with tempfile.TemporaryDirectory(prefix="gw-adapter-") as name:
            folder = Path(name)
            for file in files:
                self.run.store.download_file(folder / file, *self._key(step), file)
            if found := differences(folder, files):
                raise StorageError(
                    f"adapter of {self.run.store.path(*self._key(step))}", "; ".join(found),
                    "a file must have the sha256 that its checkpoint recorded",
                    f"run the same command after deleting {MARKER} there: the last steps are taken again",
                )  # fmt: skip
            yield folder

    def clear_unfinished(self) -> None:
        """Remove what a killed run left without a marker. Rank 0, before training."""
        whole = {_name(step) for step in self._complete_steps()}
        for name in set(self.run.store.list(*self.run.checkpoints())) - whole:
            self.run.store.delete(*self.run.checkpoints(name))

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
        sums = sums_of(folder)
        if not self.run.store.is_local:
            for name in sums:
                self.run.store.upload(folder / name, *self._key(step), *name.split("/"))
            shutil.rmtree(folder, ignore_errors=True)
        return sums

    def commit(self, mark: CheckpointMark) -> None:
        """Write the marker: from now on the checkpoint is whole. Rank 0, once every file has been sent."""
        self.run.store.write_json(asdict(mark), *self._key(mark.step), MARKER)

    def drop(self, step: int) -> None:
        """Remove a checkpoint, its marker first."""
        self.run.store.delete(*self._key(step), MARKER)
        self.run.store.delete(*self._key(step))

    def _complete_steps(self) -> list[int]:
        names = self.run.store.list(*self.run.checkpoints())
        steps = [int(name.removeprefix(PREFIX)) for name in names if name.removeprefix(PREFIX).isdigit()]
        return sorted(step for step in steps if self.run.store.exists(*self._key(step), MARKER))

    def _mark(self, step: int) -> CheckpointMark:
        record = self.run.store.read_json(*self._key(step), MARKER)
        return CheckpointMark(
            **{**record, "files": {name: FileSum(**found) for name, found in record["files"].items()}}
        )

    def _key(self, step: int) -> tuple[str, ...]:
        return self.run.checkpoints(_name(step))


def is_of_model(name: str) -> bool:
    """Whether a checkpoint's file is what is published of it: the adapter, or all weights, and its config."""
    configs = ("adapter_config.json", "config.json", "generation_config.json", "model.safetensors.index.json")
    return name in configs or name.endswith(".safetensors")


def surplus(marks: list[CheckpointMark], keep: CheckpointSpec) -> list[int]:
    """Steps of the checkpoints that the spec does not keep: neither among the newest nor among the best."""
    measured = [mark for mark in marks if keep.metric in mark.metrics]
    measured.sort(key=lambda mark: mark.metrics[keep.metric], reverse=keep.higher_is_better)
    kept = {mark.step for mark in measured[: keep.keep_best]}
    kept |= set(sorted(mark.step for mark in marks)[-keep.keep_last :])
    return [mark.step for mark in marks if mark.step not in kept]


def _name(step: int) -> str:
    return f"{PREFIX}{step}"
