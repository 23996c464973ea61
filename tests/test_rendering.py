"""Chat templates: bounded in time and memory whatever they do, else exactly as Jinja renders them; and their clock."""

import datetime
import json
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import jinja2.sandbox
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmtune import families, rendering
from glmtune.errors import UserError
from glmtune.rendering import clock_texts, jinja_renderer

from . import tiny
from .cases import cases

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
GROW = "{{% set ns = namespace(x={start}) %}}{{% for i in range(1000) %}}{{% set ns.x = {next} %}}{{% endfor %}}{{{{ ns.x }}}}"
REPEAT = "{{% set l = range(90000) | list %}}{{% for i in range(99999) %}}{body}{{% endfor %}}"
ENDLESS = {
    # loops and calls
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a range": "{% for i in range(10**10) %}x{% endfor %}",
    "passed over": "{% for k in range(99999) %}{% for i in range(99999) if false %}{% endfor %}{% endfor %}",
    "continue": "{% for a in range(99999) %}{% for b in range(99999) %}{% continue %}{% endfor %}{% endfor %}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "two macros": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branches": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "caller": "{% macro f() %}{{ caller() }}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call f() %}" * 18 + "{% endcall %}" * 18,
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "block": "{% block a %}{{ self.a() }}{% endblock %}",
    "output": "{% set s = 'a' * 100000 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "scaffold": "{% for i in range(99999) %}{% for j in range(99) %}" + "x" * 10_000 + "{% endfor %}{% endfor %}",
    # what grows with every step
    **{
        f"grows by {after}": GROW.format(start=start, next=after)
        for start, after in [
            ("'ab'", "ns.x + ns.x"), ("'ab'", "ns.x ~ ns.x"), ("'ab'", "ns.x * 2"), ("'ab'", "ns.x.join([ns.x, ns.x])"),
            ("'ab'", "ns.x | replace('', ns.x)"), ("'ab'", "'%s%s' % (ns.x, ns.x)"), ("'ab'", "'{0}{0}'.format(ns.x)"),
            ("'\"'", "ns.x | tojson"), ("'ab'", "[ns.x, ns.x] | join"), ("[1]", "ns.x + ns.x"), ("[1]", "[ns.x, ns.x]"),
            ("{}", "{'a': ns.x, 'b': ns.x}"), ("{}", "dict(a=ns.x, b=ns.x)"), ("(1,)", "(ns.x, ns.x)"), ("3", "ns.x * ns.x"),
            ("3", "ns.x ** 9"), ("'ab'", "ns.x.translate({97: ns.x, 98: ns.x})"), ("'ab'", "ns.x | format | center(ns.x | length * 2)"),
        ]
    },
    "unrolled": "{% set s = 'abcdefgh' %}" + "{% set s = s + s %}" * 60,
    "a text set twice": "{% set s %}ab{% endset %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 60,
    # what is huge at once
    **{
        expression: "{{ " + expression + " }}"
        for expression in [
            "'x' * 9999999999", "9999999999 * 'x'", "[1] * 9999999999", "9 ** 9999999999", "'x' | center(9999999999)",
            "'x'.ljust(9999999999)", "'x'.zfill(9999999999)", "'%9999999999d' % 1", "'%*d' % (9999999999, 1)", "'{:9999999999}'.format(1)",
            "'{:{}}'.format(1, 9999999999)", "'%.9999999999f' | format(1.5)", "('\\t' * 9999).expandtabs(999999)",
            "('\\n' * 9999) | indent(999999)", "'x' | indent(9999999999, true)", "[1] | batch(9999999999, 'x') | list",
            "[1] | slice(9999999999) | list", "messages | tojson(indent=9999999999)", "1.5 | round(99999999, 'ceil')",
            "(5).to_bytes(9999999999, 'big')", "('a' * 99999).replace('', 'a' * 99999)", "('ä' * 999999).encode('punycode')",
        ]
    },
    # what takes long each time, and is done again
    **{
        f"again: {body}": REPEAT.format(body=body)
        for body in [
            "{{ -1 in l }}", "{% if 'a' in range(99999) %}{% endif %}", "{% if l == l[:] %}{% endif %}", "{% set m = l[1:] %}",
            "{% set m = l | map('string') | list %}", "{% set m = l | select('none') | list %}", "{{ -1 is in l }}", "{{ l | sum }}",
            "{{ l | sort | first }}", "{{ l | unique | first }}", "{{ l | string | length }}", "{{ {(l | string): 1} | length }}",
        ]
    },
}  # fmt: skip


