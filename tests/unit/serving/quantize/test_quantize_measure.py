"""What one precision is measured to be: bytes, perplexity, answers, speed, and what a merge would lose."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graftwork.artifacts import publish as artifact
from graftwork.base import load as base_model
from graftwork.base.load import ResolvedBase, load
from graftwork.base.model_shape import ModelShape
from graftwork.base.source import BaseSpec
from graftwork.prompts import render as chat
from graftwork.prompts.render import Prompt
from graftwork.quantization import QuantSpec, default_dtype
from graftwork.serving.quantize.measure import (
    Material,
    PrecisionResult,
    caveat,
    measure,
    merge_loss,
    perplexity,
    windows,
)
from graftwork.serving.quantize.spec import QuantizeSpec
from graftwork.storage.store import Store
from tests import engines
from tests.adapters import facts
from tests.fake_arms import airports
from tests.tiny import write_tiny_base

SYSTEM = "Answer with one JSON object."
NEW = 8
TEXT = tuple(int(x) for x in torch.randint(3, 500, (75,), generator=torch.Generator().manual_seed(3)))
PRECISIONS = ("fp32", "bf16", "int8", "nf4", "nf4-double")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ResolvedBase:
    return base_model.resolve(BaseSpec(uri=str(write_tiny_base(tmp_path_factory.mktemp("base")))))


@pytest.fixture(scope="module")
def adapter(base: ResolvedBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.write_lora(base.folder, tmp_path_factory.mktemp("lora"), 1, r=8, target_modules=list(engines.ALL))


@pytest.fixture(scope="module")
def asked(base: ResolvedBase, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizeSpec:
    root = tmp_path_factory.mktemp("root")
    known = facts(base_digest=base.digest, prompt={"system": SYSTEM})
    artifact.publish(Store(str(root)), "airport-card", adapter, alias="latest", **known)
    arm = {"max_new_tokens": NEW}
    return QuantizeSpec.model_validate(
        {
            "name": "tiny",
            "root": str(root),
            "base": str(base.folder),
            "eval": "eval.jsonl",
            "answer_schema": "schema.json",
            "arms": [
                {"name": "base", "prompt": {"system": SYSTEM}, **arm},
                {"name": "tuned", "adapter": "airport-card@latest", **arm},
            ],
            "text": {"window": 32, "stride": 20},
            "speed": {"batches": [1, 4], "prompt_tokens": 8, "new_tokens": 6, "rounds": 2},
            "engine": {"max_batch": 8, "max_seq_len": 256, "kv_tokens": 4096, "num_threads": 1},
        }
    )


@pytest.fixture(scope="module")
def of(asked: QuantizeSpec) -> Callable[[str], PrecisionResult]:
    """Each precision measured once, when first asked for."""
    material, found = Material(asked.arms, tuple(airports(6)), TEXT), {}

    def one(precision: Any) -> PrecisionResult:
        if precision not in found:
            found[precision] = measure(asked, precision, material)
        return found[precision]

    return one


@given(tokens=st.integers(2, 300), window=st.integers(1, 64), back=st.integers(0, 63))
def test_every_token_but_the_first_is_scored_once_with_its_context(tokens: int, window: int, back: int) -> None:
    stride = max(1, window - back)
    found = list(windows(tokens, window, stride))
    scored = [token for one in found for token in range(one.first, one.stop)]
    assert scored == list(range(1, tokens))
    assert all(one.stop - one.start <= window for one in found)
    assert all(one.first - one.start >= window - stride for one in found[1:])


def test_perplexity_is_that_of_transformers_strided_recipe(base: ResolvedBase) -> None:
    """Source: transformers' own loss over the labels that a window scores, weighted by how many those are."""
    model, ids = engines.load_model(base.folder), torch.tensor([TEXT])
    nats, before = 0.0, 1
    for start in range(0, len(TEXT), 20):
        stop = min(start + 32, len(TEXT))
        labels = ids[:, start:stop].clone()
        labels[:, : before - start] = -100
        with torch.inference_mode():
            nats += float(model(ids[:, start:stop], labels=labels).loss) * (stop - before)
        before = stop
        if stop == len(TEXT):
            break
    with torch.inference_mode():
        found = perplexity(TEXT, lambda ids_1T: model(ids_1T).logits, window=32, stride=20)
    assert found.tokens == len(TEXT) - 1
    assert found.nats == pytest.approx(nats / found.tokens, rel=1e-5)
    assert found.value == pytest.approx(math.exp(nats / found.tokens), rel=1e-4)


def test_arms_are_measured_as_peft_would_answer(
    of: Callable[[str], PrecisionResult], base: ResolvedBase, adapter: Path
) -> None:
    """fp32: the texts are PEFT's greedy ones, the text's likelihood is PEFT's. Source: peft, transformers."""
    from peft import PeftModel

    found, template = of("fp32"), base_model.template(base)
    for arm, folder in zip(found.arms, (None, adapter), strict=True):
        prompts = [
            chat.render(row.question, template, prompt=Prompt(system=SYSTEM), generate=True) for row in airports(6)
        ]
        expected = engines.peft_greedy(base.folder, folder, [prompt.ids for prompt in prompts], NEW)
        for said, ids in zip(arm.answers, expected, strict=True):
            ends = [at for at, token in enumerate(ids) if token in template.stop_ids]
            assert said.text == template.decode(ids[: ends[0]] if ends else ids)
            assert said.cut == (not ends)
        model = engines.load_model(base.folder)
        model = PeftModel.from_pretrained(model, folder).eval() if folder else model
        with torch.inference_mode():
            nats = perplexity(TEXT, lambda ids_1T, m=model: m(ids_1T).logits, window=32, stride=20).nats  # type: ignore[misc]
        assert arm.nats == pytest.approx(nats, rel=1e-5)
    assert found.arms[0].nats != pytest.approx(found.arms[1].nats, rel=1e-2)
    assert [arm.adapter_version is None for arm in found.arms] == [True, False]


