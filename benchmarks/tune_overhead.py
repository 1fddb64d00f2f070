"""What a trial of a sweep costs beside its training: the same loop in one warm process and as trials of Ray Tune.

    python -m benchmarks.tune_overhead

LoRA on SmolLM2-135M (nf4), rows of the airport-card recipe, two steps and one evaluation a trial, one thread, one trial
at a time. `loop` is `training.loop.run_steps` in this process, called again and again: seconds from its first step to
its end, and of the whole call (the base is loaded, the trainer built). `trial`: from one trial's last report to the
next one's, in a sweep; the first two are left out, since processes start there. What a trial costs beyond its training
is a trial less the loop from its first step; what the scheduling costs is a trial less the whole call.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.base import URI
from benchmarks.record import Clock, figure, write

STEPS, WARM, TRIAL_S = 2, 2, 60.0


def sweep_of(root: Path, trials: int) -> Any:
    from graftwork.tuning.spec import TuneSpec

    train = {
        "name": "overhead",
        "base": URI,
        "num_workers": 1,
        "data": {
            "train": "recipe://airport-card/train.jsonl",
            "eval": "recipe://airport-card/valid.jsonl",
            "train_rows": 32,
        },
    }
    space = {"optim.lr": {"kind": "choice", "values": [1e-3 * (1 + number / 100) for number in range(trials)]}}
    return TuneSpec.model_validate(
        {
            "name": "overhead",
            "root": str(root),
            "train": train,
            "space": space,
            "num_trials": trials,
            "steps": STEPS,
            "report_every": STEPS,
            "eval_rows": 4,
            "scheduler": None,
            "max_concurrent": 1,
        }
    )


def looped(spec: Any, times: int) -> list[dict[str, float]]:
    """Seconds of the loop in this process; the first call imports."""
    from benchmarks.recorded import job_of
    from graftwork.training.loop import run_steps
    from graftwork.tuning.run import Sweep
    from graftwork.tuning.search import FixedPoints

    sweep, found = Sweep.resolve(spec), []
    assert isinstance(sweep.search, FixedPoints)
    for values in sweep.search.points[: times + 1]:
        began = time.perf_counter()
        result = run_steps(job_of(sweep, values), lambda _: True)
        found.append({"call_s": time.perf_counter() - began, "loop_s": result.wall_s})
    return found[1:]


def swept(spec: Any) -> list[float]:
    """Seconds from one trial's end to the next one's, those after the first ones."""
    from graftwork.cluster.session import session
    from graftwork.tuning.run import tune

    with session("local", num_cpus=2):
        report = tune(spec)
    assert all(trial.state == "finished" for trial in report.trials)
    ends = [trial.started_s + trial.wall_s for trial in report.trials]
    return [later - earlier for earlier, later in zip(ends, ends[1:], strict=False)][WARM - 1 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trials", type=int, default=10)
    args = parser.parse_args()
    import torch

    from graftwork.metrics import quantile

    torch.set_num_threads(1)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        spec = sweep_of(Path(folder), args.trials)
        loops, trials = looped(spec, min(5, args.trials - 1)), swept(spec)
    loop, call = (quantile([one[key] for one in loops], 0.5) for key in ("loop_s", "call_s"))
    figures = {
        "loop": figure([one["loop_s"] for one in loops], "s"),
        "call": figure([one["call_s"] for one in loops], "s"),
        "trial": figure(trials, "s"),
        "beyond_training": figure([trial - loop for trial in trials], "s"),
        "beyond_share": figure([100 * (trial - loop) / TRIAL_S for trial in trials], "%"),
        "scheduling": figure([trial - call for trial in trials], "s"),
        "scheduling_share": figure([100 * (trial - call) / TRIAL_S for trial in trials], "%"),
    }
    write("tune_overhead", args.out, figures, [{"loops": loops, "trials": trials}], {"trials": args.trials}, clock)


if __name__ == "__main__":
    main()
