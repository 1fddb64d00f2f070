"""Predicts what a stage takes before it starts: whether it fits, how long it runs, and the setting to run it with.

Operations: a product of weights costs 2 a weight and token forward and 2 backward for the input's gradient; frozen
weights need no gradient, so LoRA takes 4N a token where full finetuning takes 6N. Checkpointing computes the forward
pass again: 2N more. Efficiencies are shares of the machine's matmul rate (`machine.measure_speed` on a CPU, the
vendor's figure of a GPU), calibrated with `benchmarks/memory_plan.py` on SmolLM2-135M and on one H100.
"""

from graftwork.plan.gpus import GPUS, Gpu, gpu_called, gpu_here, named_gpu
from graftwork.plan.hardware import Machine
from graftwork.plan.seconds import RAY_TUNE_START_S, START_S, evaluation_seconds, step_seconds
from graftwork.plan.serving import RequestLoad, answers_seconds, plan_serving
from graftwork.plan.settle import has_auto, resolve_auto
from graftwork.plan.stage import StagePlan, charge_bytes, verdict_of, worker_memory
from graftwork.plan.training import plan_training
from graftwork.plan.ways_out import suggest_training_changes

__all__ = [
    "GPUS",
    "RAY_TUNE_START_S",
    "START_S",
    "Gpu",
    "Machine",
    "RequestLoad",
    "StagePlan",
    "answers_seconds",
    "charge_bytes",
    "evaluation_seconds",
    "gpu_called",
    "gpu_here",
    "has_auto",
    "named_gpu",
    "plan_serving",
    "plan_training",
    "resolve_auto",
    "step_seconds",
    "suggest_training_changes",
    "verdict_of",
    "worker_memory",
]
