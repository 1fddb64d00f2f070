"""JSON schemas and regular expressions, compiled by llguidance into masks of the tokens that may come next.

Compiling runs in the caller's thread, never in the engine's. What the library cannot enforce (`not`, `uniqueItems`, an
unknown format, look-around) or what no answer can satisfy is refused by it, and so here: nothing is enforced in part.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, Literal, TypeVar
from urllib.parse import unquote

import numpy
import numpy.typing
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from graftwork.datasets.rows import read_text
from graftwork.errors import DataError
from graftwork.prompts.template import Template
from graftwork.serving.spec import GrammarSpec

MaskWords = numpy.typing.NDArray[numpy.int32]
"""[ceil(V / 32)], bit n of word w for token 32 * w + n."""


@dataclass(frozen=True)
class GrammarText:
    """A grammar as people write it: a JSON schema (as JSON) or a regular expression that the whole answer matches."""

    kind: Literal["json_schema", "regex"]
    text: str


class GrammarError(DataError):
    """A grammar that cannot be enforced: not valid, no answer can have it, or a part of it is not known."""


T = TypeVar("T")
STACK_BYTES = 512 * 2**20
"""Address space; only what is touched becomes memory."""
_starting = threading.Lock()


def on_tall_stack(call: Callable[[], T]) -> T:
    """Return or raise the outcome of `call`, run in a thread of its own. Blocks. About 0.1 ms."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # top of the thread: the caller gets whatever it was
            future.set_exception(error)

    thread = threading.Thread(target=run, name="tall-stack", daemon=True)
    with _starting:  # the size is a setting of the process that threads take at their start
        usual = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    return future.result()


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


_KEPT = 64
_TRIED = 4
_DEAREST_S = 0.03
_DEEPEST = 20_000
_MOST_JOINED = 200_000
_SPACE = r"[ \n\r\t]{1,40}"
"""Whitespace between JSON tokens: as the model likes it, but a model that loves newlines comes to an end."""


class Grammars:
    """Compiles for one base; the last 64 grammars are kept by content. Thread-safe."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.compile = lru_cache(maxsize=_KEPT)(self._compile)
        """Grammar of a text. Blocks for about 1 ms, on the first call for the table too. Raises GrammarError."""

    def _compile(self, text: GrammarText) -> "Grammar":
        return on_tall_stack(partial(self._build, text))

    def _build(self, text: GrammarText) -> "Grammar":
        matcher = LLMatcher(self._vocabulary.open(), _definition(text), log_level=0, limits=_limits())
        words = -(-self._vocabulary.size // 32)
        _try_out(text, Matcher(matcher, words), words)
        matcher.reset()
        return Grammar(text, matcher, words)


class Grammar:
    """Shared by the requests of one grammar: copies take 2 us and share the states that the lexer has built."""

    def __init__(self, text: GrammarText, matcher: LLMatcher, words: int) -> None:
        self.text, self._matcher, self._words = text, matcher, words

    def matcher(self) -> "Matcher":
        """A new answer's state."""
        return Matcher(self._matcher.deep_copy(), self._words)


class Matcher:
    """One growing answer in its grammar. A step costs microseconds where the lexer knows the state; nothing raises.

    words: 32-bit words that the library writes; more than the model's where the tokenizer has ids that the model lacks.
    """

    def __init__(self, matcher: LLMatcher, words: int) -> None:
        self._matcher, self._all = matcher, numpy.zeros(words, numpy.int32)

    @property
    def problem(self) -> str | None:
        """In the library's words, a limit that the grammar passed; the answer then ends with an error."""
        return _plain(self._matcher.get_error()) if self._matcher.is_error() else None

    @property
    def finished(self) -> bool:
        """The answer is whole, and no token may follow."""
        return bool(self._matcher.is_stopped())

    def fill(self, words_W: MaskWords) -> None:
        """Sets the bits of the tokens that may come next, stop ids too where the answer is whole. Releases the GIL."""
        self._matcher.unsafe_compute_mask_ptr(self._all.ctypes.data, self._all.nbytes)
        words_W[: len(self._all)] = self._all[: len(words_W)]

    def take(self, token_id: int) -> None:
        """One token on. A token that the mask forbids sets `problem`."""
        self._matcher.consume_token(token_id)


