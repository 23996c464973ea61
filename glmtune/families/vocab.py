"""Published vocabularies as the text of a tokenizer.json: SentencePiece models (BPE, Unigram) and tiktoken ranks.

The ids are those of the libraries that published them (tests/test_vocab.py holds both sides), on the raw path: `encode_special_tokens`
on and `add_special_tokens` off. There a typed `<s>`, `[gMASK]` or `<0x0A>` is plain text.

What the tokenizers library cannot do as SentencePiece does (each pinned by a test):

- A charsmap's rules for several characters (e + accent) are made by NFC behind its rules for one. NFC also composes what no rule
  names: accents in an unusual order, the accent behind a ligature.
- Unigram scores are summed in float64 where SentencePiece sums float32: at a tie (the same pieces in another order) or a near tie far
  into a long text, the cut may differ (ChatGLM-6B: 2 words in 4 million characters). The text it decodes to is the same.
- A user-defined piece of a BPE model stands in the vocabulary as a private-use character, so that nothing merges with it; typing
  that very character gives the piece.

Not rebuilt, since no known file needs it: BPE merges that pass through an UNUSED piece, and user-defined pieces of BPE that overlap
one another in a text.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError

NEVER = -1e4  # a Unigram score that loses against any other way to write the same characters
PRIVATE = 0xF0000  # first private-use character of plane 15; with plane 16 there is room for 131,072 ids
CUT = "\x01"  # parts a letter from its accent, then goes: the Precompiled normalizer reads a cluster of both as its first character
JOINING = r"(?=[\p{M}\n\x{200C}\x{200D}\x{FF9E}\x{FF9F}\x{0E33}\x{0EB3}])"  # characters that join the cluster before them
NORMALIZERS = ("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")
SINGLE_WORD = ("sop", "eop")  # ChatGLM2's marks are plain letters: without this "people" would hold one


def is_sentencepiece(path: Path) -> bool:
    """Whether a `tokenizer.model` is SentencePiece's (ChatGLM2, ChatGLM3) rather than tiktoken's text (GLM-4), by its first byte."""
    with path.open("rb") as file:
        return file.read(1) == b"\n"  # field 1 of the protobuf: the first piece


def pieces(path: Path) -> dict[str, int]:
    """The pieces of a SentencePiece model and their ids. Raises UserError for a broken file."""
    return {piece.piece: id for id, piece in enumerate(_read(path).pieces)}


def count_ranks(path: Path) -> int:
    """How many tokens a tiktoken file holds; special tokens stand behind them. Raises UserError for a broken file."""
    return len(_ranks(path))


def from_sentencepiece(
    path: Path,
    *,
    special: Mapping[str, int] | None = None,
    front: Sequence[str] = (),
    back: Sequence[str] = (),
    replace: Sequence[tuple[str, str]] = (),
    offset: int = 0,
) -> str:
    """The tokenizer.json of a SentencePiece model.

    special: names and ids of special tokens, of pieces in the model (which they rename) or right behind them; the model's CONTROL and
    UNKNOWN pieces are special without being named. front, back: special tokens put around a text where they are asked for.
    replace: (text, user-defined piece) pairs, made in this order before normalisation and undone by the decoder.
    offset: so many `<image_i>` stand before the pieces (ChatGLM-6B before April 2023: 20000).

    Source: sentencepiece's normalizer.cc, bpe_model.cc, unigram_model.cc. Raises UserError for a broken file, one that does not hold
    what `special` says, and kinds of model that no ChatGLM relative uses.
    """
    proto, model = _proto(), _read(path)
    kinds, rules = proto.ModelProto.SentencePiece, model.normalizer_spec
    numbered = list(enumerate(model.pieces, start=offset))
    unknown = next(id for id, piece in numbered if piece.type == kinds.UNKNOWN)
    special = {p.piece: id for id, p in numbered if p.type in (kinds.CONTROL, kinds.UNKNOWN)} | dict(special or {})
    names = {id: name for name, id in special.items()}
    special = {name: id for id, name in names.items()}  # a name that `special` gives to a CONTROL piece takes the place of its own
    names = {id: f"<|unused_{id}|>" for id, p in numbered if p.type == kinds.UNUSED} | names
    vocabulary = [f"<image_{i}>" for i in range(offset)] + [names.get(id, piece.piece) for id, piece in numbered]
    _check_specials(path, special, vocabulary)
    normal = {id: piece for id, piece in numbered if id not in names and piece.type == kinds.NORMAL}
    whole = {id: piece.piece for id, piece in numbered if id not in names and piece.type == kinds.USER_DEFINED}

    normalizer = [_replace(text, mark) for text, mark in replace] + _normalizer(rules)
    decoder = [_replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if rules.add_dummy_prefix or rules.remove_extra_whitespaces:
        decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    decoder += [_replace(mark, text) for text, mark in replace]
    guard, byte_fallback = None, model.trainer_spec.byte_fallback
    if model.trainer_spec.model_type == proto.TrainerSpec.UNIGRAM:
        best = max(0.0, *(piece.score for piece in normal.values()))  # unigram_model.cc starts from FLT_MIN, not from -FLT_MAX
        scores = {id: piece.score for id, piece in normal.items()}
        scores |= {id: len(text.encode()) * best - 0.1 for id, text in whole.items()}
        never = [name for id, name in enumerate(vocabulary) if id not in scores]
        guard = _guard(never, [piece.piece for piece in normal.values()], list(whole.values()), byte_fallback)
        scored = [(name, scores.get(id, NEVER)) for id, name in enumerate(vocabulary)]
        tree = {"type": "Unigram", "unk_id": unknown, "vocab": scored, "byte_fallback": byte_fallback}
    else:
        for id, text in sorted(whole.items(), key=lambda item: -len(item[1])):
            vocabulary[id] = chr(PRIVATE + id)
            normalizer.append(_replace(text, vocabulary[id]))
            decoder.insert(0, _replace(vocabulary[id], text))
        ranked = [piece.piece for piece in sorted(normal.values(), key=lambda piece: -piece.score)]
        tree = _bpe(vocabulary, ranked, unk_token=vocabulary[unknown], fuse_unk=True, byte_fallback=byte_fallback)
    steps = {"normalizer": {"type": "Sequence", "normalizers": normalizer}, "decoder": {"type": "Sequence", "decoders": decoder}}
    return _json(tree, special, front, back, pre_tokenizer=guard, **steps)


def from_tiktoken(path: Path, *, pattern: str, special: Mapping[str, int], front: Sequence[str] = ()) -> str:
    """The tokenizer.json of tiktoken ranks (lines of base64 bytes and rank). `special`: names and ids, right behind the ranks.

    Source: tiktoken's _educational.py: a word of `pattern` that has a rank is that token, else the pair of the lowest rank merges first.
    Raises UserError for a broken or cut file.
    """
    ranks = _ranks(path)
    printable = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # ByteLevel's alphabet (GPT-2): one printable character per byte
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: byte for byte in printable} | {byte: 256 + i for i, byte in enumerate(others)}
    vocabulary = [token.decode("latin-1").translate(alphabet) for token in ranks]
    _check_specials(path, special, vocabulary)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    words = {"type": "Sequence", "pretokenizers": [_split(pattern), level]}
    return _json(_bpe(vocabulary, vocabulary, ignore_merges=True), special, front, (), pre_tokenizer=words, decoder=level)


def _proto() -> Any:
    """The module of SentencePiece's protobuf classes, which protobuf makes while it is imported (so no checker knows them)."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2


