"""Plans of comparisons count the prompts that the arms will really put to the model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.studies.plan import likelihood_answers
from examples.studies.spec import StudySpec
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.datasets.rows import read_rows
from graftwork.prompts.render import PromptSpec
from graftwork.serving.arms import build_prompt
from graftwork.serving.evaluation.spec import CompareSpec
from graftwork.serving.quantize.spec import QuantizeSpec
from graftwork.serving.request_sizes import compare_answers, quantize_answers
from graftwork.serving.spec import ArmSpec
from graftwork.stages.plans import plan_spec
from tests.process_races import ROOT
from tests.tiny import write_tiny_base

WORDS = "lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, uneven questions, and passages that share words with them."""
    where = tmp_path_factory.mktemp("sizes")
    write_tiny_base(where / "base")
    rows = [
        {
            "id": f"q{n}",
            "doc_id": f"d{n}",
            "gold": {"city": f"town {n}", "choices": ["a", "bb"]},
            "messages": [{"role": "user", "content": f"{WORDS} {n}? " * (1 + n % 5)}],
        }
        for n in range(12)
    ]
    passages = [{"id": f"d{n}", "text": f"{WORDS} {n}. " * 2} for n in range(12)]
    for name, records in (("eval", rows), ("corpus", passages)):
        (where / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    (where / "schema.json").write_text('{"type": "object"}', encoding="utf-8")
    return where


def arms(folder: Path) -> list[dict[str, Any]]:
    corpus = str(folder / "corpus.jsonl")
    return [
        {"name": "base", "max_new_tokens": 24},
        {
            "name": "rag",
            "max_new_tokens": 24,
            "retriever": {"corpus": corpus, "k": 3},
            "prompt": {"system": "Answer in one word."},
        },
        {"name": "short-rag", "max_new_tokens": 24, "retriever": {"corpus": corpus, "k": 3, "context_tokens": 250}},
        {"name": "tuned", "adapter": "task@latest", "max_new_tokens": 60},
    ]


def compare(folder: Path, **keys: Any) -> CompareSpec:
    return CompareSpec.model_validate(
        {
            "name": "c",
            "root": str(folder / "root"),
            "base": str(folder / "base"),
            "quant": {"kind": "none"},
            "eval": str(folder / "eval.jsonl"),
            "answer_schema": str(folder / "schema.json"),
            "arms": arms(folder),
            "baseline": "base",
            **keys,
        }
    )


def served(folder: Path, arm: ArmSpec) -> float:
    """Mean tokens of the prompts as the endpoint builds them."""
    template = base_model.template(base_model.resolve(BaseSpec(uri=str(folder / "base"))))
    rows = read_rows(str(folder / "eval.jsonl"), need="eval")
    prompts = [build_prompt(arm, row.question, template, max_seq_len=8192) for row in rows]
    return sum(len(prompt.ids) for prompt in prompts) / len(rows)


def test_prompts_are_those_that_are_served(folder: Path) -> None:
    spec = compare(folder)
    found = compare_answers(spec, {})
    base, rag, short, tuned = expected = [served(folder, arm) for arm in spec.arms]
    assert base == tuned < short < rag, "passages are in the prompts, and only those that have room"
    assert found.count == 12 * 4
    assert found.prompt_tokens == pytest.approx(sum(expected) / 4)
    assert found.parts[1] == f"rag 12 x ({rag:.0f} + 24)"
    template = base_model.template(base_model.resolve(spec.base))
    right = [json.dumps(row.gold, separators=(",", ":")) for row in read_rows(spec.eval, need="eval")]
    own = sum(len(template.encode(text)) + 1 for text in right) / len(right)
    assert found.new_tokens == pytest.approx((3 * 24 + min(60, own)) / 4), "an adapter writes answers like the rows'"
    prompts = {"task": spec.arms[1].prompt or PromptSpec()}
    assert compare_answers(spec, prompts).prompt_tokens > found.prompt_tokens, "as the adapter will be trained"


def test_a_plan_of_a_comparison_takes_longer_with_longer_rows(folder: Path) -> None:
    [plan] = plan_spec(compare(folder), folder)
    [short] = plan_spec(compare(folder, arms=[arm for arm in arms(folder) if "retriever" not in arm]), folder)
    assert plan.seconds > short.seconds
    assert any(line.startswith("48 requests, prompts of ") for line in plan.assumptions)


def test_probes_the_judge_and_choices_are_counted(folder: Path) -> None:
    asked = compare(
        folder,
        probes={"max_failures": 5},
        judge={"limit": 3},
        scorers=["fields", {"kind": "choice", "field": "city", "options_field": "choices"}],
    )
    counts = {part.rpartition(" x ")[0] for part in compare_answers(asked, {}).parts}
    assert {
        "base 12",
        "base choice 12",
        "rag gold passage 5",
        "rag closed book 5",
        "base closed book 5",
        "tuned grammar 5",
        "tuned judged 6",
    } <= counts
    assert "base judged 6" not in counts
    elsewhere = compare(folder, judge={"limit": 3, "url": "http://127.0.0.1:1/v1", "model": "m"})
    assert not any("judged" in part for part in compare_answers(elsewhere, {}).parts), "another endpoint judges"


def test_precisions_and_likelihoods_are_counted(folder: Path) -> None:
    shared = {"root": str(folder / "root"), "base": str(folder / "base"), "eval": str(folder / "eval.jsonl")}
    schema = str(folder / "schema.json")
    quantize = QuantizeSpec.model_validate(
        {
            "name": "q",
            **shared,
            "answer_schema": schema,
            "arms": arms(folder)[:1],
            "speed": {"batches": [1, 4], "rounds": 2},
            "text": {"max_tokens": 1024, "stride": 256},
        }
    )
    parts = quantize_answers(quantize, {}).parts
    base = served(folder, quantize.arms[0])
    assert parts == (f"base 12 x ({base:.0f} + 24)", "windows of text 4 x (512 + 1)", "speed 10 x (64 + 24)")
    del shared["eval"]
    measure = {
        "name": "m",
        "kind": "likelihood",
        "eval": str(folder / "eval.jsonl"),
        "metrics": ["choice"],
        "arms": arms(folder)[:2],
    }
    claim = {"statement": "s", "a": "base", "b": "rag", "metric": "choice", "expect": "higher"}
    study = StudySpec.model_validate(
        {
            "name": "s",
            "title": "t",
            "paper": "p",
            **shared,
            "measures": [measure],
            "claims": [claim],
        }
    )
    found = likelihood_answers(study, study.measures[0], {})
    assert found.count == 12 * 2 * 2, "a prompt for each choice of each arm"
    assert found.prompt_tokens > (base + served(folder, study.measures[0].arms[1])) / 2


def test_the_command_line_of_the_studies_plans_a_file(folder: Path, tmp_path: Path) -> None:
    shared = {"root": str(tmp_path / "root"), "base": str(folder / "base"), "quant": {"kind": "none"}}
    measures = [
        {
            "name": kind,
            "kind": kind,
            "eval": str(folder / "eval.jsonl"),
            "metrics": [metric],
            "arms": [{"name": "left", "max_new_tokens": 24}, {"name": "right", "max_new_tokens": 48}],
            **({"answer_schema": str(folder / "schema.json")} if kind == "answers" else {}),
        }
        for kind, metric in (("answers", "facts"), ("likelihood", "choice"))
    ]
    train = {
        "kind": "train",
        "name": "other",
        "base": "elsewhere",
        "data": {"train": str(folder / "turns.jsonl")},
        "optim": {"epochs": 2},
        "num_workers": 1,
    }
    turns = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": "a town"}]
    (folder / "turns.jsonl").write_text(json.dumps({"id": "t", "messages": turns}) + "\n", encoding="utf-8")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(train), encoding="utf-8")
    study = {
        "kind": "study",
        "name": "s",
        "title": "t",
        "paper": "p",
        **shared,
        "measures": measures,
        "adapters": [{"file": "train.yaml", "set": {"name": "towns"}}],
        "claims": [{"statement": "s", "a": "left", "b": "right", "metric": "facts", "expect": "higher"}],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")

    def ran(*argv: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "examples.studies", *argv]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    planned = ran(str(tmp_path / "study.yaml"), "--plan", "--json")
    assert planned.returncode == 0, planned.stderr
    lines = json.loads(planned.stdout)
    assert [line["stage"] for line in lines] == ["train towns", "measure answers", "measure likelihood"]
    assert all(line["seconds"] > 0 and line["total_bytes"] > 0 for line in lines)
    refused = ran(str(tmp_path / "train.yaml"))
    assert refused.returncode == 2
    assert "this command takes kind='study'" in refused.stderr
    assert f"graftwork train {tmp_path / 'train.yaml'}" in refused.stderr
    assert not (tmp_path / "root").exists()
