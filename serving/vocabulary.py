"""The base's tokens as bytes: what a grammar is matched against, and how one token is shown to a person."""

import threading
from functools import cached_property

from llguidance import LLTokenizer

from graftwork.chat import Template


class Vocabulary:
    """Thread-safe. `size`: rows of the model's embedding; ids that the tokenizer lacks spell nothing.

    The table is built when it is first asked for (0.25 CPU s where there are 49,152 tokens): call `open` in a thread.
    """

    def __init__(self, template: Template, size: int) -> None:
        self._template, self.size = template, max(size, template.vocab_size)
        self._lock = threading.Lock()

    def open(self) -> LLTokenizer:
        """The table, as llguidance takes it; special tokens are sealed (`Template`), so no grammar can spell one."""
        with self._lock:
            return self._table

    def spell(self, token_id: int) -> bytes:
        """Bytes of one token, which may be part of a character; of a special token, its name."""
        if token_id in self._template.special_ids:
            return self._template.decode([token_id], skip_special=False).encode()
        if token_id >= self._template.vocab_size:
            return b""
        found: bytes = self.open().decode_bytes([token_id])
        return found

    @cached_property
    def _table(self) -> LLTokenizer:
        stop_ids = sorted(self._template.stop_ids)
        return LLTokenizer(self._template.sealed_tokenizer(), n_vocab=self.size, eos_token=stop_ids)