def _read(path: Path) -> Any:
    """The file's ModelProto. Raises UserError for what is not one, or not one that is understood here."""
    from google.protobuf.message import DecodeError

    proto = _proto()
    model = proto.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise UserError(f"{path}: not a SentencePiece model, or cut short; wanted the published file; copy it again") from None
    trainer, rules = model.trainer_spec, model.normalizer_spec
    unknown = [piece for piece in model.pieces if piece.type == proto.ModelProto.SentencePiece.UNKNOWN]
    complete = model.HasField("trainer_spec") and model.HasField("normalizer_spec")  # they stand behind the pieces
    if len(unknown) != 1 or not complete:
        raise UserError(
            f"{path}: a SentencePiece model without its <unk> or its settings; it is cut short, copy the published file again"
        )
    kind = proto.TrainerSpec.ModelType.Name(trainer.model_type)
    charsmap_known = not rules.precompiled_charsmap or rules.name in NORMALIZERS
    if kind not in ("BPE", "UNIGRAM") or trainer.treat_whitespace_as_suffix or not charsmap_known:
        raise UserError(
            f"{path}: a SentencePiece model of kind {kind}, normalizer '{rules.name}'; wanted BPE or UNIGRAM, blanks in front of words, "
            f"and a normalizer of {', '.join(NORMALIZERS)}; put a tokenizer.json beside the weights instead"
        )
    return model