@pytest.mark.few(4)
@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_an_error_that_names_it(name):
    with pytest.raises(UserError, match="chat template does not come to an end"):
        jinja_renderer(ENDLESS[name], {})(TURNS)


def test_values_nested_without_end_are_no_crash():
    for text in ("{% set ns.x = (ns.x,) %}", "{% set ns.x = [ns.x] %}", "{% set ns.x = {'a': ns.x} %}"):
        source = "{% set ns = namespace(x=(1,)) %}{% for i in range(9999) %}" + text + "{% endfor %}{{ ns.x }}"
        with pytest.raises(UserError, match="does not come to an end"):
            jinja_renderer(source, {})(TURNS)


@pytest.mark.few(3)
@pytest.mark.parametrize("source", [
    "{% for %}", "{{ ", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "{{ " + "9" * 5000 + " }}",
    "{{ " + " + ".join(["a"] * 20_000) + " }}", "x" * 600_000, "{{ 1 | no_filter }}", "{% include 'x' %}",
])  # fmt: skip
def test_what_python_cannot_compile_is_an_error(source):
    with pytest.raises(UserError, match="chat template") as error:
        jinja_renderer(source, {})(TURNS)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("source", [
    "{{ 1 / 0 }}", "{{ {}.a.b }}", "{{ [1][5].x }}", "{{ 'x' + 1 }}", "{{ raise_exception('x' * 99999) }}", "{{ '\\ud800'.encode() }}",
    "{{ messages | sort }}", "{{ messages.append(1) }}", "{{ ''.__class__.x }}", "{{ lipsum() }}", "{{ [1] | first(2, 3) }}",
])  # fmt: skip
def test_whatever_goes_wrong_in_a_template_is_a_short_error(source):
    with pytest.raises(UserError, match="chat template refuses these turns") as error:
        jinja_renderer(source, {})(TURNS)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


# Templates of every construct that is charged, put together at random: as Jinja alone renders them.
_names = st.sampled_from(
    [
        "m.content",
        "m['role']",
        "loop.index0",
        "'a'",
        "7",
        "x",
        "[m.content, 1]",
        "{'k': m.role}",
        "messages | length",
        "m.content[1:]",
    ]
)
_expressions = st.recursive(
    _names,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([" + ", " ~ ", " == ", " in ", " * ", " % ", " < ", " and ", " if x else "]), inner).map(
            lambda parts: f"({parts[0]}{parts[1]}{parts[2]})"
        ),
        st.tuples(inner, st.sampled_from(["upper", "trim", "length", "string", "list", "join(', ')", "replace('a', 'bc')", "default('d')",
                                          "center(9)", "first", "map('string') | list", "tojson_", "reverse | list", "sort", "indent(2)"])).map(
            lambda parts: f"({parts[0]} | {parts[1].replace('tojson_', 'string')})"
        ),
        inner.map(lambda one: f"({one}).split('a')"),
        inner.map(lambda one: f"f({one})"),
        inner.map(lambda one: f"({one} is string)"),
    ),
    max_leaves=5,
)  # fmt: skip


@cases(100)
@given(st.lists(st.tuples(st.sampled_from(["put", "set", "if", "for"]), _expressions), min_size=1, max_size=4))
def test_a_budget_changes_nothing(parts):
    wrapped = {
        "put": "{{ %s }}",
        "set": "{%% set x = %s %%}",
        "if": "{%% if %s %%}y{%% endif %%}",
        "for": "{%% for c in (%s) if c %%}{{ c }},{%% endfor %%}",
    }
    body = "".join(wrapped[kind] % expression for kind, expression in parts)
    source = "{% macro f(a) %}<{{ a }}>{% endmacro %}{% set x = 'a' %}{% for m in messages %}" + body + "{% endfor %}"
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    try:
        wanted = plain.render(messages=TURNS)
    except Exception:
        with pytest.raises(UserError):
            jinja_renderer(source, {})(TURNS)
        return
    if "<generator" not in wanted:
        assert jinja_renderer(source, {})(TURNS) == wanted


