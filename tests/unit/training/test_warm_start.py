"""Going on from a published adapter."""

from typing import Any

import pytest

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import AdapterManifest
from graftwork.artifacts.registry import resolve
from graftwork.base import load as base_model
from graftwork.errors import ArtifactError, ConfigError
from graftwork.storage.store import RunPaths, Store
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.run import ResolvedRun, run_paths
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import TrainJob
from tests.adapters import facts
from tests.training import task


def publish(spec: TrainSpec, run: RunPaths, step: int, parent: str | None = None) -> AdapterManifest:
    """The adapter of a checkpoint as `train` publishes it."""
    known: dict[str, Any] = {
        **facts(),
        "base_digest": base_model.resolve(spec.base).digest,
        "method": spec.adapter.model_dump(mode="json"),
        "run": run.run_id,
        "parent": parent,
    }
    with Checkpoints(run).model_files(step) as folder:
        return artifact.publish(run.store, spec.name, folder, **known, alias="latest")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainSpec, AdapterManifest, float]:
    """A trained and published adapter, and its last loss."""
    spec = task(tmp_path_factory.mktemp("init"), **{"optim.epochs": 8})
    run = RunPaths(Store(spec.root), spec.name, "0" * 64)
    result = run_steps(TrainJob(spec, prepare(spec), run), lambda _: True)
    return spec, publish(spec, run, result.steps), result.train_loss[-1][1]


def test_training_goes_on_where_the_adapter_was(first: tuple[TrainSpec, AdapterManifest, float]) -> None:
    spec, manifest, last_loss = first
    run = ResolvedRun.resolve(spec.with_({"init_from": "colours@latest"}))
    assert run.spec.init_from == manifest.ref
    fresh = run_steps(TrainJob(spec, run.data, max_steps=1), lambda _: True)
    going_on = run_steps(TrainJob(run.spec, run.data, max_steps=1), lambda _: True)
    assert going_on.train_loss[0][1] < 1.5 * last_loss < 0.5 * fresh.train_loss[0][1]


def test_a_rerun_is_the_same_run_although_its_result_took_the_alias(
    first: tuple[TrainSpec, AdapterManifest, float],
) -> None:
    spec, manifest, _ = first
    spec = spec.with_({"init_from": "colours@latest", "seed": 3, "optim.epochs": 1})
    run = ResolvedRun.resolve(spec)
    assert run.paths.digest != run_paths(spec.with_({"init_from": None})).digest
    result = run_steps(TrainJob(run.spec, run.data, run.paths), lambda _: True)
    published = publish(spec, run.paths, result.steps, parent=manifest.version)
    assert resolve(Store(spec.root), "colours@latest").version == published.version != manifest.version
    assert run_paths(spec).digest == run.paths.digest
    artifact.promote(Store(spec.root), "colours", "latest", manifest.version)


def test_another_shape_is_refused(first: tuple[TrainSpec, AdapterManifest, float]) -> None:
    spec, _, _ = first
    with pytest.raises(ConfigError, match=r"adapter\.rank=4 with init_from=colours@latest") as caught:
        run_paths(spec.with_({"init_from": "colours@latest", "adapter.rank": 4}))
    assert "--set adapter.rank=16" in caught.value.hint


def test_an_unknown_adapter_is_refused(first: tuple[TrainSpec, AdapterManifest, float]) -> None:
    spec, _, _ = first
    with pytest.raises(ArtifactError):
        run_paths(spec.with_({"init_from": "colours@nightly"}))
