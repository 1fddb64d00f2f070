"""Check of a base by running the stages on a scaled-down copy of it: train, publish, serve, compare the tokens.

`graftwork.base.support` predicts from the real config.json what each stage supports. A stage that it does not reject
runs here on random weights (`graftwork.base.scaled`), on the path of `graftwork train` and `graftwork serve`. Greedy
tokens of the engine are compared with those of transformers and PEFT in fp32.
"""

import json
import math
import queue
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graftwork.base.load import ResolvedBase, load, resolve
from graftwork.base.model_shape import ModelShape
from graftwork.base.scaled import VOCAB, write_scaled_base
from graftwork.base.source import BaseSpec
from graftwork.base.support import BaseSupport, Stage, base_support
from graftwork.errors import GraftworkError, RunError
from graftwork.planning.hardware import GPUS, Machine
from graftwork.planning.memory import RowSizes
from graftwork.quantization import METHODS, QuantKind, QuantSpec
from graftwork.storage.store import Store
from graftwork.training.loop import train_as_worker
from graftwork.training.planning.plan import plan_training
from graftwork.training.run import ResolvedRun, train_resolved
from graftwork.training.spec import TrainSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from graftwork.serving.engine.engine import NativeEngine
    from graftwork.serving.engine.request import TokenEvent
    from graftwork.training.report import TrainReport
    from graftwork.training.worker_messages import LoopResult, TrainJob

Status = Literal["supported", "rejected", "untested"]
RUNS_PLAIN: tuple[Stage, ...] = ("train LoRA", "train full", "serve")
NEW_TOKENS = 8
PROMPT_LENGTHS = (3, 20, 41, 60)
"""Tokens of the prompts: shorter and longer than the sliding window and the chunks of the scaled-down base."""
STEP_ROWS = 2
ANSWER_S = 60.0
SAME_LOGPROB, SAME_LOGPROB_INT8 = 1e-3, 0.1
"""Largest difference of a token's log probability. int8 rounds each row's inputs to 8 bits: differences of 1e-7 before
it can become one step."""
SAME_LOSS = 1e-4
"""Relative difference of a packed step's loss: both are sums of the same fp32 losses in another order."""


@dataclass(frozen=True)
class StageStatus:
    """One stage. `reason`: why it is rejected or untested; of a supported one the setting that it needs, or empty."""

    status: Status
    reason: str = ""


@dataclass(frozen=True)
class BaseCheck:
    """The stages of one base."""

    model_type: str
    model_class: str
    stages: Mapping[Stage, StageStatus]

    def as_dict(self) -> dict[str, Any]:
        """Return the check as JSON."""
        return asdict(self)


def check_base(config: Mapping[str, Any]) -> BaseCheck:
    """Run the stages on a scaled-down base of this config.json. Takes seconds, and writes to a temporary folder alone.

    Raises BaseModelError where transformers has no causal language model for it.
    """
    support = base_support(config)
    with tempfile.TemporaryDirectory(prefix="gw-base-") as folder:
        check = _Check(config, support, Path(folder))
        with _no_logs():
            check.run()
        stages = {stage: check.found.get(stage, StageStatus("untested", "not run")) for stage in support.names}
    return BaseCheck(support.model_type, support.model_class, stages)


