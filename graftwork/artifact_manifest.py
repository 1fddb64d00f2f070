"""What is recorded of an adapter version, and how its version follows from its content."""

import hashlib
import json
from collections.abc import Mapping
from datetime import date
from typing import Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue

from graftwork.artifact_check import CONFIG_FILE, WEIGHTS_FILE, is_adapter_file
from graftwork.config import canonical_json
from graftwork.errors import ArtifactError
from graftwork.storage import NAME_PATTERN

VERSION_PATTERN = r"^[0-9a-f]{12}$"
_DIGEST_PATTERN = r"^[A-Za-z0-9:._-]{1,128}$"
_CONTENT = ("base_digest", "quant", "template_digest", "tokenizer_digest", "prompt", "files")


class FileEntry(BaseModel):
    """What one file must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class AdapterManifest(BaseModel):
    """One adapter version: what decides its answers, and from `task` on the facts of how it came to be."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal[1] = 1
    version: str = Field(pattern=VERSION_PATTERN)
    """`content_version` of this manifest."""
    base_digest: str = Field(pattern=_DIGEST_PATTERN)
    """The base model that the adapter was trained on and works on."""
    quant: dict[str, JsonValue]
    """How the base was quantized in training (QuantSpec)."""
    template_digest: str = Field(pattern=_DIGEST_PATTERN)
    tokenizer_digest: str = Field(pattern=_DIGEST_PATTERN)
    prompt: dict[str, JsonValue]
    """The prompt that it was trained with (PromptSpec)."""
    template_date: date | None = None
    """The day that the chat template wrote as today's in training, and writes in serving; null: it writes no date."""
    files: dict[str, FileEntry]

    task: str = Field(pattern=NAME_PATTERN)
    method: dict[str, JsonValue]
    """The adapter's spec (LoraSpec, ...), and `objective`: the kind of finetuning."""
    data_fingerprint: str
    """Digest of the training rows."""
    metrics: dict[str, FiniteFloat]
    """Measured in training."""
    run: str
    """The run that made it."""
    created_at: str
    """UTC, ISO 8601."""
    provenance: dict[str, JsonValue]
    """`provenance.collect` of the run."""
    parent: str | None = None
    """The version of this task that this one was trained from, or `task@version` of another."""
    merged_from: tuple[str, ...] = ()
    """`task@version` of each that this one was merged from."""

    @pydantic.field_validator("files")
    @classmethod
    def _only_adapter_files(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        wrong = [name[:80] for name in files if not is_adapter_file(name)]
        if wrong or not {CONFIG_FILE, WEIGHTS_FILE} <= set(files):
            raise ValueError(f"needs {CONFIG_FILE} and {WEIGHTS_FILE}, may not name {wrong}")
        return files

    @property
    def ref(self) -> str:
        """`task@version`."""
        return f"{self.task}@{self.version}"

    def content_version(self) -> str:
        """The version that the content asks for; it differs from `version` where somebody changed the manifest."""
        return content_version(self.model_dump(mode="json"))


def content_version(fields: Mapping[str, object]) -> str:
    """First 12 hex digits of a sha256 over what decides the answers: file digests, base, quant, tokenizer, prompt, and
    the template's date where it writes one."""
    content = {key: fields[key] for key in _CONTENT}
    if fields.get("template_date") is not None:
        content["template_date"] = fields["template_date"]
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:12]


def build(task: str, fields: Mapping[str, object]) -> AdapterManifest:
    """A manifest from plain fields, its version derived. Raises ArtifactError, e.g. for a metric that is NaN."""
    plain = json.loads(canonical_json({"task": task, **fields}))
    return _validated(f"manifest of {task}", {"version": content_version(plain), **plain})


def parse(asked: str, data: bytes) -> AdapterManifest:
    """A manifest from its JSON. `asked` begins the ArtifactError of one that does not hold."""
    return _validated(asked, data)


def _validated(asked: str, source: bytes | dict[str, object]) -> AdapterManifest:
    try:
        if isinstance(source, bytes):
            return AdapterManifest.model_validate_json(source)
        return AdapterManifest.model_validate(source)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise ArtifactError(
            asked,
            f"its manifest is not valid at {where}: {first['msg']}",
            "a manifest has exactly the fields of format 1",
            "publish the adapter again",
        ) from None
