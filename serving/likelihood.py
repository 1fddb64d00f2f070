"""How likely given answers are, for one arm and conversation: the call's requests in the engine and what they tell."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from graftwork.chat import Template
from graftwork.serving.api_error import bad_request
from graftwork.serving.arms import Dump
from graftwork.serving.generation import Generation, require_served


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of one continuation."""

    logprob: float
    """Natural log of its probability: the sum over its tokens, each given the prompt and the tokens before it."""
    tokens: int

    def dump(self) -> Dump:
        """As a plain dict, the form that travels through a handle."""
        return asdict(self)


def continuation_ids(texts: Sequence[str], template: Template) -> list[tuple[int, ...]]:
    """Ids of each text as it stands right behind a prompt; no special token can come out. Raises ApiError."""
    if not texts:
        raise bad_request("continuations is empty: there is nothing to be scored.", param="continuations")
    for number, text in enumerate(texts):
        if not text:
            raise bad_request(f"continuation {number} is empty: it has no token.", param="continuations")
    return [tuple(template.continuation_ids(text)) for text in texts]


async def collect(generation: Generation, lengths: Sequence[int]) -> list[Likelihood]:
    """Waits for all scores, in order. lengths: tokens of each continuation. Raises ApiError where the engine failed."""
    told: dict[int, Likelihood] = {}
    async for events in generation.events():
        for index, [event] in events.items():
            require_served(event)
            assert event.logprob is not None, "a scored request tells its sum"
            told[index] = Likelihood(event.logprob, lengths[index])
    return [told[index] for index in range(len(lengths))]
