"""Statistics of live and offline comparisons: false alarms when one looks always, power, and the time of a long log.

    python -m benchmarks.sequential                      2,000 runs of each, a few minutes on one core
    python -m benchmarks.sequential --runs 200 --rows 50000 --out /tmp/sequential.json

Runs are simulated side by side through the classes that the monitor uses
(tests/unit/serving/ab_test/test_online_runs.py compares both) and, on the same draws, peers: the z-test looked at
after every request and the same once at the
end, mSPRT with plug-in variance, McNemar's z looked at always, chi-square looked at always, and lm-eval's unpaired z
offline. Units enter as they are drawn here; benchmarks/latency_runs.py lets their answers overtake one another. Upper
bounds are one-sided 95 % ones (Wilson). The log has two arms, an assignment and an answer a unit, as Parquet segments.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.online_runs import (
    Split,
    Stopped,
    Stops,
    even,
    guard_runs,
    ramping,
    ratio_runs,
    shadow_runs,
    share,
    split_runs,
    tenth,
)
from benchmarks.record import NEVER, Clock, Figure, figure, write
from graftwork import stats
from graftwork.stats import Floats

SHARES = (0.01, 0.1, 0.5, 0.9, 0.99)
PLANS = {"50/50": even, "90/10": tenth, "ramping": ramping}
OFFLINE_N, OFFLINE_GAIN = 200, 0.08


def upper(hits: float, runs: int) -> float:
    """One-sided 95 % upper bound of a share."""
    return stats.wilson(round(hits * runs), runs, alpha=0.1).high


def rate(stops: Stops, within: int) -> Figure:
    """Share of runs that stopped, with its 50 % interval in place of quartiles."""
    runs, found = len(stops), share(stops, within)
    around = stats.wilson(round(found * runs), runs, alpha=0.5)
    return Figure(value=found, q1=min(around.low, found), q3=max(around.high, found), n=runs, unit="share of runs")


def median(stops: Stops, unit: str) -> Figure:
    """Median stop over all runs; one that never stopped stands at the end."""
    return figure([float(stop) for stop in np.minimum(stops, NEVER)], unit)


def alike(runs: int) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """A/A: false alarms and misses of the sequence for every share and plan."""
    found: list[dict[str, Any]] = []
    for number, (share_right, (name, plan)) in enumerate((p, one) for p in SHARES for one in PLANS.items()):
        seen = split_runs(Split(share_right, share_right, plan), runs, seed=number)
        found.append(
            {
                "p": share_right,
                "plan": name,
                "runs": runs,
                "ours": share(seen.ours, 4000),
                "upper": upper(share(seen.ours, 4000), runs),
                "covered": 1 - float(np.mean(seen.missed)),
                "peers": {peer: share(stops, 4000) for peer, stops in seen.peers.items()},
            }
        )
        print(found[-1], flush=True)
    bounds, peeked = [one["upper"] for one in found], [one["peers"]["z, always looked at"] for one in found]
    worst = {"aa_upper": max(bounds), "aa_covered": min(one["covered"] for one in found), "aa_peeked_z": max(peeked)}
    return {name: single(value, runs, "share of runs") for name, value in worst.items()}, found


def unlike(runs: int) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """Splits with an effect: the goal's, and others for the table."""
    cases = {
        "0.85 to 0.80": (0.85, 0.8, even),
        "0.55 to 0.50": (0.55, 0.5, even),
        "0.60 to 0.50": (0.6, 0.5, even),
        "0.85 to 0.80, 90/10": (0.85, 0.8, tenth),
        "0.04 to 0.01": (0.04, 0.01, even),
    }
    found: list[dict[str, Any]] = []
    first: Stopped | None = None
    for number, (name, (one, none, plan)) in enumerate(cases.items()):
        seen = split_runs(Split(one, none, plan), runs, seed=100 + number)
        first = first or seen
        found.append({"case": name, **_told(seen, 4000)})
        print(found[-1], flush=True)
    assert first is not None
    figures = {
        "power": rate(first.ours, 4000),
        "power_median": median(first.ours, "requests"),
        "power_covered": single(1 - float(np.mean(first.missed)), runs, "share of runs"),
        "power_msprt": rate(first.peers["mSPRT"], 4000),
    }
    return figures, found


