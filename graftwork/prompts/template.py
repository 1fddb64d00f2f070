"""A base's chat template and tokenizer, loaded so that text from people can never become a control token.

How that is kept: every special token of `tokenizer.json` gets a random name in this process ("sealed"). What the
template itself writes is renamed along; what stands in a message is not, so to the tokenizer it is plain text.
"""

import contextlib
import copy
import functools
import hashlib
import itertools
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from graftwork.errors import BaseModelError, DataError
from graftwork.prompts.capabilities import (
    TOOL,
    FunctionsPlace,
    Turn,
    find_functions,
    place_functions,
    probe,
    probe_conversation,
)

if TYPE_CHECKING:
    import jinja2

DEFAULT_DATE = date(2024, 7, 26)
"""Today's date in a template unless a spec or a manifest names another: the fallback of Llama 3's own."""

TEMPLATE_FOR_TOOLS = "additional_chat_templates/tool_use.jinja"
"""Template of a base for conversations with functions, next to its chat_template.jinja."""

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What a template gets from here: no variable of a spec or a row.
_OWN_VARIABLES = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "strftime_now", "generation")
)
_NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})
_QUESTION = {"role": "user", "content": "first question"}


class Template:
    """Chat template and tokenizer of one base. Thread-safe; loads in about half a second."""

    def __init__(
        self,
        source: str,
        tokenizer_json: str,
        named: Mapping[str, str],
        eos_ids: Iterable[int],
        day: date = DEFAULT_DATE,
        base: str = "the base",
    ) -> None:
        from tokenizers import Tokenizer

        self.base = base
        """Name of the base in errors."""

        self.date = day if "strftime_now" in source else None
        """The day that the template writes as today's; None: it writes none."""
        self.digest = hashlib.sha256(source.encode()).hexdigest()
        """sha256 of the template text."""
        self.tokenizer_digest = hashlib.sha256(tokenizer_json.encode()).hexdigest()
        """sha256 of tokenizer.json."""
        self._named = dict(named)
        self._jinja = compile_template(source)
        self.variables = _variables(source)
        """Variables that the template reads besides the conversation and its tools (`enable_thinking`)."""
        model = json.loads(tokenizer_json)
        specials = [t["content"] for t in model["added_tokens"] if t["special"] and len(t["content"]) > 1]
        salt = secrets.token_hex(8)
        self._mark = secrets.token_hex(8)  # no `<`: templates with `|safe` escape texts of people (Ministral 3)
        self._sealed = {name: f"<{salt}{number:04d}>" for number, name in enumerate(specials)}
        self._names = {sealed: name for name, sealed in self._sealed.items()}
        self._special = _any_of(specials)
        self._special_start = re.compile(f"(?={self._special.pattern})(.)", re.DOTALL)
        self._sealed_special = _any_of(self._names)
        self._tokenizer = Tokenizer.from_str(json.dumps(_rename_specials(model, self._sealed)))
        self.specials: Mapping[str, int] = {t["content"]: t["id"] for t in model["added_tokens"] if t["special"]}
        """Control tokens by name."""
        self.special_ids = frozenset(self.specials.values())
        """Control tokens: no text of people is ever one."""
        self.opening_ids = _opening_ids(model.get("post_processor"), self.specials)
        """Ids that the tokenizer puts before every plain text: the beginning-of-text token, or none."""
        self.eos_names = [self._named["eos_token"]] if "eos_token" in self._named else []
        """The base's end token by name, where it has one."""
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        """Tokenizer ids lie in [0, vocab_size)."""
        self.longest_token_bytes = _longest_token_bytes(model)
        """UTF-8 bytes of text that one token holds at most."""
        think = self._sealed.get("<think>", "<think>")
        self.functions_in: FunctionsPlace = find_functions(self)
        """Where the template reads functions."""
        self.can = probe(self, source, frozenset(eos_ids), think)
        """What the template writes: functions, calls, reasoning, the end of an answer."""
        self.stop_ids = frozenset({self.can.end_id, self.can.call_end_id, *eos_ids})
        """Tokens that end an answer."""
        self.pad_id: int = self.specials.get(self._named.get("pad_token", ""), self.can.end_id)
        """Filler of a batch; never looked at."""
        self._prefix_holds: dict[tuple[bool, str], bool] = {}

    @classmethod
    def load(
        cls, folder: Path, day: date = DEFAULT_DATE, *, chat_template: str | None = None, base: str | None = None
    ) -> "Template":
        """From a folder with tokenizer.json and a chat template, on the given day. Raises BaseModelError.

        chat_template: text of another template. base: name of the base in errors.
        """
        base = base or str(folder)
        try:
            tokenizer_json = (folder / "tokenizer.json").read_text(encoding="utf-8")
            named, eos_names = _named_tokens(folder)
            source = template_source(folder) if chat_template is None else chat_template
            added = {t["content"]: t["id"] for t in json.loads(tokenizer_json)["added_tokens"]}
            eos_ids = {added[name] for name in eos_names if name in added}
            ended = _json(folder / "generation_config.json").get("eos_token_id")
            eos_ids.update(ended if isinstance(ended, list) else [ended] if isinstance(ended, int) else [])
            return cls(source, tokenizer_json, named, eos_ids, day, base)
        except FileNotFoundError as error:
            raise BaseModelError(
                f"tokenizer of {base}",
                f"no {Path(error.filename).name}",
                "a base has tokenizer.json and a chat template next to its weights",
                "export the tokenizer in the fast (tokenizers) format, for example with save_pretrained",
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BaseModelError(f"tokenizer of {base}", f"it cannot be read ({error})") from error
        except DataError as error:
            raise BaseModelError(
                f"chat template of {base}", error.problem, "question and answer must be allowed"
            ) from error

    def on(self, day: date | None) -> Self:
        """Return this template with another day; itself where it writes no date, or where `day` is None or its own."""
        if self.date is None or day is None or day == self.date:
            return self
        dated = copy.copy(self)
        dated.date = day
        return dated

    @property
    def has_prefix_property(self) -> bool:
        """Each prompt is a text prefix of the conversation that it grows into. If not, train one turn a row."""
        return self.prefix_holds()

    def prefix_holds(self, *, tools: bool = False, variables: Mapping[str, Any] = _NO_VARIABLES) -> bool:
        """True if `has_prefix_property` holds with these variables, in conversations with calls where `tools`."""
        key = (tools, json.dumps(dict(variables), sort_keys=True))
        if key not in self._prefix_holds:
            self._prefix_holds[key] = self._check_prefix(tools, variables)
        return self._prefix_holds[key]

    def sealed_text(
        self,
        turns: Sequence[Turn],
        *,
        generate: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] = _NO_VARIABLES,
        functions_in: FunctionsPlace | None = None,
    ) -> str:
        """The template's text with special tokens sealed. Raises DataError where the template refuses the turns."""
        import jinja2

        messages, functions = place_functions(
            self._shielded(turns), self._shielded(tools), functions_in or self.functions_in
        )
        try:
            text = self._jinja.render(
                messages=messages,
                documents=None,
                add_generation_prompt=generate,
                strftime_now=(self.date or DEFAULT_DATE).strftime,
                **{**self._named, **functions, **self._shielded(variables)},
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:  # the last two: of expressions on other types
            hint = ""
            if turns and turns[0]["role"] == "system":
                with contextlib.suppress(DataError):
                    self.sealed_text(turns[1:], generate=generate, tools=tools, variables=variables)
                    hint = "write the text of the system turn into the first user turn"
            raise DataError(
                f"conversation of turns {', '.join(turn['role'] for turn in turns)}",
                f"the base's chat template refuses it ({error})",
                "the template of the base decides which turns may follow each other",
                hint,
            ) from error
        return self._special.sub(lambda m: self._sealed[m.group()], text).replace(self._mark, "")

    def _shielded(self, value: Any) -> Any:
        """Strings of people with a mark behind the first character of each special token in them.

        The mark breaks the token, and overlapping ones too, until the template's own tokens are sealed.
        """
        if isinstance(value, str):
            return self._special_start.sub(lambda match: match.group(1) + self._mark, value)
        if isinstance(value, Mapping):
            return {self._shielded(key): self._shielded(item) for key, item in value.items()}
        return [self._shielded(item) for item in value] if isinstance(value, list | tuple) else value

    def control_ids(self, sealed: str) -> list[int]:
        """Ids of the special tokens in sealed text, in order."""
        return [self.specials[self._names[name]] for name in self._sealed_special.findall(sealed)]

    def written(self) -> dict[str, int]:
        """Ids by name of the control tokens around a question and its answer."""
        ids = {*self.control_ids(self.sealed_text([_QUESTION], generate=True)), self.can.end_id}
        return {name: one for name, one in self.specials.items() if one in ids}

    def closing(self, *, calls: bool) -> str:
        """Sealed text behind the last turn of a row, where the template writes no end token there."""
        end_id = self.can.call_end_id if calls else self.can.end_id
        return "" if self.can.closes else self.seal_token(next(n for n, i in self.specials.items() if i == end_id))

    def last_control(self, sealed: str) -> str:
        """Sealed text from its last special token on; empty where there is none."""
        found = [match.start() for match in self._sealed_special.finditer(sealed)]
        return sealed[found[-1] :] if found else ""

    def token_boundary(self, sealed: str, at: int) -> int:
        """`at`, or the start of the special token in sealed text that `at` would cut."""
        cut = (match.start() for match in self._sealed_special.finditer(sealed) if match.start() < at < match.end())
        return next(cut, at)

    def seal_token(self, name: str) -> str:
        """A token that the template itself would write, in sealed text."""
        return self._sealed.get(name, name)

    def token_spans(self, sealed: str, *, continues: bool) -> list[tuple[int, int]]:
        """Characters [start, end) of each token of `sealed_ids`, or of `continuation_ids` where `continues`."""
        first = next(iter(self._names)) if continues else ""
        encoding = self._tokenizer.encode_batch([first + sealed], add_special_tokens=False)[0]
        spans = encoding.offsets[1:] if continues else encoding.offsets
        return [(start - len(first), end - len(first)) for start, end in spans]

    def sealed_ids(self, sealed: str) -> list[int]:
        """Ids of sealed text: special tokens are the template's own, none comes from a message."""
        # `encode` holds the GIL to its end (2.9 s for 3.9 MB, tokenizers 0.23); the batch calls release it
        ids: list[int] = self._tokenizer.encode_batch_fast([sealed], add_special_tokens=False)[0].ids
        return ids

    def continuation_ids(self, sealed: str) -> list[int]:
        """Ids of text that goes on after other text: no beginning-of-text space is put before it."""
        first = next(iter(self._names))
        return self.sealed_ids(first + sealed)[1:]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no special token can come out."""
        return self.sealed_ids(text)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids; an id outside the tokenizer's vocabulary gives nothing."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text if skip_special else self._sealed_special.sub(lambda match: self._names[match.group()], text)

    def sealed_tokenizer(self) -> str:
        """tokenizer.json as it is used here, special tokens sealed: for libraries that read the vocabulary."""
        text: str = self._tokenizer.to_str()
        return text

    def _check_prefix(self, tools: bool, variables: Mapping[str, Any]) -> bool:
        render = partial(self.sealed_text, tools=(TOOL,) if tools else (), variables=variables)
        probes = probe_conversation(self.can.calls if tools else None)
        for opening in ((), ({"role": "system", "content": "be brief"},)):
            turns = (*opening, *probes)
            try:
                whole = render(turns, generate=False)
                for end in range(len(opening) + 1, len(turns) + 1):
                    is_prompt = turns[end - 1]["role"] != "assistant"
                    if not whole.startswith(render(turns[:end], generate=is_prompt)):
                        return False
            except DataError:
                if not opening:
                    return False
        return True


def compile_template(source: str) -> "jinja2.Template":
    """The sandboxed jinja of transformers' `apply_chat_template` (5.23: utils/chat_template_utils.py)."""
    import jinja2

    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise BaseModelError("chat template of the base", f"it is not valid jinja ({error})") from error


@functools.cache
def _environment() -> "jinja2.Environment":
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}` marks answers for transformers' own masks; here its body is just rendered."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def _variables(source: str) -> frozenset[str]:
    """Names that a template reads and that neither it nor this module sets.

    A name that the template sets counts if its default is set so (`reasoning_effort` of gpt-oss).
    """
    from jinja2 import meta, nodes

    environment = _environment()
    tree = environment.parse(source)
    read = meta.find_undeclared_variables(tree)
    assigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    asking = {"defined", "undefined", "default", "d"}
    tests = (test for test in tree.find_all((nodes.Test, nodes.Filter)) if test.name in asking)
    asked = {test.node.name for test in tests if isinstance(test.node, nodes.Name)}
    known = environment.globals.keys() | _OWN_VARIABLES | set(_NAMED_TOKENS)
    known |= {macro.name for macro in tree.find_all(nodes.Macro)}
    return frozenset(read - (assigned - asked) - known)


def _opening_ids(processor: Any, specials: Mapping[str, int]) -> tuple[int, ...]:
    """From the `post_processor` of tokenizer.json: special tokens before the text of a single sequence."""
    if not isinstance(processor, dict):
        return ()
    if processor.get("type") == "Sequence":
        found = (_opening_ids(part, specials) for part in processor["processors"])
        return next((ids for ids in found if ids), ())
    if processor.get("type") != "TemplateProcessing":
        return ()
    before = itertools.takewhile(lambda part: "SpecialToken" in part, processor["single"])
    return tuple(specials[part["SpecialToken"]["id"]] for part in before)


def _longest_token_bytes(model: Mapping[str, Any]) -> int:
    """From tokenizer.json. The pieces of a byte-level vocabulary have one character a byte."""
    vocab = model["model"]["vocab"]
    pieces = [piece if isinstance(piece, str) else piece[0] for piece in vocab]
    byte_level = '"ByteLevel"' in json.dumps(model.get("decoder"))
    sizes = (len(piece) if byte_level else len(piece.encode()) for piece in pieces)
    return max(itertools.chain(sizes, (len(token["content"].encode()) for token in model["added_tokens"])))


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(f"(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _rename_specials(model: dict[str, Any], sealed: Mapping[str, str]) -> dict[str, Any]:
    """`tokenizer.json` with special tokens renamed, everything else (ids, flags, order) untouched."""
    added = [{**t, "content": sealed.get(t["content"], t["content"])} for t in model["added_tokens"]]
    inner = dict(model["model"])
    vocab = inner["vocab"]
    if isinstance(vocab, dict):
        inner["vocab"] = {sealed.get(piece, piece): number for piece, number in vocab.items()}
    else:  # Unigram: [piece, score]
        inner["vocab"] = [[sealed.get(piece, piece), score] for piece, score in vocab]
    if isinstance(inner.get("unk_token"), str):
        inner["unk_token"] = sealed.get(inner["unk_token"], inner["unk_token"])
    return {**model, "added_tokens": added, "model": inner, "post_processor": None, "truncation": None, "padding": None}


def template_source(folder: Path) -> str:
    """Text of the chat template in a folder: chat_template.jinja, or the key of a JSON file.

    Where the folder has one for functions (`tool_use`), functions are rendered by that one, as in transformers.
    """
    path, for_tools = folder / "chat_template.jinja", folder / TEMPLATE_FOR_TOOLS
    files = ("tokenizer_config.json", "chat_template.json")  # the latter of bases with a processor (Gemma-3)
    found: Any = next((text for file in files if (text := _json(folder / file).get("chat_template"))), None)
    if path.is_file():
        found = {"default": path.read_text(encoding="utf-8")}
        if for_tools.is_file():
            found["tool_use"] = for_tools.read_text(encoding="utf-8")
    elif isinstance(found, list):
        found = {item["name"]: item["template"] for item in found}
    if isinstance(found, dict):
        named, found = found, found.get("default")
        if isinstance(named.get("tool_use"), str) and isinstance(found, str):
            found = "{% if tools %}" + named["tool_use"] + "{% else %}" + found + "{% endif %}"
    if not isinstance(found, str):
        raise BaseModelError(
            f"chat template of {folder}",
            "there is none",
            "the base's own template turns a conversation into text",
            "take the instruct version of the base, or set base.chat_template to a chat_template.jinja of your own",
        )
    return found


def hermes_template(folder: Path) -> str:
    """Text of a template that writes functions, calls and results as text into the turns of the folder's own."""
    import jinja2

    own = template_source(folder)
    system = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "first question"}]
    names = {**_named_tokens(folder)[0], "strftime_now": DEFAULT_DATE.strftime, "tools": None, "documents": None}
    compiled = compile_template(own)
    try:
        takes_system = "be brief" in compiled.render(messages=system, add_generation_prompt=True, **names)
    except (jinja2.TemplateError, TypeError, ValueError):
        takes_system = False
    text = (Path(__file__).parent / "hermes.jinja").read_text(encoding="utf-8").rstrip()
    return f"{{%- set takes_system = {str(takes_system).lower()} -%}}\n{text}{own}"


def _named_tokens(folder: Path) -> tuple[dict[str, str], list[str]]:
    """(what the template knows as bos_token, eos_token, ..., the names of the end tokens)."""
    settings = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    named = {}
    for key in _NAMED_TOKENS:
        value = settings.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            named[key] = value
    return named, [named["eos_token"]] if "eos_token" in named else []


def _json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return value if isinstance(value, dict) else {}
