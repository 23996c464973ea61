"""Tool calls: how rows write them, how a record holds them, and how each family's chat format writes them.

In a record (Turn.extra): the first turn may carry "tools", the schemas as the row gave them; an assistant turn's "tool_calls" are
[{"name": ..., "arguments": {...}}] (an "id" stays); a tool turn has the "name" of what it answers. `for_template` rewrites the turns for
a chat format, by what `supports` found that format to know:

    calls     the template writes `tools` and `tool_calls` itself, in OpenAI's shape (Qwen2.5 ...)
    one call  the same, but one call in a turn and no text beside it (Llama 3.1)
    chatglm3  name in the header line, ```python tool_call(arg=value)``` as content; the schemas are in the system turn's "tools"
    glm4      name in the header line, the arguments as JSON; the schemas are system text under "# 可用工具"
    system    nothing: schemas as JSON in the system turn, a call is JSON text, results are a user turn
    question  the same for a format without system turns: the schemas stand before the first question

Facts: THUDM/ChatGLM3 finetune_chatmodel_demo/preprocess_utils.py (2023-10); THUDM/GLM-4 basic_demo/glm_server.py and the chat_template
of glm-4-9b-chat (2024-06); the chat templates of Qwen2.5 and Llama 3.1 (2024).
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from .errors import UserError
from .records import Turn

Supports = Literal["calls", "one call", "chatglm3", "glm4", "system", "question"]
Call = dict[str, Any]

CHATGLM3_SYSTEM = "Answer the following questions as best as you can. You have access to the following tools:"
GLM4_SYSTEM = "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，你的任务是针对用户的问题和要求提供适当的答复和支持。"
GLM4_HEADING, GLM4_TAIL = "\n\n# 可用工具", "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
HEADING = 'You can call these tools; a call is one line of JSON: {"name": ..., "arguments": {...}}'
RESULT = "Tool result ({name}):\n{text}"

# --- rows ---------------------------------------------------------------------------------------------------------------


def read_calls(value: Any) -> list[Call] | None:
    """Calls as a row writes them: an object or a list, perhaps as a JSON string, bare or in OpenAI's shape; None for anything else."""
    value = loaded(value)
    made = [_read_call(_keys_of(one)) for one in (value if isinstance(value, list) else [value])]
    calls = [call for call in made if call is not None]
    return calls if calls and len(calls) == len(made) else None


def unread_keys(value: Any) -> list[str]:
    """The keys of the first call that `read_calls` cannot read."""
    value = loaded(value)
    given = map(_keys_of, value if isinstance(value, list) else [value])
    return next((list(keys) for keys in given if keys and _read_call(keys) is None), [])


def _keys_of(value: Any) -> dict[str, Any]:
    """A call in one level, whether it stands under "function" or not; {} for what is no object."""
    value = loaded(value)
    if not isinstance(value, dict):
        return {}
    inner = loaded(value.get("function"))
    return {**{key: one for key, one in value.items() if key != "function"}, **inner} if isinstance(inner, dict) else value


def _read_call(keys: dict[str, Any]) -> Call | None:
    name, given = keys.get("name"), [keys[key] for key in ("arguments", "parameters") if keys.get(key) not in (None, "")]
    if not given and keys.keys() <= _CALL_KEYS:  # else they may stand under the other key
        given = [{}]
    arguments = loaded(given[0]) if len(given) == 1 else None
    if not (isinstance(name, str) and name and isinstance(arguments, dict)):
        return None
    call = {"name": name, "arguments": arguments}
    return {**call, "id": keys["id"]} if isinstance(keys.get("id"), str) else call


_CALL_KEYS = {"name", "arguments", "parameters", "id", "type", "index"}


def read_schemas(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a row: a list of objects with a name, perhaps as a JSON string; [] for nothing, None for anything else."""
    value = loaded(value) if value not in (None, "") else []
    if isinstance(value, list) and all(isinstance(one, dict) and isinstance(_schema(one).get("name"), str) for one in value):
        return value
    return None


def loaded(value: Any) -> Any:
    """What JSON in a string says, None where it cannot be used; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        value = json.loads(value)
    except (ValueError, RecursionError):
        return None
    return None if is_deep(value) else value


DEEPEST = 200  # far below what Python can recurse into


def is_deep(value: Any) -> bool:
    """Whether lists and objects are nested so deep that writing them could fail."""
    level = [[value]]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, (dict, list))  # dict | list takes twice as long, and every row pays it
        ]
        if not level:
            return False
    return True


def answered(turns: Sequence[Turn]) -> dict[int, tuple[int, Call]]:
    """Which call each tool turn answers: the turn's position -> (the call's number in the conversation, the call)."""
    found: dict[int, tuple[int, Call]] = {}
    waiting: list[tuple[int, Call]] = []
    count = 0
    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            waiting = list(enumerate(_calls(turn), count))
            count += len(waiting)
        elif turn.role == "tool" and waiting:
            found[i] = next((one for one in waiting if _is_for(turn, one[1])), waiting[0])
            waiting.remove(found[i])
    return found


