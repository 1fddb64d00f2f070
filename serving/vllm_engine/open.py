"""Starts vLLM: the one place that imports it."""

import os
from importlib.util import find_spec
from typing import Any

from graftwork.base_model import QuantSpec, ResolvedBase
from graftwork.errors import BaseModelError, ConfigError
from graftwork.serving.spec import EngineSpec
from graftwork.serving.vllm_engine.engine import AsyncLlm, VllmEngine
from graftwork.serving.vllm_engine.loras import LoadedLora
from graftwork.serving.vllm_engine.settings import engine_arguments
from graftwork.serving.vllm_engine.tally import Tally

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # vLLM would tell its makers about this machine
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a replica has threads and may have touched CUDA
}


def create_vllm(base: ResolvedBase, quant: QuantSpec, spec: EngineSpec) -> VllmEngine:
    """A vLLM engine on this process' GPUs. Blocks for minutes.

    Raises ConfigError (vLLM or its bitsandbytes plugin is not installed, a setting that vLLM cannot honour),
    BaseModelError (vLLM cannot load the base).
    """
    arguments = engine_arguments(base.folder, spec, quant)
    if base.overrides:
        arguments["hf_overrides"] = dict(base.overrides)
    _require("vllm")
    if quant.kind == "nf4":
        _require("vllm_bnb_plugin")
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    tally = Tally(spec.kv_tokens)

    def make() -> AsyncLlm:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        llm: AsyncLlm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[_stat_logger(tally)])
        return llm

    try:
        return VllmEngine(make, VllmTranslation(), spec, vocab_size=int(base.config["vocab_size"]), tally=tally)
    except (RuntimeError, ValueError, OSError, ImportError, NotImplementedError) as error:
        raise BaseModelError(
            f"base {base.uri} with engine.kind=vllm", f"vLLM did not start ({str(error)[:400]})",
            "vLLM needs CUDA devices, and an architecture that it knows", "see its log, or use engine.kind=graftwork",
        ) from error  # fmt: skip


class VllmTranslation:
    """vLLM's own classes."""

    def prompt(self, ids: tuple[int, ...], cache_salt: str) -> Any:
        """Token ids in; vLLM takes no empty salt."""
        from vllm import TokensPrompt

        salted = {"cache_salt": cache_salt} if cache_salt else {}
        return TokensPrompt(prompt_token_ids=list(ids), **salted)

    def sampling(self, arguments: dict[str, Any], grammar: dict[str, str] | None) -> Any:
        """Deltas out."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        structured = StructuredOutputsParams(**grammar) if grammar is not None else None
        return SamplingParams(**arguments, structured_outputs=structured, output_kind=RequestOutputKind.DELTA)

    def lora(self, lora: LoadedLora) -> Any:
        """Never with `load_inplace`."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(lora_name=lora.name, lora_int_id=lora.number, lora_path=str(lora.folder))


def _stat_logger(tally: Tally) -> Any:
    """A factory of vLLM's stat loggers that write into the tally."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class ToTally(StatLoggerBase):  # type: ignore[misc]  # vLLM has no types here
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
            tally.record(scheduler_stats, iteration_stats)

        def log_engine_initialized(self) -> None:
            pass

    return ToTally


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(
            "engine.kind=vllm", f"the package {package} is not installed where the engine runs",
            "vLLM is the extra `vllm`, for Linux with CUDA", "pip install 'vllm==0.29.0' 'vllm-bnb-plugin>=0.0.3,<0.1'",
        )  # fmt: skip