@dataclass
class _Check:
    """A check in progress."""

    config: Mapping[str, Any]
    support: BaseSupport
    folder: Path
    found: dict[Stage, StageStatus] = field(default_factory=dict)
    base: ResolvedBase | None = None
    lora: "TrainReport | None" = None

    @property
    def targets(self) -> str | None:
        """The first value of `adapter.targets` that trains."""
        return next((which for which, one in self.support.lora.items() if not one.reason), None)

    def run(self) -> None:
        """Fill `found`, each stage after those that it needs."""
        self._try("plan", self._plan)
        try:
            self.base = resolve(BaseSpec(uri=str(write_scaled_base(self.config, self.folder / "base"))))
            _require_pass(self.base)
        except Exception as error:  # code of any architecture
            untested = _untested(f"no scaled-down base could be made and run ({_first_line(error)})")
            for stage in self.support.names:
                if stage not in self.found:
                    self._try(stage, untested)
            return
        hint = "" if self.targets in (None, "all-linear") else f"adapter.targets={self.targets}"
        self._try("train LoRA", self._train_lora, hint)
        self._try("train full", self._train_full)
        trained = self.found["train LoRA"]
        self._try("packing", self._pack, rejected=trained.reason if trained.status == "rejected" else "")
        self._try("serve", self._serve)
        self._try("serve adapters", self._serve_adapters)
        for kind, method in METHODS.items():
            if method.keeps_checkpoint:
                self._try(kind, _untested("the copy's weights are plain: `graftwork quantize` measures it"))
            elif method.bits:
                self._try(kind, partial(self._quantise, kind), self.support.train_packed.reason)
            else:
                ran = any(self.found[stage].status == "supported" for stage in RUNS_PLAIN)
                self.found[kind] = StageStatus("supported") if ran else self.found["serve"]

    def _try(self, stage: Stage, work: Callable[[], None], note: str = "", *, rejected: str = "") -> None:
        """Note why the base is rejected, or what `work` did. An AssertionError is a missing result of another stage."""
        if reason := rejected or self.support.stages[stage].reason:
            self.found[stage] = StageStatus("rejected", reason)
            return
        try:
            work()
        except _NotReady as error:
            self.found[stage] = StageStatus("untested", str(error))
        except Exception as error:  # code of any architecture
            self.found[stage] = StageStatus("rejected", f"on the scaled-down base: {_first_line(error)}")
        else:
            self.found[stage] = StageStatus("supported", note)

    def _plan(self) -> None:
        spec = TrainSpec.model_validate({**_usual("base", "rows.jsonl", self.folder), "gpus_per_worker": 1})
        machine = Machine.with_gpus(GPUS["h100"]).at(spec.quant)
        plan = plan_training(spec, ModelShape.from_config(self.config), RowSizes.at_most(512, 8), None, machine)
        if not math.isfinite(plan.peak_bytes_per_process) or plan.peak_bytes_per_process <= 0:
            raise RunError("plan", f"peak of {plan.peak_bytes_per_process} bytes")

    def _train_lora(self) -> None:
        self.lora = self._train(_lora(self.targets))

    def _train_full(self) -> None:
        report = self._train({"adapter": {"kind": "full"}, "optim": _optim(1e-3)})
        assert report.base is not None, "a run of all weights publishes a base"
        trained = resolve(BaseSpec(uri=report.base))
        if not self.support.stages["serve"].reason:
            _compare_tokens(trained, QuantSpec(kind="none", dtype="float32"), None)

    def _pack(self) -> None:
        plain, packed = (self._first_loss(packing) for packing in ("none", "best_fit"))
        if math.isclose(plain, packed, rel_tol=SAME_LOSS):
            return
        again = self._first_loss("none", seed=1)  # an adapter's start values change no loss
        if not math.isclose(plain, again, rel_tol=SAME_LOSS):
            raise _NotReady(f"its training draws random numbers: two equal steps have losses {plain:.4f}, {again:.4f}")
        raise RunError("packing", f"a step's loss is {packed:.6f} packed and {plain:.6f} unpacked")

    def _serve(self) -> None:
        assert self.base is not None, "written before"
        _compare_tokens(self.base, QuantSpec(kind="none", dtype="float32"), None)

    def _serve_adapters(self) -> None:
        assert self.base is not None, "written before"
        if self.lora is None:
            raise _NotReady(f"no adapter was trained: {self.found['train LoRA'].reason}")
        _compare_tokens(self.base, QuantSpec(kind="none", dtype="float32"), self._adapter(self.lora))

    def _quantise(self, kind: QuantKind) -> None:
        """Train on packed weights, and serve them with the adapter."""
        assert self.base is not None, "written before"
        quant = QuantSpec(kind=kind, dtype="float32")
        report = None
        if not (self.support.stages["train LoRA"].reason or self.support.train_packed.reason):
            report = self._train({**_lora(self.targets), "quant": quant.model_dump(mode="json")})
        if not self.support.stages["serve"].reason:
            _compare_tokens(self.base, quant, None)
        elif report is None:
            raise _NotReady("neither trained nor served")

    def _train(self, keys: Mapping[str, Any]) -> "TrainReport":
        run = ResolvedRun.resolve(self._spec(keys))
        report = train_resolved(run, workers=_run_here)
        losses = [loss for _, loss in report.train_loss]
        if len(losses) != 2 or not all(math.isfinite(loss) for loss in losses):
            raise RunError("training", f"losses of two steps: {losses}")
        return report

    def _first_loss(self, packing: str, seed: int = 0) -> float:
        """Return the loss of all rows as one step."""
        from graftwork.training.loop import run_steps
        from graftwork.training.objectives.rows import prepare
        from graftwork.training.worker_messages import TrainJob

        objective = {"kind": "sft", "packing": packing}
        spec = self._spec({**_lora(self.targets), "objective": objective, "max_length": 1024, "seed": seed})
        data = prepare(spec)
        rows = len(data.train)  # in one pass: a router's loss is one of all tokens of a pass
        spec = spec.with_({"optim.rows_per_step": rows, "optim.micro_batch": rows})
        result = run_steps(TrainJob(spec, data, max_steps=1), lambda _: True)
        return result.train_loss[0][1]

    def _spec(self, keys: Mapping[str, Any]) -> TrainSpec:
        assert self.base is not None, "written before"
        rows = self.folder / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in _ROWS), encoding="utf-8")
        return TrainSpec.model_validate({**_usual(str(self.base.folder), str(rows), self.folder), **keys})

    def _adapter(self, report: "TrainReport") -> Path:
        task, _, version = str(report.adapter).partition("@")
        return Path(Store(str(self.folder / "root")).path("adapters", task, version))


