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
    Goal("engine_decode", "distinct_32", "32 distinct adapters in a batch of 32, against base only", "at least", 0.75),
    Goal("engine_decode", "saved16_32", "the same, adapters saved in bf16", "at least", 0.75),
    Goal("engine_decode", "none_used", "adapters loaded and none used, against none loaded", "at least", 0.99),
    Goal("engine_decode", "against_peft", "32 distinct adapters, against PEFT's adapter_names", "at least", 8.0),
    Goal("engine_decode_bf16", "against_peft", "the same, base and adapters in bf16", "at least", 8.0),
    Goal("engine_decode", "step_to_static", "decode step of 32 requests, to a static batch's", "at most", 1.10),
    Goal("zipf", "registered_64", "64 registered adapters, Zipf(1) traffic, against base only", "at least", 0.85),
    Goal("zipf", "registered_1000", "1,000 registered adapters, Zipf(1) traffic, against base only", "at least", 0.80),
    Goal("adapter_load", "host_to_slot", "host cache to slot, ms", "at most", 5.0),
    Goal("adapter_load", "file_to_token", "file to first token, beyond a loaded adapter's, ms", "at most", 50.0),
    Goal("swap_stall", "p99_to_quiet", "others' inter-token p99 during 10 swaps a second to quiet", "at most", 1.10),
    Goal("swap_stall", "saved16_p99_to_quiet", "the same, adapters saved in bf16", "at most", 1.10),
    Goal("prompt_flood", "p99_to_quiet", "others' inter-token p99, flood of 4 MB prompts to quiet", "at most", 1.2),
    Goal("start", "ready", "start of the process to the first answer, s", "at most", 10.0),
    Goal("zipf", "worst_to_median", "worst adapter's p95 time to first token, to the median, Zipf(1)", "at most", 3.0),
    Goal("live_changes", "answered", "10,000 requests while adapters, arms, weights change: answered", "at least", 1.0),
    Goal("live_changes", "kept", "the same: replicas that stayed the same process, share", "at least", 1.0),
    Goal("live_changes", "wrong_refused", "wrong live configs refused, the old one served on, share", "at least", 1.0),
    Goal("training_speed", "qlora_to_trl_best", "QLoRA on a CPU, tokens/s, against TRL at its best", "at least", 1.2),
    Goal("training_speed", "lora_to_trl_best", "LoRA on a CPU, tokens/s, against TRL at its best", "at least", 1.2),
    Goal("training_speed", "qlora_to_trl_no_recompute", "QLoRA, against TRL that does not recompute", "at least", 1.2),
    Goal("training_speed", "lora_to_trl_no_recompute", "LoRA, against TRL that does not recompute", "at least", 1.2),
    Goal("training_speed", "qlora_to_trl", "QLoRA on a CPU, tokens/s, against TRL's default settings", "at least", 1.2),
    Goal("training_speed", "lora_to_trl", "LoRA on a CPU, tokens/s, against TRL's default settings", "at least", 1.2),
    Goal("ray_overhead", "ray_to_bare", "a training step on Ray Train, to bare processes", "at most", 1.01),
    Goal("tune_overhead", "beyond_share", "what a trial costs beyond its training, of 60 s, %", "at most", 5.0),
    Goal("checkpoint_stall", "stall_share", "what a checkpoint on S3 stalls, of 100 steps, %", "at most", 1.0),
    Goal("memory_plan", "peak_worst", "memory of a training worker, rows of one length, worst, %", "at most", 15.0),
    Goal("memory_runs", "worst", "the same, whole runs on real rows, worst, %", "at most", 15.0),
    Goal("advice", "named", "planted causes of failures named by the probes, of 600", "at least", 0.90),
    Goal("rag", "index_100k", "100,000 short passages indexed, CPU-s", "at most", 3.0),
    Goal("rag", "query_p99", "a question over 100,000 short passages, p99, ms", "at most", 5.0),
    Goal("rag", "recall_5_lexical", "R@5 on SQuAD's development paragraphs, lexical", "at least", 0.94),
    Goal("experiment", "assign_p99", "assignment of a live experiment, p99, us", "at most", 10.0),
    Goal("experiment", "added_p99", "what an experiment adds to the p99 of a request, ms", "at most", 2.0),
    Goal("experiment", "shadow_p99", "callers' p99 with every prompt shadowed, to without", "at most", 1.05),
    Goal("experiment", "killed_answered", "callers answered while a shadow arm dies, share", "at least", 1.0),
    Goal("sequential", "aa_upper", "A/A looked at always: false positives, upper bound, worst of 15", "at most", 0.05),
    Goal("latency_runs", "aa_upper", "the same, one arm 1 to 30 times slower, worst of 16", "at most", 0.05),
    Goal("latency_runs", "feedback_aa_upper", "the same, feedback of 30 %, later in one arm, of 4", "at most", 0.05),
    Goal("latency_runs", "srm_upper", "these 20: alarms of the sample ratio, upper bound", "at most", 0.001),
    Goal("sequential", "aa_covered", "confidence sequence covers at all n at once, worst of 15", "at least", 0.95),
    Goal("sequential", "power", "live split, 5 points at 0.8: found by 4,000 requests", "at least", 0.88),
    Goal("sequential", "power_median", "the same: requests, median", "at most", 2000.0),
    Goal("latency_runs", "power", "the same 5 points, one arm 10 times slower: found by 4,000", "at least", 0.88),
    Goal("latency_runs", "power_median", "the same: requests, median", "at most", 2000.0),
    Goal("sequential", "shadow_power", "shadow, 5 points at 20 % discordance: found by 2,000", "at least", 0.98),
    Goal("sequential", "shadow_median", "the same: prompts, median", "at most", 650.0),
    Goal("sequential", "offline_power_mcnemar_exact", "offline, 200 questions, 8 points: found", "at least", 0.42),
    Goal("sequential", "offline_null_mcnemar_exact", "the same with no difference: found", "at most", 0.05),
    Goal("sequential", "srm_52_median", "units that tell 52/48 from 50/50, median", "at most", 20_000.0),
    Goal("sequential", "srm_51_median", "units that tell 51/49 from 50/50, median", "at most", 50_000.0),
    Goal("sequential", "srm_false", "false alarms of the sample ratio by 50,000 units", "at most", 0.001),
    Goal("sequential", "guard_median", "requests until an arm with 20 % errors is cut, median", "at most", 60.0),
    Goal("sequential", "guard_false", "arms at the guardrail's limit that are cut by 4,000 requests", "at most", 0.01),
    Goal("sequential", "log_wall", "log of 1,000,000 rows to verdict and page, s", "at most", 10.0),
    Goal("together", "together_4_steps_s", "4 LoRA trials on one base, against one by one: steps", "at least", 1.3),
    Goal("together", "together_4_run_s", "the same: whole runs of 6 steps, evaluations included", "at least", 1.3),
    Goal("together", "loss_apart", "the same: held-out losses apart, relative, worst of all trials", "at most", 0.03),
    Goal("asha", "grid_share", "ASHA, reduction 4, on a grid of rank x lr in its order, steps of all", "at most", 0.35),
    Goal("asha", "grid_within_noise", "the same: winner within the deviation over seeds, of runs", "at least", 0.8),
    Goal("asha", "shuffled_share", "the same in shuffled orders, steps", "at most", 0.35),
    Goal("asha", "shuffled_within_noise", "the same: winner within the deviation, of runs", "at least", 0.8),
    Goal("asha", "default_grid_share", "ASHA as a spec has it by default, grid's order, steps", "at most", 0.35),
    Goal("asha", "default_grid_within_noise", "the same: winner within the deviation, of runs", "at least", 0.8),
    Goal("asha", "default_shuffled_share", "ASHA as a spec has it by default, shuffled orders, steps", "at most", 0.35),
    Goal("asha", "default_shuffled_within_noise", "the same: winner within the deviation, of runs", "at least", 0.8),
    Goal("search", "tpe_upper", "TPE: best of 8 trials, above the best of all, to random's; upper end", "at most", 1.0),
    Goal("search", "gp_upper", "the same of the Gaussian process", "at most", 1.0),
    Goal("plan_cold", "plan", "plan of a training spec, start of the process to its end, s", "at most", 2.0),
    Goal("plan_cold", "import_cli", "import of the command line, s", "at most", 0.3),
    Goal("plan_cold", "help", "graftwork --help, s", "at most", 0.5),
    Goal("plan_cold", "jobs_1000", "state of 1,000 jobs of a store on a disk, s", "at most", 2.0),
    Goal("search", "bohb_upper", "the same of BOHB's search", "at most", 1.0),
)
