"""Predicts what a stage takes before it starts: whether it fits, how long it runs, and the setting to run it with.

Operations: a product of weights costs 2 a weight and token forward and 2 backward for the input's gradient; frozen
weights need no gradient, so LoRA takes 4N a token where full finetuning takes 6N. Checkpointing computes the forward
pass again: 2N more. Efficiencies are shares of the machine's matmul rate (`machine.measure_speed` on a CPU, the
vendor's figure of a GPU), calibrated with `benchmarks/memory_plan.py` on SmolLM2-135M and on one H100.
"""

from graftwork.plan.gpus import GPUS, Gpu, gpu_called, gpu_here, named_gpu
from graftwork.plan.hardware import Machine
from graftwork.plan.seconds import RAY_TUNE_START_S, START_S, evaluation_seconds, step_seconds
from graftwork.plan.serving import Answers, answers_seconds, plan_serving
from graftwork.plan.settle import has_auto, settle
from graftwork.plan.stage import StagePlan, charged, verdict_of, worker_memory
from graftwork.plan.training import plan_training
from graftwork.plan.ways_out import training_ways_out

__all__ = [
    "GPUS",
    "RAY_TUNE_START_S",
    "START_S",
    "Answers",
    "Gpu",
    "Machine",
    "StagePlan",
    "answers_seconds",
    "charged",
    "evaluation_seconds",
    "gpu_called",
    "gpu_here",
    "has_auto",
    "named_gpu",
    "plan_serving",
    "plan_training",
    "settle",
    "step_seconds",
    "training_ways_out",
    "verdict_of",
    "worker_memory",
]