class _NotReady(Exception):
    """A stage that needs the result of another one, which has none."""


def _untested(reason: str) -> Callable[[], None]:
    def work() -> None:
        raise _NotReady(reason)

    return work


_ROWS = [
    {"prompt": f"Which airport has the code {code}{'?' * number}", "completion": f"{code}." + " Large." * number}
    for number, code in enumerate(["ZPPP", "KJFK", "EDDF", "LFPG"])
]


def _usual(base: str, rows: str, folder: Path) -> dict[str, Any]:
    return {
        "name": "check",
        "root": str(folder / "root"),
        "base": base,
        "data": {"train": rows},
        "num_workers": 1,
        "gpus_per_worker": 0,
        "quant": {"kind": "none", "dtype": "float32"},
        "optim": _optim(1e-3),
        "checkpoint_every": 2,
    }


def _optim(lr: float) -> dict[str, Any]:
    return {"rows_per_step": STEP_ROWS, "micro_batch": 1, "lr": lr, "schedule": "constant", "warmup_ratio": 0.0}


def _lora(targets: str | None) -> dict[str, Any]:
    """A LoRA that changes the answers after two steps: Adam moves each weight by the learning rate."""
    if targets is None:
        raise _NotReady("no LoRA can be attached")
    return {"adapter": {"kind": "lora", "rank": 4, "alpha": 64.0, "targets": targets}, "optim": _optim(0.1)}


def _run_here(job: "TrainJob") -> "LoopResult":
    result = train_as_worker(job, lambda _: True, lambda: False)
    if isinstance(result, GraftworkError):
        raise result
    return result


def _prompts() -> list[list[int]]:
    rng = random.Random(2)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(length)] for length in PROMPT_LENGTHS]
    return [*prompts, [*prompts[-1][:50], 7, 8, 9]]


@dataclass(frozen=True)
class _Answer:
    """Greedy tokens, and the natural log of each one's probability."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def differs(self, other: "_Answer", tolerance: float) -> bool:
        """Return whether tokens differ, or probabilities by more than the tolerance."""
        same = all(abs(one - two) <= tolerance for one, two in zip(self.logprobs, other.logprobs, strict=False))
        return self.tokens != other.tokens or not same


def _require_pass(base: ResolvedBase) -> None:
    """Raise the error of transformers' own code in a forward and backward pass, where sizes do not fit each other."""
    import torch

    model = load(base, QuantSpec(kind="none", dtype="float32"), device="cpu", purpose="train").model
    ids = torch.tensor([_prompts()[1]])
    model.train().requires_grad_(True)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()