def test_a_measurement_names_what_it_was_taken_on(of: Callable[[str], PrecisionResult], asked: QuantizeSpec) -> None:
    material = Material(asked.arms, tuple(airports(6)), TEXT)
    others = (
        replace(material, rows=tuple(airports(6, seed=1))),
        replace(material, text_ids=TEXT[:-1]),
        replace(material, arms=material.arms[:1]),
    )
    assert of("fp32").material == of("nf4").material == material.digest
    assert len({material.digest, *(other.digest for other in others)}) == 4
    assert "cores" in of("fp32").machine


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_gives_answers_and_speeds(of: Callable[[str], PrecisionResult], precision: str) -> None:
    found = of(precision)
    for arm in found.arms:
        assert [said.error for said in arm.answers] == [None] * 6
        assert {rows: len(rounds) for rows, rounds in arm.tokens_per_s.items()} == {1: 2, 4: 2}
        assert all(speed > 0 for rounds in arm.tokens_per_s.values() for speed in rounds)
        assert (arm.merge_loss is not None) == (precision.startswith("nf4") and arm.arm == "tuned")
    assert found.peak_rss_bytes > 100 * 2**20
    assert found.reason.startswith("dtype=bfloat16" if precision == "bf16" else "dtype=")


def test_bytes_are_those_of_the_arithmetic(of: Callable[[str], PrecisionResult], base: ResolvedBase) -> None:
    """Counted on the loaded model; the shape predicts it, but for each linear's codebook."""
    shape, linears = ModelShape.from_config(base.config), 14
    for precision in PRECISIONS:
        found = of(precision)
        assert found.predicted_bytes is not None
        codebooks = {"nf4": 200, "nf4-double": 1300, "int8": 1}.get(precision, 0)
        assert 0 <= found.stored_bytes - found.predicted_bytes <= linears * codebooks, precision
    assert of("fp32").stored_bytes == of("fp32").resident_bytes == shape.params * 4
    assert of("bf16").stored_bytes == shape.params * 2
    assert of("nf4").stored_bytes < of("int8").stored_bytes < of("fp32").stored_bytes


def test_bf16_without_units_for_it_is_flagged() -> None:
    here = default_dtype("cpu")[0]
    assert bool(caveat("bf16", "cpu")) == (here is not torch.bfloat16)
    assert [caveat(one, "cpu") for one in PRECISIONS if one != "bf16"] == [""] * 4  # type: ignore[arg-type]


@pytest.mark.parametrize("double", [False, True])
def test_a_merge_into_4_bit_loses_most_of_the_delta(base: ResolvedBase, adapter: Path, double: bool) -> None:
    """The norm of what PEFT's own merge into packed nf4 leaves of the delta. Source: peft's merge_and_unload."""
    from bitsandbytes.functional import dequantize_4bit
    from peft import PeftModel

    quant = QuantSpec(double_quant=double, resident="packed", dtype="float32")

    def fresh() -> Any:
        return load(base, quant, device="cpu", purpose="serve").model

    def plain(model: Any, name: str) -> torch.Tensor:
        weight = model.get_submodule(name).weight
        values: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return values

    names = [name for name, module in fresh().named_modules() if type(module).__name__ == "Linear4bit"]
    served, unmerged = fresh(), PeftModel.from_pretrained(fresh(), adapter)
    deltas = {name: unmerged.base_model.model.get_submodule(name).get_delta_weight("default") for name in names}
    merged = PeftModel.from_pretrained(fresh(), adapter).merge_and_unload()
    lost = sum(float((plain(merged, n) - plain(served, n) - deltas[n]).norm()) ** 2 for n in names)
    expected = math.sqrt(lost / sum(float(deltas[name].norm()) ** 2 for name in names))
    model = fresh()
    assert merge_loss(model, quant, adapter) == pytest.approx(expected, rel=0.02)
    assert expected > 0.5, "more than half of the adapter's norm is gone"
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit", "the base is given back"


def test_int8_rows_do_not_depend_on_their_neighbours(base: ResolvedBase) -> None:
    """Threshold 0 (base_model.load) bit for bit; bitsandbytes' default of 6.0 fails the same check."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    ids, loud = torch.tensor([TEXT[:16], TEXT[16:32]]), torch.tensor([TEXT[:16], [7] * 16])
    ours = load(base, QuantSpec(kind="int8"), device="cpu", purpose="serve").model
    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    default = AutoModelForCausalLM.from_pretrained(base.folder, quantization_config=settings, device_map={"": "cpu"})
    same = {}
    for name, model in (("ours", ours), ("default", default.eval())):
        with torch.no_grad():
            model.get_input_embeddings().weight[7] = 40.0  # outliers in every feature of one token
            same[name] = torch.equal(model(ids).logits[0], model(loud).logits[0])
    assert same == {"ours": True, "default": False}
