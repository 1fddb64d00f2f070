"""Bases that training made: published whole or not at all, named by their content, used by their place.

    bases/<name>/<version>/{config.json, *.safetensors, tokenizer.json, ..., chat_template.jinja, manifest.json}

The folder is one in Hugging Face form, so `base: <root>/bases/<name>/<version>` loads it like any other. Its digest, of
which the version is the beginning, is the one that `base_model.resolve` finds.
"""

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue

from graftwork.artifacts.manifest import VERSION_PATTERN, FileEntry
from graftwork.base import source
from graftwork.base.load import ResolvedBase
from graftwork.errors import ArtifactError
from graftwork.storage.local import file_sha256
from graftwork.storage.store import NAME_PATTERN, Store, json_bytes

MANIFEST_FILE = "manifest.json"
WEIGHT_FILES = (".safetensors", ".safetensors.index.json")


class BaseManifest(BaseModel):
    """One base version and how it came to be."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal[1] = 1
    name: str = Field(pattern=NAME_PATTERN)
    version: str = Field(pattern=VERSION_PATTERN)
    digest: str
    """sha256 over config, weights and tokenizer: what adapters trained on this base record."""
    parent_uri: str
    parent_digest: str
    """The base whose weights were trained."""
    files: dict[str, FileEntry]
    method: dict[str, JsonValue]
    prompt: dict[str, JsonValue]
    """The prompt that it was trained with (PromptSpec)."""
    data_fingerprint: str
    metrics: dict[str, FiniteFloat]
    run: str
    created_at: str
    """UTC, ISO 8601."""
    provenance: dict[str, JsonValue]
    template_date: date | None = None
    """The day that the chat template wrote as today's in training; null: it writes no date."""


def publish(
    store: Store,
    name: str,
    weights: Path,
    parent: ResolvedBase,
    *,
    method: Mapping[str, object],
    prompt: Mapping[str, object],
    data_fingerprint: str,
    metrics: Mapping[str, float],
    run: str,
    provenance: Mapping[str, object],
    template_date: date | None = None,
    require_current: Callable[[], None] = lambda: None,
) -> BaseManifest:
    """Make the model in folder `weights` a base: its config and safetensors, with the parent's tokenizer and template.

    Equal content published again is the manifest of the first time. The manifest is written last, directly after
    `require_current`, which raises where the caller has been replaced.
    Raises ArtifactError (no weights there), StorageError.
    """
    if parent.chat_template is not None:
        (weights / "chat_template.jinja").write_text(parent.chat_template, encoding="utf-8")
    files = dict(_files(weights, parent.folder))
    _require_model(weights, files)
    digest = source.content_digest(files)
    version = digest[:12]
    manifest = BaseManifest.model_validate(
        {
            "name": name,
            "version": version,
            "digest": digest,
            "parent_uri": parent.uri,
            "parent_digest": parent.digest,
            "files": {
                file: {"sha256": file_sha256(path), "size_bytes": path.stat().st_size} for file, path in files.items()
            },
            "method": method,
            "prompt": prompt,
            "data_fingerprint": data_fingerprint,
            "metrics": metrics,
            "run": run,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "provenance": provenance,
            "template_date": template_date,
        }
    )
    found = find(store, name, version)
    if found is not None:
        return found
    for file, path in files.items():
        store.upload(path, *_key(name, version), file)
    require_current()
    store.create_bytes(json_bytes(manifest.model_dump(mode="json")), *_key(name, version), MANIFEST_FILE)
    return manifest


def _require_model(weights: Path, files: Mapping[str, Path]) -> None:
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise ArtifactError(
            f"base from {weights}",
            f"it holds {', '.join(sorted(files)) or 'nothing'}",
            "a base has config.json and safetensors",
            "point at what save_pretrained wrote",
        )


def find(store: Store, name: str, version: str) -> BaseManifest | None:
    """The manifest of a published base; None where there is none. ArtifactError for one that does not hold."""
    data = store.find_bytes(*_key(name, version), MANIFEST_FILE)
    if data is None:
        return None
    try:
        return BaseManifest.model_validate_json(data)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise ArtifactError(
            f"base {store.path(*_key(name, version))}",
            f"its manifest is not valid at {'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}",
            "a manifest has exactly the fields of format 1",
            "delete that folder and run the training again: its last checkpoint is published",
        ) from None


def place(store: Store, name: str, version: str) -> str:
    """Value of `base:` that names it: a path, or an `s3://` URI."""
    return store.path(*_key(name, version))


def _files(weights: Path, parent: Path) -> Iterator[tuple[str, Path]]:
    """The parent's small files but its config, which the trained model brings with the weights."""
    for path in sorted(parent.iterdir()):
        if path.suffix in (".json", ".jinja") and not path.name.endswith(WEIGHT_FILES) and path.name != MANIFEST_FILE:
            yield path.name, path
    for path in sorted(weights.iterdir()):
        if path.suffix in (".json", ".jinja") or path.name.endswith(WEIGHT_FILES):
            yield path.name, path


def _key(name: str, version: str) -> tuple[str, str, str]:
    return ("bases", name, version)
