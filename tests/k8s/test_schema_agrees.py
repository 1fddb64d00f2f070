"""What our check refuses, a real API server refuses under strict field validation, and the other way round."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from graftwork.cluster.kuberay.schema import check_schema
from tests.k8s.server import CRDS, NAMESPACE, ApiServer, require_parts
from tests.kuberay_objects import GPUS, changed, rayjob, rayservice

pytestmark = pytest.mark.k8s
PLURALS = {"RayJob": "rayjobs", "RayService": "rayservices"}
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    7,
    2**31,
    2**63,
    1.5,
    "",
    "10",
    "10m",
    "text",
    [],
    [1],
    ["a"],
    {},
    {"a": 1},
    {"a": "b"},
]
CHANGES = 400
SEED = 20260819


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    require_parts()
    server = ApiServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


def dry_run(server: ApiServer, made: dict[str, Any]) -> tuple[int, str]:
    """Code and message of a creation that stores nothing."""
    plural = PLURALS[made["kind"]]
    path = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/{plural}?dryRun=All&fieldValidation=Strict"
    code, answer = server.ask("POST", path, made)
    return code, str(answer.get("message", ""))


def definition(server: ApiServer, kind: str) -> dict[str, Any]:
    code, found = server.ask("GET", f"{CRDS}/{PLURALS[kind]}.ray.io")
    assert code == 200
    return dict(found)


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """All paths within `spec`."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, str(key)))


@pytest.mark.parametrize("made", [rayjob(workers=[GPUS], queue="gpu"), rayservice(workers=[{**GPUS, "max_count": 4}])])
def test_what_is_built_is_taken(server: ApiServer, made: dict[str, Any]) -> None:
    assert dry_run(server, made)[0] == 201
    assert check_schema(made, definition(server, made["kind"])) == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "made", [rayjob(workers=[GPUS], gcs={"backend": "rocksdb"}), rayservice(workers=[{**GPUS, "max_count": 4}])]
)
def test_changes_at_random_are_judged_alike(server: ApiServer, made: dict[str, Any]) -> None:
    """Live and shipped schemas against the server: no object that one takes and the other refuses."""
    crd, dice = definition(server, made["kind"]), random.Random(SEED)
    paths = ["|".join(("spec", *path)) for path in places(made["spec"])]
    differ, refused = [], 0
    for _ in range(CHANGES):
        path, value = dice.choice(paths), dice.choice(ODD)
        if dice.random() < 0.3:
            path = f"{path.rpartition('|')[0]}|{dice.choice(('odd', 'replica', 'name'))}"
            if path.split("|")[-2].isdigit() or not isinstance(at(made, path.rpartition("|")[0]), dict):
                continue
        copy = changed(made, {path: value})
        code, message = dry_run(server, copy)
        ours, shipped = check_schema(copy, crd), check_schema(copy)
        refused += code != 201
        if (code == 201) != (not ours) or (code == 201) != (not shipped):
            differ.append(
                (path, value, code, message[:200], [one.where for one in ours], [one.where for one in shipped])
            )
    assert "\n".join(map(str, differ)) == ""
    assert refused > CHANGES / 4


def at(made: dict[str, Any], path: str) -> Any:
    inner: Any = made
    for key in path.split("|"):
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    return inner