def test_a_long_conversation_has_a_longer_budget():
    """Looking through all messages at each of them is what some published templates do."""
    source = (
        "{% for m in messages %}{% for n in messages %}{% if n.role == m.role %}{% endif %}{% endfor %}{{ m.content }}{% endfor %}"
    )
    assert jinja_renderer(source, {})(TURNS * 300) == "hiyo" * 300
    long = [{"role": "user", "content": "abc " * 2_000_000}]
    assert len(jinja_renderer("{{ messages[0].content.split('x')[-1].strip() + '\n' }}", {})(long)) == 8_000_000


def test_a_budget_is_a_rendering_s_own_in_threads_and_processes():
    render = jinja_renderer("{% for i in range(60000) %}{% if i == 59999 %}{{ messages[0].content }}{% endif %}{% endfor %}", {})
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(render, [[{"role": "user", "content": str(i)}] for i in range(8)])) == list("01234567")
    global RENDER
    RENDER = render
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_rendered, range(4)) == list("0123")


def _rendered(i: int) -> str:
    return RENDER([{"role": "user", "content": str(i)}])


def test_published_templates_are_far_from_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "STEPS", 20_000)
    monkeypatch.setattr(rendering, "STEPS_OF_INPUT", 0)
    monkeypatch.setattr(rendering, "STEPS_OF_PAIR", 0)
    for source in families.CHATS.values():
        jinja_renderer(source, {"bos_token": "<s>", "eos_token": "</s>"})(TURNS * 20)


# --- the clock --------------------------------------------------------------------------------------------------------------

NOW = datetime.datetime(2026, 3, 1, 12, 30, 15)


@pytest.mark.parametrize(("source", "texts"), [
    ("{{ messages[0].content }}", []),
    ("{{ strftime_now('%d %b %Y') }}", ["01 Mar 2026"]),
    ("{% if strftime_now is defined %}{{ strftime_now('%Y') ~ strftime_now('%H:%M') }}{% endif %}", ["12:30", "2026"]),
    ("{% if strftime_now is defined %}x{% endif %}", []),
    ("{% set f = '%Y' %}{{ strftime_now(f) }}", ["2026-03-01 12:30:15"]),
    ("{% set now = strftime_now %}{{ now('%Y') }}", ["2026-03-01 12:30:15"]),
])  # fmt: skip
def test_what_the_clock_writes_is_known(source, texts):
    assert clock_texts(source, NOW) == texts


@cases(100)
@given(
    st.text("%YmdHMSjab -", max_size=8), st.datetimes(datetime.datetime(2000, 1, 1)), st.datetimes(datetime.datetime(2000, 1, 1))
)
def test_two_days_render_alike_where_the_clock_writes_alike(form, one, other):
    source = f"{{{{ strftime_now({json.dumps(form)}) }}}}"
    alike = jinja_renderer(source, {}, one)(TURNS) == jinja_renderer(source, {}, other)(TURNS)
    assert alike == (clock_texts(source, one) == clock_texts(source, other))


def test_a_template_has_one_date_over_midnight(tmp_path, monkeypatch):
    template = families.open_template(tiny.tokenizer(tmp_path, DATED), now=NOW)
    assert template.date == "2026-03-01T12:30:15" and template.dates == ("01 Mar 2026",)
    before = template.encode(TURNS).ids
    again = families.open_template(tmp_path, now=datetime.datetime.fromisoformat(template.date))
    assert (
        again.encode(TURNS).ids == before != families.open_template(tmp_path, now=datetime.datetime(2026, 3, 2)).encode(TURNS).ids
    )
    assert families.open_template(tiny.tokenizer(tmp_path / "plain")).date is None


DATED = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + tiny.CHATML.replace(
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}", ""
)


