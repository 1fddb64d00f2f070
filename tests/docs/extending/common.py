"""Steps that the programs of several sections share: train with the real trainer, serve, compare with PEFT."""

from pathlib import Path
from typing import Any

import torch

import graftwork
from graftwork.artifacts.publish import fetch
from graftwork.base import load as base_model
from graftwork.serving.engine.engine import NativeEngine
from graftwork.storage.store import Store
from graftwork.training.run import train
from graftwork.training.spec import TrainSpec
from tests import engines
from tests.training import task

PROMPTS = ([5, 17, 99, 250, 31], list(range(40, 70)))
NEW_TOKENS = 8


def require_copy(work: Path) -> None:
    """Require that the package is the changed copy, next to the program's folder."""
    assert Path(graftwork.__file__).is_relative_to(work.parent), f"{graftwork.__file__} is not the changed copy"


def small_task(work: Path, **changes: Any) -> TrainSpec:
    """Return a training spec of two optimizer steps on a tiny base, with one worker, at a rate that changes answers."""
    keys = {"num_workers": 1, "optim.epochs": 2 / 6, "optim.lr": 0.5, "optim.warmup_ratio": 0}
    return task(work, **{**keys, **changes})


def train_and_fetch(spec: TrainSpec) -> Path:
    """Train and publish, and return the fetched folder of the published version."""
    report = train(spec)
    task_name, _, version = report.published_name.partition("@")
    return fetch(Store(spec.root), task_name, version)


def check_served_as_peft(spec: TrainSpec, adapter: Path) -> None:
    """Require that the engine answers as PEFT does on the same base, in fp32, and not as the base does."""
    from peft import PeftModel

    base = base_model.resolve(spec.base)

    def load() -> Any:
        return base_model.load(base, spec.quant, device="cpu", purpose="serve").model

    engine = NativeEngine(load(), engines.spec(max_rank=64), "cpu")
    engine.load_adapter("trained", adapter)
    engine.start()
    try:
        asked = [
            engines.request(f"{name}{n}", prompt, name, max_new_tokens=NEW_TOKENS)
            for name in ("trained", None)
            for n, prompt in enumerate(PROMPTS)
        ]
        answers = engines.ask(engine, *asked)
    finally:
        engine.stop()
    assert {answer.error for answer in answers} == {None}
    served, plain = ([a.tokens for a in some] for some in (answers[: len(PROMPTS)], answers[len(PROMPTS) :]))
    model = PeftModel.from_pretrained(load(), adapter).eval()
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(out[0, len(prompt) :].tolist())
    assert served == expected, (served, expected)
    assert served != plain, "training changed nothing"