def loose_results(turns: Sequence[Turn]) -> list[str]:
    """What is wrong with tool turns: those that no call asked for, and those whose tool_call_id names no call. Numbers from 1."""
    told = []
    calls = answered(turns)
    for i, turn in enumerate(turns):
        if turn.role != "tool":
            continue
        given = turn.extra.get("tool_call_id")
        if i not in calls:
            told.append(f"turn {i + 1} is a tool result without a call")
        elif given and "id" in calls[i][1] and calls[i][1]["id"] != given:
            told.append(f"turn {i + 1} has the tool_call_id {given!r}, which names no call that waits for a result")
    return told


def with_names(turns: Sequence[Turn]) -> list[Turn]:
    """Every tool turn with the name of what it answers."""
    calls = answered(turns)
    return [
        replace(turn, extra={"name": _name(calls[i][1]), **turn.extra}) if i in calls and _named(calls[i][1]) else turn
        for i, turn in enumerate(turns)
    ]


def _is_for(turn: Turn, call: Call) -> bool:
    given = turn.extra.get("tool_call_id")
    return (
        given == call["id"] if given and "id" in call else bool(turn.extra.get("name")) and turn.extra["name"] == call.get("name")
    )


# --- chat formats ---------------------------------------------------------------------------------------------------------


def concerns(turns: Iterable[Turn]) -> bool:
    return any(turn.role == "tool" or turn.extra.get("tools") or turn.extra.get("tool_calls") for turn in turns)


def for_template(turns: Sequence[Turn], supports: Supports) -> tuple[Turn, ...]:
    """The turns as that chat format wants them. Doing it twice changes nothing more."""
    schemas = next((turn.extra["tools"] for turn in turns if turn.extra.get("tools")), [])
    made = with_names(turns)
    if supports in ("calls", "one call"):
        made = [_with(turn, tools=[_openai(one) for one in turn.extra.get("tools", ())]) for turn in made]
        return tuple(_in_openai_shape(made if supports == "calls" else _one_by_one(made)))
    if supports == "chatglm3":
        made = [_header_and(_python, turn) for turn in _one_by_one(made)]
        return _with_system(made, CHATGLM3_SYSTEM, "", tools=schemas) if schemas else tuple(made)
    if supports == "glm4":
        made = [_header_and(_json, turn) for turn in _one_by_one(made)]
        listed = [f"\n\n## {one['name']}\n\n{_json(one, indent=4)}{GLM4_TAIL}" for one in map(_schema, schemas)]
        return _with_system(made, GLM4_SYSTEM, GLM4_HEADING + "".join(listed)) if schemas else tuple(made)
    return _as_text(made, schemas, supports)


def _with_system(turns: list[Turn], text: str, more: str, **extra: Any) -> tuple[Turn, ...]:
    """The row's own system text, else `text`, with `more` behind it; the tools stand in no other turn."""
    turns = [_with(turn, tools=None) for turn in turns]
    own = turns.pop(0) if turns[0].role == "system" else Turn("system", "")
    return (replace(own, text=(own.text or text) + more, extra={**own.extra, **extra}), *turns)


def _one_by_one(turns: list[Turn]) -> list[Turn]:
    """One call in a turn, with nothing beside it; its result follows it."""
    calls, made, count, i = answered(turns), [], 0, 0
    while i < len(turns):
        turn, i = turns[i], i + 1
        own = _calls(turn)
        count += len(own)
        if not own or (len(own) == 1 and not turn.text):
            made.append(turn)
            continue
        if turn.text:
            made.append(_with(turn, tool_calls=None))
        results = []
        while i < len(turns) and turns[i].role == "tool":
            results.append((calls.get(i, (count - 1,))[0], turns[i]))
            i += 1
        for number, call in enumerate(own, count - len(own)):
            made.append(_with(replace(turn, text=""), tool_calls=[call]))
            made += [result for answers, result in results if answers == number]
    return made


def _header_and(write: Callable[[Any], str], turn: Turn) -> Turn:
    """A call as ChatGLM writes it: the name in the header line (`metadata`), the arguments as the content."""
    if not _calls(turn):
        return turn
    call = _calls(turn)[0]
    return _with(replace(turn, text=write(_arguments(call))), tool_calls=None, metadata=_name(call))


def _python(arguments: dict[str, Any]) -> str:
    plain = all(key.isidentifier() for key in arguments)
    written = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) if plain else f"**{arguments!r}"
    return f"```python\ntool_call({written})\n```"


