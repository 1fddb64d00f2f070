"""The scorer `max_words`: its keys, a comparison whose verdict is about it, and live traffic without gold."""

import asyncio
import sys
from pathlib import Path
from typing import Any

from graftwork.serving.ab_test.log import scorers_of
from graftwork.serving.ab_test.spec import ExperimentSpec
from graftwork.serving.evaluation.compare import compare
from graftwork.serving.evaluation.scorers.protocol import ModelReply
from tests.docs.extending.common import require_copy
from tests.fake_arms import Script, airports, ask_all, spec

MOST = 20
SCORER = {"kind": "max_words", "name": "brief", "words": MOST}


def main(work: Path) -> None:
    require_copy(work)
    rows = airports(60)
    script = Script(rows)

    async def answer(arm: Any, messages: Any, request_id: str) -> Any:
        found = await script(arm, messages, request_id)
        return {**found, "text": found["text"] + " and so on" * 10} if arm.name == "base-rag" else found

    asked = spec(scorers=[SCORER], primary="brief", answer_schema=None)
    answers = asyncio.run(ask_all(asked, rows, answer, work / "answers.jsonl"))
    report = compare(asked, rows, answers, None)
    for arm in report.arms:
        texts = [answers.get(arm.name, row.id).text for row in rows]
        expected = sum(len(text.split()) <= MOST for text in texts) / len(rows)
        assert arm.scores["brief"].value == expected, (arm.name, arm.scores["brief"], expected)
    found = {(one.metric, one.test, one.verdict) for one in report.differences}
    assert found == {("brief", "mcnemar-exact", "better")}, found
    experiment = ExperimentSpec.model_validate(
        {
            "kind": "experiment",
            "name": "brief-answers",
            "endpoint": "http://127.0.0.1:8000",
            "arms": [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 0.5}],
            "control": "a",
            "primary": {"name": "brief"},
            "scorers": [SCORER],
        }
    )
    live = scorers_of(experiment)
    assert live.score(ModelReply("three short words")) == {"brief": 1.0}
    assert live.score(ModelReply("word " * (MOST + 1))) == {"brief": 0.0}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
