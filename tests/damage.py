"""Kinds of damage done to data files, each at a line that is known, for the proof that `glmtune data check` finds them all."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LONG = "The harbour lies north of the town, and ships have come to it from every side for hundreds of years. "


def places(row: Row) -> tuple[tuple[Row, str], tuple[Row, str]]:
    """Where the (last) question and the (last) answer of a row stand: (object, key) each."""
    for messages, text in (("messages", "content"), ("conversations", "value")):
        if messages in row:
            return (row[messages][-2], text), (row[messages][-1], text)
    for question, answer in (("instruction", "output"), ("question", "answer")):
        if question in row:
            return (row, question), (row, answer)
    raise AssertionError(list(row))


def question(text: Any) -> Callable[[Row], Row]:
    return lambda row: _put(row, 0, text)


def answer(text: Any) -> Callable[[Row], Row]:
    return lambda row: _put(row, 1, text)


def _put(row: Row, which: int, text: Any) -> Row:
    new = deepcopy(row)
    holder, key = places(new)[which]
    holder[key] = text
    if which == 0 and "input" in new:
        new["input"] = ""
    return new


def _key(change: Callable[[str], str] | None) -> Callable[[Row], Row]:
    """The answer's key, misspelt or (None) gone."""

    def done(row: Row) -> Row:
        new = deepcopy(row)
        holder, key = places(new)[1]
        text = holder.pop(key)
        if change is not None:
            holder[change(key)] = text
        return new

    return done


def turns(*roles: str) -> Callable[[Row], Row]:
    return lambda row: {"messages": [{"role": role, "content": f"Text {i}."} for i, role in enumerate(roles)]}


def line(change: Callable[[Row], Any] = lambda row: row, spell: Callable[[str], str] = str) -> Callable[[Row], bytes]:
    return lambda row: spell(json.dumps(change(row), ensure_ascii=False)).encode("utf-8", "surrogatepass")


def _twice(text: str) -> str:
    """The first key of a row once more, at its end."""
    return text[:-1] + ", " + text[1 : text.index(":")] + ': ""}'


@dataclass(frozen=True)
class Damage:
    """Row -> the bytes of its line; `level` "note" where check tells of it beside the problems."""

    kind: str
    level: str
    change: Callable[[Row], bytes]


def error(kind: str, change: Callable[[Row], bytes]) -> Damage:
    return Damage(kind, "error", change)


def warning(kind: str, change: Callable[[Row], bytes]) -> Damage:
    return Damage(kind, "warning", change)


