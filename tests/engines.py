"""Tiny engines and adapters for tests: random models, adapters saved by PEFT itself, PEFT's generation as reference."""

import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork.serving.engine.cpu import kernels
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.engine.request import GenerateRequest, SamplingParams, TokenEvent
from graftwork.serving.spec import EngineSpec

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
WAIT_S = 60.0


def load_model(folder: Path) -> Any:
    """The base in `folder`, fp32, eval."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@contextmanager
def without_kernels() -> Iterator[None]:
    """Engines made within it compute as on a machine without a C compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", "false")
        kernels.library.cache_clear()
        try:
            yield
        finally:
            kernels.library.cache_clear()


def load_quantized(folder: Path, kind: str, *, fused: bool = False) -> Any:
    """The base with bitsandbytes linears ("nf4" or "int8"), fp32 compute. fused: by the CPU's own kernel if it has one.

    That kernel rounds to bf16, and peft's DoRA misreads the weights that are repacked for it.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        if kind == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu &= fused
    if kind == "int8":
        with torch.inference_mode():
            model(torch.tensor([[1]]))
    for module in model.modules():
        if isinstance(module, Linear8bitLt):  # peft 0.21.2's DoRA makes the weight anew without its scales
            module.init_8bit_state = lambda: None
    return model


def write_lora(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    """An adapter that PEFT makes and saves; its lora_B is random, so that it changes what the base says."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_model(base), LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder


def write_peft(base: Path, folder: Path, seed: int, config: Any) -> Path:
    """An adapter of any kind that PEFT makes and saves, its trained values moved so that it changes the answers."""
    from peft import get_peft_model

    model = get_peft_model(load_model(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(noise * 0.1)
            elif "prompt_encoder" in name:
                parameter.copy_(noise)
            else:  # magnitudes, factors, rows: near what they were
                parameter.add_(noise * 0.3)
    model.save_pretrained(folder)
    return folder


def write_bottleneck(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    """A bottleneck adapter in the form of `serving/engine/adapters/bottleneck.py`, random, written without it."""
    import json

    from safetensors.torch import save_file

    settings: dict[str, Any] = {"peft_type": "BOTTLENECK", "bottleneck_size": 6, "activation": "gelu", "scaling": 1.0}
    settings |= {"use_bias": True, "target_modules": ["o_proj", "down_proj"], **config}
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in load_model(base).named_modules():
        if name.rpartition(".")[2] in settings["target_modules"]:
            size, out, key = settings["bottleneck_size"], module.out_features, f"base_model.model.{name}.bottleneck"
            shapes: dict[str, tuple[int, ...]] = {"down.weight": (size, out), "up.weight": (out, size)}
            shapes |= {"down.bias": (size,), "up.bias": (out,)} if settings["use_bias"] else {}
            tensors |= {
                f"{key}_{half}": torch.randn(shape, generator=generator) * 0.2 for half, shape in shapes.items()
            }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@dataclass
class Answer:
    """The events of one request, put together."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None
    cached_tokens: int = 0
    score: float | None = None


class Collector:
    """Receives events from the engine's thread; `answers` waits for them."""

    def __init__(self) -> None:
        self._events: queue.Queue[TokenEvent] = queue.Queue()
        self.answers: dict[str, Answer] = {}

    def __call__(self, event: TokenEvent) -> None:
        self._events.put(event)

    def next(self) -> TokenEvent:
        """Waits for the next event of any request."""
        event = self._events.get(timeout=WAIT_S)
        answer = self.answers.setdefault(event.request_id, Answer())
        assert answer.finish is None, f"{event.request_id} got an event after its last"
        if event.token_id >= 0:
            answer.tokens.append(event.token_id)
            answer.logprobs.append(event.logprob)
        if event.finish_reason == "scored":
            answer.score = event.logprob
        answer.cached_tokens += event.cached_tokens
        answer.finish, answer.error = event.finish_reason, event.error
        return event

    def wait(self, *request_ids: str) -> list[Answer]:
        """Waits until these requests have ended."""
        while any(name not in self.answers or self.answers[name].finish is None for name in request_ids):
            self.next()
        return [self.answers[name] for name in request_ids]


def request(
    name: str,
    prompt: Sequence[int],
    adapter: str | None = None,
    stop_ids: frozenset[int] = frozenset(),
    **sampling: Any,
) -> GenerateRequest:
    """A request with its sampling written flat; 16 new tokens at most unless said otherwise."""
    return GenerateRequest(name, tuple(prompt), SamplingParams(**{"max_new_tokens": 16, **sampling}), stop_ids, adapter)


def ask(engine: NativeEngine, *requests: GenerateRequest) -> list[Answer]:
    """Submits all at once and waits for all."""
    collector = Collector()
    for one in requests:
        engine.submit(one, collector)
    return collector.wait(*(one.request_id for one in requests))


def spec(**changed: Any) -> EngineSpec:
    """Small limits, so that tests run into them."""
    usual = {"max_batch": 16, "max_seq_len": 256, "kv_tokens": 8192, "prefill_tokens": 64, "num_threads": 1}
    return EngineSpec(**{**usual, **changed})


def scoring(
    name: str, prompt: Sequence[int], continuation: Sequence[int], adapter: str | None = None
) -> GenerateRequest:
    """A request that asks how likely the continuation is."""
    return GenerateRequest(name, tuple(prompt), adapter=adapter, continuation=tuple(continuation))


def peft_score(base: Path, adapter: Path | None, prompt: Sequence[int], continuation: Sequence[int]) -> float:
    """log P(continuation | prompt) by one whole forward pass of transformers or PEFT, summed in double precision."""
    from peft import PeftModel

    model = load_model(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    ids = torch.tensor([[*prompt, *continuation]])
    with torch.inference_mode():
        logits_TV = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
    logs_TV = logits_TV.double().log_softmax(-1)
    return float(logs_TV.gather(1, ids[0, len(prompt) :, None]).sum())


def peft_greedy(
    base: Path,
    adapter: Path | None,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    load: Callable[[Path], Any] = load_model,
) -> list[list[int]]:
    """What `PeftModel.generate` (or the base's) answers to each prompt alone, greedy, exactly `new_tokens` long."""
    from peft import PeftModel

    model = load(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    if adapter is not None and model.active_peft_config.is_prompt_learning:
        return [_step_by_step(model, prompt, new_tokens) for prompt in prompts]
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def _step_by_step(model: Any, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """Greedy by whole forward passes. peft 0.21.2's `generate` drops prefixes under transformers 5.24, whose models
    take `cache` where peft hands over `past_key_values`; its forward, which training uses, does not.
    """
    ids = torch.tensor([list(prompt)])
    for _ in range(new_tokens):
        with torch.inference_mode():
            logits_1TV = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat([ids, logits_1TV[:, -1:].argmax(-1)], dim=1)
    answer: list[int] = ids[0, len(prompt) :].tolist()
    return answer
