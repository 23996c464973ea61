"""Text <-> tokens: the one module that decides what a conversation looks like to the model and which tokens are learned.

Training, chat, prediction and the coloured preview all go through `Template`, so they cannot disagree. Laws (tests/test_chat.py):

- a prompt is a prefix of its training sequence;
- the stop mark of every learned turn is learned, and nothing but learned turns and their stop marks is;
- `parse` of a reply gives the turn's text back;
- user text cannot write a special token;
- for the model's own format, the ids are those of its published chat template (`Template.differs` counts the rows where not).

What a format writes is a function from turns to `Part`s. Two kinds exist: a `Form` (format strings), and a Jinja template
(rendering.py) cut into parts by rendering it with sentinels in place of the texts, once for each shape of a conversation.
"""

import contextlib
import datetime
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from . import rendering, tools
from .decoding import Decoding, beginning_of, steps
from .errors import UserError
from .records import Conversation, Document, Example, Learn, Piece, Turn, Vocabulary
from .rendering import jinja_renderer
from .run import Form

Message = dict[str, Any]

FORMS: dict[str, Form] = {
    "plain": Form(),
    "chatml": Form(
        system="<|im_start|>system\n{content}<|im_end|>\n",
        user="<|im_start|>user\n{content}<|im_end|>\n",
        assistant="<|im_start|>assistant\n{content}{stop}\n",
        stop="<|im_end|>",
    ),
    "alpaca": Form(
        system="{content}\n\n",
        user="### Instruction:\n{content}\n\n",
        assistant="### Response:\n{content}{stop}\n\n",
    ),
}
DEFAULT_SYSTEM = {
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
}
KEPT = 24  # characters up to which a text's ids are remembered
RECENT = 2000  # characters up to which the ids of the last few longer texts are: a system prompt comes with every row
JOIN = {"alpaca": "\n\n### Input:\n"}  # what stands between instruction and input; elsewhere a newline


# --- tokens -------------------------------------------------------------------------------------------------------------


