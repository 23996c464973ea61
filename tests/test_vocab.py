"""Fast tokenizers against the libraries that published the vocabularies: sentencepiece itself, and tiktoken's rule written out here."""

import base64
import io
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import Tokenizer

from glmtune.chat import Tokens
from glmtune.errors import UserError
from glmtune.families import vocab

from . import tiny
from .cases import cases

# --- the published settings ---------------------------------------------------------------------------------------------

MARKS = [("\n", "<n>"), ("\t", "<|tab|>"), *((" " * n, f"<|blank_{n}|>") for n in range(80, 1, -1))]
CHATGLM1 = {"back": ("[gMASK]", "<sop>"), "replace": MARKS}
EARLY_CHATGLM1 = {**CHATGLM1, "offset": 20000}  # before April 2023: 20000 image tokens in front
CHATGLM2 = {
    "special": {"[MASK]": 64789, "[gMASK]": 64790, "[sMASK]": 64791, "sop": 64792, "eop": 64793},
    "front": ("[gMASK]", "sop"),
}
ROLES = {"<|system|>": 64794, "<|user|>": 64795, "<|assistant|>": 64796, "<|observation|>": 64797}
CHATGLM3 = {**CHATGLM2, "special": CHATGLM2["special"] | ROLES}
LLAMA = {"front": ("<s>",)}
GLM4_NAMES = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES]
GLM4_NAMES += ["<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]
GLM4 = {
    "pattern": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "special": {name: 151329 + i for i, name in enumerate(GLM4_NAMES)},
    "front": ("[gMASK]", "<sop>"),
}
PUBLISHED = {
    "chatglm1": ("ice_text.model", vocab.from_sentencepiece, CHATGLM1),
    "chatglm2": ("tokenizer.model", vocab.from_sentencepiece, CHATGLM2),
    "chatglm3": ("tokenizer.model", vocab.from_sentencepiece, CHATGLM3),
    "glm4": ("tokenizer.model", vocab.from_tiktoken, GLM4),
}


def marked(text: str) -> str:
    """What ChatGLM-6B's published code does before SentencePiece sees a text."""
    for blank, mark in MARKS:
        text = text.replace(blank, mark)
    return text


def unmarked(text: str) -> str:
    for blank, mark in MARKS:
        text = text.replace(mark, blank)
    return text


def opened(text: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True
    return tokenizer


def raw(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


# --- small models of our own --------------------------------------------------------------------------------------------

CORPUS = """The quick brown fox jumps over the lazy dog, and the dogs of the people do not mind. How are you today?
People who read [books] eat <apples> at 12:30; it's "fine" — isn't it? x = 3.14159 * (y + 2) / 100 % 7
def fibonacci(number):
    if number < 2: return number
    return fibonacci(number - 1) + fibonacci(number - 2)
for index in range(1024): print(index, "|", index ** 2, {index: [0] * 16})
今天天气很好，我们去公园散步吧。机器学习是人工智能的一个分支，它研究计算机怎样模拟人类的学习行为。
中华人民共和国的首都是北京。你好！请问你叫什么名字？我叫小明，今年二十岁。语言模型能够生成文本，也能够回答问题。
ab abab aab abb aaaa bbbb aaa aabb abba baab abababab aaaaaaaa a aa aaa    four   three  two
""".replace("\t", " ")
KINDS: dict[str, dict[str, Any]] = {
    "bpe": dict(user_defined_symbols=["<n>", "<n>>", "<|tab|>"], control_symbols=["[gMASK]"], byte_fallback=True),
    "bpe without dummy prefix": dict(byte_fallback=True, add_dummy_prefix=False),
    "bpe without bytes": dict(remove_extra_whitespaces=True),
    "unigram": dict(
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True,
        byte_fallback=True,
        user_defined_symbols=[mark for _, mark in MARKS],
        control_symbols=["[MASK]", "[gMASK]", "<sop>", "<eop>", "<ζ>"],  # ζ is not in the text: no piece holds it
    ),
    "unigram without bytes": dict(model_type="unigram", add_dummy_prefix=False),
}


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vocab")
    common = dict(model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True)
    common |= dict(vocab_size=700, hard_vocab_limit=False, num_threads=1, allow_whitespace_only_pieces=True, minloglevel=2)
    made = {}
    for name, kind in KINDS.items():
        writer = io.BytesIO()
        settings = {**common, **kind}
        settings["vocab_size"] = 450 + (256 if kind.get("byte_fallback") else 0) + len(kind.get("user_defined_symbols", ()))
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS.splitlines()), model_writer=writer, **settings)
        made[name] = folder / f"{name}.model"
        made[name].write_bytes(writer.getvalue())
    return made


@pytest.fixture(scope="session")
def pairs(small: dict[str, Path]) -> dict[str, tuple[Tokenizer, sentencepiece.SentencePieceProcessor]]:
    """Ours and the library's, by kind."""
    return {
        kind: (
            opened(vocab.from_sentencepiece(path, replace=MARKS if kind == "unigram" else ())),
            sentencepiece.SentencePieceProcessor(model_file=str(path)),
        )
        for kind, path in small.items()
    }


def edited(path: Path, to: Path, edit: Callable[[Any], object]) -> Path:
    model = proto.ModelProto.FromString(path.read_bytes())
    edit(model)
    to.write_bytes(model.SerializeToString())
    return to


WORDS = """the people|sop|eop| sop|[gMASK]|[MASK]|<sop>|<s>|</s>|<unk>|<pad>|<0x0A>|<0xE4>|<|user|>|<|endoftext|>|<n>|<n>>|<|tab|>
▁|▁▁|你好|今天天气|，|。|！|？|…|—|“|12|3.14|2023|ab|aab|aaa|aaaaa|def f(x):|return|it's|I'M|'ſ|ß|ζ|<ζ>|<ζζ>|[|<|>|{}|ﬁ|²|½|ＡＢ|：|ｶﾞ|한국|नमस्ते|กำ|نص
é|e\u0301|\u0301|\u0302|\u0323|か\u3099|\u1112\u1161\u11ab|ａ\u0301|²\u0301|😀|👍🏽|🇨🇳|1\ufe0f\u20e3|👨\u200d👩\u200d👧|\U00020000|\ue000|\ufffd|\ufeff|\u200b"""
PIECES = [word for line in WORDS.split("\n") for word in line.replace("<|", "<¦").replace("|>", "¦>").split("|")]
PIECES = [piece.replace("¦", "|") for piece in PIECES] + list("|ab 0\t\n\r\x00\x01\x7f\x85\xa0\u3000\u2028")
PIECES += ["\r\n", "  ", "   ", " " * 5, " " * 81, "<|blank_2|>", "<|blank_80|>"]
NASTY = st.lists(st.one_of(st.sampled_from(PIECES), st.characters(exclude_categories=["Cs"])), max_size=12).map("".join)
fuzz = cases(150, derandomize=True)


# --- properties against sentencepiece -----------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_sentencepiece(kind: str, pairs):
    ours, theirs = pairs[kind]

    @fuzz
    @given(NASTY)
    def check(text: str) -> None:
        seen = marked(text) if kind == "unigram" else text
        if not unicodedata.is_normalized("NFC", theirs.Normalize(seen)) and kind == "unigram":
            return  # see test_nfc_composes_more_than_the_charsmap
        ids = theirs.EncodeAsIds(seen)
        tied = kind.startswith("unigram") and sorted(raw(ours, text)) == sorted(
            ids
        )  # float32 breaks a tie of two orders its own way
        assert raw(ours, text) == ids or tied
        if theirs.unk_id() not in ids:
            published = theirs.DecodeIds(ids)
            assert ours.decode(ids) == (unmarked(published) if kind == "unigram" else published)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_typed_look_alikes_are_plain_text(kind: str, pairs):
    ours, theirs = pairs[kind]
    for id in range(theirs.get_piece_size()):
        if theirs.IsControl(id) or theirs.IsByte(id):
            for text in (theirs.IdToPiece(id), f"a{theirs.IdToPiece(id)}b"):
                assert raw(ours, text) == theirs.EncodeAsIds(text)
                assert theirs.IsByte(id) or id not in raw(ours, text)  # the 8 of <0x38> may itself be that byte


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["bpe", "bpe without dummy prefix"])
def test_text_comes_back(kind: str, pairs):
    ours, _ = pairs[kind]

    @fuzz
    @given(NASTY)
    def check(text: str) -> None:
        assert ours.decode(raw(ours, text)) == text.replace("▁", " ")  # U+2581 is SentencePiece's blank: a typed one becomes one

    check()


