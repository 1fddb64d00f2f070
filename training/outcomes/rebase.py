"""Newer bases come: each task's recorded spec on the new base, beside the old one, before anything is promoted."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import yaml

from graftwork import artifact, base_model, stats
from graftwork.artifact import AdapterManifest
from graftwork.base_model import BaseSpec
from graftwork.config import validate
from graftwork.errors import ArtifactError, ConfigError, DataError
from graftwork.metrics import Metric, signature
from graftwork.provenance import collect
from graftwork.report import BuiltReport, build
from graftwork.report.outcome_records import Level, PairedTest, Rebased, RebaseReport
from graftwork.report.records import MetricInfo
from graftwork.report.whole import ReportInput
from graftwork.storage import RunPaths, Store
from graftwork.training.outcomes.paired import level, paired
from graftwork.training.outcomes.told import task_scores, with_task
from graftwork.training.records import Progress
from graftwork.training.run import ResolvedRun, check, train
from graftwork.training.spec import TrainSpec

OnProgress = Callable[[str, Progress], None]
"""(alias, where its new run is)"""


@dataclass(frozen=True)
class RebaseAsk:
    """What is to be set side by side."""

    root: str
    base: str
    aliases: tuple[str, ...]
    rows: int = 200
    """Held-out rows answered, where a recorded spec names no number."""
    alpha: float = 0.05


@dataclass(frozen=True)
class RebasedTask:
    """One task as it was trained, and as it will be."""

    alias: str
    manifest: AdapterManifest
    old: TrainSpec
    new: TrainSpec


def pairs_of(ask: RebaseAsk) -> list[RebasedTask]:
    """Each alias' recorded spec, on both bases. Raises UserErrors of all kinds, before anything starts."""
    if len(set(ask.aliases)) != len(ask.aliases):
        raise ConfigError(f"rebase {' '.join(ask.aliases)}", "an alias stands twice", "each task once")
    new_base = base_model.resolve(BaseSpec.model_validate(ask.base))
    found = [_pair(ask, alias) for alias in ask.aliases]
    for pair in found:
        if pair.manifest.base_digest == new_base.digest:
            raise ConfigError(f"rebase --base {ask.base} {pair.alias}", "that is the base it was trained on",
                              "a rebase sets two bases side by side", "name another base")  # fmt: skip
        check(pair.new)
    return found


def _pair(ask: RebaseAsk, alias: str) -> RebasedTask:
    store = Store(ask.root)
    manifest = artifact.resolve(store, alias)
    asked = f"rebase {alias}"
    path = RunPaths(store, *_name_and_digest(manifest.run)).spec() if "-" in manifest.run else ()
    if not path or not store.exists(*path):
        raise ArtifactError(asked, f"run {manifest.run!r} has no recorded spec in {store.uri}",
                            "a task is trained again from its run's spec.yaml",
                            "a merged or registered adapter has none: rebase what it was made of")  # fmt: skip
    old = recorded_spec(asked, store, path)
    if old.init_from is not None:
        raise ConfigError(asked, f"it went on from {old.init_from}", "an adapter can't go on on another base",
                          f"rebase {old.init_from} first, and train on from its new version")  # fmt: skip
    if old.data.eval is None:
        raise ConfigError(asked, "its spec has no data.eval", "both bases answer the recorded held-out rows",
                          "train it again with data.eval")  # fmt: skip
    old = with_task(old, ask.rows)
    if (now := ResolvedRun.resolve(old).paths.run_id) != manifest.run:
        raise DataError(asked, f"its recorded spec is now run {now}, and {manifest.ref} came from {manifest.run}",
                        "the rows and the base that it names are those it was trained with",
                        "its data or its defaults changed since: train and promote it again first")  # fmt: skip
    return RebasedTask(alias, manifest, old, old.with_({"base": ask.base}))


def recorded_spec(asked: str, store: Store, path: Sequence[str]) -> TrainSpec:
    """The spec that a run recorded, in this root. Raises ConfigError where it is of another version of graftwork."""
    tree = yaml.safe_load(store.read_text(*path))
    if not tree["data"].get("eval"):
        tree.pop("eval_every", None)  # recorded with its default, which without data.eval can't take effect
    return validate(TrainSpec, {**tree, "root": store.uri}, where=f"{asked}: {store.path(*path)}")


def _name_and_digest(run_id: str) -> tuple[str, str]:
    name, _, digest = run_id.rpartition("-")
    return name, digest


