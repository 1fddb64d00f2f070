"""The checks of a request, before anything is queued."""

import pytest

from graftwork.errors import DataError
from graftwork.serving.engine.request import check_request
from tests import engines
from tests.tiny import VOCAB_SIZE


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"prompt": []}, "an empty prompt"),
        ({"prompt": [5, VOCAB_SIZE]}, f"token id {VOCAB_SIZE}"),
        ({"prompt": [-1]}, "token id -1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 250}, "max_new_tokens=250"),
        ({"stop": ("end",)}, "stop strings need an engine that was given `decode`"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty=inf"),
        ({"presence_penalty": float("nan")}, "presence_penalty=nan"),
        ({"logit_bias": ((VOCAB_SIZE, 1.0),)}, f"logit_bias: token id {VOCAB_SIZE}"),
        ({"logit_bias": ((3, float("nan")),)}, "logit_bias="),
        ({"stop_ids": frozenset({-1})}, "stop_ids: token id -1"),
        ({"min_new_tokens": 6}, "min_new_tokens=6"),
        ({"logprobs": 21}, "logprobs=21"),
        ({"stop": ("",)}, "a stop string has at least one character"),
    ],
)
def test_a_bad_request_is_refused(changed: dict[str, object], found: str) -> None:
    request = engines.request("bad", **{"prompt": range(10, 60), "max_new_tokens": 5, **changed})  # type: ignore[arg-type]
    with pytest.raises(DataError, match=found):
        check_request(request, max_seq_len=256, vocab_size=VOCAB_SIZE, decodes=False)