def test_short_alphabets_find_no_tie_that_breaks_another_way(pairs):
    ours, theirs = pairs["bpe"]

    @fuzz
    @given(st.text("ab ", max_size=40))
    def check(text: str) -> None:
        assert raw(ours, text) == theirs.EncodeAsIds(text)

    check()


def test_nfc_composes_more_than_the_charsmap(pairs):
    ours, theirs = pairs["unigram"]
    for text, composed in [("ﬁ\u0301", "fí"), ("E\u0301\u0323", "Ẹ\u0301"), ("e\x01\u0301", "é"), ("a\n\u0338", "a<n≯")]:
        assert ours.normalizer.normalize_str(text) == "▁" + composed
        assert theirs.Normalize(marked(text)) != "▁" + composed


def test_a_private_character_stands_for_a_user_defined_piece_of_bpe(pairs):
    ours, theirs = pairs["bpe"]
    id = theirs.PieceToId("<n>")
    assert raw(ours, chr(vocab.PRIVATE + id))[1:] == [id] == raw(ours, "<n>")[1:] and ours.decode([id]) == "<n>"


def test_unused_pieces_never_come_out_of_text(small, pairs, tmp_path):
    for kind, word in [("bpe", "▁people"), ("unigram", "▁number"), ("unigram", "天")]:
        id = pairs[kind][1].PieceToId(word)
        assert id and id in raw(pairs[kind][0], word.strip("▁"))

        def discard(model: Any, id: int = id) -> None:
            model.pieces[id].type = proto.ModelProto.SentencePiece.UNUSED

        path = edited(small[kind], tmp_path / "unused.model", discard)
        ours, theirs = opened(vocab.from_sentencepiece(path)), sentencepiece.SentencePieceProcessor(model_file=str(path))
        text = f"the {word} 今天天气".replace("▁", "")
        assert id not in raw(ours, text) and raw(ours, text) == theirs.EncodeAsIds(text)


