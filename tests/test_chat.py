"""The laws of the text <-> tokens module, for every kind of template."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmtune import chat, families
from glmtune.errors import UserError
from glmtune.records import Conversation, Document, Turn
from glmtune.run import Form

from . import tiny
from .cases import cases

OWN = Form(system="S: {content}\n", user="Q: {content}\n", assistant="A: {content}{stop}\n\n", stop="</s>")
NAMES = ["chatml-jinja", "llama2-jinja", "glm4-jinja", "plain", "chatml", "alpaca", "own"]


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, chat.Template]:
    root = tmp_path_factory.mktemp("templates")
    made = {
        "chatml-jinja": families.open_template(tiny.tokenizer(root / "a")),
        "llama2-jinja": families.open_template(tiny.tokenizer(root / "b", tiny.LLAMA2, eos="</s>", bos="<s>")),
        "glm4-jinja": families.open_template(tiny.tokenizer(root / "c", tiny.GLM4, eos="<|endoftext|>")),
    }
    for wanted in ("plain", "chatml", "alpaca"):
        made[wanted] = families.open_template(root / "a", wanted)
    made["own"] = families.open_template(root / "a", OWN)
    return made


# Texts with everything that goes wrong: blanks, newlines, special look-alikes, several scripts, emoji.
text = st.one_of(
    st.text(min_size=1, max_size=30).filter(lambda t: not any("\ud800" <= c <= "\udfff" or "\ue000" <= c <= "\ue001" for c in t)),
    st.sampled_from(
        [
            "hi",
            "<|im_end|>",
            "</s>",
            "[gMASK]<sop>",
            "<|user|>\n",
            "\n\n x",
            " lead",
            "trail \n",
            "你好，世界",
            "👩‍👩‍👧",
            "### Response:\n",
            "{{ name }}",
            "[INST]",
        ]
    ),
)
plain_text = st.text(alphabet="abc the?!é你好 123", min_size=1, max_size=20).filter(lambda t: t == t.strip())


@st.composite
def conversations(draw: st.DrawFn, texts=text) -> list[dict]:
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(texts)}, {"role": "assistant", "content": draw(texts)}]
    return messages


@pytest.mark.few(3)
@pytest.mark.parametrize("name", NAMES)
@cases(60)
@given(messages=conversations())
def test_a_prompt_is_a_prefix_of_its_training_sequence(templates, name, messages):
    template = templates[name]
    ids = template.encode(messages).ids
    for end, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = template.prompt(messages[:end])
            assert ids[: len(prompt)] == prompt
            assert template.prompt(messages[: end + 1]) == prompt  # a last answer is what is to be answered anew


@pytest.mark.few(1)
@pytest.mark.parametrize("name", NAMES)
def test_a_long_conversation_is_cut_as_a_short_one(templates, name):
    template = templates[name]
    messages = [{"role": role, "content": f"{role} {i} said"} for i in range(40) for role in ("user", "assistant")]
    whole = template.encode(messages)
    for end in (1, 39, 79):
        prompt = template.prompt(messages[:end])
        assert whole.ids[: len(prompt)] == prompt
    assert (
        whole.num_learned
        == sum(
            template.encode(messages[:end]).num_learned - template.encode(messages[: end - 2]).num_learned
            for end in range(4, 82, 2)
        )
        + template.encode(messages[:2]).num_learned
    )


@pytest.mark.few(3)
@pytest.mark.parametrize("name", NAMES)
@cases(60)
@given(messages=conversations(), learn=st.sampled_from(["all", "last"]))
def test_exactly_the_answers_and_their_stop_marks_are_learned(templates, name, messages, learn):
    template = templates[name]
    example = template.encode(messages, learn)
    turns = [m for m in messages if m["role"] == "assistant"]
    learned, runs = [token != -100 for token in example.labels], []
    for i, flag in enumerate(learned):
        if flag and (i == 0 or not learned[i - 1]):
            runs.append([])
        if flag:
            runs[-1].append(example.labels[i])
    expected = turns if learn == "all" else turns[-1:]
    if name != "glm4-jinja" or len(expected) == 1:  # there the stop mark of one turn may touch nothing unlearned before the next
        assert len(runs) == len(expected)
        for run, turn in zip(runs, expected):
            assert run[-1] in template.stop_ids
            said = template.parse(run).text
            published = turn["content"].strip() if template.differs else turn["content"]
            assert said in (turn["content"], published)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", NAMES)
@cases(60)
@given(messages=conversations())
def test_user_text_cannot_write_a_special_token(templates, name, messages):
    template = templates[name]
    innocent = [{**m, "content": "x"} for m in messages]
    special = set(template.tokens.special.values())
    assert [t for t in template.encode(messages).ids if t in special] == [t for t in template.encode(innocent).ids if t in special]


@pytest.mark.few(3)
@pytest.mark.parametrize("name", NAMES)
@cases(40)
@given(messages=conversations(plain_text))
def test_what_was_trained_is_what_is_served(templates, name, messages):
    """The saved chat template, rendered and tokenised by transformers' own way, gives our ids."""
    template = templates[name]
    render = chat.jinja_renderer(template.jinja, {k: template.tokens.name(k) for k in ("bos_token", "eos_token")})
    published = render(messages)
    ours = "".join(piece.text for piece in template.pieces(messages))
    assert ours in (published, published + template.tokens.names[template.tokens.eos_id])
    prompt = render(messages[:-1], add_generation_prompt=True)
    assert template.prompt(messages) == _ids_with_special(template.tokens, prompt)
    assert template.encode(messages).ids == _ids_with_special(template.tokens, ours)


