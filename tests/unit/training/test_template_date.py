"""Chat templates that write today's date: one day for training, publishing and serving, whatever the clock says."""

import asyncio
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import build_manifest, content_version
from graftwork.artifacts.registry import open_adapter
from graftwork.base import load as base_model
from graftwork.base import publish as base_publish
from graftwork.base.source import BaseSpec
from graftwork.config import canonical_json
from graftwork.errors import ArtifactError
from graftwork.prompts import render as chat
from graftwork.prompts.render import Message
from graftwork.prompts.template import DEFAULT_DATE, Template
from graftwork.storage.store import Store
from graftwork.training.adapters.merge import MergeSpec, merge_published
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.loop import run_steps
from graftwork.training.run import ResolvedRun, _job, _write_run_inputs, publish, run_paths
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import LoopResult, StepReport, read_steps
from tests import engines
from tests.adapters import facts
from tests.replicas import answer, ask, replica_of
from tests.tiny import CHATML, write_tiny_base, write_tiny_tokenizer
from tests.training import task

DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %B %Y') %}{% endif %}"
    "{{ '<|im_start|>system\nToday is ' + date_string + '<|im_end|>\n' }}" + CHATML
)
"""As Llama 3's, which takes `date_string` where a caller gives one."""
HELLO = (Message("user", "Hello"),)
OTHER = date(2025, 5, 1)


@contextmanager
def clock(monkeypatch: pytest.MonkeyPatch, zone: str) -> Iterator[None]:
    """The process in a time zone. Those of the test are 26 hours apart: never on the same day."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", zone)
        time.tzset()
        yield
    time.tzset()


WEST, EAST = "Etc/GMT+12", "Etc/GMT-14"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_base(tmp_path_factory.mktemp("dated"))
    return write_tiny_tokenizer(folder, DATED)


@pytest.fixture
def spec(base: Path, tmp_path: Path) -> TrainSpec:
    return task(tmp_path, base=str(base), num_workers=1, checkpoint_every=2, **{"quant.kind": "none"})


def text(template: Template) -> str:
    return template.decode(chat.render(HELLO, template, generate=True).ids, skip_special=False)


def test_the_day_is_that_of_the_spec_and_never_the_clocks(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for zone in (WEST, EAST):
        with clock(monkeypatch, zone):
            plain = base_model.template(base_model.resolve(BaseSpec(uri=str(base))))
            assert "Today is 26 July 2024<" in text(plain)
            asked = BaseSpec.model_validate({"uri": str(base), "template_date": "2025-05-01"})
            dated = base_model.template(base_model.resolve(asked))
            assert "Today is 01 May 2025<" in text(dated)
            assert text(plain.on(OTHER)) == text(dated)
            assert "Today is 26 July 2024<" in text(plain), "another day is another template"
    assert dated.digest == plain.digest, "of the text of the template"


def test_a_template_without_a_date_has_none(tmp_path: Path) -> None:
    template = Template.load(write_tiny_tokenizer(tmp_path), OTHER)
    assert (template.date, template.on(DEFAULT_DATE)) == (None, template)


def test_a_run_is_the_same_one_on_the_next_day(
    spec: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for zone in (WEST, EAST):
        with clock(monkeypatch, zone):
            monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / zone[-3:]))  # another machine, without rendered rows
            found.append(run_paths(spec).run_id)
    assert found[0] == found[1]
    other = run_paths(spec.with_({"base.template_date": "2025-05-01"})).run_id
    assert other != found[0], "another day is another prompt"


def test_a_killed_run_goes_on_the_next_day(spec: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with clock(monkeypatch, WEST):
        run = ResolvedRun.resolve(spec)
        _write_run_inputs(run)
        run_steps(_job(run, None), lambda step: step.step < 4)
        assert Checkpoints(run.paths).newest()
    with clock(monkeypatch, EAST):
        monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "another machine"))
        again = ResolvedRun.resolve(spec)
        steps: list[int] = []

        def note(step: StepReport) -> bool:
            steps.append(step.step)
            return True

        run_steps(_job(again, None), note)
    assert again.paths.run_id == run.paths.run_id
    assert steps[0] > 4, "it began behind the checkpoint"


def trained(spec: TrainSpec) -> tuple[ResolvedRun, LoopResult, list[StepReport]]:
    run = ResolvedRun.resolve(spec)
    _write_run_inputs(run)
    return run, run_steps(_job(run, None), lambda _: True), read_steps(run.paths)


def test_the_manifest_of_an_adapter_names_the_day(spec: TrainSpec) -> None:
    made = publish(*trained(spec.with_({"base.template_date": "2025-05-01", "optim.epochs": 0.5})))
    manifest = open_adapter(Store(spec.root), spec.name, made.version)
    assert manifest.template_date == OTHER
    content = manifest.model_dump(mode="json")
    assert manifest.version == content_version(content)
    assert content_version({**content, "template_date": "2025-05-02"}) != made.version, "another day, another version"


def test_versions_of_templates_without_a_date_are_what_they_were() -> None:
    """Source: the formula of the versions that are published."""
    keys = ("base_digest", "quant", "template_digest", "tokenizer_digest", "prompt", "files")
    content: dict[str, object] = {key: key for key in keys}
    wanted = hashlib.sha256(canonical_json(content).encode()).hexdigest()[:12]
    assert content_version(content) == content_version({**content, "template_date": None}) == wanted


def test_a_base_of_a_full_run_has_its_day_wherever_it_is_used(spec: TrainSpec) -> None:
    changes: dict[str, Any] = {
        "adapter": {"kind": "full"},
        "alias": None,
        "optim": {"lr": 1e-4, "epochs": 0.5},
        "base.template_date": "2025-05-01",
    }
    made = publish(*trained(spec.with_(changes)))
    found = base_publish.find(Store(spec.root), spec.name, made.version)
    assert found is not None
    assert found.template_date == OTHER
    assert base_model.resolve(BaseSpec(uri=made.base or "")).template_date == OTHER
    assert base_model.resolve(BaseSpec(uri=made.base or "", template_date=DEFAULT_DATE)).template_date == DEFAULT_DATE


def test_an_adapter_is_served_on_the_day_that_it_was_trained_on(base: Path, tmp_path: Path) -> None:
    """Days of unequal length in tokens, so that each prompt's count tells which one it has."""

    async def play() -> None:
        async with replica_of(base, tmp_path / "root") as replica:
            plain = await answer(replica, ask("plain"))
            folder = engines.write_lora(base, tmp_path / "adapter", 1, r=4, target_modules=["q_proj"])
            known = facts(base_digest=plain.base_digest, prompt={})
            for name, day in (("may", OTHER), ("old", None)):
                artifact.publish(
                    Store(str(tmp_path / "root")), name, folder, **known, template_date=day, alias="latest"
                )
            template = base_model.template(base_model.resolve(BaseSpec(uri=str(base))))
            lengths = {day: len(chat.render(HELLO, template.on(day), generate=True).ids) for day in (None, OTHER)}
            assert lengths[None] != lengths[OTHER], "the test tells them apart"
            assert plain.prompt_tokens == lengths[None]
            for name, day in (("may", OTHER), ("old", None)):
                tuned = await answer(replica, ask(name, adapter=f"{name}@latest"))
                assert tuned.prompt_tokens == lengths[day], f"{name}: {day or 'an older manifest: the base'}"

    asyncio.run(play())


