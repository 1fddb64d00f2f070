"""Newer bases: two tiny ones, the recorded spec trained on the second, both asked the recorded held-out rows."""

from pathlib import Path

import pytest

from graftwork.artifacts.manifest import aliases
from graftwork.artifacts.registry import resolve
from graftwork.base import load as base_model
from graftwork.cluster.session import Session
from graftwork.errors import ArtifactError, ConfigError
from graftwork.storage.store import Store
from graftwork.training.evaluation.rebase import RebaseAsk, curve, pairs_of, rebase, write_curve, write_rebase
from graftwork.training.run import train
from graftwork.training.spec import TrainSpec
from tests.tiny import write_tiny_base
from tests.training import task


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Session) -> tuple[TrainSpec, str]:
    """A task that hardly learned and whose outcomes were not measured, and its adapter."""
    folder = tmp_path_factory.mktemp("rebase")
    spec = task(folder, **{"num_workers": 1, "optim.lr": 1e-5, "optim.epochs": 1})
    report = train(spec)
    assert "was not measured" in Path(report.page).read_text(encoding="utf-8")
    return spec, report.published_name


@pytest.fixture(scope="module")
def new_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_base(tmp_path_factory.mktemp("new-base"), seed=1))


@pytest.mark.long
def test_both_bases_answer_and_nothing_is_promoted(trained: tuple[TrainSpec, str], new_base: str) -> None:
    spec, old = trained
    ask = RebaseAsk(spec.root, new_base, ("colours@latest",))
    told = []
    report = rebase(ask, on_progress=lambda alias, now: told.append((alias, now.total_steps)))
    [found] = report.tasks
    assert (found.alias, found.old_adapter, found.metric, found.test.n) == ("colours@latest", old, "exact", 8)
    assert set(told) == {("colours@latest", 6)}
    store = Store(spec.root)
    assert aliases(store, "colours") == {"latest": old.partition("@")[2]}
    made = resolve(store, found.new_adapter)
    assert made.base_digest == base_model.resolve(spec.with_({"base": new_base}).base).digest
    assert f"graftwork adapters promote {found.new_adapter} latest --root {spec.root}" == found.promote
    assert found.outcome == "undecided"
    assert "Nothing was promoted" in report.sentence
    for run in Store(spec.root).list("runs"):
        assert "Gained and lost" in Path(spec.root, "runs", run, "report.html").read_text(encoding="utf-8")
    again = rebase(ask)
    assert again.tasks[0].reused
    assert again == report.model_copy(update={"tasks": (found.model_copy(update={"reused": True}),)})
    page = Path(write_rebase(ask, report).html_uri).read_text(encoding="utf-8")
    assert found.promote in page


def test_what_cannot_be_rebased_is_refused_before_a_start(trained: tuple[TrainSpec, str], new_base: str) -> None:
    spec, _ = trained
    with pytest.raises(ConfigError, match="that is the base it was trained on"):
        pairs_of(RebaseAsk(spec.root, spec.base.uri, ("colours@latest",)))
    with pytest.raises(ConfigError, match="stands twice"):
        pairs_of(RebaseAsk(spec.root, new_base, ("colours@latest", "colours@latest")))
    with pytest.raises(ArtifactError, match="prod"):
        pairs_of(RebaseAsk(spec.root, new_base, ("colours@prod",)))


@pytest.mark.soak
def test_a_curve_is_made_of_ordinary_runs(trained: tuple[TrainSpec, str]) -> None:
    spec = trained[0].with_({"optim.lr": 5e-3, "optim.epochs": 4})
    report = curve(spec, [8, 24])
    assert [point.rows for point in report.points] == [8, 24]
    assert report.points[1].loss.value < report.points[0].loss.value
    assert report.steps[0].loss.value == pytest.approx(report.points[1].loss.value - report.points[0].loss.value)
    assert [point.reused for point in curve(spec, [8, 24]).points] == [True, True]
    plain = train(spec.with_({"data.train_rows": 24, "alias": None}))
    assert (plain.reused, plain.run_id) == (True, report.points[1].run_id)
    assert report.sentence in Path(write_curve(spec, report).html_uri).read_text(encoding="utf-8")