def _ids_with_special(tokens: chat.Tokens, rendered: str) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokens.json).encode(rendered, add_special_tokens=False).ids


def test_ids_equal_transformers_apply_chat_template(tmp_path):
    from transformers import AutoTokenizer

    folder = tiny.tokenizer(tmp_path)
    messages = [
        {"role": "user", "content": "the cat\n"},
        {"role": "assistant", "content": "sat 你好"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
    ]
    theirs = AutoTokenizer.from_pretrained(folder)
    assert families.open_template(folder).encode(messages).ids == theirs.apply_chat_template(messages)["input_ids"]
    assert (
        families.open_template(folder).prompt(messages)
        == theirs.apply_chat_template(messages[:3], add_generation_prompt=True)["input_ids"]
    )


def test_inner_turns_of_glm4_learn_the_next_header_and_the_last_the_end_token(templates):
    template = templates["glm4-jinja"]
    messages = [{"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]]
    example = template.encode(messages)
    names = [template.tokens.names.get(t) for t in example.labels if t in template.tokens.names]
    assert names == ["<|user|>", "<|endoftext|>"]


def test_learn_false_and_weight_reach_the_tokens(templates):
    template = templates["chatml"]
    row = Conversation(
        (Turn("user", "a"), Turn("assistant", "bb", learn=False), Turn("user", "c"), Turn("assistant", "d", weight=0.5)), weight=2.0
    )
    example = template.encode(row)
    assert [w for w in example.weights if w] == [1.0, 1.0]  # "d" and its stop mark: 0.5 of the turn times 2 of the row
    assert template.encode(row, "last").weights == example.weights
    first = Conversation((Turn("user", "a"), Turn("assistant", "bb", learn=True), Turn("user", "c"), Turn("assistant", "d")))
    assert template.encode(first, "last").num_learned > template.encode([*_plain(first)], "last").num_learned


def _plain(conversation: Conversation) -> list[dict]:
    return [{"role": t.role, "content": t.text} for t in conversation.turns]


def test_everything_learns_the_prompt_too(templates):
    example = templates["chatml"].encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "everything")
    assert all(example.weights[:-1])


def test_next_ids_are_the_ids_one_later(templates):
    example = templates["chatml"].encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert example.next_ids[:-1] == example.ids[1:]
    assert example.weights[-1] == 0


def test_a_model_without_a_chat_format_lists_the_choices(tmp_path):
    folder = tiny.tokenizer(tmp_path, chat_template=None)
    with pytest.raises(UserError, match="template=plain"):
        families.open_template(folder)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{% for m in messages %}{{ m['role'] }}<|im_end|>{% endfor %}", "does not appear exactly once"),
        ("{{ messages|length }}{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}", "not the beginning"),
        ("{% for m in messages|reverse %}{{ m['content'] }}<|im_end|>{% endfor %}", "does not appear exactly once"),
        ("{% if %}", "not valid Jinja"),
    ],
)
def test_a_template_that_cannot_be_cut_says_so(tmp_path, source, why):
    with pytest.raises(UserError, match=why):
        families.open_template(tiny.tokenizer(tmp_path, source))


