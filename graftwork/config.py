"""One YAML, one frozen model: loading, `--set a.b=v`, hashing, explanation and JSON schema.

A spec file names its stage by the top-level key `kind` (train, tune, serve, compare, experiment, ...). Each stage's
spec lives beside its owner and subclasses `Spec`; `SPEC_KINDS` is the only place that knows them all, by dotted name,
so that this module imports neither torch nor ray.
"""

import difflib
import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict

from graftwork.errors import ConfigError

SPEC_KINDS = {
    "train": ("graftwork.training.spec", "TrainSpec"),
    "trial": ("graftwork.tuning.trial_spec", "TrialSpec"),
    "tune": ("graftwork.tuning.spec", "TuneSpec"),
    "serve": ("graftwork.serving.spec", "ServeSpec"),
    "compare": ("graftwork.serving.experiment.spec", "CompareSpec"),
    "experiment": ("graftwork.serving.experiment.online.spec", "ExperimentSpec"),
    "quantize": ("graftwork.serving.quantize.spec", "QuantizeSpec"),
    "rag": ("graftwork.serving.rag.spec", "RagSpec"),
    "demo": ("graftwork.demo_spec", "DemoSpec"),
    "study": ("graftwork.study.spec", "StudySpec"),
    "command": ("graftwork.cluster.command_spec", "CommandSpec"),
    "cluster": ("graftwork.cluster.spec", "ClusterSpec"),
}


NO_IDENTITY = frozenset({"root", "alias"})
"""Keys that name a place or a pointer. A run is named by what it does, not by where it is kept."""


class Spec(BaseModel):
    """Base of every spec: frozen, no unknown keys, attribute docstrings are the documentation of the keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    def digest(self) -> str:
        """sha256 hex of the resolved spec in canonical JSON: equal specs, equal digest."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json")).encode()).hexdigest()

    def identity(self) -> str:
        """As `digest`, without the keys that say where things lie and not what they are: two stores, one identity."""
        tree = self.model_dump(mode="json")
        return hashlib.sha256(canonical_json(_without(tree, NO_IDENTITY)).encode()).hexdigest()

    def with_(self, overrides: Mapping[str, Any]) -> Self:
        """A validated copy with dotted keys replaced, e.g. `{"optim.lr": 1e-3}`. Raises ConfigError on a wrong key."""
        tree = self.model_dump(mode="json", exclude_unset=True)  # a default that was not given is not given now
        for key, value in overrides.items():
            _assign(tree, key, value)
        return validate(type(self), tree, where="override")


SpecT = TypeVar("SpecT", bound=Spec)


class _KeysAreText(yaml.SafeLoader):
    """YAML 1.1 takes the key `on` for true; a spec's keys are names."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:bool":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """A spec's YAML. Raises yaml.YAMLError."""
    return yaml.load(text, _KeysAreText)  # a SafeLoader


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: the one form that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def spec_class(kind: str, where: str = "kind") -> type[Spec]:
    """The spec class of a stage. Raises ConfigError naming the nearest known kind."""
    if kind not in SPEC_KINDS:
        raise ConfigError(
            f"{where}: kind={kind!r}",
            "no such stage",
            f"kind is one of {', '.join(SPEC_KINDS)}",
            _did_you_mean(str(kind), SPEC_KINDS),
        )
    module, name = SPEC_KINDS[kind]
    cls: type[Spec] = getattr(importlib.import_module(module), name)
    return cls


def load(path: str | Path, sets: Sequence[str] = (), expect: str | None = None) -> Spec:
    """Read a spec file, apply `--set a.b=v` in order, validate. `expect` is the kind that the command needs.

    Raises ConfigError: missing file, bad YAML, unknown or mistyped key (with the nearest known key), wrong kind.
    """
    path = Path(path)
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"spec file {path}",
            "it does not exist",
            "a command takes the path of a YAML spec",
            "see examples/ for one file a stage",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"spec file {path}", f"it cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"spec file {path}", f"it is not YAML ({error})", "a spec is one YAML mapping") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"spec file {path}", f"found {type(tree).__name__}", "a spec is one YAML mapping of keys")
    for item in sets:
        key, sep, text = item.partition("=")
        if not sep or not key:
            raise ConfigError(f"--set {item}", "no '=' in it", "write --set key.sub=value")
        try:
            _assign(tree, key, yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item}", f"the value is not YAML ({error})") from error
    kind = tree.get("kind")
    if kind is None:
        raise ConfigError(
            f"{path}: kind",
            "the key is missing",
            f"kind is one of {', '.join(SPEC_KINDS)}",
            "add a line such as 'kind: train'",
        )
    if expect is not None and kind != expect:
        raise ConfigError(
            f"{path}: kind={kind!r}",
            f"this command takes kind={expect!r}",
            "one stage, one command",
            f"run `graftwork {kind} {path}`" if kind in SPEC_KINDS else "",
        )
    return validate(spec_class(kind, str(path)), tree, where=str(path))


