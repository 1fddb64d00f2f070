"""Spec files that cannot take effect: each error names subject, problem, rule and a hint, in the words of the file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.studies.spec import StudySpec
from graftwork import config
from graftwork.errors import ConfigError
from graftwork.spec_errors import PEER_KEYS, RENAMED_KEYS, RENAMED_KINDS
from graftwork.training.spec import TrainSpec
from graftwork.tuning.spec import TuneSpec

TRAIN: dict[str, Any] = {"kind": "train", "name": "cards", "base": "base", "data": {"train": "rows.jsonl"}}
TUNE: dict[str, Any] = {
    "kind": "tune",
    "name": "sweep",
    "space": {"optim.lr": {"kind": "choice", "values": [1e-3, 4e-3]}},
    "train": {"name": "cards", "base": "base", "data": {"train": "a.jsonl", "eval": "b.jsonl"}},
}
OF_PYDANTIC = ("Input should", "valid dictionary", "instance of", "unable to parse", "String should")


def load(path: Path, sets: Sequence[str] = ()) -> config.Spec:
    """Load a spec file of a stage, or of a study of examples/."""
    if '"kind": "study"' in path.read_text(encoding="utf-8"):
        return config.load_as(StudySpec, path, sets)
    return config.load(path, sets)


def refusal(tmp_path: Path, text: str, *sets: str) -> ConfigError:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, sets)
    assert not any(word in str(caught.value) for word in OF_PYDANTIC), str(caught.value)
    return caught.value


def changed(**keys: Any) -> str:
    return yaml.safe_dump({**TRAIN, **keys})


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("kind: train\nname: a\nbase: b\nname: other\ndata: {train: x}\n", "name", (2, 4)),
        ("kind: train\nname: a\nbase: b\ndata:\n  train: x\n  eval: y\n  train: z\n", "train", (5, 7)),
        ("kind: serve\nbase: b\narms:\n- name: a\n  max_new_tokens: 3\n  name: b\n", "name", (4, 6)),
    ],
)
def test_a_key_given_twice_is_refused_with_both_lines(
    tmp_path: Path, text: str, key: str, lines: tuple[int, int]
) -> None:
    error = refusal(tmp_path, text)
    assert f"{key!r} is given on line {lines[0]} and on line {lines[1]}" in error.problem


def test_a_key_given_twice_on_one_line_is_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path, "kind: train\nname: a\nbase: b\ndata: {train: x}\noptim: {lr: 0.1, lr: 0.2}\n")
    assert "'lr' is given twice on line 5" in error.problem


def test_a_merge_key_may_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("kind: train\nname: a\nbase: b\ndata: &d {train: x, eval: y}\nprompt: &p {system: s}\n")
    assert config.load(path) is not None
    assert config.read_yaml("a: &x {k: 1}\nb: {<<: *x, k: 2}") == {"a": {"k": 1}, "b": {"k": 2}}


@pytest.mark.parametrize(
    ("peer", "own"),
    [
        ("epochs", "optim.epochs"),
        ("learning_rate", "optim.lr"),
        ("lora_r", "adapter.rank"),
        ("target_modules", "adapter.target_modules"),
        ("max_seq_length", "max_length"),
        ("batch_size", "optim.rows_per_step"),
    ],
)
def test_keys_of_other_trainers_lead_to_the_key_here(tmp_path: Path, peer: str, own: str) -> None:
    assert refusal(tmp_path, changed(**{peer: 3})).hint == f"use {own!r}"


def test_every_suggested_key_exists_in_a_spec() -> None:
    def keys(schema: dict[str, Any], node: dict[str, Any], prefix: str = "") -> set[str]:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node
        below = [keys(schema, one, prefix) for form in ("anyOf", "oneOf", "allOf") for one in node.get(form, [])]
        named = node.get("properties", {})
        below += [{prefix + name} | keys(schema, one, f"{prefix}{name}.") for name, one in named.items()]
        return set().union(*below)

    schemas = [config.schema(kind) for kind in ("train", "serve")]
    known = set().union(*[keys(schema, schema) for schema in schemas])
    assert set(PEER_KEYS.values()) <= known


STUDY: dict[str, Any] = {
    "kind": "study",
    "name": "s",
    "title": "t",
    "paper": "p",
    "base": "b",
    "claims": [{"statement": "s", "a": "x", "b": "y", "metric": "facts", "expect": "higher"}],
    "measures": [
        {
            "name": "m",
            "eval": "e.jsonl",
            "answer_schema": "s.json",
            "metrics": ["facts"],
            "arms": [{"name": "x"}, {"name": "y"}],
        }
    ],
}
COMPARE: dict[str, Any] = {
    "kind": "compare",
    "name": "c",
    "base": "b",
    "eval": "e.jsonl",
    "answer_schema": "s.json",
    "baseline": "x",
    "arms": [{"name": "x"}, {"name": "y"}],
}
RENAMED: dict[str, tuple[dict[str, Any], str, Any]] = {
    "too_long": (TRAIN, "too_long", "refuse"),
    "shots_from": (TRAIN, "prompt.shots_from", "rows.jsonl"),
    "stack_on": (TRAIN, "stack_on", "language@latest"),
    "gang": (TUNE, "gang", "always"),
    "together": (TUNE, "together", 2),
    "goals": (TUNE, "goals", ["eval_loss"]),
    "keep_s": ({"kind": "cluster"}, "keep_s", 60),
    "matters": (COMPARE, "probes.matters", 0.2),
    "published": (STUDY, "published", "p"),
    "differs": (STUDY, "differs", ["d"]),
    "says": (STUDY, "claims.0.says", "s"),
    "loss": ({**TRAIN, "objective": {"kind": "dpo"}}, "objective.loss", "ipo"),
}
"""Where each renamed key was: a valid spec, the dotted key, a value that it took."""


def test_every_renamed_key_has_a_case() -> None:
    assert RENAMED.keys() == RENAMED_KEYS.keys()


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_key_is_refused_with_its_new_name_which_works(tmp_path: Path, old: str) -> None:
    spec, dotted, value = RENAMED[old]
    new = RENAMED_KEYS[old]
    text = json.dumps(spec)
    where = dotted.removesuffix(old)
    (tmp_path / "ok.yaml").write_text(text)
    whole = {} if old != "shots_from" else {"prompt.shots": 1}
    sets = [f"{key}={json.dumps(given)}" for key, given in {f"{where}{new}": value, **whole}.items()]
    found: Any = load(tmp_path / "ok.yaml", sets).model_dump(mode="json")
    for part in f"{where}{new}".split("."):
        found = found[int(part) if part.isdigit() else part]
    assert found == value or new == "objectives"
    error = refusal(tmp_path, text, f"{dotted}={json.dumps(value)}")
    assert (error.problem.startswith("unknown key"), error.hint) == (True, f"{old} was renamed to {new}")


def test_a_renamed_key_in_the_wrong_place_is_refused_with_its_place(tmp_path: Path) -> None:
    error = refusal(tmp_path, changed(**{"shots_from": "rows.jsonl"}))
    assert error.hint == "shots_from was renamed to few_shot_file: use 'prompt.few_shot_file'"


def test_the_gang_scheduler_of_a_cluster_keeps_its_key(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("kind: cluster\ngang: volcano\n")
    assert config.load(tmp_path / "cluster.yaml").model_dump()["gang"] == "volcano"


@pytest.mark.parametrize(("old", "new"), RENAMED_KINDS.items())
@pytest.mark.parametrize("expect", [True, False])
def test_a_renamed_kind_is_refused_with_its_new_name(tmp_path: Path, old: str, new: str, expect: bool) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(f"kind: {old}\nname: hello\n")
    with pytest.raises(ConfigError) as caught:
        config.load(path, expect=new if expect else None)
    assert caught.value.hint == f"{old} was renamed to {new}"


def test_an_unknown_key_without_a_near_one_still_has_a_hint(tmp_path: Path) -> None:
    assert refusal(tmp_path, changed(zzzqqq=1)).hint == "remove 'zzzqqq'"


def test_quant_takes_a_plain_string(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(changed(quant="int8"))
    spec, nested = config.load(path), config.load(path, ["quant={kind: int8}"])
    assert isinstance(spec, TrainSpec)
    assert spec.quant.kind == "int8"
    assert spec.digest() == nested.digest()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"quant": "4bit"}, ("quant='4bit'", "it is one of none, int8, nf4", "use 'nf4'")),
        ({"quant": [1]}, ("quant", "not a mapping of keys", "double_quant, dtype, kind, resident")),
        ({"name": "My Tickets"}, ("name='My Tickets'", "lower-case letters", "write 'my-tickets'")),
        ({"name": False}, ("name=False", "not text", "quote it: name: 'no'")),
        ({"init_from": "cards"}, ("TASK@ALIAS", "write 'cards@latest'")),
        ({"num_workers": "two"}, ("num_workers='two'", "whole number")),
        ({"adapter": {"rank": 0}}, ("adapter.rank=0", "out of range", "greater than or equal to 1")),
        ({"objective": {"beta": 0.1}}, ("objective.beta", "belongs to kind", "dpo", "add 'kind: ")),
        ({"objective": {"kind": "sft", "beta": 0.1}}, ("of another kind", "--set 'objective={kind: sft}'")),
    ],
)
def test_wrong_values_are_named_with_rule_and_hint(
    tmp_path: Path, keys: dict[str, Any], words: tuple[str, ...]
) -> None:
    error = refusal(tmp_path, changed(**keys))
    for word in words:
        assert word in str(error)


def test_a_rule_about_the_whole_spec_prints_no_python_dict(tmp_path: Path) -> None:
    tree = {**TUNE, "train": {**TUNE["train"], "data": {"train": "a.jsonl"}}}
    error = refusal(tmp_path, yaml.safe_dump(tree))
    assert "{'" not in str(error)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind: train\nprompt:\n\tsystem: x\n", ("line 3", "tab", "spaces")),
        ("kind: train\nprompt: {system: a}\nname: Answer: x\n", ("line 3", "quote a value")),
        ("", ("it is empty", "kind: train")),
        ("- a\n", ("it is not a mapping",)),
    ],
)
def test_yaml_that_cannot_be_read_names_line_and_way_out(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    error = refusal(tmp_path, text)
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize("key", ["space.optim.lr.values", 'space."optim.lr".values'])
def test_set_reaches_keys_that_contain_dots(tmp_path: Path, key: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(TUNE))
    spec = config.load(path, [f"{key}=[0.5, 0.25]"])
    assert isinstance(spec, TuneSpec)
    assert json.loads(spec.model_dump_json())["space"]["optim.lr"]["values"] == [0.5, 0.25]


def test_further_problems_are_a_list_of_their_own(tmp_path: Path) -> None:
    error = refusal(tmp_path, changed(zzzqqq=1, num_workers="two"))
    assert "\n" not in error.hint
    assert len(error.also) == 1
    assert str(error).endswith(f"Also: {error.also[0]}")
