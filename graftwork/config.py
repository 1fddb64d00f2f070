"""One YAML, one frozen model: loading, `--set a.b=v`, hashing, explanation and JSON schema.

A spec file names its stage by the top-level key `kind` (train, tune, serve, compare, experiment, ...). Each stage's
spec is in its owner's folder and subclasses `Spec`; `SPEC_KINDS` is the only place that knows them all, by dotted name,
so that this module imports neither torch nor ray.
"""

import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict

from graftwork.errors import ConfigError
from graftwork.spec_errors import RENAMED_KINDS, did_you_mean, explain_error

SPEC_KINDS = {
    "train": ("graftwork.training.spec", "TrainSpec"),
    "trial": ("graftwork.tuning.trial_store", "TrialSpec"),
    "tune": ("graftwork.tuning.spec", "TuneSpec"),
    "serve": ("graftwork.serving.spec", "ServeSpec"),
    "compare": ("graftwork.serving.evaluation.spec", "CompareSpec"),
    "experiment": ("graftwork.serving.ab_test.spec", "ExperimentSpec"),
    "quantize": ("graftwork.serving.quantize.spec", "QuantizeSpec"),
    "rag": ("graftwork.serving.rag.spec", "RagSpec"),
    "demo": ("graftwork.stages.demo_spec", "DemoSpec"),
    "exec": ("graftwork.cluster.jobs.models", "ExecSpec"),
    "cluster": ("graftwork.cluster.spec", "ClusterSpec"),
}


NO_IDENTITY = frozenset({"root", "alias"})
"""Keys that name a store or an alias. The identity of a run does not depend on its store."""


class Spec(BaseModel):
    """Base of every spec: frozen, no unknown keys, attribute docstrings are the documentation of the keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    def digest(self) -> str:
        """sha256 hex of the resolved spec in canonical JSON: equal specs, equal digest."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json")).encode()).hexdigest()

    def identity(self) -> str:
        """Like `digest`, without NO_IDENTITY: the same in every store."""
        tree = self.model_dump(mode="json")
        return hashlib.sha256(canonical_json(_drop_keys(tree, NO_IDENTITY)).encode()).hexdigest()

    def with_(self, overrides: Mapping[str, Any]) -> Self:
        """A validated copy with dotted keys replaced, e.g. `{"optim.lr": 1e-3}`. Raises ConfigError on a wrong key."""
        tree = self.model_dump(mode="json", exclude_unset=True)  # a default that was not given is not given now
        for key, value in overrides.items():
            _assign(tree, key, value)
        return validate(type(self), tree, where="override")


SpecT = TypeVar("SpecT", bound=Spec)


def with_kind(tree: Any, key: str, default: str) -> Any:
    """Return the tree of a spec with `key.kind` set where the key is given without a kind."""
    given = tree.get(key) if isinstance(tree, dict) else None
    if isinstance(given, dict) and "kind" not in given:
        return {**tree, key: {"kind": default, **given}}
    return tree


class DuplicateKeyError(yaml.YAMLError):
    """A key that is given twice in one mapping; YAML would silently use the last one."""


def read_yaml(text: str) -> Any:
    """Parse a spec's YAML. Raises yaml.YAMLError, DuplicateKeyError included."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_keys(node, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_keys(node: yaml.Node, seen: set[int]) -> None:
    """Refuse keys that are given twice, and take `on` for a name: YAML 1.1 takes it for true."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:bool":
            key.tag = "tag:yaml.org,2002:str"
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            line = key.start_mark.line + 1
            if key.value in lines:
                first = lines[key.value]
                where = f"twice on line {line}" if first == line else f"on line {first} and on line {line}"
                raise DuplicateKeyError(f"the key {key.value!r} is given {where}")
            lines[key.value] = line
        _check_keys(value, seen)


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
            _renamed_kind(kind) or did_you_mean(str(kind), SPEC_KINDS),
        )
    module, name = SPEC_KINDS[kind]
    cls: type[Spec] = getattr(importlib.import_module(module), name)
    return cls


def load(path: str | Path, sets: Sequence[str] = (), expect: str | None = None) -> Spec:
    """Read a spec file, apply `--set a.b=v` in order, validate. `expect` is the kind that the command needs.

    Raises ConfigError: missing file, bad YAML, unknown or mistyped key (with the nearest known key), wrong kind.
    """
    tree = _read(Path(path), sets)
    kind = tree.get("kind")
    if kind is None:
        raise ConfigError(
            f"{path}: kind",
            "the key is missing",
            f"kind is one of {', '.join(SPEC_KINDS)}",
            "add a line such as 'kind: train'",
        )
    if expect is not None and kind != expect:
        raise _wrong_kind(path, kind, expect)
    return validate(spec_class(kind, str(path)), tree, where=str(path))


def load_as(cls: type[SpecT], path: str | Path, sets: Sequence[str] = ()) -> SpecT:
    """As `load`, for a spec class outside `SPEC_KINDS`; the default of its key `kind` is the kind of the file."""
    tree = _read(Path(path), sets)
    expect = cls.model_fields["kind"].default
    if tree.get("kind") != expect:
        raise _wrong_kind(path, tree.get("kind"), expect)
    return validate(cls, tree, where=str(path))