class Tokens:
    """The tokenizer of a folder, without transformers (milliseconds instead of seconds).

    `encode` never yields a special token, whatever the text says.
    """

    def __init__(self, tokenizer_json: str, config: dict[str, Any], end_ids: Iterable[int] = (), built: bool = False):
        from tokenizers import Tokenizer

        self.json, self.config = tokenizer_json, config
        self.built = built  # by us, from published files of another kind
        self._raw = Tokenizer.from_str(tokenizer_json)
        self._raw.encode_special_tokens = True
        self._raw.no_truncation()
        self._raw.no_padding()
        tree = json.loads(tokenizer_json)
        self.special = {t["content"]: t["id"] for t in tree.get("added_tokens", []) if t["special"]}
        self.names = {id: name for name, id in self.special.items()}
        # SentencePiece's leading blank: some tokenizers write it before the first text only, some also behind a special token; a few
        # published formats (`apart`) encode an answer by itself, so that it gets one wherever it stands.
        self.prepends = any(part.get("type") == "Prepend" for part in _parts(tree, "normalizer", "normalizers"))
        self._inner = self._raw
        if _prepends_once(tree) or (self.prepends and not config.get("apart")):
            self._inner = Tokenizer.from_str(json.dumps(_never_prepend(tree)))
            self._inner.encode_special_tokens = True
        self._short: dict[tuple[str, bool], list[int]] = {}  # headers and other texts that come again
        self._recent = lru_cache(maxsize=64)(self._encode)
        self.chat_template: str | None = config.get("chat_template")
        self.eos_id = self._id("eos_token")
        self.bos_id = self._id("bos_token")
        pad = self._id("pad_token")
        self.pad_id = pad if pad is not None else self.eos_id if self.eos_id is not None else 0
        named = {self._raw.token_to_id(name) for name in config.get("end_tokens", ())}
        self.end_ids: list[int] = sorted(id for id in {*end_ids, *named, self.eos_id} if id is not None)

    @classmethod
    def open(cls, folder: Path) -> "Tokens":
        """From `tokenizer.json` and its neighbours. Raises UserError where they are missing or broken."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{folder} holds no tokenizer.json; copy the model's tokenizer files beside its weights")
        config, ends = about_tokenizer(folder), _ends(folder)
        with readable(path):
            return cls(path.read_text(encoding="utf-8"), config, ends)

    @classmethod
    def of_vocabulary(cls, folder: Path, vocabulary: Vocabulary) -> "Tokens":
        """From a vocabulary that was built from a folder's published files."""
        ends = _ends(folder)
        with readable(published_vocabulary(folder)):
            return cls(vocabulary.json, dict(vocabulary.config), ends, built=True)

    def _id(self, key: str) -> int | None:
        value = self.config.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        return self._raw.token_to_id(name) if name else None

    def name(self, key: str) -> str:
        """The text of `bos_token`, `eos_token` ...; empty where there is none."""
        value = self.config.get(key)
        return (value.get("content") if isinstance(value, dict) else value) or ""

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Ids of plain text. `first`: no text stands right before it in the sequence."""
        if len(text) <= KEPT:
            found = self._short.get((text, first))
            if found is None:
                found = self._encode(text, first)
                if len(self._short) < 10_000:
                    self._short[text, first] = found
            return list(found)
        return list(self._recent(text, first)) if len(text) <= RECENT else self._encode(text, first)

    def _encode(self, text: str, first: bool) -> list[int]:
        # The batch call leaves out offsets and is a quarter faster even for one text.
        try:
            return (self._raw if first else self._inner).encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:
            half = next(letter for letter in text if "\ud800" <= letter <= "\udfff")
            raise UserError(f"a text holds U+{ord(half):04X}, half of a surrogate pair, which is not a character") from None

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        return self._raw.decode(list(ids), skip_special_tokens=not keep_special)

    def decoding(self) -> Decoding:
        """`decode` of tokens that come one by one."""
        return Decoding(self._steps, self._shown, self.decode)

    @cached_property
    def _steps(self) -> Any:
        decoder: Any = self._raw.decoder
        return steps(None if decoder is None else json.loads(decoder.__getstate__()))

    def _shown(self, id: int) -> str | None:
        name = self._raw.id_to_token(id)
        return None if name in self.special else name

    @cached_property
    def prefix(self) -> list[int]:
        """Special tokens that the tokenizer puts in front of every text (`<s>`, `[gMASK]sop`)."""
        with_special = self._raw.encode("a").ids
        plain = self._raw.encode("a", add_special_tokens=False).ids
        for start in range(len(with_special)):
            if with_special[start : start + len(plain)] == plain:
                # ChatGLM-6B's stand behind a question; what is to be continued they precede all the same.
                return with_special[:start] or with_special[len(plain) :]
        return []

    @cached_property
    def vocab_size(self) -> int:
        """Rows of embeddings that its tokens need: one more than the largest id."""
        return 1 + max(self._raw.get_vocab(with_added_tokens=True).values(), default=-1)


def published_vocabulary(folder: Path) -> Path:
    """The file that a vocabulary is built from; the folder where there is none."""
    return next((path for name in ("tokenizer.model", "ice_text.model") if (path := folder / name).is_file()), folder)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever reading a tokenizer's file raises, as a UserError with its name. A damaged file can hold anything; the tokenizers library
    raises bare Exception, and a panic of its Rust code is not even that."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise UserError(f"{path}: cannot be read as a tokenizer ({reason}); copy the file again") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a model folder's small file; empty where there is no such file. Raises UserError for anything else."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(found, ensure_ascii=False).encode()  # halves of surrogate pairs, which no file can be written with
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({str(error)[:150]}); copy the file again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object; copy the file again")
    return found


NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def about_tokenizer(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json, with chat_template.jinja; empty without them.

    Raises UserError, with the file, for values that are none of a tokenizer.
    """
    about: dict[str, Any] = {}
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        found = read_object(path)
        for key, value in found.items():
            if not _fits(key, value):
                raise UserError(f"{path}: {key} is {json.dumps(value, ensure_ascii=False)[:80]}; copy the file again")
        about |= found
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            about["chat_template"] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8; copy the file again") from None
    template = about.get("chat_template")
    if isinstance(template, list):  # several, by name
        about["chat_template"] = next((made["template"] for made in template if made["name"] == "default"), None)
    return about


def _fits(key: str, value: Any) -> bool:
    """Whether a value of a tokenizer's settings is of the kind that it is read as."""

    def is_token(value: Any) -> bool:
        return isinstance(value.get("content") if isinstance(value, dict) else value, str)

    if value is None:
        return True
    if key in NAMED:
        return is_token(value)
    if key == "chat_template":
        several = isinstance(value, list) and all(isinstance(made, dict) for made in value)
        return isinstance(value, str) or (
            several and all(isinstance(made.get(name), str) for made in value for name in ("name", "template"))
        )
    if key == "added_tokens_decoder":
        return isinstance(value, dict) and all(re.fullmatch(r"\d{1,9}", id) and is_token(token) for id, token in value.items())
    if key == "end_tokens":
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    if key in ("add_bos_token", "add_eos_token", "prefix_lm", "apart", "clean_up_tokenization_spaces"):
        return isinstance(value, bool)
    if key == "num_image_tokens":
        return type(value) is int
    return True


def _ends(folder: Path) -> set[int]:
    """The end tokens that a model folder's configs name."""
    ends: set[int] = set()
    for path in (folder / "config.json", folder / "generation_config.json"):
        found = read_object(path).get("eos_token_id")
        listed = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(id) is int for id in listed):
            raise UserError(f"{path}: eos_token_id is {json.dumps(found)[:80]}; wanted a token's number, or a list of them")
        ends |= set(listed)
    return ends


def _prepends_once(tree: dict[str, Any]) -> bool:
    return any(
        part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first"
        for part in _parts(tree, "pre_tokenizer", "pretokenizers")
    )


