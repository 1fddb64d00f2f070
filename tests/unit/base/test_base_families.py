"""Families of transformers through the real stages: each goes as far as `base_support` says, and no further."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from graftwork.artifacts.verify import problems, read_folder
from graftwork.base import load as base_model
from graftwork.base.load import LoadedBase, ResolvedBase
from graftwork.base.source import BaseSpec
from graftwork.base.support import base_support, check_serving, check_training
from graftwork.errors import BaseModelError
from graftwork.quantization import QuantSpec
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.spec import ServeSpec
from graftwork.training.objectives.rows import prepare
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import TrainJob
from tests import engines
from tests.families import FAMILIES, write_family

QUICK = ("gemma2", "mixtral", "falcon_h1")
"""One of each kind of limit; the rest takes two minutes."""
CASES = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.soak) for kind in FAMILIES]
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Which airport has the code {code}{'?' * number}"},
            {"role": "assistant", "content": f"Number {number}." + " It is large." * number},
        ]
    }
    for number, code in enumerate(["ZPPP", "KJFK", "EDDF", "LFPG"])
]


@pytest.mark.parametrize("kind", CASES)
def test_a_family_trains_as_far_as_its_support_says(kind: str, tmp_path: Path) -> None:
    base = resolved(kind, tmp_path)
    support = base_support(base.config)
    targets = next((which for which, found in support.lora.items() if not found.reason), "all-linear")
    for quant in ("none", "nf4"):
        spec = train_spec(base, tmp_path, quant={"kind": quant}, adapter={"rank": 4, "targets": targets})
        packed = support.train_packed if quant == "nf4" else support.stages["none"]
        if not (support.stages["train"].reason or support.stages[quant].reason or packed.reason):
            check_training(spec, base.config)
            assert all(math.isfinite(loss) for loss in losses(spec)), quant
        else:
            with pytest.raises(BaseModelError):
                check_training(spec, base.config)
    if not support.stages["train"].reason:  # and publishing takes the adapter
        assert list(problems(read_folder(write_adapter(base, tmp_path / "adapter", targets)))) == []
    for which, found in support.lora.items():
        if found.reason:
            spec = train_spec(base, tmp_path, quant={"kind": "none"}, adapter={"targets": which})
            with pytest.raises(BaseModelError, match="adapter|PEFT|router"):
                check_training(spec, base.config)


@pytest.mark.parametrize("kind", CASES)
def test_a_family_packs_rows_as_its_support_says(kind: str, tmp_path: Path) -> None:
    base = resolved(kind, tmp_path)
    support = base_support(base.config)
    if support.stages["train"].reason:
        return
    targets = next(which for which, found in support.lora.items() if not found.reason)
    spec = train_spec(
        base,
        tmp_path,
        quant={"kind": "none"},
        adapter={"rank": 4, "targets": targets},
        objective={"kind": "sft", "packing": "best_fit"},
        max_length=256,
    )
    if not support.stages["pack"].reason:
        check_training(spec, base.config)
        assert all(math.isfinite(loss) for loss in losses(spec))
    else:
        with pytest.raises(BaseModelError, match="packing"):
            check_training(spec, base.config)


@pytest.mark.parametrize("kind", CASES)
def test_a_family_is_served_as_its_support_says(kind: str, tmp_path: Path) -> None:
    """Greedy tokens equal those of transformers and PEFT, in one batch and by chunks of prompts."""
    base = resolved(kind, tmp_path)
    support = base_support(base.config)
    spec = ServeSpec.model_validate({"base": str(base.folder), "quant": {"kind": "none"}})
    if support.stages["serve"].reason:
        with pytest.raises(BaseModelError):
            check_serving(spec)
        with pytest.raises(BaseModelError):  # nor does the engine start where nobody checked
            NativeEngine(loaded(base).model, engines.spec(), "cpu")
        return
    check_serving(spec)
    if support.stages["serve adapters"].reason:
        with pytest.raises(BaseModelError):
            check_serving(spec.with_({"adapters": ["t@latest"]}))
    targets = next((which for which, found in support.lora.items() if not found.reason), None)
    adapted = not support.stages["serve adapters"].reason and targets is not None
    adapter = write_adapter(base, tmp_path / "adapter", targets) if adapted else None
    prompts = prompts_of(base)
    engine = NativeEngine(loaded(base).model, engines.spec(prefill_tokens=16), "cpu")
    if adapter is not None:
        engine.load_adapter("v1", adapter)
    engine.start()
    for name in (None, "v1") if adapter is not None else (None,):
        asked = [engines.request(f"r{n}", prompt, name, max_new_tokens=12) for n, prompt in enumerate(prompts)]
        answers = [answer.tokens for answer in engines.ask(engine, *asked)]
        assert answers == engines.peft_greedy(base.folder, adapter if name else None, prompts, 12)
    engine.stop()


def resolved(kind: str, folder: Path) -> ResolvedBase:
    return base_model.resolve(BaseSpec(uri=str(write_family(folder / "base", kind))))


def loaded(base: ResolvedBase) -> LoadedBase:
    return base_model.load(base, QuantSpec(kind="none", dtype="float32"), device="cpu", purpose="serve")


def train_spec(base: ResolvedBase, folder: Path, **keys: Any) -> TrainSpec:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    keys["quant"]["dtype"] = "float32"
    return TrainSpec.model_validate(
        {
            "name": "t",
            "root": str(folder / "root"),
            "base": str(base.folder),
            "data": {"train": str(rows)},
            "num_workers": 1,
            "optim": {"rows_per_step": 4, "micro_batch": 2},
            **keys,
        }
    )


def losses(spec: TrainSpec) -> list[float]:
    """Losses of two steps of the loop."""
    from graftwork.training.loop import run_steps

    seen: list[float] = []
    run_steps(TrainJob(spec, prepare(spec), max_steps=2), lambda step: seen.append(step.loss) is None)  # type: ignore[func-returns-value]
    return seen


def write_adapter(base: ResolvedBase, folder: Path, targets: Any) -> Path:
    from graftwork.adapters.lora import LoraSpec

    config = LoraSpec(rank=4, targets=targets).peft_config(loaded(base).model)
    return engines.write_peft(base.folder, folder, 3, config)


def prompts_of(base: ResolvedBase) -> list[list[int]]:
    rng = random.Random(2)
    prompts = [[rng.randrange(3, 500) for _ in range(length)] for length in (3, 20, 41, 60)]
    return [*prompts, prompts[-1][:50] + [7, 8, 9]]