def _wrong_kind(path: str | Path, kind: object, expect: str) -> ConfigError:
    return ConfigError(
        f"{path}: kind={kind!r}",
        f"this command takes kind={expect!r}",
        "one stage, one command",
        f"run `graftwork {kind} {path}`" if kind in SPEC_KINDS else _renamed_kind(kind),
    )


def _read(path: Path, sets: Sequence[str]) -> dict[str, Any]:
    """Return the mapping of a spec file with `sets` applied."""
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
    except DuplicateKeyError as error:
        raise ConfigError(f"spec file {path}", str(error), "a key is given once", "remove one of the two") from None
    except yaml.YAMLError as error:
        raise _not_yaml(path, error) from None
    if not isinstance(tree, dict):
        found = "it is empty" if tree is None else "it is not a mapping"
        raise ConfigError(f"spec file {path}", found, "a spec is one YAML mapping of keys", "begin with 'kind: train'")
    return with_sets(tree, sets)


def with_sets(tree: dict[str, Any], sets: Sequence[str]) -> dict[str, Any]:
    """`tree` with the changes `a.b=v` made in it, in order. Raises ConfigError."""
    for item in sets:
        key, sep, text = item.partition("=")
        if not sep or not key:
            raise ConfigError(f"--set {item}", "no '=' in it", "write --set key.sub=value")
        try:
            _assign(tree, key, read_yaml(text))
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item}", f"the value is not YAML ({error})") from error
    return tree


def _renamed_kind(kind: object) -> str:
    return f"{kind} was renamed to {RENAMED_KINDS[str(kind)]}" if str(kind) in RENAMED_KINDS else ""


def validate(cls: type[SpecT], tree: Mapping[str, Any], where: str) -> SpecT:
    """`tree` as a `cls`. Raises ConfigError that names every wrong key, its value, the rule and the nearest key."""
    try:
        return cls.model_validate(tree)
    except pydantic.ValidationError as error:
        own = (e for e in error.errors() if e["type"] != "default_factory_not_called")  # for want of another key
        first, *rest = [explain_error(cls, dict(e), tree) for e in own]
        also = tuple(
            f"{asked}: {found}" + (f" ({hint or rule})" if hint or rule else "") for asked, found, rule, hint in rest
        )
        raise ConfigError(f"{where}: {first[0]}", *first[1:], also) from None


def _not_yaml(path: Path, error: yaml.YAMLError) -> ConfigError:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "it cannot be parsed"
    where = f"spec file {path}" + (f", line {mark.line + 1}, column {mark.column + 1}" if mark else "")
    if "\\t" in problem:
        return ConfigError(where, "a tab", "YAML is indented by spaces", "replace the tab by spaces")
    hint = "quote a value that holds ': ' or begins with a special character: key: 'a: b'"
    return ConfigError(where, f"it is not YAML: {problem}", "a spec is one YAML mapping", hint)


def schema(kind: str) -> dict[str, Any]:
    """JSON schema of a stage's spec, for editors."""
    return spec_class(kind).model_json_schema()


def explain(spec: Spec, given: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Each leaf of the resolved spec as (dotted key, value, where it came from: 'file' or 'default')."""
    leaves_given = {key for key, _ in _leaves(dict(given))}
    for key, value in _leaves(spec.model_dump(mode="json")):
        short = any(key.startswith(g + ".") for g in leaves_given)  # `base: URI` gives base.uri alone
        came = (
            key in leaves_given or any(g.startswith(key + ".") for g in leaves_given) or (short and _is_set(spec, key))
        )
        yield key, value, "file" if came else "default"


def _is_set(spec: Spec, dotted: str) -> bool:
    node: Any = spec
    for part in dotted.split("."):
        if not isinstance(node, BaseModel):
            return True
        if part not in node.model_fields_set:
            return False
        node = getattr(node, part)
    return True


def _drop_keys(tree: Any, keys: frozenset[str]) -> Any:
    if isinstance(tree, dict):
        return {key: _drop_keys(value, keys) for key, value in tree.items() if key not in keys}
    return tree


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `dotted` in `tree`. A part in quotes, and a key that `tree` has already, may hold dots: `space.optim.lr`."""
    parts = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|([^.]+)', dotted)]
    node: Any = tree
    while parts:
        ends = range(len(parts), 1, -1)  # the longest run of parts that is a key, else the first part
        end = next((n for n in ends if isinstance(node, dict) and ".".join(parts[:n]) in node), 1)
        part, parts = ".".join(parts[:end]), parts[end:]
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(
                    f"--set {dotted}",
                    f"{part!r} is no entry of a list of {len(node)}",
                    "entries count from 0",
                    f"use 0 to {len(node) - 1}, or replace the list: --set 'key=[...]'",
                )
            if not parts:
                node[int(part)] = value
            node = node[int(part)]
        else:
            if not parts:
                node[part] = value
                return
            if parts and part == "base" and isinstance(node.get(part), str):  # the short form of `base.uri`
                node[part] = {"uri": node[part]}
            node = node.setdefault(part, {})
        if parts and not isinstance(node, dict | list):
            raise ConfigError(
                f"--set {dotted}",
                f"{part!r} holds {node!r}, which has no keys",
                "only a mapping has keys",
                f"replace it: --set '{part}={{...}}'",
            )
