import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmtune import quality

from .cases import cases
from .damage import CHINESE, LONG

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("ala", "ero", "ini", "onu", "usa", "emi")]


def text_of(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def near_duplicates(texts: list[str]) -> list[quality.Near]:
    near = quality.NearDuplicates()
    for text in texts:
        near.add(text)
    return list(near.found(enumerate(texts)))


def test_near_duplicates_names_the_earlier_text_and_the_share_of_common_pieces() -> None:
    one = text_of(40, 1)
    changed = one.rsplit(" ", 1)[0] + " other"
    found = near_duplicates([text_of(40, 2), one, text_of(40, 3), changed])
    # 40 words are 38 pieces of three; the last word stands in one of them: 37 common of 39
    assert found == [quality.Near(3, 1, pytest.approx(37 / 39))]


@pytest.mark.parametrize("changes", [0, 1, 2])
def test_few_near_duplicates_are_missed_and_none_is_wrong(changes: int) -> None:
    texts = [text_of(60, seed) for seed in range(200)]
    again = []
    for seed, text in enumerate(texts):
        words = text.split()
        for at in random.Random(seed).sample(range(60), changes):
            words[at] = "other"
        again.append(" ".join(words))
    found = near_duplicates(texts + again)
    assert all(near.later == near.earlier + 200 and near.share >= quality.NEAR for near in found)
    assert len(found) >= 190


def test_short_texts_are_not_near_each_other() -> None:
    assert near_duplicates([f"What is {i}? It is {i}." for i in range(50)]) == []


def test_chinese_texts_are_compared_by_characters() -> None:
    assert [(n.later, n.earlier) for n in near_duplicates([CHINESE * 2, LONG, CHINESE * 2 + "吗？"])] == [(2, 0)]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (LONG, "Latin script"),
        (CHINESE, "Chinese"),
        ("「きょうは天気がいいですね」と言いました。", "Japanese"),
        ("안녕하세요, 반갑습니다.", "Korean"),
        ("Привет, мир", "Cyrillic script"),
        ("مرحبا بالعالم", "Arabic script"),
        ("Voilà, ça marche", "Latin script"),
        ("Translate: " + CHINESE, "Chinese"),
        ("1 + 1 = 2", ""),
        ("…", ""),
        ("", ""),
    ],
)
def test_language(text: str, language: str) -> None:
    assert quality.language(text) == language


@cases(100)
@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=60))
def test_a_histogram_counts_every_length_once(sizes: list[int]) -> None:
    found = quality.lengths(sizes, "tokens")
    bins = found["histogram"]
    assert len(bins) <= 12 and sum(count for _, _, count in bins) == len(sizes)
    assert all(count == sum(low <= size <= high for size in sizes) for low, high, count in bins)
    assert found["shortest"] <= found["p50"] <= found["p95"] <= found["longest"] == max(sizes)


def test_lengths_worked_out_by_hand() -> None:
    found = quality.lengths([3, 4, 5, 12, 21], "tokens")
    assert (found["shortest"], found["p50"], found["longest"], found["mean"]) == (3, 5, 21, 9.0)
    assert found["histogram"][0] == [2, 3, 1] and len(found["histogram"]) == 10  # steps of two: 21 // 1 - 3 // 1 is 18 steps of one
    assert quality.lengths([], "tokens") == {}


# Every control token that the families of this project write (ChatGLM 1 to 3, GLM-4, Llama 2 and 3, Qwen, InternLM, Baichuan, others).
SPECIAL = """[gMASK] [sMASK] [MASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|> <|endoftext|> <|begin_of_image|>
<s> </s> [INST] [/INST] <<SYS>> <</SYS>> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|python_tag|>
<|im_start|> <|im_end|> <tool_call> </tool_call> <eoh> <eoa> <|action_start|> <|plugin|> <reserved_106> <reserved_107>
<start_of_turn> <end_of_turn> <bos> <eos> <pad> <unk> <｜User｜> <｜begin▁of▁sentence｜> [TOOL_CALLS]"""


@pytest.mark.parametrize("token", SPECIAL.split())
def test_special_tokens_of_every_family_are_found_inside_texts(token: str) -> None:
    found = quality.damage({"a": {"b": [f"Yes.{token}No."]}})
    assert list(found) == ["leaked-special-token"] and token in found["leaked-special-token"].message


