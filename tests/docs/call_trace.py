"""Order in which named functions are first called, in this process or in child processes.

A child process records where its PYTHONPATH starts with the folder that `child_environment` returns.
"""

import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
VARIABLE = "CALL_TRACE"
"""Environment variable with the file that child processes append to and the functions that they look for."""
STARTER = "from tests.docs import call_trace\ncall_trace.start_in_child()\n"


def resolve(dotted: str) -> object:
    """Return what a dotted name such as `training.run.ResolvedRun.resolve` names. Raises LookupError."""
    parts = dotted.split(".")
    parts = parts if parts[0] == "graftwork" else ["graftwork", *parts]
    for cut in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if error.name is None or not ".".join(parts[:cut]).startswith(error.name):
                raise
            continue
        for name in parts[cut:]:
            if not hasattr(found, name):
                raise LookupError(f"{'.'.join(parts[:cut])} has no {'.'.join(parts[cut:])}")
            found = getattr(found, name)
        return found
    raise LookupError(f"no module {dotted}")


def code_of(dotted: str) -> tuple[str, str]:
    """Return file and qualified name of the code of a function, method or class (then of `__init__`)."""
    found = resolve(dotted)
    function: Any = inspect.unwrap(found.__init__ if isinstance(found, type) else found)  # type: ignore[arg-type,misc]
    function = getattr(function, "__func__", function)
    code: CodeType = inspect.unwrap(function).__code__
    return os.path.realpath(code.co_filename), code.co_qualname


class Recorder:
    """Profile hook that calls `on_first` once for each of the wanted functions, from any thread."""

    def __init__(self, wanted: Mapping[tuple[str, str], str], on_first: Callable[[str], None]) -> None:
        self._on_first = on_first
        self._known: dict[int, CodeType] = {}
        self.look_for(wanted)

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if event != "call" or id(code) in self._known:
            return
        self._known[id(code)] = code  # the reference keeps the id from being used again
        if code.co_qualname in self._names:
            name = self._wanted.pop((os.path.realpath(code.co_filename), code.co_qualname), None)
            if name is not None:
                self._on_first(name)

    def look_for(self, wanted: Mapping[tuple[str, str], str]) -> None:
        """Record first calls of these functions from now on."""
        self._wanted = dict(wanted)
        self._names = {qualified for _, qualified in wanted}
        self._known.clear()

    def install(self) -> None:
        """Record in this thread and in those that are started from now on."""
        threading.setprofile(self)
        sys.setprofile(self)

    @staticmethod
    def remove() -> None:
        """Stop in this thread and for new ones."""
        threading.setprofile(None)
        sys.setprofile(None)


@contextmanager
def child_environment(folder: Path, names: list[str]) -> Iterator[tuple[dict[str, str], Callable[[], list[str]]]]:
    """Environment in which every Python process records the first calls of `names`, and a reader of their order."""
    starter = folder / "starter"
    starter.mkdir()
    (starter / "sitecustomize.py").write_text(STARTER, encoding="utf-8")
    log = folder / "calls.txt"
    log.touch()
    wanted = [[*code_of(name), name] for name in names]
    path = os.pathsep.join([str(starter), str(ROOT)])
    yield (
        {**os.environ, "PYTHONPATH": path, VARIABLE: json.dumps({"log": str(log), "wanted": wanted})},
        lambda: read_order(log),
    )


def read_order(log: Path) -> list[str]:
    """Names by the time of their first call in any process."""
    first: dict[str, int] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        at, name = line.split(" ")
        first[name] = min(int(at), first.get(name, int(at)))
    return sorted(first, key=lambda name: first[name])


def start_in_child() -> None:
    """Record in this process, which `child_environment` started."""
    settings = json.loads(os.environ[VARIABLE])
    log = os.open(settings["log"], os.O_WRONLY | os.O_APPEND)

    def note(name: str) -> None:
        os.write(log, f"{time.monotonic_ns()} {name}\n".encode())

    Recorder({(file, qualified): name for file, qualified, name in settings["wanted"]}, note).install()