def test_llama_puts_its_mark_in_front(small):
    ours = opened(vocab.from_sentencepiece(small["bpe"], **LLAMA))
    assert ours.encode("people").ids == [1, *raw(ours, "people")] and ours.decode(ours.encode("people").ids) == "people"


def test_special_tokens_inside_behind_and_instead_of_pieces(small):
    path = small["bpe"]
    size = len(proto.ModelProto.FromString(path.read_bytes()).pieces)
    piece = sentencepiece.SentencePieceProcessor(model_file=str(path)).IdToPiece(size - 1)
    special = {"</s>": 2, "<bos>": 1, "<|im_start|>": size - 1, "sop": size, "[x]": size + 1}
    text = vocab.from_sentencepiece(path, special=special, front=["<bos>", "sop"], back=["</s>"])
    ours = opened(text)
    assert {name: ours.token_to_id(name) for name in special} == special
    assert size - 1 not in raw(ours, piece) and ours.decode([size - 1], skip_special_tokens=False) == "<|im_start|>"
    assert ours.encode("a").ids == [1, size, *raw(ours, "a"), 2]
    assert ours.encode("a", "b").ids == [1, size, *raw(ours, "a"), 2, *raw(ours, "b")]
    assert ours.token_to_id("<s>") is None  # its id is <bos>'s now
    default = Tokenizer.from_str(text)
    assert raw(default, "people sop") == [*raw(ours, "people "), size]  # as a special token it stands alone


# --- the published files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def published(shared: Path) -> Mapping[str, Tokens]:
    def opened(name: str) -> Tokens:
        file, build, options = PUBLISHED[name]
        return Tokens(build(shared / "tokenizers" / name / file, **options), {"apart": True})

    return tiny.Lazy({name: partial(opened, name) for name in PUBLISHED})