class Clock:
    """Stands in for the datetime module: the day is what a test says."""

    def __init__(self, day: int):
        now = datetime.datetime(2026, 3, day, 12, 30, 15, 123456)
        self.datetime = type("Moved", (datetime.datetime,), {"now": classmethod(lambda cls, tz=None: now)})


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_date_and_answers_with_it(tmp_path, monkeypatch, capsys):
    from glmtune import chat, cli, load
    from glmtune.run import load_run
    from glmtune.training import Screen, train

    class StopsAt(Screen):
        def __init__(self, step: int):
            self.at = step

        def step(self, row, total):
            if row["step"] == self.at:
                raise KeyboardInterrupt

    model = tiny.llama(tmp_path / "m", DATED)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(8))

    def run(out: str, *more: str):
        given = [
            f"model={model}",
            f"data={rows}",
            f"out={tmp_path / out}",
            "optim.steps=6",
            "optim.batch_size=4",
            "save.every_steps=2",
            "samples=[]",
        ]
        return load_run(None, [*given, "report_to=[]", "precision=fp32", "optim.lr=1e-2", *more])

    def result(out: str) -> bytes:
        return (tmp_path / out / "adapter" / "adapter_model.safetensors").read_bytes()

    monkeypatch.setattr(chat, "datetime", Clock(1))
    train(run("whole"))
    with pytest.raises(KeyboardInterrupt):
        train(run("cut"), screen=StopsAt(3))
    monkeypatch.setattr(chat, "datetime", Clock(2))
    train(load_run(tmp_path / "cut" / "run.yaml"), resume=True)
    assert result("cut") == result("whole")
    train(run("next"))
    assert result("next") != result("whole")
    train(run("repeated", "date=2026-03-01"))
    assert result("repeated") == result("whole")
    with pytest.raises(UserError, match="was started with other options: date"):
        train(run("cut", "date=2026-03-02"), resume=True)
    # what was trained with a date is asked with it
    first = load(tmp_path / "whole").template
    assert "01 Mar 2026" in first.tokens.decode(first.prompt(TURNS[:1]))
    assert "02 Mar 2026" in first.tokens.decode(load(model).template.prompt(TURNS[:1]))
    for arguments in (
        ["chat", tmp_path / "whole", "--prompt", "hi", "--max-new-tokens", "2"],
        ["show", f"model={model}", f"data={rows}"],
    ):
        with pytest.raises(SystemExit) as end:
            cli.main([*map(str, arguments)])
        said = capsys.readouterr()
        assert end.value.code == 0 and (said.out + said.err).count("writes the date into prompts") == 1


def test_tokenised_rows_keep_their_date(tmp_path, monkeypatch):
    from glmtune import chat, plan
    from glmtune.run import load_run
    from glmtune.tokenise import tokenised

    model = tiny.llama(tmp_path / "m", DATED)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(8))

    def wanted(data, *more):
        return plan.wanted(load_run(None, [f"model={model}", f"data={data}", "out=o", *more]), print)[1]

    monkeypatch.setattr(chat, "datetime", Clock(1))
    first = wanted(rows)
    made = tokenised(first, tmp_path / "tokens")
    monkeypatch.setattr(chat, "datetime", Clock(2))
    assert wanted(rows).key() != first.key() == wanted(rows, "date=2026-03-01").key()
    again = wanted(tmp_path / "tokens")
    assert again.template.date == "2026-03-01T12:30:15" and tokenised(again).digest == made.digest
    with pytest.raises(UserError, match="02 Mar 2026"):
        tokenised(wanted(tmp_path / "tokens", "date=2026-03-02"))


@pytest.mark.few(1)
@pytest.mark.parametrize("command", ["chat", "show", "train", "data check", "predict", "export"])
def test_every_command_refuses_a_template_without_end(command, tmp_path, capsys):
    from glmtune import cli

    model = tiny.llama(tmp_path / "m", ENDLESS["nested loops"])
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(2))
    given = {
        "chat": [model, "--prompt", "hi"], "show": [f"model={model}", f"data={rows}"], "train": [f"model={model}", f"data={rows}", f"out={tmp_path / 'o'}"],
        "data check": [rows, "--model", model], "predict": [model, rows, "--out", tmp_path / "p"], "export": [model, "--to", tmp_path / "e"],
    }  # fmt: skip
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), *map(str, given[command])])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "chat template does not come to an end" in said and "Traceback" not in said
