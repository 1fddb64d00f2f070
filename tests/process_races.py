"""Real processes that race for the same key or die in the middle.

Run as a program it is one of them: it prints `ready`, waits for a line, acts, prints its outcome as JSON.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwork.artifacts import publish as artifact
from graftwork.errors import GraftworkError
from graftwork.storage.store import Store
from tests.adapters import facts

ROOT = Path(__file__).parents[1]
PROCESS_TIMEOUT_S = 60
_CHANGES = {"open", "write", "flush", "fsync", "close", "__exit__", "replace", "rename", "link", "unlink", "mkdir"}


def race(actions: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Run each action in a process of its own, all released at the same moment. Their outcomes, in order."""
    crew = [start(action) for action in actions]
    for process in crew:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()
    for process in crew:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return [outcome(process) for process in crew]


def start(action: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """A process that waits for its line before it acts."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "tests.process_races", *action]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a process printed at its end. A crash is a failed assertion that shows its traceback."""
    out, errors = process.communicate("go\n", timeout=PROCESS_TIMEOUT_S)
    assert process.returncode == 0, errors
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer


def fork_race(actions: Sequence[Callable[[], object]]) -> list[dict[str, Any]]:
    """`race` for local roots: forks of this process, which need no start-up and so meet more closely."""
    gate_read, gate_write = os.pipe()
    crew = []
    for action in actions:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(gate_write)
            os.read(gate_read, 1)  # returns in all processes at once, when the parent closes the gate
            os.write(write, json.dumps(_attempt(action)).encode())
            os._exit(0)
        os.close(write)
        crew.append((pid, read))
    os.close(gate_write)
    os.close(gate_read)
    outcomes = []
    for pid, read in crew:
        with os.fdopen(read, "rb") as pipe:
            text = pipe.read()
        assert os.waitpid(pid, 0)[1] == 0, text
        outcomes.append(json.loads(text))
    return outcomes


def die_at(moment: int, action: Callable[[], object]) -> bool:
    """Run `action` in a fork that kills itself -9 before its n-th call that can change a file. Whether it died."""
    pid = os.fork()
    if pid == 0:
        left = moment

        def count(_: object, event: str, called: Any) -> None:
            nonlocal left
            if event == "c_call" and called.__name__ in _CHANGES:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        answer = _attempt(action)
        sys.setprofile(None)
        os._exit("error" in answer)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _attempt(action: Callable[[], object]) -> dict[str, Any]:
    """What an action returned or raised, ready for JSON. The top of a child process: nothing may pass it."""
    try:
        return {"done": action()}
    except GraftworkError as error:
        return {"error": type(error).__name__, "text": str(error)}
    except BaseException as error:
        return {"error": "crash", "text": repr(error)}


def _act(store: Store, verb: str, *rest: str) -> object:
    if verb == "create":
        return store.create_bytes(str(os.getpid()).encode() * 1000, *rest), os.getpid()
    if verb == "publish":
        task, folder, *alias = rest
        return artifact.publish(store, task, Path(folder), **facts(), alias=alias[0] if alias else None).version
    if verb == "publish-limited":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        return _act(store, "publish", *rest)
    if verb == "promote":
        task, name, *versions = rest
        for version in versions:
            artifact.promote(store, task, name, version)
        return versions[-1]
    if verb == "remove":
        artifact.remove(store, *rest)
        return None
    raise SystemExit(f"no such verb: {verb}")


def _main() -> None:
    import numpy as np

    verb, root, *rest = sys.argv[1:]
    store = Store(root)
    assert np
    store.list()  # imports and connections come before the barrier, so that all do the same work after it
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(_attempt(lambda: _act(store, verb, *rest))))


if __name__ == "__main__":
    _main()
