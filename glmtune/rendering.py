"""Chat templates of models, in Jinja: rendered as transformers renders them, in bounded time and memory, with a clock that stands still.

A template came with somebody's model, so Jinja's sandbox is not enough: it stops no nested loops, no recursion that branches and no
text that doubles. Here every rendering has a budget of steps. The compiler charges each loop's body and each macro for the nodes in it.
What makes a text or list is charged for its length, what goes through a whole value (compares, hashes or writes it) for all that is in
it, before it does so, and as often as it is in it: lists of the same list grow like a text that doubles. Nothing looks at a clock, so
the same template on the same messages ends in the same way on every machine, in every process and thread.

Where Jinja would draw at random (`random`, `lipsum`) nothing is there: the same row must give the same tokens.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import GeneratorType
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from .errors import UserError

STEPS = 1_000_000  # of a rendering: one or two seconds; published templates take up to 300 for a message
STEPS_OF_INPUT = 1000  # more for each item of the messages, and each 8 characters
STEPS_OF_PAIR = 50  # more for each pair of messages: some templates look through all of them at each
CHARACTERS = 8  # a step's worth of text
FREE = 64  # characters up to which a text costs nothing beside the node that made it
DEEPEST = 200  # levels of lists and objects
CALL = 5  # steps of calling something, beside what it does
BITS = 4096  # of a number
SOURCE = 500_000  # characters of a template; the longest published ones have 40,000


class Exhausted(jinja2.TemplateRuntimeError):
    """A rendering took more steps, or made more text, than any chat format needs."""


# isinstance takes a tuple in half the time of a union.
_SIZED = (str, list, tuple, dict, bytes)
_CONTAINERS = (list, dict, tuple, range, set, frozenset)


def size_of(value: Any, most: int) -> int:
    """Steps that it takes to go through a value, with all that is in it as often as it is in it. Raises Exhausted beyond `most`."""
    total, level, depth = 0, [value], 0
    while level:
        inner: list[Any] = []
        for one in level:
            total += 1
            if isinstance(one, (str, bytes)):
                total += len(one) // CHARACTERS
            elif isinstance(one, dict):
                inner += one
                inner += one.values()
            elif isinstance(one, range):
                total += len(one)
            elif isinstance(one, _CONTAINERS):
                inner += one
            if total + len(inner) > most:
                raise Exhausted
        depth += 1
        if depth > DEEPEST:
            raise Exhausted
        level = inner
    return total


class _Context(Context):
    """The variables of a rendering, and what is left of its budget."""

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self.root, self.left, self.is_extended = self, STEPS, False

    def derived(self, locals: dict[str, Any] | None = None) -> "_Context":
        made: Any = super().derived(locals)
        made.root = self.root
        return made

    def spend(self, steps: int) -> None:
        root = self.root
        root.left -= steps
        if root.left < 0:
            root.extend()

    def extend(self) -> None:
        """What a long conversation may take more; it is counted only where the usual budget is spent."""
        if not self.is_extended:
            self.is_extended = True
            messages, schemas = self.parent.get("messages", ()), self.parent.get("tools")
            self.left += STEPS_OF_INPUT * size_of([messages, schemas], 10**9) + STEPS_OF_PAIR * len(messages) ** 2
        if self.left < 0:
            raise Exhausted

    def made(self, value: Any) -> Any:
        """Charges for a value that was made; returns it."""
        if isinstance(value, _SIZED):
            if len(value) > FREE:
                self.spend(len(value) // CHARACTERS)
        elif value.__class__ is int and value.bit_length() > BITS:
            raise Exhausted
        return value

    def weigh(self, value: Any) -> Any:
        """Charges for going through all of a value; returns it."""
        if value.__class__ is str and len(value) <= FREE:
            return value
        if isinstance(value, _CONTAINERS):
            self.spend(size_of(value, max(self.root.left, STEPS)))
            return value
        return self.made(value)

    def search(self, values: Any, deep: bool) -> Any:
        """Charges for `... in values`; returns them. deep: it may be a list or an object that is looked for."""
        if isinstance(values, range) or (isinstance(values, list | tuple) and not deep):
            self.spend(len(values))
            return values
        return values if isinstance(values, dict) else self.weigh(values)

    def add(self, *values: Any) -> Any:
        """`a + b + ...`, from the left."""
        total = values[0]
        for value in values[1:]:
            total = total + value
            if total.__class__ is not str or len(total) > FREE:
                self.made(total)
        return total

    def put(self, value: Any) -> str:
        """What `{{ value }}` writes."""
        if value.__class__ is str:
            if len(value) > FREE:
                self.spend(len(value) // CHARACTERS)
            return value
        self.weigh(value)
        return value if isinstance(value, str) else str(value)

    def each(self, values: Iterable[Any], steps: int) -> Iterator[Any]:
        """The values, each for so many steps."""
        for value in values:
            self.spend(steps)
            yield value

    def weigh_arguments(self, name: str, subject: Any, given: Sequence[Any]) -> None:
        """Charges for what a filter or method is about to go through, and for the most that it can make of it."""
        self.weigh(subject)
        for one in given:
            if isinstance(one, int):  # it may be a width
                self.spend(abs(one))
            else:
                self.weigh(one)
        if (most := _GROWS.get(name)) is not None:
            self.spend(most(subject, given) // CHARACTERS)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 64


def _formatted(subject: Any, given: Sequence[Any]) -> int:
    """Characters that `'...'.format` or `'...' % ...` can make: any number in the text may be a width, any argument stand in any place."""
    text = subject if isinstance(subject, str) else ""
    if not text:
        return 0
    widths = sum(int(number[:12]) for number in re.findall(r"[0-9]+", text))
    numbers = sum(abs(one) for one in given if isinstance(one, int))
    return widths + (text.count("%") + text.count("{")) * (numbers + CHARACTERS * size_of(list(given), 10**9))


def _replaced(subject: Any, given: Sequence[Any]) -> int:
    old, new = (str(one) if not isinstance(one, bytes) else one.decode("latin-1") for one in (*given, "", "")[:2])
    text = subject.decode("latin-1") if isinstance(subject, bytes) else str(subject)
    return text.count(old) * len(new)


def _by_numbers(subject: Any, given: Sequence[Any]) -> int:
    width = max((abs(one) if isinstance(one, int) else _length(one) for one in given), default=4)
    return width * CHARACTERS * size_of(subject, 10**9)


# Filters and methods that make more than the sum of what they are given: at most how many characters.
_GROWS: dict[str, Callable[[Any, Sequence[Any]], int]] = {
    "replace": _replaced,
    "join": lambda subject, given: _length(subject) * max(map(_length, given), default=0),
    "format": _formatted,
    "format_map": _formatted,
    "translate": lambda subject, given: _length(subject) * CHARACTERS * size_of(list(given), 10**9),
    "indent": lambda subject, given: (
        str(subject).count("\n") * max((one if isinstance(one, int) else _length(one) for one in given), default=4)
    ),
    "expandtabs": lambda subject, given: subject.count("\t") * max([8, *(one for one in given if isinstance(one, int))]),
    "sum": lambda subject, given: _length(subject) * CHARACTERS * size_of(subject, 10**9) if given else 0,
    "tojson": lambda subject, given: _by_numbers(subject, given) if any(given) else 0,
    "pprint": _by_numbers,
    "encode": lambda subject, given: _length(subject) ** 2 if "".join(map(str, given)).lower() in ("idna", "punycode") else 0,
}
_GROWS["decode"] = _GROWS["encode"]
_FIRST = frozenset(("length", "count", "first", "last", "default", "d"))  # filters that take no longer for a long value
# Filters that look at each item of a value, and into none.
_SHALLOW = frozenset(("list", "reverse", "map", "select", "selectattr", "reject", "rejectattr", "items"))
# Tests that look at a whole value; the others look at its kind.
_LOOKING = (
    "in", "eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "gt", ">", "greaterthan", "ge", ">=", "upper", "lower",
)  # fmt: skip


class _Weighing(NodeTransformer):
    """Puts `|made`, `|weigh` and `|search` around what is made and gone through without a filter or a call."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:  # `for ... if`: what is passed over counts as well
            node.iter = _filter(node.iter, "each", nodes.Const(_steps([node.test])))
        return node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        for pair in node.items:
            pair.key = _weighed(pair.key)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filter(node, "made")
        node.arg = _weighed(node.arg)  # it is hashed
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = list(map(_weighed, node.nodes))
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Comparing with a literal takes no longer than the literal is; only what is looked through by `in` may be long all the same."""
        self.generic_visit(node)
        around = [node.expr, *(op.expr for op in node.ops)]
        deep = not any(map(_is_short, around))
        for op in node.ops:
            if op.op in ("in", "notin") and not _is_short(op.expr):
                op.expr = _filter(op.expr, "search", nodes.Const(deep))
            elif deep:
                op.expr = _weighed(op.expr)
        if deep:
            node.expr = _weighed(node.expr)
        return node


def _weighed(node: nodes.Expr) -> nodes.Expr:
    return node if _is_short(node) else _filter(node, "weigh")


def _filter(node: Any, name: str, *given: nodes.Expr) -> nodes.Expr:
    return nodes.Filter(node, name, list(given), [], None, None, lineno=node.lineno)


_NUMBERS: Any = (
    nodes.Compare,
    nodes.Test,
    nodes.Not,
    nodes.Neg,
    nodes.Pos,
    nodes.Sub,
    nodes.Div,
    nodes.FloorDiv,
    nodes.Mod,
    nodes.Pow,
)


def _is_short(node: nodes.Node) -> bool:
    """Whether a value is no longer than its source: a literal, a number (`'...' % x` was charged when it was made)."""
    if isinstance(node, nodes.Getattr):
        return isinstance(node.node, nodes.Name) and node.node.name == "loop" and node.attr not in ("previtem", "nextitem")
    return isinstance(node, (nodes.Const, *_NUMBERS)) or (
        isinstance(node, nodes.List | nodes.Tuple | nodes.Dict | nodes.Pair) and all(map(_is_short, node.iter_child_nodes()))
    )


_REPEATED: Any = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)  # what may be carried out more than once


def _steps(body: Sequence[nodes.Node]) -> int:
    """Of carrying out these nodes once, without the bodies in them that are charged by themselves."""
    count, rest = 0, list(body)
    while rest:
        node = rest.pop()
        count += 1 + (len(node.data) // CHARACTERS if isinstance(node, nodes.TemplateData) else 0)
        inside = () if isinstance(node, _REPEATED) else node.iter_child_nodes()
        rest += inside
        if isinstance(node, nodes.For):
            rest += [node.iter, *node.else_]
    return count


class _Generator(CodeGenerator):
    """Jinja's compiler, which also writes what is charged."""

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        node = _Weighing().visit(node)
        self.charged = {id(one.body): _steps(one.body) for one in node.find_all(_REPEATED)}
        super().visit_Template(node, frame)

    def blockvisit(self, nodes: Any, frame: Frame) -> None:
        if steps := self.charged.get(id(nodes)):
            self.writeline(f"context.spend({steps})")
        super().blockvisit(nodes, frame)

    def visit_Add(self, node: nodes.Add, frame: Frame) -> None:
        values: list[nodes.Expr] = [node]
        while isinstance(first := values[0], nodes.Add):
            values[:1] = [first.left, first.right]
        self.write("context.add(")
        for value in values:
            self.visit(value, frame)
            self.write(", ")
        self.write(")")

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        super()._output_child_pre(node, frame, finalize)
        self.write("context.put(")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write(")")
        super()._output_child_post(node, frame, finalize)