def test_adapters_of_several_days_merge_to_one_of_none(base: Path, tmp_path: Path) -> None:
    store, digest = Store(str(tmp_path / "root")), base_model.resolve(BaseSpec(uri=str(base))).digest
    for seed, day in enumerate((OTHER, OTHER, DEFAULT_DATE)):
        folder = engines.write_lora(base, tmp_path / f"adapter{seed}", seed, r=4, target_modules=["q_proj"])
        known = facts(base_digest=digest, prompt={})
        artifact.publish(store, f"task{seed}", folder, **known, template_date=day, alias="latest")
    same = merge_published(store, "same", ["task0@latest", "task1@latest"], MergeSpec("linear", (1.0, 1.0)))
    assert (same.manifest.template_date, same.notes) == (OTHER, ())
    mixed = merge_published(store, "mixed", ["task0@latest", "task2@latest"], MergeSpec("linear", (1.0, 1.0)))
    assert mixed.manifest.template_date is None
    assert mixed.notes == (
        "the adapters' template dates differ, so the merged adapter records none and uses the base's",
    )


def test_a_day_that_is_none_is_refused(base: Path) -> None:
    with pytest.raises(ValueError, match="template_date"):
        BaseSpec.model_validate({"uri": str(base), "template_date": "tomorrow"})
    with pytest.raises(ArtifactError, match="template_date"):
        build_manifest("task", {**facts(), "files": {}, "template_date": "tomorrow"})