def _in_openai_shape(turns: list[Turn]) -> list[Turn]:
    """tool_calls and tool_call_id; a call without an id gets one (of nine characters, as Mistral's templates ask)."""
    calls, count, made = answered(turns), 0, []
    for i, turn in enumerate(turns):
        own = [
            {"id": f"call{count + n:05d}", **(_openai(call, arguments=_arguments(call)) if _named(call) else call)}
            for n, call in enumerate(_calls(turn))
        ]
        count += len(own)
        if i in calls:
            turn = replace(turn, extra={"tool_call_id": calls[i][1].get("id", f"call{calls[i][0]:05d}"), **turn.extra})
        made.append(_with(turn, tool_calls=own))
    return made


def _openai(one: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A schema or a call under "function"; what has no name is left as it is."""
    if not _named(one):
        return one
    rest = {key: value for key, value in one.items() if key in ("id", "type")}
    inner = {key: value for key, value in _schema(one).items() if key != "id"}
    return {"type": "function", **rest, "function": {**inner, **more}}


def _as_text(turns: list[Turn], schemas: list[dict[str, Any]], supports: Supports) -> tuple[Turn, ...]:
    made: list[Turn] = []
    before = ""
    for turn in turns:
        own, role = _calls(turn), turn.role
        turn = _with(turn, tools=None, tool_calls=None)
        if own:
            written = [_json({"name": _name(call), "arguments": _arguments(call)}) for call in own]
            turn = replace(turn, text="\n".join([turn.text, *written] if turn.text else written))
        if role == "tool":
            turn = Turn("user", RESULT.format(name=turn.extra.get("name", "tool"), text=turn.text))
            if before == "tool":  # several results are one user turn
                turn = replace(made[-1], text=f"{made.pop().text}\n\n{turn.text}")
        made.append(turn)
        before = role
    if not schemas:
        return tuple(made)
    listed = "\n".join([HEADING, *(_json(_schema(one)) for one in schemas)])
    if supports == "question" and made[0].role != "system":
        return (replace(made[0], text=f"{listed}\n\n{made[0].text}"), *made[1:])
    has_text = made[0].role == "system" and made[0].text
    return _with_system(made, "", f"\n\n{listed}" if has_text else listed)


def _with(turn: Turn, **keys: Any) -> Turn:
    """The turn with other keys in `extra`; what is empty goes."""
    if not any(value or key in turn.extra for key, value in keys.items()):
        return turn
    return replace(turn, extra={key: value for key, value in {**turn.extra, **keys}.items() if key not in keys or value})


def _calls(turn: Turn) -> list[Call]:
    return turn.extra.get("tool_calls") or [] if turn.role == "assistant" else []


def _schema(tool: dict[str, Any]) -> dict[str, Any]:
    inner = tool.get("function", tool)
    return inner if isinstance(inner, dict) else tool


def _named(call: Call) -> bool:
    return "name" in _schema(call)


def _name(call: Call) -> str:
    if not _named(call):
        raise UserError(f'a tool call needs a name: {{"name": ..., "arguments": {{...}}}}, not {_json(call)}')
    return _schema(call)["name"]


def _arguments(call: Call) -> dict[str, Any]:
    arguments = _schema(call).get("arguments")
    arguments = {} if arguments in (None, "") else loaded(arguments)
    if not isinstance(arguments, dict):
        raise UserError(f"the arguments of a tool call must be an object (or that as JSON), not in {_json(call)}")
    return arguments


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


# --- what a chat format knows ---------------------------------------------------------------------------------------------


def supports(jinja: str, parts: Callable[[Sequence[Turn], bool], Sequence[Any]]) -> Supports:
    """What a chat format knows about tools: its template mentions it, and a trial conversation comes out whole."""

    def knows(kind: Supports, turns: Sequence[Turn], *marks: str) -> bool:
        try:
            text = "".join(part.text for part in parts(for_template(turns, kind), False))
        except UserError:
            return False
        return all(mark in text for mark in marks)

    call = {"name": "try_it", "arguments": {"what": "apple"}}
    asked = Turn("user", "a", extra={"tools": [{"name": "tool_of_trial", "description": "b", "parameters": {"type": "object"}}]})
    one = (asked, Turn("assistant", "", extra={"tool_calls": [call]}), Turn("tool", "pear"), Turn("assistant", "c"))
    two = (asked, Turn("assistant", "d", extra={"tool_calls": [call, call]}), Turn("tool", "pear"), *one[2:])
    marks = ("tool_of_trial", "try_it", "apple", "pear")
    if "tool_calls" in jinja and "tools" in jinja:
        if knows("calls", two, *marks) and knows("calls", one, *marks):
            return "calls"
        if knows("one call", one, *marks):
            return "one call"
    if "metadata" in jinja and "observation" in jinja:
        kind: Supports = "chatglm3" if "[gMASK]sop" in jinja else "glm4"
        if knows(kind, one, *marks, "<|observation|>"):
            return kind
    return "system" if knows("system", (Turn("system", "e"), *one), *marks) else "question"
