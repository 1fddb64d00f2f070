"""The GPU benchmark runs as it stands with a tiny shape on this machine's CPU, and counts what it says it counts."""

import json
from pathlib import Path

from benchmarks.gpu_decode import main


def test_every_figure_of_the_gpu_benchmark_is_taken(tmp_path: Path) -> None:
    out = tmp_path / "gpu_decode.json"
    sizes = {"batch": 3, "prompt": 5, "new": 4, "adapters": 2, "distinct": 2, "rounds": 1, "prefill": 16}
    main(
        ["--out", str(out), "--shape", "tiny", "--device", "cpu", *(f"--{key}={value}" for key, value in sizes.items())]
    )
    document = json.loads(out.read_text())
    assert set(document) == {"run_info", "result", "meta_info"}
    assert document["meta_info"]["batch"] == 3
    for one in (document["result"][weights] for weights in ("bf16", "nf4")):
        for mix, rows in (("base", 3), ("2_adapters", 3), ("batch_1", 1), ("distinct_base", 2), ("distinct", 2)):
            tokens = one[mix]["tokens_per_s"] * one[mix]["seconds"]
            assert round(tokens) == 4 * rows
            assert 0 < one[mix]["first_token_s"] < one[mix]["seconds"]
        assert len(one["host_to_slot_ms"]) == 2
        assert one["first_answer_s"] > one["engine_start_s"] > 0
        assert one["distinct_over_base"] > 0
