"""Options of the command line: shared ones are declared once, renamed ones are rejected with the new name."""

import re
from dataclasses import dataclass, field, fields
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from graftwork.cli import app
from graftwork.cli.options import RENAMED_FLAGS, RENAMED_VERBS, LaunchOptions, Sets, StageOptions, with_options
from graftwork.errors import ConfigError

STAGES = ("train", "tune", "serve", "compare", "quantize", "exec")
OWN = {"train": {"--curve"}, "tune": {"--trial-target"}}
VERBS_WITH = {
    "--on": ("train", "tune", "chat", "demo", "doctor", "plan", "jobs ls", "rag eval", "rebase"),
    "--trials-on": ("tune",),
    "--cluster": ("train", "plan", "doctor", "k8s render"),
    "--pending": ("train", "serve", "plan"),
}


def flags_of(verb: str) -> set[str]:
    done = CliRunner().invoke(app, [*verb.split(), "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return set(re.findall(r"(?m)^\W*(--[a-z-]+)", done.output)) - {"--help"}


def flags_of_fields(group: type) -> set[str]:
    special = {"as_json": "--json", "sets": "--set"}
    return {special.get(one.name, "--" + one.name.replace("_", "-")) for one in fields(group)}


@pytest.mark.parametrize("verb", STAGES)
def test_every_stage_command_has_the_launch_options_and_its_own(verb: str) -> None:
    assert flags_of(verb) == flags_of_fields(LaunchOptions) | OWN.get(verb, set())


def test_a_plan_has_the_options_of_a_stage() -> None:
    assert flags_of("plan") == flags_of_fields(StageOptions) | {"--target", "--gpu", "--gpus"}


def test_a_field_of_an_options_dataclass_is_an_option_with_its_default() -> None:
    @dataclass(frozen=True)
    class Shared:
        sets: Sets = field(default_factory=list)
        depth: Annotated[int, typer.Option("--depth", min=1)] = 3

    seen: list[tuple[str, Shared, bool]] = []

    def verb(name: str, shared: Shared, fast: bool = False) -> None:
        seen.append((name, shared, fast))

    small = typer.Typer()
    verb.__annotations__["shared"] = Shared
    small.command()(with_options(verb))
    for argv in (["a"], ["b", "--set", "x=1", "--set", "y=2", "--depth", "5", "--fast"]):
        assert CliRunner().invoke(small, argv).exit_code == 0
    assert seen == [("a", Shared(), False), ("b", Shared(["x=1", "y=2"], 5), True)]
    assert CliRunner().invoke(small, ["a", "--depth", "0"]).exit_code == 2


def test_every_renamed_flag_has_a_case() -> None:
    assert VERBS_WITH.keys() == RENAMED_FLAGS.keys()


@pytest.mark.parametrize(("old", "verb"), [(old, verb) for old, verbs in VERBS_WITH.items() for verb in verbs])
@pytest.mark.parametrize("form", [["{}", "x"], ["{}=x"]], ids=["separate", "joined"])
def test_a_renamed_flag_is_rejected_with_its_new_name(old: str, verb: str, form: list[str]) -> None:
    new = RENAMED_FLAGS[old]
    done = CliRunner().invoke(app, [*verb.split(), *(part.format(old) for part in form)])
    error = done.exception
    assert isinstance(error, ConfigError)
    assert (error.exit_code, error.subject, error.problem) == (2, old, "no such option")
    assert (error.rule, error.hint) == (f"{old} was renamed to {new}", f"use {new}")
    assert new in flags_of(verb)
    assert old not in flags_of(verb)


@pytest.mark.parametrize(("old", "new"), RENAMED_VERBS.items())
def test_a_renamed_verb_is_rejected_with_its_new_name(old: str, new: str) -> None:
    error = CliRunner().invoke(app, [old, "job.yaml"]).exception
    assert isinstance(error, ConfigError)
    assert error.hint == f"use graftwork {new}"
    assert flags_of(new)


def test_an_unknown_flag_stays_a_usage_error() -> None:
    done = CliRunner().invoke(app, ["train", "spec.yaml", "--onn", "local"])
    assert (done.exit_code, "No such option" in done.output) == (2, True)
