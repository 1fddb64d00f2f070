"""What a live experiment costs its callers: the draw, the way through, a shadow beside it, a shadow arm that is killed.

    python -m benchmarks.experiment

assign_p99: one draw and its row in the queue of the log, in microseconds, by batches of 40,000. added_p99: the same arm
asked directly and as an experiment, request by request in turns, over HTTP on a base of two thin layers, so that the
engine's time hides nothing; the difference of the two p99s of a round. shadow_p99: on the real base, callers one at a
time with a pause as long as their answer takes; p99 with every prompt copied to a second arm, to p99 of the same arm
without. killed_answered: share of callers with an answer while the replica of the shadow arm is killed: two replicas,
every prompt copied.
"""

import argparse
import gc
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks import base
from benchmarks.record import Clock, Figure, figure, write
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.cluster.session import session
from graftwork.metrics import quantile
from graftwork.serving.ab_test.experiment_record import Records, new_record
from graftwork.serving.ab_test.live_experiment import LiveExperiment, RecentAnswers
from graftwork.serving.ab_test.spec import ExperimentSpec
from graftwork.serving.client import Client
from graftwork.serving.deploy import Endpoint, deploy
from graftwork.serving.spec import ArmSpec, ServeSpec
from graftwork.storage.store import Store

DRAWS = 40_000
HELLO = [{"role": "user", "content": "Which airport has the ICAO code ENBR?"}]


def assign_p99_us(rounds: int) -> list[float]:
    """One p99 a round."""
    arms = [{"name": name, "weight": weight} for name, weight in (("a", 0.5), ("b", 0.3), ("c", 0.2))]
    spec = ExperimentSpec.model_validate(
        {"name": "cards", "control": "a", "arms": arms, "holdout": 0.1, "primary": "thumbs", "log_buffer": 3 * DRAWS}
    )
    record = new_record(spec, {name: ArmSpec(name=name) for name in "abc"}, "0" * 64)
    found = []
    with tempfile.TemporaryDirectory() as root:
        for number in range(rounds):
            gc.collect()
            one = LiveExperiment(record, Records(Store(root)), None, RecentAnswers())  # type: ignore[arg-type]  # no answer
            times = []
            for name in [f"{number}-{n}" for n in range(DRAWS)]:
                began = time.perf_counter_ns()
                admitted = one.assign(one.place("user", name), name)
                times.append((time.perf_counter_ns() - began) / 1000)
                assert admitted, "the buffer has room for all"
            found.append(quantile(times, 0.99))
    return found


