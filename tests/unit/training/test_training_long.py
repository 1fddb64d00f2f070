"""Longer contexts: positions stretched for training, told by the manifest, asked of serving; answers by place."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork.artifacts import publish as artifact
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.config import validate
from graftwork.errors import ArtifactError, ConfigError
from graftwork.quantization import QuantSpec
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.models import AdapterSource
from graftwork.storage.store import RunPaths, Store
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import AnsweredRows, prepare
from graftwork.training.objectives.trainer import edit_similarity
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import StepReport, TrainJob, before_after
from tests import engines
from tests.adapters import facts
from tests.training import task
from tests.unit.base.test_rope import PLAIN

CELLS = [(length, depth) for length in (96, 320) for depth in (0, 100)]
STOP = frozenset({2})
YARN = {"kind": "yarn", "factor": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 128 positions, and questions whose answer stands at the start or the end of up to 320 tokens."""
    folder = tmp_path_factory.mktemp("long")
    shutil.copytree(Path(task(folder).base.uri), folder / "short")
    config = json.loads((folder / "short" / "config.json").read_text())
    (folder / "short" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 128}))
    rows: list[dict[str, Any]] = []
    for length, depth in CELLS * 2:
        colour, filler = ("red", "blue")[len(rows) % 2], "the quick brown fox "
        text = [f"It is {colour}. "] * (depth == 0) + [filler] * (length // 6) + [f"It is {colour}. "] * (depth == 100)
        turns = [{"role": "user", "content": "".join(text)}, {"role": "assistant", "content": colour}]
        rows.append({"id": f"r{len(rows)}", "messages": turns, "length": length, "depth": depth})
    for name, some in (("needle", rows), ("held", rows[1:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def long_task(folder: Path, **changes: Any) -> TrainSpec:
    usual = {
        "base": {"uri": str(folder / "short"), "rope_scaling": YARN},
        "data.train": str(folder / "needle.jsonl"),
        "data.eval": str(folder / "held.jsonl"),
        "objective": {"kind": "sft", "answers": {"by": ["length", "depth"], "max_new_tokens": 8}},
        "quant.kind": "none",
        "num_workers": 1,
        "optim.epochs": 8,
        "optim.rows_per_step": 2,
        "optim.lr": 1e-2,
        "eval_every": 1000,
        "checkpoint_every": 1000,
    }
    return task(folder, **{**usual, **changes})


def test_from_training_on_stretched_positions_to_serving_them(folder: Path, tmp_path: Path) -> None:
    spec = long_task(folder)
    data, resolved = prepare(spec), base_model.resolve(spec.base)
    assert data.train.lengths_N.max() > 2 * 128, "longer than the base's own positions"
    run, seen = RunPaths(Store(str(tmp_path)), "needle", "0" * 64), list[StepReport]()

    def note(report: StepReport) -> bool:
        seen.append(report)
        return True

    result = run_steps(TrainJob(spec, data, run), note)
    cells = {f"eval_exact_match[length={length}, depth={depth}]" for length, depth in CELLS}
    assert cells < seen[-1].metrics.keys()
    mean = sum(seen[-1].metrics[cell] for cell in cells) / len(cells)
    assert mean == pytest.approx(seen[-1].metrics["eval_exact_match"]), "equal groups, so their mean is the whole"
    similar = seen[-1].metrics["eval_edit_similarity"]
    assert similar > seen[0].metrics["before_edit_similarity"] + 0.1
    with Checkpoints(run).model_files(result.steps) as adapter:
        manifest = artifact.publish(run.store, "needle", adapter, **facts(base_digest=resolved.digest), alias="latest")
    assert manifest.base_digest.endswith(".yarn-4-of-128")
    unstretched = base_model.resolve(BaseSpec(uri=spec.base.uri))
    with pytest.raises(ArtifactError, match="trained with RoPE scaling yarn-4-of-128, this base has none"):
        AdapterSource(run.store, unstretched.digest).resolve("needle@latest")
    source = AdapterSource(run.store, resolved.digest)
    served = source.fetch(source.resolve("needle@latest"))
    engine = NativeEngine(
        base_model.load(resolved, PLAIN, device="cpu", purpose="serve").model, engines.spec(max_seq_len=512), "cpu"
    )
    engine.load_adapter("needle", served)
    engine.start()
    assert isinstance(data.eval, AnsweredRows)
    prompts = [data.eval.prompt(number) for number in range(len(data.eval))]
    asked = [engines.request(str(n), prompt, "needle", STOP, max_new_tokens=8) for n, prompt in enumerate(prompts)]
    said = [[token for token in answer.tokens if token not in STOP] for answer in engines.ask(engine, *asked)]
    engine.stop()
    template = base_model.template(resolved)
    texts = [template.decode(tokens, skip_special=False) for tokens in said]
    wanted = [template.decode(data.eval.answer(number)[:-1]) for number in range(len(data.eval))]
    scores = [edit_similarity(text, right) for text, right in zip(texts, wanted, strict=True)]
    assert sum(scores) / len(scores) == pytest.approx(similar, abs=1e-6), "served answers are those of training"


@pytest.mark.parametrize("kind", ["linear", "yarn", "ntk"])
def test_each_kind_changes_the_frequencies(folder: Path, kind: str) -> None:
    def frequencies(rope: object) -> torch.Tensor:
        spec = BaseSpec.model_validate({"uri": str(folder / "short"), "rope_scaling": rope})
        model = base_model.load(base_model.resolve(spec), PLAIN, device="cpu", purpose="train").model
        found: torch.Tensor = model.model.rotary_emb.inv_freq
        return found

    own, changed = frequencies(None), frequencies({"kind": kind, "factor": 4})
    assert (changed <= own * 1.0001).all()
    assert float(changed[-1]) == pytest.approx(float(own[-1]) / 4, rel=1e-4), "the slowest turns four times slower"


def test_ntk_is_transformers_dynamic_ntk_at_the_longest_sequence(folder: Path) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    spec = BaseSpec.model_validate({"uri": str(folder / "short"), "rope_scaling": {"kind": "ntk", "factor": 4}})
    ours = base_model.load(base_model.resolve(spec), PLAIN, device="cpu", purpose="train").model
    config = AutoConfig.from_pretrained(folder / "short")
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 1.0}
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=4 * 128)
    torch.testing.assert_close(ours.model.rotary_emb.inv_freq, theirs, rtol=1e-5, atol=0)


def test_the_table_has_a_line_a_length_in_natural_order() -> None:
    def step(prefix: str, values: list[float]) -> StepReport:
        cells = [(1024, 0), (512, 50), (512, 0)]
        metrics = {f"{prefix}exact_match[length={a}, depth={b}]": v for (a, b), v in zip(cells, values, strict=True)}
        return StepReport(1, 1, 0.0, 0.0, 0.0, 1, 0.0, 0.0, metrics=metrics)

    assert before_after([step("before_", [0, 0.25, 0.5]), step("eval_", [1, 0.75, 0.5])]) == (
        "held-out exact match, length=512: depth=0 0.5 to 0.5, depth=50 0.25 to 0.75",
        "held-out exact match, length=1024: depth=0 0 to 1",
    )


def test_answers_need_held_out_rows_and_whole_weights(folder: Path) -> None:
    minimal = {"name": "needle", "base": "some/base", "data": {"train": "x.jsonl"}}
    with pytest.raises(ConfigError, match=r"objective.answers is set but data.eval is not given"):
        validate(TrainSpec, {**minimal, "objective": {"answers": {}}}, "spec")
    with pytest.raises(ConfigError, match=r"objective.answers can't go with strategy.kind=zero3"):
        long_task(folder, **{"strategy": {"kind": "zero3"}})


def test_quantised_bases_are_stretched_alike(folder: Path) -> None:
    spec = BaseSpec.model_validate({"uri": str(folder / "short"), "rope_scaling": YARN})
    plain, packed = (
        base_model.load(base_model.resolve(spec), quant, device="cpu", purpose="train").model
        for quant in (PLAIN, QuantSpec(kind="nf4", dtype="float32"))
    )
    assert torch.equal(plain.model.rotary_emb.inv_freq, packed.model.rotary_emb.inv_freq)