def cleaned(text: str) -> str:
    """transformers 4.30 took the blank before punctuation out of whatever it decoded; ours leaves it."""
    return re.sub(r" (\.|\?|!|,|n't|'m|'s|'ve|'re)", r"\1", text)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_goldens(name: str, published, shared):
    tokens = published[name]
    golden = json.loads((shared / "goldens" / f"tokenizer_{name}.json").read_text(encoding="utf-8"))
    known = {
        name: id for name, id in golden["special_ids"].items() if name not in ("<bos>", "<eos>", "<pad>") or name in tokens.special
    }
    assert {name: tokens._raw.token_to_id(name) for name in known} == known
    for row in golden["strings"]:
        ids = tokens.encode(row["text"])
        assert ids == row["ids_raw_model_encode"] == tokens.encode(row["text"], first=False)
        assert cleaned(tokens.decode(ids)) == cleaned(row["decode_of_raw"])
        if not any(look_alike in row["text"] for look_alike in golden["special_ids"]):
            assert tokens._raw.encode(row["text"]).ids == row["ids_encode_default"]


def rows(shared: Path) -> list[str]:
    english = json.loads((shared / "data" / "alpaca_en.json").read_text(encoding="utf-8"))
    chinese = json.loads((shared / "data" / "alpaca_zh.json").read_text(encoding="utf-8"))
    return [row["instruction"] + "\n" + row["output"] for row in english[:500] + chinese[:500]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chatglm1", "chatglm2"])
def test_published_ids_of_real_and_of_nasty_text(name: str, published, shared):
    tokens, first = published[name], name == "chatglm1"
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(shared / "tokenizers" / name / PUBLISHED[name][0]))

    def same(text: str) -> None:
        seen = marked(text) if first else text
        if first and not unicodedata.is_normalized("NFC", theirs.Normalize(seen)):
            return
        ids = tokens.encode(text)
        assert ids == theirs.EncodeAsIds(seen)
        assert tokens.decode(ids) == (unmarked(theirs.DecodeIds(ids)) if first else text.replace("▁", " "))
        assert not set(ids) & set(tokens.special.values())

    for text in rows(shared):
        same(text)
    fuzz(given(NASTY)(same))()


def test_float32_sums_decide_a_near_tie(published, shared):
    wiki = (shared / "data" / "wiki.txt").read_text(encoding="utf-8")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(shared / "tokenizers" / "chatglm1" / "ice_text.model"))
    at = wiki.index("intermingle")
    far, near = wiki[at - at % 3000 : at + 20], wiki[at - 20 : at + 20]
    assert published["chatglm1"].encode(near) == theirs.EncodeAsIds(marked(near))
    ours = published["chatglm1"].encode(far)
    assert ours != theirs.EncodeAsIds(marked(far))
    assert published["chatglm1"].decode(ours) == unmarked(theirs.DecodeIds(theirs.EncodeAsIds(marked(far))))


@pytest.mark.slow
def test_early_chatglm_stands_behind_the_image_tokens(published, shared):
    early = Tokens(
        vocab.from_sentencepiece(shared / "tokenizers" / "chatglm1" / "ice_text.model", **EARLY_CHATGLM1), {"apart": True}
    )
    marks = {"[MASK]": 150000, "[gMASK]": 150001, "<sop>": 150004, "<eop>": 150005, "<pad>": 20003}
    assert {name: early.special[name] for name in marks} == marks
    for text in ["你好，world!\n\n  <n> 👍🏽", "<image_5> <image_19999>", "[gMASK]<sop><0x0A>", *rows(shared)[::50]]:
        assert early.encode(text) == [20000 + id for id in published["chatglm1"].encode(text)]
        assert early.decode(early.encode(text)) == published["chatglm1"].decode(published["chatglm1"].encode(text))
    assert early._raw.encode("a").ids == [20104, 150001, 150004]


@pytest.fixture(scope="session")
def glm4_ids(shared: Path) -> Callable[[str], list[int]]:
    lines = (shared / "tokenizers" / "glm4" / "tokenizer.model").read_bytes().splitlines()
    return tiktoken({base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}, GLM4["pattern"])