def _compare_tokens(base: ResolvedBase, quant: QuantSpec, adapter: Path | None) -> None:
    """Compare greedy answers in one batch, of the base alone and with the adapter. Raises RunError where they differ.

    The reference has the weights as `load` leaves them, so that it differs in the path alone.
    """
    from peft import PeftModel

    from graftwork.serving.engine.engine import NativeEngine
    from graftwork.serving.spec import EngineSpec

    prompts, tolerance = _prompts(), SAME_LOGPROB_INT8 if quant.kind == "int8" else SAME_LOGPROB
    reference = load(base, quant, device="cpu", purpose="serve").model
    wanted = {"": [_greedy(reference, prompt) for prompt in prompts]}
    if adapter is not None:
        adapted = PeftModel.from_pretrained(reference, adapter).eval()
        wanted["v1"] = [_greedy(adapted, prompt) for prompt in prompts]
        if not all(map(_Answer.differs, wanted["v1"], wanted[""], [10 * tolerance] * len(prompts))):
            raise _NotReady("the trained adapter does not change the answers, so that nothing was compared")
    limits = EngineSpec(max_batch=16, max_seq_len=256, kv_tokens=4096, prefill_tokens=16, num_threads=1)
    engine = NativeEngine(load(base, quant, device="cpu", purpose="serve").model, limits, "cpu")
    try:
        if adapter is not None:
            engine.load_adapter("v1", adapter)
        engine.start()
        asked = {f"{name} {n}": (prompts[n], name or None) for name in wanted for n in range(len(prompts))}
        answers = _ask(engine, asked)
    finally:
        engine.stop()
    for key, (prompt, name) in asked.items():
        right = wanted[name or ""][prompts.index(prompt)]
        if answers[key].differs(right, tolerance):
            what, wrong = "PEFT" if name else "transformers", answers[key]
            where = f"after a prompt of {len(prompt)} tokens"
            if wrong.tokens != right.tokens:
                raise RunError(
                    "tokens", f"the engine's tokens {where} are {wrong.tokens}, those of {what} {right.tokens}"
                )
            raise RunError("tokens", f"log probabilities {where} differ from those of {what} by more than {tolerance}")


def _greedy(model: Any, prompt: Sequence[int]) -> _Answer:
    import torch

    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = out.sequences[0, len(prompt) :].tolist()
    logs = [logits[0].double().log_softmax(-1)[token].item() for logits, token in zip(out.logits, tokens, strict=True)]
    return _Answer(tokens, logs)


def _ask(engine: "NativeEngine", asked: Mapping[str, tuple[Sequence[int], str | None]]) -> dict[str, _Answer]:
    """Answers by request id. asked: (prompt, adapter version)."""
    from graftwork.serving.engine.request import GenerateRequest, SamplingParams

    events: queue.Queue[TokenEvent] = queue.Queue()
    answers = {name: _Answer() for name in asked}
    for name, (prompt, version) in asked.items():
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS, logprobs=0)
        engine.submit(GenerateRequest(name, tuple(prompt), sampling, frozenset(), version), events.put)
    waiting = len(asked)
    while waiting:
        event = events.get(timeout=ANSWER_S)
        if event.error is not None:
            raise RunError(f"request {event.request_id}", event.error)
        if event.token_id >= 0 and event.logprob is not None:
            answers[event.request_id].tokens.append(event.token_id)
            answers[event.request_id].logprobs.append(event.logprob)
        waiting -= event.finish_reason is not None
    return answers


@contextmanager
def _no_logs() -> "Iterator[None]":
    """Libraries warn about sizes and kernels of tiny models, which says nothing about the base."""
    import logging
    import warnings

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def _first_line(error: Exception) -> str:
    if isinstance(error, GraftworkError):
        return error.problem or error.subject
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
