"""Who judges answers side by side, and by what."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from graftwork.config import Spec
from graftwork.storage import ALIAS_PATTERN


class JudgeSpec(Spec):
    """An LLM judge. Without `url` it is the served base, or an adapter of it."""

    criteria: str = Field(
        default="It answers the question rightly and completely, in the form asked for.", min_length=1
    )
    """What makes an answer the better one."""
    adapter: Annotated[str, Field(pattern=ALIAS_PATTERN)] | None = None
    """`task@alias` of an adapter that was trained to judge."""
    url: str | None = Field(default=None, pattern=r"^https?://")
    """Another endpoint with an OpenAI-compatible `/v1/chat/completions`."""
    model: str | None = None
    """Its model."""
    token_env: str | None = None
    """Environment variable with its token."""
    limit: int | None = Field(default=None, ge=1)
    """Judge the first so many questions; null judges all."""

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        if (self.url is None) != (self.model is None):
            raise ValueError("judge.url and judge.model go together")
        if self.url is None and self.token_env is not None:
            raise ValueError("judge.token_env cannot take effect without judge.url")
        if self.url is not None and self.adapter is not None:
            raise ValueError("judge.adapter is of the served base; judge.url asks another endpoint")
        return self