GOOD = ["Voilà, ça marche : « CAFÉ » à 5 °C.", "NÃO É UM PROBLEMA", "Это русский текст. РСФСР, С° и Р.", "10 µm ± 0.5 Â", "<b>bold</b> & 3 < 4", "Ça déjà vu",
        "#travel", "· · · ····", "你好！很高兴认识你", "骆驼祥子是老舍的小说。", "繁體中文也可以，謝謝您。", "ひらがなとカタカナ", "मैं घर जाता हूँ", "😀 👩‍👩‍👧 é",
        "x <| y |> z", "[1, 2] and <3", "Ελληνικά", "Ünïcödé ÄÖÜ", "tab\there\nline", "한국어 텍스트", "<think>so</think>", "‘quotes’ – “dashes” — … €",
        "AMANHÃ… NÃO!", "café¹² «é»…", "می\u200cخواهم و نمی\u200cخواهم و می\u200cروم", "ภาษา\u200bไทย\u200bง่าย\u200bมาก", "أ \u202a12\u202c ب", "👨\u200d👩\u200d👧\u200d👦 👩\u200d💻",
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "one\u200bword", "Write &amp; in HTML.", "<p>a &lt; b</p>", '{"a": "\\u4f60\\u597d"}', "R&D; AT&T", "\\usepackage",
        "The response: yes", "# Response", "I use <think> tags.", "浣熊很可爱，涓涓细流"]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_good_text_is_not_damaged(text: str) -> None:
    assert quality.damage(text) == {}


@pytest.mark.parametrize("text", ["Yes.", "42", "Paris", "none", "None.", "She said: yes", LONG, CHINESE * 3, "- one\n- two\n- three", "[1] is the first", LONG + "\n\n- Anna",
                                  "```\ncode\n```", '{"a": 1}', LONG + "(see https://example.org/a", "A good song is Hey Jude and Let It Be"])  # fmt: skip
def test_whole_answers_do_not_look_cut(text: str) -> None:
    assert [*quality.answer_damage("q", text)] == []


@cases(100)
@given(st.text(alphabet=st.characters(min_codepoint=0x4E00, max_codepoint=0x9FA5), min_size=5, max_size=30))
def test_chinese_read_in_a_wrong_encoding_is_damage(text: str) -> None:
    assert "encoding-damage" in quality.damage(text.encode().decode("latin-1"))
    assert "encoding-damage" in quality.damage(text.encode().decode("gbk", "replace"))


@pytest.mark.parametrize(
    ("answer", "unit"),
    [
        ("One. " + "Two, three. " * 10, "Two, three."),
        ("好的。" * 40, "好的。"),
        ("-" * 200, ""),
        ("| --- | --- " * 20, ""),
        ("0 1 " * 60, ""),
        ("Row, row, row your boat, " * 3, ""),
        ("la la la la la", ""),
        (LONG * 3, ""),
    ],
)
def test_a_loop_is_what_stands_at_the_end_four_times_over(answer: str, unit: str) -> None:
    assert sorted(quality.repeated_end(answer).split()) == sorted(unit.split())


@pytest.mark.parametrize(
    ("answer", "declined"),
    [
        ("I'm sorry, but as an AI language model, I cannot see it.", True),
        ("As an AI language model, I don't have feelings.", True),
        ("抱歉，我无法回答这个问题。", True),
        ("作为一个人工智能助手，我没有身体。", True),
        ("I'm sorry for your loss.", False),
        ("As an AI researcher, I can tell you.", False),
        ("对不起的英文是 sorry。", False),
    ],
)
def test_answers_that_decline(answer: str, declined: bool) -> None:
    assert quality.declines(answer) == declined


@cases(100)
@given(st.lists(st.integers(0, 50), max_size=40))
def test_lengths_may_come_counted(sizes: list[int]) -> None:
    assert quality.lengths(Counter(sizes), "tokens") == quality.lengths(sizes, "tokens")


def test_near_duplicates_beyond_the_limit_are_counted_and_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "NEAR_LIMIT", 2)
    near = quality.NearDuplicates()
    texts = [text_of(40, 1), text_of(40, 1), text_of(40, 2), text_of(40, 2)]
    for text in texts:
        near.add(text)
    assert (near.count, near.left_out) == (2, 2)
    assert [(one.later, one.earlier) for one in near.found(enumerate(texts))] == [(1, 0)]