CHINESE = "我们住在北京，每天早上坐地铁去上班。"
DAMAGE: dict[str, Damage] = {
    # JSON
    "truncated": error("malformed-json", line(spell=lambda s: s[: len(s) * 2 // 3])),
    "missing comma": error("malformed-json", line(lambda row: {**row, "a": "x", "b": "y"}, lambda s: s.replace('"x", ', '"x" '))),
    "missing colon": error("malformed-json", line(spell=lambda s: s.replace('": ', '" ', 1))),
    "missing opening brace": error("malformed-json", line(spell=lambda s: s[1:])),
    "missing brace": error("malformed-json", line(spell=lambda s: s[:-1])),
    "wrong quotes": error("malformed-json", line(spell=lambda s: s.replace('"', "'"))),
    "typographic quotes": error("malformed-json", line(spell=lambda s: s.replace('"', "“", 1).replace('"', "”", 1))),
    "trailing comma": error("malformed-json", line(spell=lambda s: s[:-1] + ",}")),
    "bad escape": error("malformed-json", line(answer("@"), lambda s: s.replace('"@"', '"C:\\qdir"'))),
    "quote inside": error("malformed-json", line(answer("@"), lambda s: s.replace('"@"', '"a "b" c"'))),
    "raw tab": error("malformed-json", line(answer("@"), lambda s: s.replace('"@"', '"a\tb"'))),
    "raw line end": error("malformed-json", line(answer("@"), lambda s: s.replace('"@"', '"a\rb"'))),
    "raw NUL": error("malformed-json", line(answer("@"), lambda s: s.replace('"@"', '"a\0b"'))),
    "BOM before the row": error("malformed-json", line(spell=lambda s: "\ufeff" + s)),
    "no JSON": error("malformed-json", lambda row: b"lorem ipsum"),
    "duplicate key": error("duplicate-key", line(spell=_twice)),
    # rows
    "a list": error("not-an-object", lambda row: b'["a", "b"]'),
    "null": error("not-an-object", lambda row: b"null"),
    "missing key": error("missing-key", line(_key(None))),
    "misspelt key": error("missing-key", line(_key(lambda key: key[:-2] + key[-1] + key[-2]))),
    "unknown keys": error("unknown-form", line(lambda row: {"a": 1, "b": 2})),
    "number": error("wrong-type", line(answer(5))),
    "null answer": error("wrong-type", line(answer(None))),
    "NaN": error("wrong-type", line(answer(float("nan")))),
    "weight": error("wrong-type", line(lambda row: {**row, "weight": "heavy"})),
    "nested": error("wrong-type", line(answer({"text": "Yes."}))),
    "huge weight": error("wrong-type", line(lambda row: {**row, "weight": 1e308})),
    "tiny weight": error("wrong-type", line(lambda row: {**row, "weight": 1e-300})),
    "pictures": error("not-text", line(lambda row: {**row, "images": ["a.jpg"]})),
    "sound": error("not-text", line(lambda row: {**row, "audio": {"path": "a.wav", "sampling_rate": 16000}})),
    # turns
    "two questions": error("role-order", line(turns("user", "user", "assistant"))),
    "assistant first": error("role-order", line(turns("assistant", "user", "assistant"))),
    "two systems": error("role-order", line(turns("system", "system", "user", "assistant"))),
    "system later": error("role-order", line(turns("user", "assistant", "system", "user", "assistant"))),
    "no answer": error("role-order", line(turns("user", "assistant", "user"))),
    "unknown role": error("unknown-role", line(turns("user", "bot"))),
    "only system": error("no-user-turn", line(turns("system"))),
    # texts
    "empty question": error("empty-question", line(question(""))),
    "empty answer": error("empty-answer", line(answer(""))),
    "blank answer": error("empty-answer", line(answer(" \n\u3000"))),
    "nan answer": warning("empty-answer", line(answer("nan"))),
    "cut answer": warning("truncated-answer", line(answer(LONG * 2 + LONG[:60].rstrip()))),
    "cut list": warning("truncated-answer", line(answer(LONG + "It has these parts: piers, cranes,"))),
    "cut Chinese": warning("truncated-answer", line(answer(CHINESE * 4 + CHINESE[:7]))),
    "cut code": warning("truncated-answer", line(answer("```python\nprint(1)\n"))),
    "cut JSON": warning("truncated-answer", line(answer('{"name": "harbour", "ships": ["Anna", "Be'))),
    # characters
    "lone surrogate": error("encoding-damage", line(answer("@"), lambda s: s.replace('"@"', '"Yes \\ud83d"'))),
    "GBK bytes": error("encoding-damage", lambda row: line(answer("@@"))(row).replace(b"@@", CHINESE.encode("gbk"))),
    "U+FFFD": warning("encoding-damage", line(answer("The caf\ufffd is closed."))),
    "BOM inside": warning("encoding-damage", line(answer("The \ufeffharbour."))),
    "NUL": warning("encoding-damage", line(answer("The\0 harbour."))),
    "UTF-8 as Latin-1": warning("encoding-damage", line(answer("Le café est fermé.".encode().decode("latin-1")))),
    "UTF-8 as Windows-1252": warning("encoding-damage", line(answer("It’s fine.".encode().decode("cp1252")))),
    "Chinese as Latin-1": warning("encoding-damage", line(answer(CHINESE.encode().decode("latin-1")))),
    "Chinese UTF-8 as GBK": warning("encoding-damage", line(answer("我们住在北京每天上班".encode().decode("gbk", "ignore")))),
    "Russian as Windows-1251": warning("encoding-damage", line(answer("Привет, мир".encode().decode("cp1251", "ignore")))),
    "GBK as Latin-1": warning("encoding-damage", line(question(CHINESE.encode("gbk").decode("latin-1")))),
    "lost for good": warning("encoding-damage", line(answer("锟斤拷锟斤拷"))),
    "escape code": warning("control-characters", line(answer("\x1b[31mred\x1b[0m"))),
    "bell": warning("control-characters", line(question("Ring\x07?"))),
    "<|im_end|>": warning("leaked-special-token", line(answer("Yes.<|im_end|>"))),
    "[gMASK]<sop>": warning("leaked-special-token", line(question("[gMASK]<sop>Hello?"))),
    "</s>": warning("leaked-special-token", line(answer("Yes.</s>"))),
    "[INST]": warning("leaked-special-token", line(question("[INST] Hello? [/INST]"))),
    "<eoh>": warning("leaked-special-token", line(question("Hello?<eoh>"))),
    "<|eot_id|>": warning("leaked-special-token", line(answer("Yes.<|eot_id|>"))),
}


def calling(call: dict[str, Any], result: dict[str, Any]) -> Callable[[Row], Row]:
    """A conversation with a tool call, and what the tool said."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", **call}]}
    last = {"role": "assistant", "content": "The ship is late."}
    return lambda row: {
        "messages": [{"role": "user", "content": "Where is it?"}, call, {"role": "tool", "content": "late", **result}, last]
    }


LATE = {"function": {"name": "find", "arguments": '{"ship": 3}'}}
REFUSED = "Where did the third ship go?"
ODD: dict[str, Damage] = {
    # characters
    "direction turned": warning("hidden-characters", line(answer("The file is called \u202egpj.exe, it seems."))),
    "direction set": warning("hidden-characters", line(answer("It is in \u202aC:\\ships."))),
    "zero width in bulk": warning("hidden-characters", line(question("The\u200b ship\u200b came\u200b late."))),
    "joiners in words": warning("hidden-characters", line(answer("The sh\u200cip ca\u200cme la\u200dte."))),
    "tag characters": warning("hidden-characters", line(question("Where?\U000e0041\U000e0042"))),
    "one word": warning("encoding-damage", line(answer("A caf" + "é".encode().decode("latin-1")))),
    "one word in capitals": warning("encoding-damage", line(answer("CAF" + "É".encode().decode("cp1252")))),
    "one Chinese character": warning("encoding-damage", line(answer("It is " + "好".encode().decode("cp1252")))),
    "two Chinese characters as GBK": warning("encoding-damage", line(answer("你好".encode().decode("gbk")))),
    "two Chinese characters as Latin-1": warning("encoding-damage", line(answer("你好".encode("gbk").decode("latin-1")))),
    "emoji": warning("encoding-damage", line(answer("Fine " + "😊".encode().decode("cp1252", "replace")))),
    "GBK as UTF-8": warning("encoding-damage", line(answer("你好".encode("gbk").decode("utf-8", "replace")))),
    # marks
    "### Response:": warning("leaked-prompt-mark", line(answer("It came.\n\n### Response:\nIt went."))),
    "### Instruction:": warning("leaked-prompt-mark", line(question("### Instruction:\nName the ship."))),
    "preamble": warning("leaked-prompt-mark", line(question("Below is an instruction that describes a task. Name it."))),
    "<think>": warning("leaked-prompt-mark", line(answer("<think>They want to know the ship.\nThe third."))),
    "</think>": warning("leaked-prompt-mark", line(answer("They want to know the ship.\n</think>\nThe third."))),
    "misspelt token": warning("leaked-prompt-mark", line(answer("The third.<|im_end>"))),
    "escaped token": warning("leaked-prompt-mark", line(answer("The third.&lt;|im_end|&gt;"))),
    "[INST] alone": warning("leaked-special-token", line(answer("The third. [INST]"))),
    "entities": warning("escaped-text", line(answer("Salt &amp; tea, at less than &#39;five&#39;."))),
    "escaped Chinese": warning("escaped-text", line(answer("They call it \\u4f60\\u597d there."))),
    # answers
    "loop": warning("repeated-text", line(answer("It came. " + "The ship was late. " * 9))),
    "Chinese loop": warning("repeated-text", line(answer(CHINESE * 7 + CHINESE[:6]))),
    "question again": warning("answer-is-question", line(lambda row: answer(REFUSED)(question(REFUSED)(row)))),
    **{text: warning("empty-answer", line(answer(text))) for text in ("N/A", "TODO", "None", "null", "<nooutput>")},
    # tools
    "no such call": warning("tool-result", line(calling({"id": "a1", **LATE}, {"tool_call_id": "a2"}))),
    "no call": warning("tool-result", line(turns("user", "assistant", "tool", "assistant"))),
    "arguments": error("tool-turn", line(calling({"function": {"name": "find", "arguments": "ship 3"}}, {}))),
}
ALL = DAMAGE | ODD


BROKEN = {
    name: one
    for name, one in DAMAGE.items()
    if one.kind == "malformed-json" and name not in ("bad escape", "quote inside", "raw tab", "raw line end", "raw NUL")
}


def spoil(rows: list[Row], path: Path, layout: str, damages: dict[str, Damage] = DAMAGE) -> dict[int, tuple[str, Damage]]:
    """Writes the rows, one a line, with every kind of damage in one of them, and says in which line.

    For DAMAGE also an exact duplicate, a near duplicate and a question with two answers, each of a row that stays whole.
    """
    lines = [line()(row) for row in rows]
    first, done = (2 if layout == "array" else 1), {}
    damages = {**damages, **(_doubles(rows) if damages is DAMAGE else {})}
    assert len(rows) >= 2 * len(damages), "every second row is damaged"
    for number, (name, damage) in enumerate(damages.items()):
        at = 2 * number + 1
        lines[at] = damage.change(rows[at])
        done[at + first] = (name, damage)
    if layout == "array":
        path.write_bytes(b"[\n" + b",\n".join(lines) + b"\n]\n")
    else:
        path.write_bytes(b"\n".join(lines) + b"\n")
    return done


def _doubles(rows: list[Row]) -> dict[str, Damage]:
    def text(row: Row, which: int) -> str:
        holder, key = places(row)[which]
        return holder[key]

    longest = max(rows[::2], key=lambda row: len(text(row, 1)))
    again = answer(text(longest, 1) + " Yes.")(question(text(longest, 0) + " Please!")(longest))
    return {
        "exact duplicate": warning("exact-duplicate", lambda row: line()(rows[0])),
        "near duplicate": Damage("near-duplicates", "note", lambda row: line()(again)),
        "two answers": Damage("same-question-other-answer", "note", lambda row: line(answer("Quite another answer."))(rows[2])),
    }