def rebase(ask: RebaseAsk, *, on_progress: OnProgress | None = None) -> RebaseReport:
    """Train each task on the new base and answer its held-out rows with both. Needs an initialised Ray.

    New versions are published without an alias. Finished runs and measured answers are reused. Raises as `train` does.
    """
    compared = []
    for pair in pairs_of(ask):

        def tell(now: Progress, alias: str = pair.alias) -> None:
            if on_progress is not None:
                on_progress(alias, now)

        train(pair.old)  # finished: only its answers are measured, where they are not yet
        report = train(pair.new, on_progress=tell)
        compared.append(Compared.from_records(pair, report.published_name, report.reused, ask.alpha))
    return rebase_report(ask, compared)


@dataclass(frozen=True)
class Compared:
    """One task's answers on both bases."""

    pair: RebasedTask
    new_adapter: str
    reused: bool
    metric: Metric
    old: Level
    new: Level
    test: PairedTest
    about: str

    @classmethod
    def from_records(cls, pair: RebasedTask, new_adapter: str, reused: bool, alpha: float) -> "Compared":
        """From what both runs recorded."""
        old, new = task_scores(pair.old), task_scores(pair.new)
        assert old.probe.units == new.probe.units, "both answered the same rows"
        metric, units, seed = new.task_metric, new.probe.units, pair.new.seed
        sides = [level(one.values[metric.name], metric, units, alpha, seed) for one in (old, new)]
        test = paired(new.values[metric.name], old.values[metric.name], metric, units, alpha, seed)
        return cls(pair, new_adapter, reused, metric, sides[0], sides[1], test, new.probe.about)


def rebase_report(ask: RebaseAsk, compared: Sequence[Compared]) -> RebaseReport:
    """Which tasks gain, lose or are undecided: Benjamini-Hochberg over the tasks."""
    adjusted = stats.benjamini_hochberg([one.test.p_value for one in compared])
    tasks = tuple(_rebased(ask, one, p) for one, p in zip(compared, adjusted, strict=True))
    known = {one.metric.name: one.metric for one in compared}
    infos = tuple(MetricInfo(name=one.name, unit=one.unit, better=one.better, kind=one.kind, meaning=one.meaning)
                  for one in known.values())  # fmt: skip
    told = {word: [task.alias for task in tasks if task.outcome == word] for word in ("gains", "loses", "undecided")}
    sentence = "; ".join(f"{word}: {', '.join(names)}" for word, names in told.items() if names)
    return RebaseReport(
        old_bases=tuple(dict.fromkeys(one.pair.old.base.uri for one in compared)), new_base=ask.base, alpha=ask.alpha,
        tasks=tasks, metrics=infos, sentence=sentence[:1].upper() + sentence[1:] + ". Nothing was promoted.",
    )  # fmt: skip


def _rebased(ask: RebaseAsk, one: Compared, p: float) -> Rebased:
    task, _, name = one.pair.alias.partition("@")
    verdict = stats.decide(one.test.value, p, False, ask.alpha, higher=one.metric.better == "higher")
    recipe = {"asked": one.about, "old": one.pair.old.base.uri, "new": ask.base, "quant": one.pair.new.quant.kind,
              "interval": one.test.interval, "test": one.test.test, "adjust": "bh"}  # fmt: skip
    root = "" if ask.root == TrainSpec.model_fields["root"].default else f" --root {ask.root}"
    move = name if name != one.pair.manifest.version else "latest"
    return Rebased(
        alias=one.pair.alias, metric=one.metric.name, old_adapter=one.pair.manifest.ref, new_adapter=one.new_adapter,
        old=one.old, new=one.new, test=one.test, p_adjusted=p, reused=one.reused,
        outcome="gains" if verdict == "better" else "loses" if verdict == "worse" else "undecided",
        promote=f"graftwork adapters promote {one.new_adapter} {move}{root}",
        signature=signature(one.metric.name, one.test.n, recipe),
    )  # fmt: skip


def write_rebase(ask: RebaseAsk, report: RebaseReport) -> BuiltReport:
    """report.json and report.html in runs/rebase-<digest8>/. Raises StorageError."""
    made = "\n".join(f"{task.old_adapter} {task.new_adapter}" for task in report.tasks)
    run = RunPaths(Store(ask.root), "rebase", hashlib.sha256(made.encode()).hexdigest())
    page = ReportInput(
        title="Old base and new base", subtitle=run.run_id, verdict=report.sentence, rebase=report,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"), provenance=collect(0),
    )  # fmt: skip
    return build(page, run.store, *run.file())
