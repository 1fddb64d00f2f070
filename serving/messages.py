"""Typed messages between ingress and engine replica: a request to one arm, and what comes back.

All are frozen dataclasses, which Ray Serve pickles. The arm was validated when its spec was loaded, the parameters when
the HTTP body was parsed; neither is validated again here.
"""

from dataclasses import dataclass, replace

from graftwork.prompts.render import Message
from graftwork.serving.engine.grammar import GrammarText
from graftwork.serving.engine.request import SamplingParams
from graftwork.serving.spec import ArmSpec

Question = tuple[Message, ...] | str
"""A conversation, or a text to be continued without a chat template."""


@dataclass(frozen=True, slots=True)
class ArmRequest:
    """One question to one arm, with what its caller chose."""

    arm: ArmSpec
    question: Question
    request_id: str
    sampling: SamplingParams = SamplingParams()
    """Parameters of sampling. The replica replaces its `max_new_tokens` once the length of the prompt is known."""
    max_new_tokens: int | None = None
    """Longest answer; None: the arm's limit, or what the prompt leaves of the sequence."""
    n: int = 1
    """Number of answers; each has a seed of its own, derived from `sampling.seed`."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer, in addition to the base's own."""
    ignore_eos: bool = False
    """The base's own stop tokens do not end the answer."""
    grammar: GrammarText | None = None
    background: bool = False
    """Shadow traffic: computed only while no other request is."""
    max_prompt_tokens: int | None = None
    """The endpoint's limit when the request was admitted; a longer prompt is refused."""
    cache_salt: str = ""
    """Name of the API key; the prefix cache shares nothing between two names."""

    def shadow_copy(self, arm: ArmSpec) -> "ArmRequest":
        """Return the same question to another arm, answered once and in idle time."""
        sampling = replace(self.sampling, logprobs=None)
        return replace(
            self, arm=arm, request_id=f"{self.request_id}-{arm.name}", sampling=sampling, n=1, background=True
        )


@dataclass(frozen=True, slots=True)
class Spelled:
    """A token as bytes, and its log probability."""

    bytes: tuple[int, ...]
    logprob: float

    @property
    def text(self) -> str:
        r"""The token as text; bytes that are no character alone as `\xe2`."""
        return bytes(self.bytes).decode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token of the answer."""

    token: Spelled
    top: tuple[Spelled, ...]
    """The most probable tokens at its place, best first."""
    offset: int
    """Characters of the answer before it."""


@dataclass(frozen=True, slots=True)
class StreamStart:
    """First chunk of a stream: the request is admitted."""

    base_digest: str
    adapter_version: str | None
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """The next piece of one answer. `text` is empty where its tokens have no certain text yet."""

    index: int
    text: str
    completion_tokens: int
    """Tokens of this answer so far."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens that `text` is made of, where the request wants them."""


@dataclass(frozen=True, slots=True)
class ArmAnswer:
    """One whole answer, and everything that decides if two answers may be compared."""

    request_id: str
    arm: str
    text: str
    adapter: str | None
    """Task of the adapter; None is the base."""
    adapter_version: str | None
    base_digest: str
    retrieved_ids: tuple[str, ...]
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose keys and values came from the prefix cache."""
    completion_tokens: int
    ttft_ms: float
    """From the call's arrival at the replica to the first token, adapter load and retrieval included."""
    latency_ms: float
    finish_reason: str
    token_ids: tuple[int, ...] = ()
    index: int = 0
    """Number of this answer among those of the request."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """Of the tokens that the text is made of; None: not asked for."""
    cold: bool = False
    """The adapter was loaded for this request, or while it came: its times do not measure the arm."""
    left_out_ids: tuple[str, ...] = ()
    """Passages that were found and did not fit `retriever.context_tokens`."""
    cited_ids: tuple[str, ...] = ()
    """Passages that the text cites, where the arm's prompt numbers them."""


StreamChunk = StreamStart | AnswerDelta | ArmAnswer
"""One `StreamStart`, then deltas, and for each answer its `ArmAnswer` at its end."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Probability of one given continuation."""

    logprob: float
    """Natural log: the sum over its tokens, each given the prompt and the tokens before it."""
    tokens: int