class _Namespace(Namespace):
    """As Jinja's, but written out it says nothing of what is in it, which may be the namespace itself."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote; for rendering it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own convention)

    def parse(self, parser: Any) -> Any:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


_OF_LOOP = frozenset(("first", "last", "index", "index0", "previtem", "nextitem", "length"))


class Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with what transformers gives to chat templates, with a budget for every rendering. now: what the clock says."""

    code_generator_class = _Generator
    context_class = _Context
    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, now: datetime.datetime | None = None):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation])

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        def tojson(
            value: Any, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys: bool = False
        ) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

        self.plain = self.overlay()  # filters and tests without a charge
        self.plain.filters = {**self.filters, "tojson": tojson}
        self.plain.tests = dict(self.tests)
        del self.plain.filters["random"], self.globals["lipsum"]
        charged = {
            name: _charged(self.plain.call_filter, name, it) for name, it in self.plain.filters.items() if name not in _FIRST
        }
        self.filters = {**self.plain.filters, **charged}
        own = {"weigh": _Context.weigh, "made": _Context.made, "search": _Context.search, "each": _Context.each}
        self.filters |= {name: pass_context(charge) for name, charge in own.items()}
        self.tests |= {name: _charged(self.plain.call_test, name, self.plain.tests[name]) for name in _LOOKING}
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = lambda form: (now or datetime.datetime.now()).strftime(form)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As the sandbox does it, which asks twelve times as long what an attribute of a message or of `loop` may be."""
        if obj.__class__ is dict and attribute in obj and not hasattr(dict, attribute):
            return obj[attribute]
        if obj.__class__ is LoopContext and attribute in _OF_LOOP:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if left.__class__ is int and operator == "%":
            return left % right
        if operator == "%" and isinstance(left, str):
            context.weigh_arguments("format", left, right if isinstance(right, tuple) else [right])
        elif operator == "*":
            for one, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(one, str | bytes | list | tuple):
                    context.spend(max(times, 0) * size_of(one, 10**9))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > BITS:
            raise Exhausted
        return context.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        name, subject = getattr(method, "__name__", ""), getattr(method, "__self__", None)
        if name == "join":
            args = tuple(list(one) if isinstance(one, GeneratorType) else one for one in args)
        __context.spend(CALL + len(args))
        if (args or kwargs or subject is not None) and not isinstance(__obj, Macro):
            if isinstance(subject, dict) and name in ("get", "items", "keys", "values"):
                subject = None  # they look at one key, or make a view
            __context.weigh_arguments(name, subject, [*args, *kwargs.values()])
        return __context.made(super().call(__context, __obj, *args, **kwargs))


def _charged(call: Callable[..., Any], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test by its name, charged for what it goes through and what it makes."""
    alone = not hasattr(function, "jinja_pass_arg")

    @pass_context
    def charged(context: _Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        if alone and value.__class__ is str and len(value) <= FREE and not args and not kwargs:
            return function(value)
        if isinstance(value, GeneratorType):
            value = list(value)
        if name in _SHALLOW:
            context.spend(len(value) if isinstance(value, list | tuple | dict | range) else CALL)
        else:
            context.weigh_arguments(name, value, [*args, *kwargs.values()])
        if alone:
            return context.made(function(value, *args, **kwargs))
        return context.made(call(name, value, args, kwargs, context=context))

    return charged


def jinja_renderer(source: str, variables: Mapping[str, Any], now: datetime.datetime | None = None) -> Callable[..., str]:
    """`render(messages, add_generation_prompt=False)`: a chat template as transformers renders it, with the clock at `now`.

    Raises UserError where a template is no valid Jinja; `render` does where it refuses the messages, or comes to no end.
    """
    if len(source) > SOURCE:
        raise UserError(
            f"the model's chat template has {len(source):,} characters; wanted at most {SOURCE:,}. Name one: template=chatml"
        )
    try:
        compiled = Environment(now).from_string(source)
    except Exception as error:  # Python's own compiler has its part in it: SyntaxError, RecursionError, MemoryError, ValueError
        raise UserError(f"the model's chat template is not valid Jinja ({_reason(error)}); name one: template=chatml") from None

    def render(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        schemas = next((message["tools"] for message in messages if message.get("tools")), None)
        try:
            return compiled.render(messages=messages, tools=schemas, add_generation_prompt=add_generation_prompt, **variables)
        except (Exhausted, RecursionError, MemoryError):
            raise UserError(
                "the model's chat template does not come to an end: it loops or calls itself without bound, or makes a text without bound; "
                "mend chat_template.jinja, or name another format: template=chatml"
            ) from None
        except Exception as error:  # what a template does wrong is its own affair, whatever Python calls it
            roles = ", ".join(str(message["role"]) for message in messages[:8]) + (" ..." if len(messages) > 8 else "")
            raise UserError(f"the model's chat template refuses these turns ({roles}): {_reason(error)}") from None

    return render


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 200 else said[:199] + "…"


def keys_read(source: str) -> set[str]:
    """Names that a template looks up in something: keys of messages among them."""
    found = Environment().parse(source).find_all((nodes.Getattr, nodes.Getitem))
    names = [node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None) for node in found]
    return {name for name in names if isinstance(name, str)}


def clock_texts(source: str, now: datetime.datetime) -> list[str]:
    """What the clock can write into the prompts of a template: a text for each format in it; [] where it reads no clock.

    Sequences are kept under these texts (tokenise.Wanted.key), so that they are made anew when a text changes, and no sooner.
    """
    tree = Environment(now).parse(source)
    forms, asked, known = set(), 0, 0
    for node in tree.find_all((nodes.Name, nodes.Call, nodes.Test)):
        if isinstance(node, nodes.Name):
            asked += node.name == "strftime_now"
            continue
        inner = node.node
        if not (isinstance(inner, nodes.Name) and inner.name == "strftime_now"):
            continue
        if isinstance(node, nodes.Test):  # `strftime_now is defined`
            known += 1
        elif len(node.args) == 1 and isinstance(node.args[0], nodes.Const) and isinstance(node.args[0].value, str):
            known += 1
            forms.add(node.args[0].value)
    if asked > known:  # by another name, or with a format that is made there
        forms.add("%Y-%m-%d %H:%M:%S")
    return [now.strftime(form) for form in sorted(forms)]
