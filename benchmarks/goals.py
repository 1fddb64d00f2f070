"""What the figures are held against: the goals of serving on a CPU (SmolLM2-135M, 2 cores), one line a figure.

A goal names the benchmark and the figure in its result. A ratio is of throughputs unless its text says otherwise.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Goal:
    """`figure` of `benchmark` is to be at least, or at most, `limit`."""

    benchmark: str
    figure: str
    text: str
    side: Literal["at least", "at most"]
    limit: float

    def met(self, value: float) -> bool:
        """Whether a measured value holds it."""
        return value >= self.limit if self.side == "at least" else value <= self.limit

    def missed_by(self, value: float) -> float:
        """Share of the limit that is missing; 0 where the goal is met."""
        return 0.0 if self.met(value) else abs(value - self.limit) / self.limit


GOALS = (
    Goal(
        "engine_decode",
        "distinct_32",
        "32 distinct adapters in a batch of 32, vs base only, tokens/s",
        "at least",
        0.75,
    ),
    Goal("engine_decode", "saved16_32", "the same, adapters saved in bf16", "at least", 0.75),
    Goal("engine_decode", "none_used", "adapters loaded but unused, vs none loaded, tokens/s", "at least", 0.99),
    Goal("engine_decode", "against_peft", "32 distinct adapters, vs PEFT's adapter_names, tokens/s", "at least", 8.0),
    Goal("engine_decode_bf16", "against_peft", "the same, base and adapters in bf16", "at least", 8.0),
    Goal("engine_decode", "step_to_static", "decode step of 32 requests, vs a static batch, time", "at most", 1.10),
    Goal("zipf", "registered_64", "64 registered adapters, Zipf(1) traffic, vs base only", "at least", 0.85),
    Goal("zipf", "registered_1000", "1,000 registered adapters, Zipf(1) traffic, vs base only", "at least", 0.80),
    Goal("adapter_load", "host_to_slot", "host cache to slot, ms", "at most", 5.0),
    Goal("adapter_load", "file_to_token", "file to first token, beyond that of a loaded adapter, ms", "at most", 50.0),
    Goal("swap_stall", "p99_to_quiet", "inter-token p99 of other requests, 10 swaps/s vs no swaps", "at most", 1.10),
    Goal("swap_stall", "saved16_p99_to_quiet", "the same, adapters saved in bf16", "at most", 1.10),
    Goal(
        "prompt_flood",
        "p99_to_quiet",
        "inter-token p99 of other requests, 4 MB prompts arriving vs none",
        "at most",
        1.2,
    ),
    Goal("start", "ready", "process start to first answer, s", "at most", 10.0),
    Goal(
        "zipf", "worst_to_median", "p95 time to first token, worst adapter vs median adapter, Zipf(1)", "at most", 3.0
    ),
    Goal("live_changes", "answered", "10,000 requests during changes of the config: share answered", "at least", 1.0),
    Goal("live_changes", "kept", "the same: share of replicas that were not restarted", "at least", 1.0),
    Goal(
        "live_changes", "wrong_refused", "share of invalid live configs rejected without interruption", "at least", 1.0
    ),
    Goal(
        "training_speed", "qlora_to_trl_best", "QLoRA on a CPU, tokens/s, vs TRL at its best settings", "at least", 1.2
    ),
    Goal("training_speed", "lora_to_trl_best", "LoRA on a CPU, tokens/s, vs TRL at its best settings", "at least", 1.2),
    Goal(
        "training_speed", "qlora_to_trl_no_recompute", "QLoRA, vs TRL without gradient checkpointing", "at least", 1.2
    ),
    Goal("training_speed", "lora_to_trl_no_recompute", "LoRA, vs TRL without gradient checkpointing", "at least", 1.2),
    Goal("training_speed", "qlora_to_trl", "QLoRA, vs TRL's default settings", "at least", 1.2),
    Goal("training_speed", "lora_to_trl", "LoRA, vs TRL's default settings", "at least", 1.2),
    Goal("ray_overhead", "ray_to_bare", "training step on Ray Train, vs plain processes, time", "at most", 1.01),
    Goal("tune_overhead", "beyond_share", "overhead of a 60 s trial, %", "at most", 5.0),
    Goal("checkpoint_stall", "stall_share", "stall per S3 checkpoint, % of 100 steps", "at most", 1.0),
    Goal("memory_plan", "peak_worst", "error of the memory plan, rows of one length, worst, %", "at most", 15.0),
    Goal("memory_runs", "worst", "error of the memory plan, whole runs on real rows, worst, %", "at most", 15.0),
    Goal("advice", "named", "share of 600 planted failure causes that the probes find", "at least", 0.90),
    Goal("rag", "index_100k", "index of 100,000 short passages, CPU-s", "at most", 3.0),
    Goal("rag", "query_p99", "query over 100,000 short passages, p99, ms", "at most", 5.0),
    Goal("rag", "recall_5_lexical", "R@5 on SQuAD's development paragraphs, lexical", "at least", 0.94),
    Goal("experiment", "assign_p99", "arm assignment of a live experiment, p99, us", "at most", 10.0),
    Goal("experiment", "added_p99", "latency that an experiment adds, p99, ms", "at most", 2.0),
    Goal("experiment", "shadow_p99", "callers' p99 with all prompts shadowed, vs none shadowed", "at most", 1.05),
    Goal("experiment", "killed_answered", "share of callers answered while a shadow arm fails", "at least", 1.0),
    Goal(
        "sequential", "aa_upper", "A/A test, continuous monitoring: false-positive rate, worst of 15", "at most", 0.05
    ),
    Goal("latency_runs", "aa_upper", "the same, one arm 1 to 30 times slower, worst of 16", "at most", 0.05),
    Goal(
        "latency_runs",
        "feedback_aa_upper",
        "the same, 30 % feedback that is later in one arm, worst of 4",
        "at most",
        0.05,
    ),
    Goal(
        "latency_runs", "srm_upper", "sample-ratio-mismatch alarms in these 20 scenarios, upper bound", "at most", 0.001
    ),
    Goal("sequential", "aa_covered", "coverage of the confidence sequence at all n, worst of 15", "at least", 0.95),
    Goal("sequential", "power", "live split, difference of 5 points: power at 4,000 requests", "at least", 0.88),
    Goal("sequential", "power_median", "the same: requests, median", "at most", 2000.0),
    Goal("latency_runs", "power", "the same difference, one arm 10 times slower: power", "at least", 0.88),
    Goal("latency_runs", "power_median", "the same: requests, median", "at most", 2000.0),
    Goal(
        "sequential", "shadow_power", "shadow, 5 points at 20 % discordance: power at 2,000 prompts", "at least", 0.98
    ),
    Goal("sequential", "shadow_median", "the same: prompts, median", "at most", 650.0),
    Goal(
        "sequential",
        "offline_power_mcnemar_exact",
        "offline, 200 questions, difference of 8 points: power",
        "at least",
        0.42,
    ),
    Goal("sequential", "offline_null_mcnemar_exact", "offline, no difference: false-positive rate", "at most", 0.05),
    Goal("sequential", "srm_52_median", "units until a 52/48 split is detected, median", "at most", 20_000.0),
    Goal("sequential", "srm_51_median", "units until a 51/49 split is detected, median", "at most", 50_000.0),
    Goal("sequential", "srm_false", "sample-ratio-mismatch false alarms by 50,000 units", "at most", 0.001),
    Goal("sequential", "guard_median", "requests until an arm with 20 % errors is removed, median", "at most", 60.0),
    Goal("sequential", "guard_false", "share of arms at the guardrail's limit that are removed", "at most", 0.01),
    Goal("sequential", "log_wall", "verdict and page from a log of 1,000,000 rows, s", "at most", 10.0),
    Goal("together", "together_4_steps_s", "4 LoRA trials on one base, vs one by one: steps/s", "at least", 1.3),
    Goal("together", "together_4_run_s", "the same: whole runs of 6 steps with evaluations", "at least", 1.3),
    Goal("together", "loss_apart", "the same: relative difference of held-out losses, worst", "at most", 0.03),
    Goal("asha", "grid_share", "ASHA, reduction 4, grid order: share of all steps", "at most", 0.35),
    Goal("asha", "grid_within_noise", "the same: runs whose winner is within one seed deviation", "at least", 0.8),
    Goal("asha", "shuffled_share", "ASHA, reduction 4, shuffled orders: share of all steps", "at most", 0.35),
    Goal("asha", "shuffled_within_noise", "the same: runs whose winner is within one seed deviation", "at least", 0.8),
    Goal("asha", "default_grid_share", "ASHA, default settings, grid order: share of all steps", "at most", 0.35),
    Goal(
        "asha", "default_grid_within_noise", "the same: runs whose winner is within one seed deviation", "at least", 0.8
    ),
    Goal(
        "asha", "default_shuffled_share", "ASHA, default settings, shuffled orders: share of all steps", "at most", 0.35
    ),
    Goal(
        "asha",
        "default_shuffled_within_noise",
        "the same: runs whose winner is within one seed deviation",
        "at least",
        0.8,
    ),
    Goal("search", "tpe_upper", "TPE: regret after 8 trials, vs random search (upper bound)", "at most", 1.0),
    Goal("search", "gp_upper", "Gaussian process: regret after 8 trials, vs random search", "at most", 1.0),
    Goal("search", "bohb_upper", "BOHB: regret after 8 trials, vs random search", "at most", 1.0),
    Goal("plan_cold", "plan", "`graftwork plan` of a training spec, s", "at most", 2.0),
    Goal("plan_cold", "import_cli", "import of the command line, s", "at most", 0.3),
    Goal("plan_cold", "help", "graftwork --help, s", "at most", 0.5),
    Goal("plan_cold", "jobs_1000", "`graftwork jobs ls` with 1,000 jobs on disk, s", "at most", 2.0),
)