def _never_prepend(tree: dict[str, Any]) -> dict[str, Any]:
    tree = json.loads(json.dumps(tree))
    for part in _parts(tree, "pre_tokenizer", "pretokenizers"):
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
    normalizers = _parts(tree, "normalizer", "normalizers")
    kept = [part for part in normalizers if part.get("type") != "Prepend"]
    if len(kept) < len(normalizers):
        tree["normalizer"] = {"type": "Sequence", "normalizers": kept}
    return tree


def _parts(tree: dict[str, Any], key: str, inner: str) -> list[dict[str, Any]]:
    top = tree.get(key) or {}
    return top.get(inner, [top])


BREAK = "\ue002\ue003\ue002"  # private use: stands inside a special token's name that must stay text; taken out before encoding


# --- scaffolds ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A stretch of a rendered conversation. kind: scaffold | text | answer | stop; `turn` is the turn's position."""

    kind: str
    text: str
    turn: int = -1


def form_parts(form: Form, stop: str, prefix: str) -> Callable[[Sequence[Turn], bool], list[Part]]:
    """Parts from format strings. `stop` is the end mark's text, `prefix` stands in front of the whole (bos)."""

    def parts(turns: Sequence[Turn], open_answer: bool) -> list[Part]:
        made = [Part("scaffold", prefix)]
        for i, turn in enumerate(turns):
            written = {"system": form.system, "user": form.user, "assistant": form.assistant}.get(turn.role)
            if written is None:
                raise UserError(
                    f"this chat format has no way to write a '{turn.role}' turn; use a model whose own template has one"
                )
            before, after = written.split("{content}")
            made.append(Part("scaffold", before, i))
            if turn.role != "assistant":
                made += [Part("text", turn.text, i), Part("scaffold", after, i)]
                continue
            gap, _, tail = after.partition("{stop}") if "{stop}" in after else (after, "", "")
            made += [Part("answer", turn.text, i), Part("stop", gap + stop, i), Part("scaffold", tail, i)]
        if open_answer:
            made.append(Part("scaffold", form.assistant.split("{content}")[0]))
        return made

    return parts


def form_jinja(form: Form, stop: str, prefix: str, default_system: str | None) -> str:
    """The same format as a Jinja chat template, so that other programs render what was trained."""

    def written(text: str) -> str:
        before, after = text.replace("{stop}", stop).split("{content}")
        return f"{{{{ {json.dumps(before)} + message['content'] + {json.dumps(after)} }}}}"

    assistant = form.assistant if "{stop}" in form.assistant else form.assistant + "{stop}"
    header = form.assistant.split("{content}")[0]
    default = ""
    if default_system is not None:
        before, after = form.system.split("{content}")
        text = json.dumps(before + default_system + after)
        default = "{% if messages[0]['role'] != 'system' %}{{ " + text + " }}{% endif %}"
    return (
        f"{{{{ {json.dumps(prefix)} }}}}{default}"
        "{% for message in messages %}"
        f"{{% if message['role'] == 'system' %}}{written(form.system)}"
        f"{{% elif message['role'] == 'user' %}}{written(form.user)}"
        f"{{% elif message['role'] == 'assistant' %}}{written(assistant)}"
        "{% else %}{{ raise_exception('no such role: ' + message['role']) }}{% endif %}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {json.dumps(header)} }}}}{{% endif %}}"
    )