def shadowed(runs: int) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """Pairs: 5 points at 20 % discordance, none, and 10 points."""
    cases = {"5 pp at 20 %": (0.125, 0.075), "none at 20 %": (0.1, 0.1), "10 pp at 20 %": (0.15, 0.05)}
    seen = {name: shadow_runs(*case, 2000, runs, seed=200 + k) for k, (name, case) in enumerate(cases.items())}
    first = seen["5 pp at 20 %"]
    figures = {
        "shadow_power": rate(first.ours, 2000),
        "shadow_median": median(first.ours, "prompts"),
        "shadow_aa": rate(seen["none at 20 %"].ours, 2000),
    }
    return figures, [{"case": name, **_told(one, 2000)} for name, one in seen.items()]


def ratios(runs: int) -> dict[str, Figure]:
    """Sample ratio: shifts of two points and of one, and none."""
    two, _ = ratio_runs(0.5, 0.52, 20_000, runs, seed=300)
    one, _ = ratio_runs(0.5, 0.51, 50_000, runs, seed=301)
    none, peeked = ratio_runs(0.5, 0.5, 50_000, runs, seed=302)
    return {
        "srm_52": rate(two, 20_000),
        "srm_52_median": median(two, "units"),
        "srm_51": rate(one, 50_000),
        "srm_51_median": median(one, "units"),
        "srm_false": rate(none, 50_000),
        "srm_false_peeked_chi2": rate(peeked, 50_000),
    }


def guarded(runs: int) -> dict[str, Figure]:
    """A guardrail of 5 % errors: an arm with 20 %, one at the limit, one with 1 %."""
    return {
        "guard_median": median(guard_runs(0.05, 0.2, 1000, runs, seed=400), "requests"),
        "guard_false": rate(guard_runs(0.05, 0.05, 4000, runs, seed=401), 4000),
        "guard_false_at_1": rate(guard_runs(0.05, 0.01, 4000, runs, seed=402), 4000),
    }


def offline(runs: int) -> dict[str, Figure]:
    """200 questions of uniformly varying difficulty, five times the runs: McNemar's tests and lm-eval's z."""
    found: dict[str, Figure] = {}
    for name, gain, seed in (("power", OFFLINE_GAIN, 500), ("null", 0.0, 501)):
        rng = np.random.default_rng(seed)
        refused: dict[str, list[float]] = {"mcnemar_midp": [], "mcnemar_exact": [], "lm_eval_z": []}
        for _ in range(5 * runs):
            easy = rng.uniform(0, 1 - OFFLINE_GAIN, OFFLINE_N)
            a, b = (rng.random(OFFLINE_N) < easy + gain).astype(float), (rng.random(OFFLINE_N) < easy).astype(float)
            wins, losses = int(np.sum(a > b)), int(np.sum(a < b))
            refused["mcnemar_midp"].append(stats.mcnemar_midp(wins, losses) < 0.05)
            refused["mcnemar_exact"].append(stats.mcnemar_exact(wins, losses) < 0.05)
            refused["lm_eval_z"].append(_unpaired_z(a, b) >= 1.959964)
        for test, hits in refused.items():
            stops = np.where(np.array(hits), 1, np.iinfo(np.int64).max)
            found[f"offline_{name}_{test}"] = rate(stops, 1)
    return found


def _unpaired_z(a: Floats, b: Floats) -> float:
    """Difference of means over the root of the summed squared standard errors, as lm-eval's `mean_stderr`s give it."""
    error = np.sqrt(np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b))
    return float(abs(np.mean(a) - np.mean(b)) / error)


def log_time(rows: int) -> dict[str, Figure]:
    """A log on disk to verdict, JSON and page, in a process of its own; wall and CPU seconds, peak memory."""
    with TemporaryDirectory() as folder:
        write_log(Path(folder), rows)
        found = []
        for _ in range(3):
            said = subprocess.run(
                [sys.executable, "-m", "benchmarks.sequential", "--read", folder],
                check=True,
                capture_output=True,
                text=True,
                timeout=600,
            ).stdout
            found.append([float(part) for part in said.split()])
    wall, cpu, peak, grown = (list(column) for column in zip(*found, strict=True))
    return {
        "log_wall": figure(wall, "s"),
        "log_cpu": figure(cpu, "s"),
        "log_peak": figure(peak, "MiB"),
        "log_memory": figure(grown, "MiB"),
    }