def thin_base(folder: Path) -> Path:
    """The real base's tokenizer and template before two random layers of width 64."""
    from transformers import AutoConfig, AutoModelForCausalLM

    real = base.resolve().folder
    shutil.copytree(real, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin", "*.index.json"))
    config = AutoConfig.from_pretrained(real, local_files_only=True)
    config.update(
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        }
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@contextmanager
def serving(spec: dict[str, Any]) -> Iterator[tuple[Endpoint, Client]]:
    """A deployed endpoint, and the owner's client."""
    with (
        session("local", num_cpus=4),
        deploy(ServeSpec.model_validate({"engine": {"max_seq_len": 512}, **spec})) as endpoint,
        endpoint.client() as client,
    ):
        yield endpoint, client


def ask(http: httpx.Client, model: str, tokens: int) -> float | None:
    """Milliseconds until the whole answer was here; None where it failed."""
    body = {"model": model, "messages": HELLO, "max_tokens": tokens, "ignore_eos": True, "user": f"u{time.time_ns()}"}
    began = time.perf_counter()
    response = http.post("/v1/chat/completions", json=body)
    return (time.perf_counter() - began) * 1000 if response.status_code == 200 else None


def start(client: Client, name: str, mode: str, first: str, second: str) -> None:
    """An experiment whose every caller is answered by `first`."""
    arms: list[dict[str, Any]] = [{"name": "first", "model": first}, {"name": "second", "model": second}]
    if mode == "split":
        arms = [{**arm, "weight": weight} for arm, weight in zip(arms, (1.0, 0.0), strict=True)]
    client.experiment(
        "start",
        spec={
            "kind": "experiment",
            "name": name,
            "mode": mode,
            "arms": arms,
            "control": "first",
            "primary": "thumbs",
            "shadow_queue": 1000,
        },
    )


def state(client: Client, name: str) -> dict[str, Any]:
    return next(one for one in client.experiments() if one["name"] == name)


def until(holds: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError("it never came to hold")
        time.sleep(0.1)


def added(endpoint: Endpoint, client: Client, args: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Latencies of each round, asked directly and through an experiment in turns."""
    start(client, "split", "split", endpoint.base, endpoint.base)
    found: dict[str, list[list[float]]] = {"direct": [], "experiment": []}
    with httpx.Client(base_url=str(endpoint.url), timeout=60) as http:
        for turn in range(args.rounds + 1):
            times: dict[str, list[float]] = {"direct": [], "experiment": []}
            for _ in range(args.requests):
                for name, model in (("direct", endpoint.base), ("experiment", "experiment/split")):
                    times[name].append(_answered(ask(http, model, 1)))
            for name, one in times.items():
                found[name] += [one] if turn else []
            print(f"turn {turn} p99 ms", {n: round(quantile(one, 0.99), 2) for n, one in times.items()}, flush=True)
    return found


def killed(endpoint: Endpoint, client: Client, args: argparse.Namespace, tasks: list[str]) -> dict[str, int]:
    """Failures of callers, and what became of the copies, around a kill of the replica of the shadow's arm."""
    first, second, doomed = homes_apart(endpoint, client, tasks)
    start(client, "killed", "shadow", f"{endpoint.base}:{first}", f"{endpoint.base}:{second}")
    pids = {row["replica"]: row["pid"] for row in client.stats()["replicas"]}
    failures = 0
    with httpx.Client(base_url=str(endpoint.url), timeout=60) as http:
        for number in range(args.kill_requests):
            if number == args.kill_requests // 4:
                os.kill(pids[doomed], signal.SIGKILL)
            failures += ask(http, "experiment/killed", 8) is None
            time.sleep(0.02)
    until(lambda: state(client, "killed")["shadow"]["waiting"] == 0)
    copies = state(client, "killed")["arms"][1]
    return {
        "callers": args.kill_requests,
        "failures": failures,
        "copies_answered": copies["answers"],
        "copies_failed": copies["errors"],
    }


def homes_apart(endpoint: Endpoint, client: Client, tasks: list[str]) -> tuple[str, str, str]:
    """Two tasks that different replicas hold, and the second one's replica."""
    with httpx.Client(base_url=str(endpoint.url), timeout=60) as http:
        while True:
            for task in tasks:
                _answered(ask(http, f"{endpoint.base}:{task}", 1))
            held: dict[str, set[str]] = {}
            for row in client.adapters():
                for ref in row["refs"]:
                    held.setdefault(ref.partition("@")[0], set()).add(row["replica"])
            for one in tasks:
                for other in tasks:
                    if len(held[one]) == len(held[other]) == 1 and held[one] != held[other]:
                        return one, other, next(iter(held[other]))
            for task in tasks:
                client.admin("unload", adapter=task)


def shadowed(endpoint: Endpoint, client: Client, args: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Latencies of each round, without and with a copy of every prompt to the second arm."""
    start(client, "shadow", "shadow", "arm/first", "arm/second")
    found: dict[str, list[list[float]]] = {"alone": [], "shadowed": []}
    with httpx.Client(base_url=str(endpoint.url), timeout=120) as http:
        for turn in range(args.rounds + 1):
            for name, model in (("alone", "arm/first"), ("shadowed", "experiment/shadow")):
                until(lambda: state(client, "shadow")["shadow"]["waiting"] == 0)
                times = []
                for _ in range(args.shadow_requests):
                    times.append(_answered(ask(http, model, 8)))
                    time.sleep(times[-1] / 1000)
                found[name] += [times] if turn else []
                print(
                    f"turn {turn} {name} p50, p99 ms", [round(quantile(times, q), 1) for q in (0.5, 0.99)], flush=True
                )
    return found


def _answered(took_ms: float | None) -> float:
    if took_ms is None:
        raise RuntimeError("a request failed")
    return took_ms


def _p99(rounds: list[list[float]]) -> list[float]:
    return [quantile(one, 0.99) for one in rounds]


def _quantiles(found: dict[str, list[list[float]]]) -> dict[str, Any]:
    return {
        name: {f"p{q}_ms": [round(quantile(one, q / 100), 3) for one in rounds] for q in (50, 95, 99)}
        for name, rounds in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=600, help="of a round, each way")
    parser.add_argument("--shadow-requests", type=int, default=40, help="of a round, each way")
    parser.add_argument("--kill-requests", type=int, default=300)
    args = parser.parse_args()
    clock = Clock()
    draws = assign_p99_us(args.rounds + 2)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        thin = thin_base(root / "thin")
        store, digest = Store(str(root / "store")), base_model.resolve(BaseSpec(uri=str(thin))).digest
        contents = base.write_adapters(base.linears(base.load(thin)), root / "weights", 8, torch.float32)
        tasks = base.publish_many(store, digest, contents, 8, root / "scratch")
        spec = {"base": str(thin), "root": store.uri, "quant": {"kind": "none"}, "num_cpus": 0.5}
        with serving({**spec, "port": 8765, "num_replicas": 2}) as (endpoint, client):
            through = added(endpoint, client, args)
            lost = killed(endpoint, client, args, tasks)
        arms = [{"name": name, "prompt": {"system": text}} for name, text in (("first", "Be short."), ("second", "-"))]
        with serving({"base": base.URI, "root": store.uri, "arms": arms, "port": 8765}) as (endpoint, client):
            beside = shadowed(endpoint, client, args)
            copies = state(client, "shadow")
    differences = [b - a for a, b in zip(_p99(through["direct"]), _p99(through["experiment"]), strict=True)]
    ratios = [b / a for a, b in zip(_p99(beside["alone"]), _p99(beside["shadowed"]), strict=True)]
    figures: dict[str, Figure] = {
        "assign_p99": figure(draws, "us"),
        "added_p99": figure(differences, "ms"),
        "shadow_p99": figure(ratios, "x"),
        "killed_answered": figure([1 - lost["failures"] / lost["callers"]], "share"),
    }
    detail = {
        "through": _quantiles(through),
        "beside": _quantiles(beside),
        "killed": lost,
        "copies": {"arms": copies["arms"], **copies["shadow"]},
    }
    meta = {
        "draws": DRAWS,
        "requests": args.requests,
        "shadow_requests": args.shadow_requests,
        "rounds": args.rounds,
        "kill_requests": args.kill_requests,
        "thin_base": "2 layers of width 64",
        "shadow_tokens": 8,
    }
    write("experiment", args.out, figures, detail, meta, clock)


if __name__ == "__main__":
    main()
