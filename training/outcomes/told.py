"""What a finished run's adapter says to its task's held-out rows, as scores."""

from collections.abc import Mapping
from dataclasses import dataclass

from graftwork.errors import RunError
from graftwork.metrics import Metric
from graftwork.stats import Floats
from graftwork.training.outcomes.probes import Probe
from graftwork.training.outcomes.record import read_parts
from graftwork.training.run import ResolvedRun
from graftwork.training.spec import TrainSpec


@dataclass(frozen=True)
class TaskScores:
    """A value a question for each metric, the first metric of `probe` being the task's own."""

    probe: Probe
    values: Mapping[str, Floats]

    @property
    def task_metric(self) -> Metric:
        """The task's metric."""
        return self.probe.metrics[0]


def with_task(spec: TrainSpec, rows: int | None = None) -> TrainSpec:
    """The spec with the task measured and nothing else; `rows`: of the held-out ones, where the spec names no number.

    What else was asked is left for a run of its own. No alias is moved.
    """
    asked = spec.outcomes.task.model_dump(mode="json", exclude_unset=True) if spec.outcomes.task else {}
    given = {"rows": rows, **asked} if rows is not None else asked
    return spec.with_({"outcomes": {"task": given, "alpha": spec.outcomes.alpha}, "alias": None})


def task_scores(spec: TrainSpec) -> TaskScores:
    """Of a spec by `with_task` that `train` has finished. Reads what was said; computes nothing. Raises RunError."""
    run = ResolvedRun.resolve(spec)
    [probe] = run.probes
    found = read_parts(run.paths).get("task")
    if found is None:
        raise RunError(f"outcomes.task of run {run.paths.run_id}", "it was not measured",
                       "a published run stays finished when its outcomes fail",
                       "run the same command again; the run's warning names the cause")  # fmt: skip
    return TaskScores(probe, probe.scores(found.after))