def check(text: GrammarText) -> None:
    """Raises GrammarError where the grammar is not one; needs no tokenizer, so the driver can ask early."""
    definition = _definition(text)
    failed, messages = on_tall_stack(lambda: LLMatcher.validate_grammar_with_warnings(definition, limits=_limits()))
    if failed or messages:
        raise _make_error(text, messages[0])


@lru_cache(maxsize=256)
def read_grammar(spec: GrammarSpec) -> GrammarText:
    """The grammar that an arm names, its schema read from its place. Raises DataError, StorageError."""
    if spec.regex is not None:
        return GrammarText("regex", spec.regex)
    assert spec.json_schema is not None, "GrammarSpec has one of the two"
    inline = spec.json_schema.lstrip().startswith("{")
    return GrammarText("json_schema", spec.json_schema if inline else read_text(spec.json_schema))


def _definition(text: GrammarText) -> str:
    if text.kind == "regex":
        regex: str = LLMatcher.grammar_from_regex(text.text)
        return regex
    try:
        tree = json.loads(text.text)
    except (ValueError, RecursionError) as error:
        raise _make_error(text, f"it is not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise _make_error(text, f"a schema is a JSON object, not {type(tree).__name__}")
    if (levels := _levels(tree)) > _DEEPEST:
        raise _make_error(text, f"up to {levels} levels deep, {_DEEPEST} at most")
    _require_enforced_bounds(text, tree)
    try:
        schema: str = LLMatcher.grammar_from_json_schema(
            text.text, overrides={"whitespace_pattern": _SPACE, "lenient": False, "coerce_one_of": False}
        )
    except ValueError as error:  # nested deeper than its reader goes, 128 levels
        raise _make_error(text, str(error)) from None
    return schema


def _levels(schema: object) -> int:
    """Return the most levels of a walk along the schema's references: its nesting, once for each different $ref.

    The library walks by recursion, 8 KB a level: a chain of 1,000 $refs ended the process on an 8 MiB stack.
    """
    depth, refs, level = 0, set[str](), [schema]
    while level:
        depth += 1
        inner: list[object] = []
        for node in level:
            if isinstance(node, dict):
                refs |= {str(node.get(key)) for key in ("$ref", "$dynamicRef") if key in node}
                inner += node.values()
            elif isinstance(node, list):
                inner += node
        level = inner
    return depth * (len(refs) + 1)


def _require_enforced_bounds(text: GrammarText, root: dict[str, Any]) -> None:
    """Refuse an interval of numbers whose open end the library takes for a closed one (llguidance 1.9.1).

    That is an end at a whole number, of an interval that leads away from zero and not as far as the next whole number:
    of numbers above 2 and up to 2.5 it lets `2` through, of numbers from -0.5 and below 0 `-0`. It holds all other
    bounds (benchmarked against jsonschema: 1,800 pairs of bounds, 4,900 random ones in allOf, anyOf and $ref).
    """
    looked_at, level = 0, list[object]([root])
    while level:
        inner: list[object] = []
        for node in level:
            if isinstance(node, dict):
                inner += node.values()
                for joined in _merge_branches(node, root):
                    looked_at += len(joined)
                    if looked_at > _MOST_JOINED:
                        raise _make_error(text, "too many schemas that hold for one value by $ref and allOf")
                    if (found := _unenforced_part(joined)) is not None:
                        raise _make_error(text, found)
            elif isinstance(node, list):
                inner += node
        level = inner


def _merge_branches(node: dict[str, Any], root: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """The schemas that hold together for the value of `node`: its own with allOf and $ref; with each choice of an
    anyOf or oneOf; and all of them, where there are several such lists."""
    own, choices = _closure([node], root)
    yield own
    for choice in choices[0] if len(choices) == 1 else []:
        yield [*own, *_closure([choice], root)[0]]
    if len(choices) > 1:
        yield [*own, *_closure([choice for some in choices for choice in some], root)[0]]


def _closure(start: list[Any], root: dict[str, Any]) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    found: list[dict[str, Any]] = []
    choices: list[list[Any]] = []
    waiting, seen = list(start), set[int]()
    while waiting and len(found) <= _MOST_JOINED:
        node = waiting.pop()
        if not isinstance(node, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        found.append(node)
        waiting += [_resolve_ref(node.get("$ref"), root), *_list(node, "allOf")]
        choices += [some for key in ("anyOf", "oneOf") if (some := _list(node, key))]
    return found, choices


def _unenforced_part(joined: list[dict[str, Any]]) -> str | None:
    """The bounds that these schemas give a number together, where the library does not hold them."""
    types = [node["type"] for node in joined if isinstance(node.get("type"), str | list)]
    if any("number" not in ([kind] if isinstance(kind, str) else kind) for kind in types):
        return None
    if any(key in node for node in joined for key in ("multipleOf", "enum", "const")):
        return None
    low = max((bound for node in joined for bound in _bounds_of(node, "inimum", 1)), default=None)
    high = max((bound for node in joined for bound in _bounds_of(node, "aximum", -1)), default=None)
    if low is None or high is None:
        return None
    for (end, is_open), (other, _) in ((low, high), (high, low)):  # `high` is mirrored at zero
        if is_open and end == int(end) and 0 <= end <= -other < end + 1:
            key, value = ("exclusiveMinimum", end) if (end, is_open) == low else ("exclusiveMaximum", -end)
            return f"{key}={value:g} so close to the other bound, {abs(other):g} from zero, can't be enforced"
    return None


def _bounds_of(node: dict[str, Any], name: str, sign: int) -> Iterator[tuple[float, bool]]:
    """(bound, whether it is open) of a schema; sign -1 mirrors upper bounds, so that the largest is the tightest."""
    for key, is_open in (("m" + name, False), ("exclusiveM" + name, True)):
        value = node.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield sign * value, is_open


def _list(node: dict[str, Any], key: str) -> list[Any]:
    value = node.get(key)
    return value if isinstance(value, list) else []


def _resolve_ref(ref: object, root: dict[str, Any]) -> object:
    """Return the target of a reference within the schema (RFC 6901); None for any other."""
    if not isinstance(ref, str) or not ref.startswith("#"):
        return None
    node: object = root
    for part in unquote(ref[1:]).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _try_out(text: GrammarText, answer: Matcher, words: int) -> None:
    """The first steps of an answer, here and not in the engine: what has no answer shows at once, and so does what
    would hold everybody up. The library's own limits do not see `a{100000}`, 0.1 s a step."""
    mask = numpy.zeros(words, numpy.int32)
    for step in range(_TRIED):
        began = time.thread_time()
        answer.fill(mask)
        spent = time.thread_time() - began
        if answer.problem is not None:
            raise _make_error(text, answer.problem)
        if step and spent > _DEAREST_S:  # the first step builds tables that are kept
            raise _make_error(text, f"one token of it takes {spent * 1000:.0f} ms, {_DEAREST_S * 1000:.0f} at most")
        if answer.finished:
            return
        answer.take(int(numpy.flatnonzero(numpy.unpackbits(mask.view(numpy.uint8), bitorder="little"))[-1]))


def _limits() -> LLParserLimits:
    """A tenth of the library's fuel a step and a fifth of its lexer states (about 1.5 kB each). A schema of twelve
    fields with formats and an enum of 500 needs less than a quarter of that fuel."""
    return LLParserLimits(step_lexer_fuel=20_000, max_lexer_states=50_000, verbose_errors=False)


def _make_error(text: GrammarText, found: str) -> GrammarError:
    name = "regex" if text.kind == "regex" else "JSON schema"
    return GrammarError(
        name, _plain(found), "an answer must be able to match it, and every part of it must be enforceable"
    )


def _plain(message: str) -> str:
    """The library's message in one line."""
    if message.startswith("NoExtension"):
        return "no text matches it"
    return " ".join(message.replace("<non-verbose/>", "").split())
