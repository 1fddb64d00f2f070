"""What the probes need beside the answers."""

from collections.abc import Sequence

from graftwork.artifact import AdapterManifest
from graftwork.chat import PromptSpec
from graftwork.data import DatasetRow
from graftwork.errors import ConfigError
from graftwork.serving.experiment.probes.card import AdapterFacts
from graftwork.serving.experiment.spec import CompareSpec
from graftwork.serving.spec import ArmSpec


def probed_corpus(spec: CompareSpec, rows: Sequence[DatasetRow]) -> str | None:
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