def validate(cls: type[SpecT], tree: Mapping[str, Any], where: str) -> SpecT:
    """`tree` as a `cls`. Raises ConfigError that names every wrong key, its value, the rule and the nearest key."""
    try:
        return cls.model_validate(tree)
    except pydantic.ValidationError as error:
        own = (e for e in error.errors() if e["type"] != "default_factory_not_called")  # for want of another key
        first, *rest = [_explain(cls, dict(e), tree) for e in own]
        more = "".join(f"\n  Also: {asked}: {found}" for asked, found, _, _ in rest)
        asked, found, rule, next_move = first
        raise ConfigError(f"{where}: {asked}", found, rule, next_move + more) from None


def schema(kind: str) -> dict[str, Any]:
    """JSON schema of a stage's spec, for editors."""
    return spec_class(kind).model_json_schema()


def explain(spec: Spec, given: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Each leaf of the resolved spec as (dotted key, value, where it came from: 'file' or 'default')."""
    leaves_given = {key for key, _ in _leaves(dict(given))}
    for key, value in _leaves(spec.model_dump(mode="json")):
        came = key in leaves_given or any(key.startswith(g + ".") or g.startswith(key + ".") for g in leaves_given)
        yield key, value, "file" if came else "default"


def _without(tree: Any, keys: frozenset[str]) -> Any:
    if isinstance(tree, dict):
        return {key: _without(value, keys) for key, value in tree.items() if key not in keys}
    return tree


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node: Any = tree
    for part in parents:
        node = node[int(part)] if isinstance(node, list) and part.isdigit() else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {dotted}", f"{part!r} holds {node!r}, which has no keys")
    if isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value


def _explain(cls: type[BaseModel], error: dict[str, Any], tree: Mapping[str, Any]) -> tuple[str, str, str, str]:
    keys = [str(part) for part in error["loc"] if _in_tree(tree, error["loc"], part) or error["type"] == "missing"]
    dotted = ".".join(keys) or "(top level)"
    if error["type"] == "extra_forbidden":
        models = _models_at(cls, keys[:-1])
        meant = [model for model in models if _kinds(model) & set(error["loc"])] or models
        known = _keys_of(meant)
        move = _did_you_mean(keys[-1], known)
        if keys[-1] in _keys_of(models):
            tag = f"{{{_tag(meant[0])}: {min(_kinds(meant[0]))}}}"
            move = f"it is of another kind; replace all of them: --set '{'.'.join(keys[:-1])}={tag}'"
        return dotted, f"unknown key (value {error['input']!r})", f"known keys here: {', '.join(known)}", move
    if error["type"] == "missing":
        return dotted, "the key is missing", "it has no default", f"add '{keys[-1]}:'"
    if error["type"] == "union_tag_invalid":
        tag, known = str(error["ctx"]["tag"]), re.findall(r"'([^']+)'", error["ctx"]["expected_tags"])
        return f"{dotted}.kind={tag!r}", "no such kind", f"kind is one of {', '.join(known)}", _did_you_mean(tag, known)
    return f"{dotted}={_short(error['input'])}", str(error["msg"]).removeprefix("Value error, "), "", ""


def _in_tree(tree: Any, loc: Sequence[Any], part: Any) -> bool:
    """Pydantic puts union tags into `loc`; keep only what the user wrote."""
    for step in loc:
        found = (isinstance(tree, Mapping) and step in tree) or (
            isinstance(tree, list) and isinstance(step, int) and step < len(tree)
        )
        if step is part:
            return found
        if found:
            tree = tree[step]
    return False


def _models_at(cls: type[BaseModel], path: Sequence[str]) -> list[type[BaseModel]]:
    """What may stand at a dotted key: several where it is a union."""
    models: list[type[BaseModel]] = [cls]
    for part in path:
        if part.isdigit():
            continue
        models = [
            m
            for model in models
            for name, field in model.model_fields.items()
            if name == part
            for m in _models_in(field.annotation)
        ]
    return models


def _keys_of(models: Sequence[type[BaseModel]]) -> list[str]:
    return sorted({name for model in models for name in model.model_fields})


def _tag(model: type[BaseModel]) -> str:
    """The key by which one of several models is meant."""
    return "kind" if "kind" in model.model_fields else "name"


def _kinds(model: type[BaseModel]) -> set[str]:
    """The values of its tag that mean this model."""
    field = model.model_fields.get(_tag(model))
    return {value for value in get_args(field.annotation) if isinstance(value, str)} if field else set()


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for arg in get_args(annotation):
        yield from _models_in(arg)


def _did_you_mean(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