def tiktoken(ranks: dict[bytes, int], pattern: str) -> Callable[[str], list[int]]:
    """tiktoken's rule: in each word of the pattern, the pair whose bytes have the lowest rank merges first, the left one of equals."""
    words = regex.compile(pattern)

    def encode(text: str) -> list[int]:
        ids = []
        for word in (word.encode() for word in words.findall(text)):
            parts = [word] if word in ranks else [word[i : i + 1] for i in range(len(word))]
            while len(parts) > 1:
                merged = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
                at = merged.index(min(merged))
                if merged[at] == len(ranks):
                    break
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            ids += [ranks[part] for part in parts]
        return ids

    return encode


@pytest.mark.slow
def test_glm4_ids_are_those_of_tiktoken(published, shared, glm4_ids):
    tokens = published["glm4"]

    def same(text: str) -> None:
        ids = tokens.encode(text)
        assert ids == glm4_ids(text) and tokens.decode(ids) == text

    for text in rows(shared)[::4]:
        same(text)
    fuzz(given(NASTY)(same))()


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_gives_the_same_ids(name: str, published, shared):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(published[name].json))
    golden = json.loads((shared / "goldens" / f"tokenizer_{name}.json").read_text(encoding="utf-8"))
    for row in golden["strings"]:
        assert theirs(row["text"], add_special_tokens=False, split_special_tokens=True).input_ids == row["ids_raw_model_encode"]


# --- tiktoken and broken files, without published ones ------------------------------------------------------------------

RANKS = [bytes([i]) for i in range(256)] + [b"aa", b"th", b"the", b" the", b"aaa", b"ab", b"aaab", "你".encode(), b"\r\n", b"<|"]


def ranks_file(path: Path, tokens: list[bytes] = RANKS) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def test_tiktoken_ranks(tmp_path):
    path = ranks_file(tmp_path / "tokenizer.model")
    special = {"<|a|>": len(RANKS), "[b]": len(RANKS) + 1}
    ours = opened(vocab.from_tiktoken(path, pattern=GLM4["pattern"], special=special, front=["[b]"]))
    theirs = tiktoken({token: rank for rank, token in enumerate(RANKS)}, GLM4["pattern"])
    assert ours.encode("a").ids == [len(RANKS) + 1, ord("a")]

    @fuzz
    @given(st.one_of(NASTY, st.text("ab the<|>[]")))
    def check(text: str) -> None:
        assert raw(ours, text) == theirs(text) and ours.decode(raw(ours, text)) == text

    check()


def test_the_two_formats_are_told_apart(small, tmp_path):
    assert vocab.is_sentencepiece(small["bpe"]) and not vocab.is_sentencepiece(ranks_file(tmp_path / "tokenizer.model"))
    assert vocab.pieces(small["bpe"])["</s>"] == 2 and vocab.count_ranks(tmp_path / "tokenizer.model") == len(RANKS)


def test_broken_files_are_refused_with_a_reason(small, tmp_path):
    whole, path = small["bpe"].read_bytes(), tmp_path / "tokenizer.model"
    pieces = proto.ModelProto.FromString(whole)
    for cleared in ("trainer_spec", "normalizer_spec"):
        pieces.ClearField(cleared)
    for content in [
        b"",
        b"<html>not found</html>",
        b"version https://git-lfs",
        whole[:5000],
        pieces.SerializeToString(),
        whole[:-3],
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.model.*copy"):
            vocab.from_sentencepiece(path)
    edited(small["bpe"], path, lambda model: setattr(model.trainer_spec, "model_type", proto.TrainerSpec.WORD))
    with pytest.raises(UserError, match="kind WORD"):
        vocab.from_sentencepiece(path)
    with pytest.raises(UserError, match="another model's"):
        vocab.from_sentencepiece(small["bpe"], **CHATGLM2)

    cut = ranks_file(path).read_bytes()[:-20]
    for content in [cut, b"", b"<html>not found</html>", whole, cut.replace(b" 7\n", b" 8\n"), cut.splitlines()[0]]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.model.*copy"):
            vocab.from_tiktoken(path, pattern=r"\S+", special={"<|a|>": len(RANKS)})
