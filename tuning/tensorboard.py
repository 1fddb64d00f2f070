"""TensorBoard logs of a sweep, one folder per trial: `tensorboard --logdir runs/<sweep>/tensorboard`.

    tensorboard/<trial_id>/events.out.tfevents.*    eval_loss by step, the trial's cost, its values (hparams)

A file's content follows from the trial's record alone. While a sweep runs, new events are appended, because TensorBoard
continues where it was; when a driver starts, all files are rewritten, so that a trial that runs again has no event
twice. For a root in S3 the files are written on this machine and uploaded when their trial has ended.

tensorboardX's RecordWriter is used and not its SummaryWriter, which writes in a thread: its `flush` does not wait for
that thread (2.6), so a killed driver would lose reports, and a full disk would end the thread without an error here.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwork.errors import StorageError, StoreUnreachable
from graftwork.storage.store import RunPaths
from graftwork.tuning.report import to_plain
from graftwork.tuning.search_space import EVAL_LOSS
from graftwork.tuning.trials import TrialRecord

FOLDER = "tensorboard"


class EventLogs:
    """The event files of one sweep. The driver alone writes them."""

    def __init__(self, run: RunPaths, began: float, patience_s: float = 0.0) -> None:
        """began: first start of the sweep, in seconds since 1970. patience_s: longest wait of `close` for storage."""
        self._run, self._began, self._patience_s = run, began, patience_s
        self._folder = run.store.local_dir(*run.file(FOLDER))
        self._files: dict[str, _EventFile] = {}
        self._unsent: set[str] = set()
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def follow(self, trials: Sequence[TrialRecord]) -> None:
        """Write what is new. Raises StorageError; storage that is out of reach is tried again at the next change."""
        for trial in trials:
            if trial.losses or trial.state in ("running", "failed"):
                self._write(trial)
        self._send(0.0)

    def close(self) -> None:
        """Write no more, upload what is left. Raises StorageError."""
        for trial_id, file in self._files.items():
            if file.close():
                self._unsent.add(trial_id)
        self._send(self._patience_s)

    def _write(self, trial: TrialRecord) -> None:
        file = self._files.get(trial.trial_id)
        try:
            if file is not None and not file.goes_on(trial):
                file.close()
                file = None
            if file is None:
                self._files[trial.trial_id] = file = _EventFile(self._folder / trial.trial_id, self._began)
            if file.add(trial):
                self._unsent.add(trial.trial_id)
        except OSError as error:
            raise StorageError(
                f"write {self._folder}",
                str(error),
                "TensorBoard logs are in the sweep's folder",
                "make room on that disk, or set another root",
            ) from error

    def _send(self, patience_s: float) -> None:
        """Upload the files of trials that ended, if the store is not a local folder."""
        if self._run.store.is_local:
            self._unsent.clear()
            return
        store = self._run.store.with_retries(patience_s)
        for trial_id in sorted(self._unsent):
            try:
                store.upload(self._folder / trial_id, *self._run.file(FOLDER, trial_id))
            except StoreUnreachable:
                if patience_s:
                    raise
                return
            self._unsent.discard(trial_id)


class _EventFile:
    """The event file of one trial."""

    def __init__(self, folder: Path, began: float) -> None:
        from tensorboardX.record_writer import RecordWriter  # here: it imports torch, which takes seconds

        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._writer = RecordWriter(str(folder / f"events.out.tfevents.{int(began)}.graftwork"))
        self._began = began
        self._losses: tuple[tuple[int, float], ...] = ()
        self._ended = False
        self._events = 0

    def goes_on(self, trial: TrialRecord) -> bool:
        """Return whether the record only adds to the file, which is not so for a trial that is run again."""
        return trial.losses[: len(self._losses)] == self._losses and not (self._ended and not _has_ended(trial))

    def add(self, trial: TrialRecord) -> bool:
        """Append what is new; return whether the trial has just ended."""
        from tensorboardX.summary import hparams

        if self._ended:
            return False
        if not self._events:
            self._event(self._clock(trial, 0), file_version="brain.Event:2")
            values = {key: to_plain(value) for key, value in trial.values.items()}
            for summary in hparams(values, {EVAL_LOSS: 0.0})[:2]:  # its keys and figures, and this trial's values
                self._event(self._clock(trial, 0), summary=summary)
        for step, loss in trial.losses[len(self._losses) :]:
            self._event(self._clock(trial, step), step=step, summary=_scalars({EVAL_LOSS: loss}))
        self._losses = trial.losses
        just_ended = _has_ended(trial)
        if just_ended:
            for summary in _outcome(trial):
                self._event(self._clock(trial, trial.steps), step=trial.steps, summary=summary)
        self._writer.flush()
        if just_ended:
            self.close()
        return just_ended

    def close(self) -> bool:
        """Close the file; return whether it was open."""
        was_open, self._ended = not self._ended, True
        if was_open:
            self._writer.close()
        return was_open

    def _clock(self, trial: TrialRecord, step: int) -> float:
        """Return seconds since 1970 for steps of equal length: the ledger has no time of each report."""
        return self._began + trial.started_s + (trial.wall_s * step / trial.steps if trial.steps else 0.0)

    def _event(self, wall_time: float, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events += 1
        self._writer.write(Event(wall_time=wall_time, **fields).SerializeToString())


def _has_ended(trial: TrialRecord) -> bool:
    return trial.ended or trial.state == "failed"


def _scalars(figures: Mapping[str, float]) -> Any:
    from tensorboardX.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in figures.items()])


def _outcome(trial: TrialRecord) -> Iterator[Any]:
    """Yield the costs, and the end of the session for the hparams plugin."""
    from tensorboardX.proto.api_pb2 import Status
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo
    from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

    yield _scalars({**trial.metrics, "wall_s": trial.wall_s, "peak_rss_bytes": trial.peak_rss_bytes})
    status = Status.Value("STATUS_FAILURE" if trial.state == "failed" else "STATUS_SUCCESS")
    content = HParamsPluginData(session_end_info=SessionEndInfo(status=status), version=0).SerializeToString()
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="hparams", content=content))
    yield Summary(value=[Summary.Value(tag="_hparams_/session_end_info", metadata=metadata)])
