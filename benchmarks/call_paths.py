"""Functions and files of this package on the path of one chat request, and of one training run.

    python -m benchmarks.call_paths [--chat | --train] [--names] [--out results/call_paths.json]

`sys.setprofile` records every call in all threads. A function counts once, however often it is called;
comprehensions, lambdas and class bodies do not count. A file counts once if one of its functions is called.
Each trace runs in a process of its own, on a tiny random base.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("graftwork", "serving", "training", "tuning", "cluster")
"""Folders whose functions are counted."""

SETTLE_S = 0.5
"""Time for the engine's thread to release a request that has been answered."""


class CallTrace:
    """Functions of the package that ran while the trace was on, each with its file and its number of calls."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.on = False
        self._files: dict[str, str | None] = {}

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        """Count a call; `sys.setprofile` calls this for each event."""
        if event != "call" or not self.on:
            return
        code = frame.f_code
        if code.co_name.startswith("<"):
            return
        if code.co_filename not in self._files:
            self._files[code.co_filename] = _own_path(code.co_filename)
        path = self._files[code.co_filename]
        if path is not None:
            name = f"{path}:{code.co_qualname}"
            self.calls[name] = self.calls.get(name, 0) + 1

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record within the block."""
        self.on = True
        try:
            yield
        finally:
            self.on = False

    def install(self) -> None:
        """Hook this thread and every thread that is started from now on."""
        threading.setprofile(self)
        sys.setprofile(self)

    def summary(self) -> dict[str, Any]:
        """Return the number of functions, of files and of calls, and the names as `path:qualified name`."""
        files = {name.partition(":")[0] for name in self.calls}
        return {
            "functions": len(self.calls),
            "files": len(files),
            "calls": sum(self.calls.values()),
            "names": sorted(self.calls),
        }


def _own_path(filename: str) -> str | None:
    """Return the path within the repository of a counted file; None for others. Resolves links of packages."""
    path = Path(filename).resolve()
    if not path.is_relative_to(ROOT):
        return None
    relative = path.relative_to(ROOT)
    return str(relative) if relative.parts[0] in FOLDERS and relative.suffix == ".py" else None


def trace_chat() -> dict[str, Any]:
    """Trace one POST /v1/chat/completions: base arm, 4 tokens, no Ray, no retrieval, after one request to warm up.

    Ingress and replica run in one process over `tests.local_endpoint`; Ray Serve and its router are not counted.
    """
    return _in_subprocess("chat")


def _chat() -> dict[str, Any]:
    import asyncio

    import httpx

    trace = CallTrace()
    trace.install()

    from graftwork.serving.spec import ServeSpec
    from tests.local_endpoint import local_client
    from tests.tiny import write_tiny_base

    async def play(folder: Path) -> None:
        spec = ServeSpec.model_validate(
            {
                "base": str(write_tiny_base(folder / "base")),
                "root": str(folder / "root"),
                "quant": {"kind": "none", "dtype": "float32"},
                "engine": {"max_seq_len": 128},
            }
        )
        async with local_client(spec) as client:
            await send(client, "Hello")
            await asyncio.sleep(SETTLE_S)
            with trace.recording():
                await send(client, "Another question")
                await asyncio.sleep(SETTLE_S)

    async def send(client: httpx.AsyncClient, text: str) -> None:
        body = {"model": "base", "messages": [{"role": "user", "content": text}], "max_tokens": 4}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] >= 1, answer.text

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(play(Path(folder)))
    return trace.summary()


def trace_train() -> dict[str, Any]:
    """Trace one run from its YAML to the published adapter and its page: plain LoRA SFT on a tiny base.

    The loop runs in this process. Ray, the worker's process and the command line are not counted.
    """
    return _in_subprocess("train")


def _train() -> dict[str, Any]:
    import pkgutil

    import trl.trainer.sft_trainer  # noqa: F401  # before the trace: a traced import takes minutes

    import graftwork.report
    import graftwork.training

    for package in (graftwork.training, graftwork.report):  # a class body that an import runs is no call
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)

    from graftwork import config
    from graftwork.training.loop import train_as_worker
    from graftwork.training.run import ResolvedRun, train_resolved
    from graftwork.training.spec import TrainSpec
    from graftwork.training.worker_messages import LoopResult, TrainJob
    from tests.training import task

    trace = CallTrace()

    def workers(job: TrainJob) -> LoopResult:
        result = train_as_worker(job, None, lambda: False)
        assert isinstance(result, LoopResult), result
        return result

    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "train.yaml"
        changes = {"adapter": {"kind": "lora", "rank": 4}, "num_workers": 1, "checkpoint_every": 3}
        tree = task(Path(folder), **changes).model_dump(mode="json", exclude_defaults=True)
        spec.write_text(json.dumps({"kind": "train", **tree}), encoding="utf-8")
        trace.install()
        with trace.recording():
            asked = config.load(spec, [], expect="train")
            assert isinstance(asked, TrainSpec)
            run = ResolvedRun.resolve(asked)
            run.notes_before_start()
            report = train_resolved(run, workers=workers)
        assert report.adapter, report.notes
        assert report.page, report.notes
    return trace.summary()


TRACES = {"chat": _chat, "train": _train}
"""Traces by name; each runs in a process of its own."""


def _in_subprocess(name: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "trace.json"
        command = [sys.executable, "-m", "benchmarks.call_paths", "--trace", name, "--out", str(out)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in TRACES:
        parser.add_argument(f"--{name}", action="append_const", dest="chosen", const=name)
    parser.add_argument("--names", action="store_true", help="print each function")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trace", choices=TRACES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trace:
        args.out.write_text(json.dumps(TRACES[args.trace]()))
        return
    found = {name: _in_subprocess(name) for name in args.chosen or TRACES}
    for name, trace in found.items():
        print(f"{name}: {trace['functions']} functions in {trace['files']} files, {trace['calls']} calls")
        if args.names:
            print("\n".join(f"  {one}" for one in trace["names"]))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
