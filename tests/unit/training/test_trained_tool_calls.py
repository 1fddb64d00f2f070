"""Rows with functions, calls and reasoning through training, publishing and serving, on the templates of families."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from graftwork.artifacts.manifest import build_manifest
from graftwork.artifacts.publish import require_base
from graftwork.artifacts.registry import open_adapter
from graftwork.base import load as base_model
from graftwork.base import publish as base_publish
from graftwork.base.source import BaseSpec
from graftwork.errors import ArtifactError, BaseModelError, ConfigError, DataError, StorageError
from graftwork.prompts.render import Message, Prompt, PromptSpec, render
from graftwork.storage.store import Store
from graftwork.training.loop import run_steps
from graftwork.training.run import PublishedModel, ResolvedRun, _job, _write_run_inputs, publish
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import read_steps
from tests.adapters import facts
from tests.chat_templates import FAMILIES
from tests.replicas import answer, ask, replica_of
from tests.tiny import write_tiny_base
from tests.training import task

TOOL = {"type": "function", "function": {"name": "paint", "description": "Mix.", "parameters": {"type": "object"}}}
FILES = {name: {"sha256": "a" * 64, "size_bytes": 1} for name in ("adapter_config.json", "adapter_model.safetensors")}
HELLO = (Message("user", "Hello"),)


def write_rows(path: Path, count: int, asked: str = "Name", **row: Any) -> None:
    """Conversations of a call, its result and an answer with reasoning."""
    call = {"id": "call00001", "type": "function", "function": {"name": "paint", "arguments": '{"n": 1}'}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Name a colour"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "content": "red"},
        {"role": "assistant", "content": "Red.", "reasoning_content": "It said red."},
    ]
    lines = (
        json.dumps({"messages": [{**turns[0], "content": f"{asked} {n}"}, *turns[1:]], **row}) for n in range(count)
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def spec_of(folder: Path, family: str | None, row: dict[str, Any], **changes: Any) -> TrainSpec:
    base = write_tiny_base(folder / "base")
    if family is not None:
        (base / "chat_template.jinja").write_text(FAMILIES[family].source)
    for part, count in (("train", 16), ("eval", 4)):
        write_rows(folder / f"{part}.jsonl", count, part, **row)
    usual = {"base": str(base), "num_workers": 1, "quant.kind": "none", "max_length": 512, "optim.epochs": 1}
    data = {"data.train": str(folder / "train.jsonl"), "data.eval": str(folder / "eval.jsonl")}
    return task(folder, **usual, **data, **changes)


def trained(spec: TrainSpec) -> PublishedModel:
    run = ResolvedRun.resolve(spec)
    _write_run_inputs(run)
    return publish(run, run_steps(_job(run, None), lambda _: True), read_steps(run.paths))


def test_an_adapter_is_served_with_the_functions_and_variables_of_its_training(tmp_path: Path) -> None:
    """The lengths of the prompts tell them apart."""
    prompt: dict[str, Any] = {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    spec = spec_of(tmp_path, "qwen3", {}, prompt=prompt, **{"data.thinking": "drop"})
    made = trained(spec)
    manifest = open_adapter(Store(spec.root), spec.name, made.version)
    assert manifest.prompt["tools"] == [json.dumps(TOOL)]
    assert manifest.prompt["chat_template_kwargs"] == {"enable_thinking": False}
    template = base_model.template(base_model.resolve(spec.base))
    wanted = {
        "base": render(HELLO, template, generate=True),
        "tuned": render(
            HELLO, template, prompt=Prompt(tools=(TOOL,), template_kwargs={"enable_thinking": False}), generate=True
        ),
        "arm": render(HELLO, template, tools=(TOOL, TOOL), template_kwargs={"enable_thinking": True}, generate=True),
    }
    assert len({len(rendered.ids) for rendered in wanted.values()}) == 3
    assert template.decode(wanted["tuned"].ids).endswith("<think>\n\n</think>\n\n")

    async def play() -> dict[str, int]:
        async with replica_of(Path(spec.base.uri), Path(spec.root), max_seq_len=512) as replica:
            tuned = f"{spec.name}@{made.version}"
            own: dict[str, Any] = {"tools": [TOOL, TOOL], "chat_template_kwargs": {"enable_thinking": True}}
            requests = {
                "base": ask("base"),
                "tuned": ask("tuned", adapter=tuned),
                "arm": ask("arm", adapter=tuned, **own),
            }
            return {name: (await answer(replica, request)).prompt_tokens for name, request in requests.items()}

    assert asyncio.run(play()) == {name: len(rendered.ids) for name, rendered in wanted.items()}


def test_a_template_that_opens_reasoning_trains_and_serves(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    spec = spec_of(tmp_path, "deepseek_r1_distill", {})
    turns = ({"role": "assistant", "content": "Red.", "reasoning_content": "Of all."},)
    for part in ("train", "eval"):
        rows = ({"messages": [{"role": "user", "content": f"{part} {number}"}, *turns]} for number in range(8))
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = Path(spec.base.uri)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(640)  # room for the tokens of the family
    model.save_pretrained(base)
    FAMILIES["deepseek_r1_distill"].write(base)
    made = trained(spec)
    template = base_model.template(base_model.resolve(spec.base))

    async def play() -> int:
        async with replica_of(base, Path(spec.root)) as replica:
            return (await answer(replica, ask("r1", adapter=f"{spec.name}@{made.version}"))).prompt_tokens

    prompt = render(HELLO, template, generate=True)
    assert template.decode(prompt.ids).endswith("<think>\n")
    assert asyncio.run(play()) == len(prompt.ids)


def test_a_full_run_publishes_the_template_that_it_was_trained_with(tmp_path: Path) -> None:
    changes = {
        "adapter": {"kind": "full"},
        "alias": None,
        "optim": {"lr": 1e-4, "epochs": 0.5},
        "data.thinking": "drop",
    }
    spec = spec_of(tmp_path, None, {"tools": [TOOL]}, **changes)
    with pytest.raises(BaseModelError, match=r"base.chat_template=hermes"):
        trained(spec)
    hermes = spec.with_({"base": {"uri": spec.base.uri, "chat_template": "hermes"}})
    plain, own = (base_model.resolve(one.base) for one in (spec, hermes))
    assert own.digest.startswith(f"{plain.digest}.template-")
    made = trained(hermes)
    assert made.base is not None
    published = base_model.template(base_model.resolve(BaseSpec(uri=made.base)))
    assert published.digest == base_model.template(own).digest != base_model.template(plain).digest
    assert base_publish.find(Store(spec.root), spec.name, made.version) is not None


def test_an_adapter_needs_the_template_of_its_training(tmp_path: Path) -> None:
    folder = write_tiny_base(tmp_path / "base")
    plain, hermes = (
        base_model.resolve(BaseSpec(uri=str(folder), chat_template=asked)).digest for asked in (None, "hermes")
    )
    for trained_on, served_on in ((hermes, plain), (plain, hermes)):
        manifest = build_manifest("task", {**facts(base_digest=trained_on), "files": FILES, "created_at": "now"})
        require_base(manifest, trained_on)
        with pytest.raises(ArtifactError, match=r"(?s)another chat template.*base\.chat_template as in run"):
            require_base(manifest, served_on)


def test_another_template_is_read_from_a_file(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    (tmp_path / "own.jinja").write_text(FAMILIES["qwen2_5"].source)
    resolved = base_model.resolve(BaseSpec(uri=str(base), chat_template=str(tmp_path / "own.jinja")))
    assert resolved.chat_template == FAMILIES["qwen2_5"].source
    assert base_model.template(resolved).can.tools
    with pytest.raises(StorageError, match=r"none\.jinja"):
        base_model.resolve(BaseSpec(uri=str(base), chat_template=str(tmp_path / "none.jinja")))
    (tmp_path / "own.jinja").write_bytes(b"\xff")
    with pytest.raises(BaseModelError, match=r"base.chat_template=.*not UTF-8"):
        base_model.resolve(BaseSpec(uri=str(base), chat_template=str(tmp_path / "own.jinja")))


def test_what_a_row_asks_of_a_template_is_checked_before_training(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "qwen3", {"tools": [TOOL], "chat_template_kwargs": {"enable_thinkin": True}})
    with pytest.raises(DataError, match=r"row 1: chat_template_kwargs: enable_thinkin.*"):
        ResolvedRun.resolve(spec)
    for part in ("train", "eval"):
        write_rows(tmp_path / f"{part}.jsonl", 4, part, tools=[TOOL])
    assert ResolvedRun.resolve(spec)
    with pytest.raises(ConfigError, match="a function is"):
        spec.with_({"prompt.tools": [{"name": "paint"}]})


def test_specs_without_the_new_keys_keep_their_identity() -> None:
    """Source: the digests of version 1 of the keys."""
    assert PromptSpec().model_dump() == {
        "system": None,
        "shots": 0,
        "few_shot_file": None,
        "context_header": "Context:",
        "citations": False,
    }
    assert "chat_template" not in BaseSpec(uri="base").model_dump()
    order = [{"type": "function", "function": {"parameters": {}, "name": "b"}}]
    kept = PromptSpec.model_validate({"tools": order})
    assert PromptSpec.model_validate_json(kept.model_dump_json()) == kept
    assert list(json.loads(kept.tools[0])["function"]) == ["parameters", "name"], "order of keys is part of the prompt"
