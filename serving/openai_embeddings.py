"""POST /v1/embeddings in OpenAI's shape. https://platform.openai.com/docs/api-reference/embeddings"""

import base64
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from graftwork.embedding import Embedded
from graftwork.serving.api_error import bad_request
from graftwork.serving.openai_responses import Json

Text = Annotated[str, Field(min_length=1)]
MAX_TEXTS = 2048
"""OpenAI's own limit of one request."""


class EmbeddingRequest(BaseModel):
    """Body of POST /v1/embeddings. Token ids as `input` are refused: send text."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Only the embedder's own size: its vectors can't be cut without losing what they mean."""
    user: str | None = None

    def texts(self) -> list[str]:
        """The texts, one or many."""
        return [self.input] if isinstance(self.input, str) else list(self.input)


def embedding_response(body: EmbeddingRequest, found: Embedded) -> Json:
    """Vectors as JSON numbers, or as the base64 of little-endian 32-bit floats. Raises ApiError for `dimensions`."""
    size = found.vectors_BH.shape[1]
    if body.dimensions not in (None, size):
        message = f"dimensions={body.dimensions}: this embedder's vectors have {size} numbers, and can't be cut."
        raise bad_request(message, param="dimensions", code="unsupported_parameter")
    little = found.vectors_BH.astype("<f4")
    vectors = [base64.b64encode(row.tobytes()).decode() if body.encoding_format == "base64" else row.tolist()
               for row in little]  # fmt: skip
    data = [{"object": "embedding", "index": number, "embedding": vector} for number, vector in enumerate(vectors)]
    usage = {"prompt_tokens": sum(found.tokens), "total_tokens": sum(found.tokens)}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}