def copies_texts(source: str) -> bool:
    """Whether a Jinja template does nothing with a message's content but write it out as it is, or ask whether it is empty. Then what one
    rendering shows of the template holds for all texts, roles and empty texts being the same.

    Decided on the syntax tree, for messages of a role and a content; False wherever one of them goes on to something that is not known here
    (a filter, a method, a macro, a namespace).
    """
    from jinja2 import nodes

    tree = rendering.Environment().parse(source)
    parents = {child: node for node in _all_nodes(tree) for child in node.iter_child_nodes()}
    lists, texts = {"messages"}, set[str]()  # names of messages, one or several, and of texts

    def is_text_used_well(node: Any) -> bool:
        up = parents[node]
        if isinstance(up, nodes.Not) or (isinstance(up, nodes.If | nodes.CondExpr) and up.test is node):
            return True
        if isinstance(up, nodes.Add | nodes.Concat | nodes.And | nodes.Or | nodes.CondExpr):
            return is_text_used_well(up)
        if isinstance(up, nodes.Test):
            return up.name in ("defined", "undefined", "none", "string", "mapping")
        if isinstance(up, nodes.Assign) and isinstance(up.target, nodes.Name):
            texts.add(up.target.name)
            return True
        around = up
        while around in parents:  # what is written inside a block may be changed as a whole
            around = parents[around]
            if not isinstance(around, nodes.Template | nodes.For | nodes.If | nodes.Scope):
                return False
        return isinstance(up, nodes.Output)

    def is_message_used_well(node: Any) -> bool:
        up = parents[node]
        if isinstance(up, nodes.For) and up.iter is node and isinstance(up.target, nodes.Name):
            lists.add(up.target.name)
            return True
        if isinstance(up, nodes.Assign) and isinstance(up.target, nodes.Name):
            lists.add(up.target.name)
            return True
        if isinstance(up, nodes.Filter):
            return up.name in ("length", "count")
        if isinstance(up, nodes.Test):
            return up.name in ("defined", "undefined", "none", "mapping")
        if isinstance(up, nodes.If | nodes.CondExpr) and up.test is node:
            return True
        if isinstance(up, nodes.CondExpr):
            return is_message_used_well(up)
        if isinstance(up, nodes.Getattr):
            key = up.attr
        elif isinstance(up, nodes.Getitem) and up.node is node and isinstance(up.arg, nodes.Const):
            key = up.arg.value
        else:  # some messages of a list, or one by a computed number; a computed name may be "content"
            by_number = (
                isinstance(up, nodes.Getitem) and up.node is node and isinstance(up.arg, nodes.Slice | nodes.Neg | nodes.Sub)
            )
            return by_number and is_message_used_well(up)
        if key == "content":
            return is_text_used_well(up)
        if isinstance(key, int):
            return is_message_used_well(up)
        return not any(
            hasattr(kind, str(key)) for kind in (dict, list)
        )  # no method; what else it may name is not there, but for the role

    known, rounds = 0, 0
    while known != len(lists) + len(texts):  # until no name is new: a variable may be used above the place where it is set
        known, rounds = len(lists) + len(texts), rounds + 1
        if rounds > 20:
            return False
        for node in _all_nodes(tree):
            name = node.attr if isinstance(node, nodes.Getattr) else node.value if isinstance(node, nodes.Const) else ""
            if name in ("previtem", "nextitem"):  # of `loop`: messages by another way
                return False
            if isinstance(node, nodes.Name) and node.ctx == "load":
                if node.name in lists and not is_message_used_well(node):
                    return False
                if node.name in texts and not is_text_used_well(node):
                    return False
    return not lists & texts


def _all_nodes(tree: Any) -> Iterator[Any]:
    yield tree
    for child in tree.iter_child_nodes():
        yield from _all_nodes(child)