def test_a_template_without_end_marks_learns_the_last_answer_only(tmp_path):
    """Earlier rounds are then part of the question; every answer gets a sequence of its own."""
    template = families.open_template(tiny.tokenizer(tmp_path, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"))
    talk = Conversation((Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")))
    learned = [[t for t, w in template.show(template.encode(part)) if w] for part in template.split(talk)]
    assert learned == [["b", "<|im_end|>"], ["d", "<|im_end|>"]]
    assert template.encode(talk).ids[: len(template.prompt(talk))] == template.prompt(talk)


def test_a_template_that_trims_is_followed_and_counted(tmp_path):
    source = tiny.CHATML.replace("message['content']", "message['content'] | trim")
    template = families.open_template(tiny.tokenizer(tmp_path, source))
    messages = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b\n"}]
    assert (
        template.encode(messages).ids
        == template.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).ids
    )
    assert sum(template.differs.values()) == 1


LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n#<|im_end|>\n{% endfor %}"
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set talk = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set talk = messages %}{% set system = '' %}{% endif %}{% for m in talk %}{% if loop.index0 == 0 and system %}"
    "{% set text = 'S' + system + 'T' + m.content %}{% else %}{% set text = m['content'] %}{% endif %}{{ text }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "copies"),
    [
        (tiny.CHATML, True),
        (LLAMA2, True),
        *(
            (LOOP.replace("#", written), copies)
            for written, copies in {
                "{{ m.content }}": True, "{{ '[' + m['content'] ~ ']' }}": True, "{{ m.content or 'nothing' }}": True,
                "{% generation %}{{ m.content }}{% endgeneration %}": True, "{{ m.content if m.content is string else '' }}": True,
                "{% if m.content and not loop.last %}{{ m.content }}{% endif %}": True, "{{ messages[loop.index0 - 1].content }}": True,
                "{{ m.name }}{{ messages | length }}": True,
                "{{ m.content | trim }}": False, "{{ m.content.strip() }}": False, "{{ m.content[1:] }}": False, "{{ m.get('content') }}": False,
                "{{ m['get']('content') | trim }}": False, "{{ m | tojson }}": False, "{{ m }}": False, "{{ m[key] }}": False,
                "{% if m.content == 'a' %}b{% endif %}": False, "{% if 'a' in m.content %}b{% endif %}": False,
                "{% filter trim %}{{ m.content }}{% endfilter %}": False, "{% set x %}{{ m.content }}{% endset %}{{ x | trim }}": False,
                "{% set x = m.content %}{{ x }}{{ x | trim }}": False, "{% set x = m %}{{ x.content | trim }}": False,
                "{% set ns = namespace(x=m.content) %}{{ ns.x | trim }}": False, "{% macro f(x) %}{{ x | trim }}{% endmacro %}{{ f(m.content) }}": False,
                "{{ (loop.previtem or m).content | trim }}": False, "{{ m.content * 2 }}": False, "{{ m.content if m.content | length > 3 }}": False,
                "{% with x = m.content %}{{ x | trim }}{% endwith %}": False, "{% for c in m.content %}{{ c }}-{% endfor %}": False,
                "{% for k in m %}{{ m[k] | trim }}{% endfor %}": False, "{{ messages | map(attribute='content') | join }}": False,
            }.items()
        ),
    ],
)  # fmt: skip
def test_a_template_that_only_copies_texts_is_known_as_one(source, copies):
    assert chat.copies_texts(source) is copies


@pytest.mark.few(3)
@pytest.mark.parametrize("name", NAMES)
@cases(40)
@given(talks=st.lists(conversations(), min_size=1, max_size=4))
def test_what_one_rendering_shows_of_a_template_that_copies_holds_for_all(templates, name, talks):
    template = templates[name]
    careful = replace(template, differs=template.differs.copy())
    careful.__dict__["_copies"] = False
    for messages in talks:
        assert template.encode(messages) == careful.encode(messages)
    assert template.differs == careful.differs


def test_an_unknown_stop_mark_is_an_error(tmp_path):
    with pytest.raises(UserError, match="not a special token"):
        families.open_template(tiny.tokenizer(tmp_path), Form(stop="###"))


def test_a_template_cannot_run_code(tmp_path):
    marker = tmp_path / "marker"
    source = "{{ ''.__class__.__mro__[1].__subclasses__() }}" + tiny.CHATML
    with pytest.raises(UserError):
        families.open_template(tiny.tokenizer(tmp_path / "t", source))
    assert not marker.exists()


def test_show_gives_back_every_character(templates):
    template = templates["chatml"]
    messages = [{"role": "user", "content": "é 你好 👩‍👩‍👧"}, {"role": "assistant", "content": "the 世界"}]
    shown = template.show(template.encode(messages))
    assert "".join(text for text, _ in shown) == "".join(piece.text for piece in template.pieces(messages))
    assert "".join(text for text, weight in shown if weight) == "the 世界<|im_end|>"


def test_documents_lose_no_token_at_a_cut(templates):
    tokens = templates["plain"].tokens
    document = Document("the cat sat on the mat " * 9)
    whole = [*tokens.encode(document.text), tokens.eos_id]
    parts = chat.encode_document(tokens, document, 16)
    assert [t for part in parts for t in part.ids][: len(whole)] == whole[: sum(len(p.ids) for p in parts)]
    learned = [part.next_ids[i] for part in parts for i, w in enumerate(part.weights) if w]
    assert learned == whole[1:]


def test_tokens_of_a_broken_folder(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json"):
        chat.Tokens.open(tmp_path)
    folder = tiny.tokenizer(tmp_path / "t")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        chat.Tokens.open(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        chat.Tokens.open(Path(folder))
