"""How soon a killed head shows in a job's status, against Ray's own, and what the training loses by it.

    python -m benchmarks.head_kill [--rounds 10] [--trained 3]

A cluster of one head on loopback, by docs/ray-cluster.md, that stores its state in RocksDB; else Ray loses its jobs.
In each round every process of the head gets kill -9 at a random moment while a job runs, and the head is started again
at once. `ours` is the time until `status` no longer says that the job runs, `ray` that of Ray's Jobs API for the same
attempt of the same job, from the kill on; both are asked twice a second, and the restart (`head_back`) is within both.
In the first `--trained` rounds the job is a training run of a tiny base, resubmitted after the kill: `lost_share`
is the steps taken again, of a checkpoint's interval. In the others it is a program that waits. At the end the run's
losses are compared with those of an undisturbed one: `loss_apart`, relative.
"""

import argparse
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from benchmarks.record import Clock, figure, write

EVERY, STEPS, STEPS_AN_EPOCH = 30, 1800, 6
PATIENCE_S = 300.0
POLL_INTERVAL_S = 0.5


class Rounds:
    """The cluster, its store, and what was measured so far."""

    def __init__(self, cluster: Any, rng: random.Random) -> None:
        from tests.training import task

        self.cluster, self.rng = cluster, rng
        spec = task(
            cluster.folder / "t",
            **{
                "name": "head",
                "root": str(cluster.folder / "root"),
                "num_workers": 1,
                "checkpoint_every": EVERY,
                "eval_every": STEPS,
                "optim.epochs": STEPS // STEPS_AN_EPOCH,
            },
        )
        self.train = {"kind": "train", **spec.model_dump(mode="json", exclude_unset=True)}
        self.wait = {"kind": "exec", "name": "wait", "root": self.train["root"], "argv": ["sleep", "3600"]}
        self.head = cluster.start(None, "--num-cpus", "2")
        self.found: list[dict[str, float]] = []

    @property
    def root(self) -> Path:
        return Path(self.train["root"])

    def submit(self, spec: dict[str, Any]) -> str:
        """Start a job; its id."""
        file = self.cluster.folder / "spec.json"
        file.write_text(json.dumps(spec), encoding="utf-8")
        self._client(spec["kind"], str(file), "--target", self.cluster.on, "--detach")
        return next(path.name for path in (self.root / "jobs").iterdir() if path.name.startswith(f"{spec['name']}-"))

    def steps(self) -> list[int]:
        """Steps of the training run, as it wrote them."""
        return [row["step"] for row in self.rows()]

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl of the run, the line that is being written left out."""
        texts = [path.read_text(encoding="utf-8") for path in self.root.glob("runs/*/metrics.jsonl")]
        return [json.loads(line) for text in texts for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def status(self, job_id: str) -> Any:
        from graftwork.cluster.targets import backend_of

        return backend_of(self.cluster.on, str(self.root)).status(job_id)

    def round(self, spec: dict[str, Any], job_id: str) -> None:
        """One kill, told by both, and the job on again."""
        self._until(lambda: self.status(job_id).state == "running")
        if spec["kind"] == "train":
            begun = max(self.steps(), default=0)
            self._until(lambda: max(self.steps(), default=0) > begun + EVERY)
        time.sleep(self.rng.uniform(0.0, 3.0))
        attempt = f"{job_id}-a{self.status(job_id).attempt}"
        killed_at = self.head.kill()
        one: dict[str, float] = {}
        watching = [
            threading.Thread(target=self._time, args=(one, "ours", killed_at, lambda: self._ended(job_id))),
            threading.Thread(target=self._time, args=(one, "ray", killed_at, lambda: self._ended_for_ray(attempt))),
        ]
        for thread in watching:
            thread.start()
        self.head = self.cluster.start(None, "--num-cpus", "2")
        one["head_back"] = time.time() - killed_at
        for thread in watching:
            thread.join()
        assert set(one) == {"ours", "ray", "head_back"}, one
        if spec["kind"] == "train":
            one["lost"] = max(self.steps()) - self.committed()
        self._client("jobs", "resubmit", job_id, "--root", str(self.root))
        self.found.append(one)
        print(json.dumps({key: round(value, 1) for key, value in one.items()}), flush=True)

    def committed(self) -> int:
        """Step of the newest whole checkpoint: where the next attempt goes on."""
        from graftwork.training.checkpoint import Checkpoints
        from graftwork.training.run import run_paths
        from graftwork.training.spec import TrainSpec

        newest = Checkpoints(run_paths(TrainSpec.model_validate(self.train))).newest()
        return newest.step if newest is not None else 0

    def wait_end(self, job_id: str) -> None:
        """Until the job has ended well."""
        self._until(lambda: self.status(job_id).ended)
        assert self.status(job_id).state == "succeeded", self.status(job_id)

    def _ended(self, job_id: str) -> bool:
        return str(self.status(job_id).state) not in ("running", "pending", "submitted")

    def _ended_for_ray(self, attempt: str) -> bool:
        headers = {"Authorization": f"Bearer {self.cluster.token_file.read_text()}"}
        try:
            answer = httpx.get(f"{self.cluster.on}/api/jobs/{attempt}", headers=headers, timeout=5)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200 and answer.json()["status"] not in ("RUNNING", "PENDING")

    def _time(self, into: dict[str, float], name: str, since: float, true: Callable[[], bool]) -> None:
        self._until(true)
        into[name] = time.time() - since

    def _until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < end, f"not within {PATIENCE_S:.0f} s: {self.head.said()[-2000:]}"
            time.sleep(POLL_INTERVAL_S)

    def _client(self, *argv: str) -> None:
        from tests.hosts.nodes import graftwork

        done: subprocess.CompletedProcess[str] = graftwork(self.cluster, *argv, timeout_s=PATIENCE_S)
        assert done.returncode == 0, done.stdout + done.stderr


def apart(rounds: Rounds) -> list[float]:
    """Relative difference of each step's loss to that of a run that nobody disturbed."""
    from graftwork.training.loop import run_steps
    from graftwork.training.objectives.rows import prepare
    from graftwork.training.spec import TrainSpec
    from graftwork.training.worker_messages import TrainJob

    spec = TrainSpec.model_validate(rounds.train)
    alone = dict(run_steps(TrainJob(spec, prepare(spec)), lambda _: True).train_loss)
    return [abs(row["loss"] - alone[row["step"]]) / alone[row["step"]] for row in rounds.rows()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--trained", type=int, default=3)
    args = parser.parse_args()
    from tests.hosts.nodes import ray_cluster

    clock = Clock()
    with ray_cluster(keeps=True) as cluster:
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(cluster.token_file)})
        rounds = Rounds(cluster, random.Random(0))
        for number, spec in ((args.trained, rounds.train), (args.rounds - args.trained, rounds.wait)):
            job_id = rounds.submit(spec) if number else ""
            for _ in range(number):
                rounds.round(spec, job_id)
            if number and spec is rounds.train:
                rounds.wait_end(job_id)
        losses = apart(rounds) if args.trained else []
    figures = {name: figure([one[name] for one in rounds.found], "s") for name in ("ours", "ray", "head_back")}
    figures["ours_worst"] = figure([max(one["ours"] for one in rounds.found)], "s")
    if losses:
        lost = [one["lost"] / EVERY for one in rounds.found if "lost" in one]
        figures |= {"lost_share": figure(lost, "intervals"), "loss_apart": figure([max(losses)], "")}
        figures["lost_worst"] = figure([max(lost)], "intervals")
    meta = {"rounds": args.rounds, "trained": args.trained, "every": EVERY, "steps": STEPS}
    write("head_kill", args.out, figures, rounds.found, meta, clock)


if __name__ == "__main__":
    main()