def jinja_parts(
    render: Callable[..., str], special: Iterable[str], eos: str, context: bool = False
) -> Callable[[Sequence[Turn], bool], list[Part]]:
    """Cuts a Jinja template into parts: it is rendered with sentinels for texts, and what stands between them is scaffold.

    context: only the last answer is cut out; earlier ones are text of the question (ChatGLM2's rounds have no end marks).

    The cut depends on the turns' shape only (roles, empty texts), so it is kept per shape. Raises UserError where a template
    cannot be cut exactly: it drops or reorders turns, its prompt is not the start of its whole rendering, or an answer has no end mark.
    """
    special = sorted((name for name in special if name), key=len, reverse=True)
    marks = re.compile("|".join(map(re.escape, special)) or r"(?!)")
    shapes: dict[tuple, list[Part]] = {}

    def sentinel(i: int) -> str:
        return f"\ue000{i}\ue001"

    def quote(value: Any) -> Any:
        """Other keys of a message (tools, metadata) with special tokens in them broken up, so that they stay text."""
        if isinstance(value, dict):
            return {quote(key): quote(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [quote(item) for item in value]
        if isinstance(value, str):
            for name in special:
                value = value.replace(name, name[0] + BREAK + name[1:])
        return value

    def end_of_calls(full: str, prompt: str, alone: str) -> tuple[int, int]:
        """Where the mark that ends a turn with tool calls starts and ends. Calls may hold special tokens of their own: the mark is the
        last one of the turn's rendering without what follows it, or the next one, where nothing ends it there."""
        own = [match.end() for match in marks.finditer(alone.removeprefix(prompt))]
        inside = len(own) - bool(own and not alone.removeprefix(prompt)[own[-1] :].strip())
        found = next(islice(marks.finditer(full, len(prompt)), inside, None), None) if alone.startswith(prompt) else None
        if found is None:
            raise _uncuttable("no special token ends a turn with tool calls")
        return found.span()

    def cut(turns: Sequence[Turn], open_answer: bool) -> list[Part]:
        # A tool's result may be escaped by the template, so it is rendered as it is, not cut out.
        texts = [quote(t.text) if t.role == "tool" else sentinel(i) if _written(t) else "" for i, t in enumerate(turns)]
        messages = [{"role": t.role, "content": text, **quote(t.extra)} for t, text in zip(turns, texts)]
        full = render(messages, add_generation_prompt=open_answer)
        made, at = [], 0
        # A prompt for every answer would take time that grows with the square of the turns: beyond the first few, what stands before an
        # answer is cut where the same text after the same role was; the last answer's prompt is rendered again.
        cuts: dict[tuple[str, str], int] = {}
        final = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
        for i, turn in enumerate(turns):
            if turn.role == "assistant" and turn.extra.get("tool_calls"):
                prompt = render(messages[:i], add_generation_prompt=True)
                if not full.startswith(prompt) or len(prompt) < at:
                    raise _uncuttable(f"its prompt for turn {i + 1} is not the beginning of the rendered conversation")
                mark, end = end_of_calls(full, prompt, render(messages[: i + 1]))
                made.append(Part("scaffold", full[at : len(prompt)]))
                start = full.find(sentinel(i), len(prompt), end) if turn.text else mark
                if start < 0:
                    raise _uncuttable(f"the text beside the tool call of turn {i + 1} does not appear in its rendering")
                made.append(Part("lead", full[len(prompt) : start], i))
                if turn.text:
                    made.append(Part("answer", "", i))
                    start += len(sentinel(i))
                made.append(Part("stop", full[start:end], i))
                at = end
                continue
            if not _written(turn) or turn.role == "tool":
                continue
            start = full.find(sentinel(i), at)
            if start < 0 or full.count(sentinel(i)) != 1:
                raise _uncuttable(
                    f"the text of turn {i + 1} ({turn.role}) does not appear exactly once, in order, in its rendering"
                )
            if turn.role != "assistant" or (context and (open_answer or i < len(turns) - 1)):
                made += [Part("scaffold", full[at:start]), Part("text", "", i)]
                at = start + len(sentinel(i))
                continue
            before = (turns[i - 1].role if i else "", full[at:start])
            if i < 16 or i == final or before not in cuts:
                prompt = render(messages[:i], add_generation_prompt=True)
                if not full.startswith(prompt) or not at <= len(prompt) <= start:
                    raise _uncuttable(f"its prompt for turn {i + 1} is not the beginning of the rendered conversation")
                cuts[before] = len(prompt) - at
            begin = at + cuts[before]
            made += [Part("scaffold", full[at:begin]), Part("lead", full[begin:start], i), Part("answer", "", i)]
            at = start + len(sentinel(i))
            following = next((full.find(t, at) for t in texts[i + 1 :] if t.startswith(sentinel(0)[0])), len(full))
            stop = _first_special(full[at:following], special)
            if stop is not None:
                made.append(Part("stop", full[at : at + stop], i))
                at += stop
            elif i == len(turns) - 1 and not full[at:].strip() and eos:
                made.append(Part("stop", eos, i))
            else:
                raise _uncuttable(f"no special token ends the answer of turn {i + 1}")
        return [*made, Part("scaffold", full[at:])]

    def parts(turns: Sequence[Turn], open_answer: bool) -> list[Part]:
        if any(turn.extra or turn.role == "tool" for turn in turns):
            made = cut(turns, open_answer)
        else:
            shape = _shape(turns, open_answer)
            made = shapes.get(shape)
            if made is None:
                made = shapes[shape] = cut(turns, open_answer)
        # (not `replace`: it takes a few times as long, and this is done for every row)
        return [Part(part.kind, turns[part.turn].text, part.turn) if part.kind in ("text", "answer") else part for part in made]

    return parts


def _shape(turns: Sequence[Turn], open_answer: bool) -> tuple:
    """What a rendering depends on besides the texts themselves."""
    return (open_answer, *((turn.role, bool(turn.text)) for turn in turns))


def _written(turn: Turn) -> bool:
    """Whether a turn's text is looked for in a rendering: an answer also where it is empty, for its end mark is learned."""
    return bool(turn.text) or (turn.role == "assistant" and not turn.extra.get("tool_calls"))


def _first_special(text: str, special: list[str]) -> int | None:
    """Where the first special token in `text` ends; None without one."""
    starts = [(text.find(name), -len(name), name) for name in special if name in text]
    if not starts:
        return None
    start, _, name = min(starts)
    return start + len(name)


def _uncuttable(why: str) -> UserError:
    return UserError(
        f"the model's chat template cannot be cut into learned and unlearned parts: {why}.\n"
        "Choose a format yourself: template=plain, template={user: ..., assistant: ..., stop: ...}, or one whose marks this tokenizer has "
        "(template=chatml needs <|im_end|>)"
    )


# --- the template -------------------------------------------------------------------------------------------------------


@dataclass(repr=False)
class Template:
    """A chat format bound to a tokenizer. Conversations may be given as `Conversation` or as lists of OpenAI-style messages."""

    name: str
    tokens: Tokens
    parts: Callable[[Sequence[Turn], bool], list[Part]]
    jinja: str  # what the saved folder carries as chat_template
    stop_ids: list[int]  # generation ends at any of these
    render: Callable[..., str] | None = None  # the published rendering, to compare with; None for forms
    default_system: str | None = None
    learn: Learn = "all"
    context: bool = False  # earlier answers are text of the question, without end marks: only the last one can be learned
    now: datetime.datetime | None = None  # what the format's clock says, in every prompt; None: it reads none
    dates: tuple[str, ...] = ()  # what it can write of that
    differs: Counter = field(default_factory=Counter)  # rows whose ids differ from the published rendering, by reason

    @property
    def date(self) -> str | None:
        """The clock as it is kept with what the template wrote (run option `date`)."""
        return self.now.isoformat() if self.now is not None else None

    def at(self, now: datetime.datetime | None) -> "Template":
        """The same template with its clock at another time; itself where it reads none."""
        if not self.dates:
            return self
        clock = choose("auto", self.tokens, now=now)
        return replace(self, parts=clock.parts, render=clock.render, now=clock.now, dates=clock.dates)

    def turns(self, conversation: "Conversation | Sequence[Message]") -> tuple[Turn, ...]:
        turns = conversation.turns if isinstance(conversation, Conversation) else tuple(_turn(message) for message in conversation)
        if not turns:
            raise UserError("a conversation needs at least one turn")
        if self.default_system is not None and turns[0].role != "system":
            turns = (Turn("system", self.default_system), *turns)
        if not tools.concerns(turns):
            return turns
        written = tools.for_template(turns, self._supports)
        if self._supports in ("system", "question") and written != turns:
            self.differs["this chat format has no tools: schemas and calls are written as JSON text, results as a user's turn"] += 1
        if self._supports == "one call" and any(turn.text and turn.extra.get("tool_calls") for turn in turns):
            self.differs[
                "this chat format has no text beside a tool call: the text is a turn of its own, with its own end mark"
            ] += 1
        return written

    @cached_property
    def _supports(self) -> tools.Supports:
        return tools.supports(self.jinja, self.parts)

    def pieces(
        self, conversation: "Conversation | Sequence[Message]", learn: Learn | None = None, open_answer: bool = False
    ) -> list[Piece]:
        """The generator that decides what is learned: an assistant turn's text and the stop mark that ends it.

        open_answer: end with the header that asks the assistant to write (a prompt).
        """
        learn = learn or self.learn
        turns = self.turns(conversation)
        parts = self.parts(turns, open_answer)
        parts = self._as_published(turns, parts, open_answer)
        last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
        made: list[Piece] = []
        for part in parts:
            weight = 0.0
            if part.turn >= 0 and part.kind in ("lead", "answer", "stop"):
                turn = turns[part.turn]
                learned = turn.learn if turn.learn is not None else (learn != "last" or part.turn == last)
                weight = turn.weight if learned else 0.0
            elif learn == "everything":
                weight = 1.0
            if part.kind in ("text", "answer"):
                made.append(Piece(part.text, weight=weight, joined=not self._starts_answer(part, parts)))
            else:
                made += self._fixed(part, weight)
        return made

    def _starts_answer(self, part: Part, parts: list[Part]) -> bool:
        """Whether generation begins at this part: an answer, unless a non-empty lead already began it."""
        return part.kind == "answer" and not any(other.kind == "lead" and other.turn == part.turn and other.text for other in parts)

    def _fixed(self, part: Part, weight: float) -> list[Piece]:
        """As `_scaffold`; what stands around the texts is the same in most rows, so it is kept."""
        key = (part.text, weight, part.kind != "lead")
        found = self._known.get(key)
        if found is None:
            found = self._scaffold(part, weight, joined=key[2])
            if len(self._known) < 1000:
                self._known[key] = found
        return found

    @cached_property
    def _known(self) -> dict[tuple[str, float, bool], list[Piece]]:
        return {}

    def _scaffold(self, part: Part, weight: float, joined: bool) -> list[Piece]:
        """Scaffold text with its special tokens as ids."""
        made, text = [], part.text
        names = self._special_names
        while text:
            found = min(((text.find(name), -len(name), name) for name in names if name in text), default=None)
            if found is None:
                made.append(Piece(text, weight=weight, joined=joined))
                break
            start, _, name = found
            if start:
                made.append(Piece(text[:start], weight=weight, joined=joined))
            made.append(Piece(name, id=self.tokens.special[name], weight=weight))
            text, joined = text[start + len(name) :], True
        return [replace(piece, text=piece.text.replace(BREAK, "")) if BREAK in piece.text else piece for piece in made]

    @cached_property
    def _special_names(self) -> list[str]:
        return sorted(self.tokens.special, key=len, reverse=True)

    def _as_published(self, turns: Sequence[Turn], parts: list[Part], open_answer: bool) -> list[Part]:
        """Compares with the published rendering. Where that one trims texts, so do we; other differences are counted."""
        if self.render is None:
            return parts
        # Of a template that only copies texts, one rendering is as good as all of the same shape.
        shape = None if any(turn.extra or turn.role == "tool" for turn in turns) or not self._copies else _shape(turns, open_answer)
        if shape in self._seen:
            return parts
        messages = [{"role": turn.role, "content": turn.text, **turn.extra} for turn in turns]
        published = self.render(messages, add_generation_prompt=open_answer)
        if _same(parts, published):
            if shape is not None and len(self._seen) < 1000:
                self._seen.add(shape)
            return parts
        trimmed = [replace(part, text=part.text.strip()) if part.kind in ("text", "answer") else part for part in parts]
        if _same(trimmed, published):
            self.differs["blanks around a text trimmed, as the model's own template does"] += 1
            return trimmed
        self.differs["the model's own template changes the text (it was left as it is in the data)"] += 1
        return parts

    @cached_property
    def _copies(self) -> bool:
        return copies_texts(self.jinja)

    @cached_property
    def _seen(self) -> set[tuple]:
        return set()

    def split(self, conversation: Conversation) -> list[Conversation]:
        """What is trained on: the conversation, or (`context`) one for every learned answer, ending there."""
        if not self.context or self.learn == "everything":
            return [conversation]
        turns = conversation.turns
        ends = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        learned = [i for i in ends if (self.learn != "last" or i == ends[-1] if turns[i].learn is None else turns[i].learn)]
        return [replace(conversation, turns=turns[: i + 1]) for i in learned] or [conversation]

    def encode(self, conversation: "Conversation | Sequence[Message]", learn: Learn | None = None) -> Example:
        """One training sequence. A conversation must end with an assistant turn to learn anything. (`context`: the last answer is
        learned; `split` gives the others.)"""
        where = conversation.where if isinstance(conversation, Conversation) else ""
        scale = conversation.weight if isinstance(conversation, Conversation) else 1.0
        try:
            ids, weights = self._ids(self.pieces(conversation, learn))
        except UserError as error:  # a turn that the format cannot write
            raise UserError(f"{where}: {error}" if where else str(error)) from None
        return align(ids, weights if scale == 1 else [weight * scale for weight in weights], where)

    def prompt(self, conversation: "Conversation | Sequence[Message]") -> list[int]:
        """Ids after which the model writes an answer. A last assistant turn, if there is one, is what is to be answered anew."""
        turns = self.turns(conversation)
        if turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        return self._ids(self.pieces(Conversation(turns), open_answer=True))[0]

    def _ids(self, pieces: list[Piece]) -> tuple[list[int], list[float]]:
        """Token ids and, beside each, the weight with which that token itself is learned."""
        ids: list[int] = []
        weights: list[float] = []
        held, held_weight, after_mark = "", 0.0, True

        def flush() -> None:
            nonlocal held, after_mark
            if held:
                made = self.tokens.encode(held, first=not ids or (self.tokens.prepends and after_mark))
                ids.extend(made)
                weights.extend([held_weight] * len(made))
                held, after_mark = "", False

        for piece in pieces:
            if piece.id is not None:
                flush()
                after_mark = True
                ids.append(piece.id)
                weights.append(piece.weight)
                continue
            if not piece.joined or piece.weight != held_weight:
                flush()
            held, held_weight = held + piece.text, piece.weight
        flush()
        return ids, weights

    def parse(self, ids: Sequence[int]) -> Turn:
        """The assistant turn that generated ids say: everything before the first stop mark."""
        streamer = self.streamer()
        return Turn("assistant", "".join([*map(streamer.add, ids), streamer.end()]))

    def streamer(self) -> "Streamer":
        """`parse` of ids that are still being generated, for one answer."""
        return Streamer(self.tokens.decoding(), frozenset(self.stop_ids), *self._around)

    @cached_property
    def _around(self) -> tuple[str, str]:
        """Text that the format puts before an answer and between it and its stop mark (Llama 2: a blank each)."""
        parts = self.parts((Turn("user", "a"), Turn("assistant", "b")), False)
        lead = next((part.text for part in parts if part.kind == "lead"), "")
        stop = next(part for part in parts if part.kind == "stop")
        return lead, "".join(piece.text for piece in self._scaffold(stop, 1.0, True) if piece.id is None)

    def show(self, example: Example) -> list[tuple[str, float]]:
        """(text, weight with which it is learned) of every token, special tokens by name; parts of one character are joined."""
        weights = [0.0, *example.weights[:-1]]
        made: list[tuple[str, float]] = []
        held: list[int] = []
        # Decoders of SentencePiece take a blank off the beginning of what they are given: it is given something to take it off.
        before = self.tokens.encode("a")
        skipped = len(self.tokens.decode(before, keep_special=True))
        for token, weight in zip(example.ids, weights):
            held.append(token)
            text = self.tokens.decode([*before, *held], keep_special=True)[skipped:]
            if text.endswith("\ufffd") and len(held) < 6:
                continue
            made.append((text, weight))
            held = []
        if held:
            made.append((self.tokens.decode([*before, *held], keep_special=True)[skipped:], weights[-1]))
        return made


class Streamer:
    """The one place where generated ids become an answer's text, piece by piece: what `add` gives for each id and `end` after the last one
    is, joined, the text of `Template.parse`. A piece is given as soon as no later id can change it.

    lead, gap: text that the format puts before an answer (one of them is taken off, where all of it is there) and before its stop mark.
    """

    def __init__(self, decoding: Decoding, stop_ids: frozenset[int], lead: str, gap: str):
        self._decoding, self._stop_ids, self._lead, self._gap = decoding, stop_ids, lead, gap
        self._held = ""  # what may still turn out to be the lead or the gap
        self.stopped = False  # by a stop mark; ids behind it count for nothing

    def add(self, id: int) -> str:
        if not self.stopped:
            self.stopped = id in self._stop_ids
        return "" if self.stopped else self._certain(self._decoding.add(id))

    def end(self) -> str:
        """The rest. To be called once, after the last id, whether it was a stop mark or not."""
        rest = self._certain(self._decoding.end()) + self._held
        return rest.removesuffix(self._gap) if self.stopped else rest

    def _certain(self, text: str) -> str:
        text = self._held + text
        if self._lead:
            if len(text) < len(self._lead) and self._lead.startswith(text):
                self._held = text
                return ""
            text, self._lead = text.removeprefix(self._lead), ""
        kept = beginning_of(self._gap, text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def align(ids: list[int], weights: list[float], where: str = "") -> Example:
    """The one place where tokens meet the tokens that must follow them. `weights[i]`: how much token i itself is learned."""
    return Example(ids, [*ids[1:], ids[-1]] if ids else [], [*weights[1:], 0.0] if ids else [], where)


def encode_document(tokens: Tokens, document: Document, max_length: int) -> list[Example]:
    """Pre-training: every token learned, the end token too. A long document continues in the next sequence; no token is lost:
    the last token of a sequence still learns the first of the next."""
    ids = [*tokens.prefix, *tokens.encode(document.text)]
    if tokens.eos_id is not None:
        ids.append(tokens.eos_id)
    whole = align(ids, [document.weight] * len(ids), document.where)
    cuts = range(0, max(1, len(ids) - 1), max_length)
    return [
        Example(
            whole.ids[i : i + max_length], whole.next_ids[i : i + max_length], whole.weights[i : i + max_length], document.where
        )
        for i in cuts
    ]


def _turn(message: Message) -> Turn:
    known = {"role", "content", "learn", "weight"}
    return Turn(
        message["role"],
        message.get("content") or "",
        message.get("learn"),
        message.get("weight", 1.0),
        {key: value for key, value in message.items() if key not in known},
    )


def _same(parts: list[Part], published: str) -> bool:
    text = "".join(part.text if part.kind in ("text", "answer") else part.text.replace(BREAK, "") for part in parts)
    # A stop mark that the published template leaves out at the very end is ours (GLM-4 ends with its eos token).
    return text == published or (
        parts[-1].kind == "scaffold"
        and not parts[-1].text
        and text.startswith(published)
        and len(parts) > 1
        and text == published + parts[-2].text
    )


def choose(wanted: "str | Form", tokens: Tokens, learn: Learn = "all", now: datetime.datetime | None = None) -> Template:
    """The template that an option names, bound to a tokenizer. now: what its clock says, where it has one; None: the time it is.

    The clock stands still: a conversation, a data set and a run have one date, also over midnight. Raises UserError when `auto` finds
    no template, or a mark is unknown.
    """
    if wanted == "auto":
        if not tokens.chat_template:
            raise UserError(
                f"this model brings no chat format; choose one: template={' | template='.join(FORMS)}\n"
                'or write your own: \'template={user: "Q: {content}\\n", assistant: "A: {content}{stop}\\n"}\''
            )
        variables = {key: tokens.name(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        now = now or datetime.datetime.now().replace(microsecond=0)
        render = jinja_renderer(tokens.chat_template, variables, now)
        dates = tuple(rendering.clock_texts(tokens.chat_template, now))
        turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))
        context = False
        parts = jinja_parts(render, tokens.special, tokens.name("eos_token"))
        try:
            trial = parts(turns, False)
        except UserError:
            context = True
            parts = jinja_parts(render, tokens.special, tokens.name("eos_token"), context)
            trial = parts(turns, False)
        stops = {
            tokens.special[name] for part in trial if part.kind == "stop" for name in tokens.special if part.text.endswith(name)
        }
        return Template(
            "auto", tokens, parts, tokens.chat_template, sorted({*stops, *tokens.end_ids}), render, learn=learn, context=context,
            now=now if dates else None, dates=dates,
        )  # fmt: skip
    name = wanted if isinstance(wanted, str) else "own"
    form = FORMS[wanted] if isinstance(wanted, str) else wanted
    stop = form.stop or tokens.name("eos_token")
    if not stop:
        raise UserError("this tokenizer has no end token; name a special token as template.stop")
    if stop not in tokens.special:
        raise UserError(
            f"template {name}: '{stop}' is not a special token of this tokenizer (it has {', '.join(list(tokens.special)[:8]) or 'none'}); "
            "an answer must end with one. Leave template.stop out to use the tokenizer's end token, or choose template=plain"
        )
    prefix = "".join(tokens.names.get(id, "") for id in tokens.prefix)
    system = DEFAULT_SYSTEM.get(name)
    return Template(
        name,
        tokens,
        form_parts(form, stop, prefix),
        form_jinja(form, stop, prefix, system),
        sorted({tokens.special[stop], *tokens.end_ids}),
        default_system=system,
        learn=learn,
    )
