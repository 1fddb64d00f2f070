"""The engine that a spec asks for, on this process' devices."""

from graftwork import base_model
from graftwork.base_model import ResolvedBase
from graftwork.chat import Template
from graftwork.serving.engine_protocol import Engine
from graftwork.serving.spec import ServeSpec


def open_engine(spec: ServeSpec, base: ResolvedBase, template: Template) -> tuple[Engine, str]:
    """The engine, not started, and how it holds the base and why. Blocks. Raises UserError."""
    if spec.engine.kind == "vllm":
        from graftwork.serving.vllm_engine.open import create_vllm

        held = "nf4 by bitsandbytes" if spec.quant.kind == "nf4" else "plain"
        reason = f"engine=vllm (asked for), tensor_parallel_size={spec.engine.tensor_parallel_size}; weights={held}"
        return create_vllm(base, spec.quant, spec.engine), reason
    device = "cuda:0" if spec.gpus else "cpu"
    if device == "cpu":
        _compute_alone()
    loaded = base_model.load(base, spec.quant, device=device, purpose="serve")
    limits = spec.engine.with_({"num_threads": spec.engine.num_threads or max(1, int(spec.num_cpus))})
    from graftwork.serving.engine.engine import NativeEngine  # torch: only here, so that driver and ingress go without

    return NativeEngine(loaded.model, limits, device, template.decode), loaded.reason


def _compute_alone() -> None:
    """Lets this thread compute by itself, so that the engine's thread alone has helpers.

    OpenMP keeps the helpers of every thread that ever had some, and once they are more than the CPUs they go to sleep
    at each wait: a step of 16 rows on two cores took 123 ms, not 96 (docs/log.md).
    """
    import torch

    torch.set_num_threads(1)