def _ranks(path: Path) -> list[bytes]:
    """The tokens of a tiktoken file, by rank."""
    problem, ranks = "its ranks have gaps, or a single byte has none", {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        problem, ranks = f"line {len(ranks) + 1} is {line[:40]!r}", {}
    if not ranks.keys() >= {bytes([byte]) for byte in range(256)} or [*ranks.values()] != [*range(len(ranks))]:
        wanted = "wanted lines of base64 bytes and rank, in order; copy the file again"
        raise UserError(f"{path}: not a whole list of tiktoken ranks ({problem}); {wanted}")
    return list(ranks)


def _check_specials(path: Path, special: Mapping[str, int], vocabulary: Sequence[str]) -> None:
    """Raises UserError where names and ids do not fit the vocabulary: the tokenizers library would silently number them anew."""
    size = len(vocabulary)
    at = {name: id for id, name in enumerate(vocabulary)}
    behind = sorted(id for id in special.values() if id >= size)
    wrong = {name: id for name, id in special.items() if at.get(name, id) != id}
    if wrong or behind != [*range(size, size + len(behind))]:
        raise UserError(
            f"{path}: holds {size} tokens; that does not fit the ids of the special tokens {wrong or dict(special)}; "
            "the file is cut short or another model's; copy the published one"
        )


def _normalizer(rules: Any) -> list[dict[str, Any]]:
    """normalizer.cc, step by step."""
    blank = "▁" if rules.escape_whitespaces else " "
    steps: list[dict[str, Any]] = []
    if rules.precompiled_charsmap:
        charsmap = base64.b64encode(rules.precompiled_charsmap).decode()
        steps += [_replace(JOINING, CUT, "Regex"), {"type": "Precompiled", "precompiled_charsmap": charsmap}]
        steps += [_replace(CUT, ""), {"type": "NFC"}]
    if rules.remove_extra_whitespaces:
        steps += [_replace(r"\A +", "", "Regex"), _replace(" {2,}", " ", "Regex")]
    steps.append(_replace(" ", blank))
    if rules.remove_extra_whitespaces:
        steps.append(_replace(rf"{blank}+\z", "", "Regex"))
    return steps + ([{"type": "Prepend", "prepend": blank}] if rules.add_dummy_prefix else [])


def _guard(never: list[str], normal: list[str], whole: list[str], byte_fallback: bool) -> dict[str, Any] | None:
    """Cuts a text at characters of pieces that are never typed which no normal piece holds (but not inside a user-defined one).

    Only an unknown token can cover such a character, so the cut changes nothing; without it a typed `[gMASK]` would score better as the
    special token than with an unknown character in it. Neighbours are cut apart too where each becomes its own bytes: `[MASK]` may hold
    nothing but such characters.
    """
    strange = set("".join(never)) - set("".join(normal))
    if not strange:
        return None
    spared = sorted((text for text in whole if strange & set(text)), key=len, reverse=True)
    return _split(
        "|".join([*map(re.escape, spared), "[" + "".join(map(re.escape, sorted(strange))) + "]" + ("" if byte_fallback else "+")])
    )


def _bpe(vocabulary: Sequence[str], ranked: Sequence[str], **settings: Any) -> dict[str, Any]:
    """A BPE model in which any two neighbours merge whose concatenation is a piece, the first of `ranked` first.

    A piece has all its cuts in two as merges. Their order does not matter: what happens inside a piece's span does not depend on what
    stands around it, so only one of them is ever reached.
    """
    known = set(ranked)
    cuts = ((piece[:i], piece[i:]) for piece in ranked for i in range(1, len(piece)))
    merges = [[left, right] for left, right in cuts if left in known and right in known]
    return {"type": "BPE", **settings, "vocab": {name: id for id, name in enumerate(vocabulary)}, "merges": merges}


def _json(model: dict[str, Any], special: Mapping[str, int], front: Sequence[str], back: Sequence[str], **parts: Any) -> str:
    added = [
        {
            "id": id,
            "content": name,
            "single_word": name in SINGLE_WORD,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for name, id in sorted(special.items(), key=lambda item: item[1])
    ]
    around = [[{"SpecialToken": {"id": name, "type_id": 0}} for name in names] for names in (front, back)]
    first, second = ({"Sequence": {"id": id, "type_id": 0}} for id in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [*around[0], first, *around[1]],
        "pair": [*around[0], first, *around[1], second],
        "special_tokens": {name: {"id": name, "ids": [special[name]], "tokens": [name]} for name in (*front, *back)},
    }
    whole = {"version": "1.0", "added_tokens": added, "normalizer": None, **parts, "post_processor": template, "model": model}
    return json.dumps(whole, ensure_ascii=False)


def _replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