def read_log(folder: str) -> None:
    """Prints wall s, CPU s, peak MiB and what of it came with the log."""
    from graftwork.report import ReportInput, render_html, render_json
    from graftwork.serving.ab_test.log_reader import ExperimentLog
    from graftwork.serving.ab_test.report import analyse_log
    from graftwork.serving.ab_test.spec import GuardrailSpec, OnlineRules
    from graftwork.storage.store import Store

    rules = OnlineRules(
        ("base", "rag"),
        "base",
        "right",
        {"base": 0.5, "rag": 0.5},
        guardrails=(
            GuardrailSpec(kind="errors", limit=0.05),
            GuardrailSpec(kind="latency", limit=0.05, bound_ms=2000.0),
        ),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wall, cpu = time.perf_counter(), time.process_time()
    report = analyse_log("bench", ExperimentLog(Store(folder), ()), rules)
    page = ReportInput(title="bench", created_at="2026-01-01T00:00:00+00:00", experiment=report)
    size = len(render_html(page).encode()) + 0 * len(render_json(page))
    took = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert size < 1 << 20, f"the page has {size} bytes"
    assert report.contrasts[0].verdict in ("better", "equivalent"), report.sentence
    print(*took, peak, peak - before)


def write_log(folder: Path, rows: int, size: int = 50_000) -> None:
    """Parquet segments of a split with a 1 pp effect, answers of some 100 ms, 1 % failures."""
    import pyarrow as pa

    from graftwork.serving.ab_test.log import LogSegment, parquet_bytes
    from graftwork.serving.ab_test.log_reader import SCHEMA

    rng = np.random.default_rng(0)
    units = rows // 2
    for number, start in enumerate(range(0, units, size // 2), 1):
        count = min(size // 2, units - start)
        ids = [f"{value:032x}" for value in (start + np.arange(count)).tolist()]
        treated, failed = rng.random(count) < 0.5, rng.random(count) < 0.01
        right = (rng.random(count) < np.where(treated, 0.81, 0.8)).astype(float)
        drawn, latency_ms = (start + np.arange(count)) / 50, rng.lognormal(4.6, 0.8, count)
        order = np.argsort(np.concatenate([drawn, drawn + latency_ms / 1000]), kind="stable")
        unit, answer = order % count, order >= count
        columns = {
            "kind": np.where(answer, "answer", "assignment"),
            "experiment": ["bench"] * (2 * count),
            "role": ["primary"] * (2 * count),
            "unit": [ids[k] for k in unit],
            "request_id": [ids[k] for k in unit],
            "arm": np.where(treated, "rag", "base")[unit],
            "probability": np.full(2 * count, 0.5),
            "at": np.where(answer, drawn[unit] + latency_ms[unit] / 1000, drawn[unit]),
            "latency_ms": pa.array(latency_ms[unit], mask=~answer),
            "cold": np.zeros(2 * count, dtype=bool),
            "error": ["timeout" if one else None for one in failed[unit] & answer],
        }
        table = pa.table(
            {
                field.name: pa.array(columns[field.name], field.type)
                if field.name in columns
                else pa.nulls(2 * count, field.type)
                for field in SCHEMA
            }
        )
        scores = pa.StructArray.from_arrays([pa.array(right[unit], mask=failed[unit] | ~answer)], ["right"])
        data = parquet_bytes(table.append_column("scores", scores))
        (folder / LogSegment(1, number, number, 2 * count, "parquet").name).write_bytes(data)


def _told(seen: Stopped, steps: int) -> dict[str, Any]:
    return {
        "runs": len(seen.ours),
        "ours": share(seen.ours, steps),
        "median": min(float(np.median(seen.ours)), NEVER),
        "covered": 1 - float(np.mean(seen.missed)),
        "peers": {name: share(stops, steps) for name, stops in seen.peers.items()},
    }


def single(value: float, n: int, unit: str) -> Figure:
    """A value that is one number over all runs."""
    return Figure(value=value, q1=value, q3=value, n=n, unit=unit)


def main() -> None:
    """Measures and writes the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read_log(args.read)
        return
    clock, figures, detail = Clock(), {}, {}
    parts: dict[str, Callable[[int], tuple[dict[str, Figure], list[dict[str, Any]]]]] = {
        "alike": alike,
        "unlike": unlike,
        "shadow": shadowed,
    }
    for name, part in parts.items():
        found, detail[name] = part(args.runs)
        figures.update(found)
    for other in (ratios, guarded, offline):
        figures.update(other(args.runs))
    figures.update(log_time(args.rows))
    write("sequential", args.out, figures, detail, {"runs": args.runs, "rows": args.rows}, clock)


if __name__ == "__main__":
    main()
