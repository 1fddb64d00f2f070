"""Asking the probes on the endpoint of the comparison, and what they need beside the answers."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from graftwork.artifact import AdapterManifest
from graftwork.chat import PromptSpec
from graftwork.data import Row
from graftwork.errors import ConfigError
from graftwork.serving.experiment.answers import Answers
from graftwork.serving.experiment.endpoints import Endpoints
from graftwork.serving.experiment.offline import CompareProgress, Job, ask_jobs, count_missing
from graftwork.serving.experiment.probes.ask import Prober
from graftwork.serving.experiment.probes.card import AdapterFacts
from graftwork.serving.experiment.spec import CompareSpec
from graftwork.serving.spec import ArmSpec


def probe(
    prober: Prober, live: Endpoints, path: Path, on_progress: Callable[[CompareProgress], None] | None
) -> Answers:
    """Both rounds. A round whose answers are all on disk deploys nothing."""
    first = prober.first_round()
    found = _asked(prober, first, live, path, on_progress)
    return _asked(prober, first + prober.second_round(found), live, path, on_progress)


def _asked(
    prober: Prober,
    jobs: Sequence[Job],
    live: Endpoints,
    path: Path,
    on_progress: Callable[[CompareProgress], None] | None,
) -> Answers:
    if count_missing(jobs, path):
        live.open()
    return asyncio.run(ask_jobs(jobs, live.send, path, prober.spec.concurrency, on_progress))


def probed_corpus(spec: CompareSpec, rows: Sequence[Row]) -> str | None:
    """Where gold passages are. Raises ConfigError where rows name documents and nothing says where they are."""
    assert spec.probes is not None
    corpus = spec.probes.corpus or next((arm.retriever.corpus for arm in spec.arms if arm.retriever), None)
    if corpus is None and any(row.doc_id for row in rows):
        raise ConfigError("probes.corpus", "no arm has a retriever, and the rows name documents (doc_id)",
                          "the gold passage is looked up in a corpus",
                          "name the corpus: probes: {corpus: PATH}")  # fmt: skip
    return corpus


def prompt_of(arm: ArmSpec, manifest: AdapterManifest | None) -> PromptSpec:
    """The arm's prompt, else the one that its adapter was trained with."""
    return arm.prompt or (PromptSpec.model_validate(manifest.prompt) if manifest else PromptSpec())


def adapter_facts(manifest: AdapterManifest) -> AdapterFacts:
    size = sum(file.size_bytes for file in manifest.files.values())
    return AdapterFacts(size, manifest.metrics.get("train_s"))
