"""What a shell script runs: each command as its words, as bash reads them (POSIX Shell Command Language, 2; bash manual, 3). Nothing is run.

Followed are quotes, comments, continued lines, redirections, here-documents, variables, arrays, functions, `for` over words, `eval` and
`bash -c`. What only a running shell can fill (a variable of the environment, `$(date)`, one that is set in two branches) stays in the
word as it is written, between two UNKNOWN marks, so that nobody takes it for a value. Both branches of a condition are read.
"""

import fnmatch
import re
from dataclasses import dataclass, field

UNKNOWN = "\0"  # no shell text can hold one
_NAME = re.compile(r"[A-Za-z_]\w*")
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_DECLARE = ("export", "declare", "local", "readonly", "typeset")
_REDIRECT = re.compile(r"(?:\d*(?=[<>]))?(<<<|<<-|<<|<>|<&|>>|>&|>\||&>>|&>|[<>](?!\())")
_OPERATOR, _BLANKS = re.compile(r"[;&|]+"), re.compile(r"[ \t\n]+|[^ \t\n]+")
_DOLLAR, _LIST = re.compile(r"\$[\w({@*#?$!-]"), re.compile(r"\$(@|\{\w*\[@\]\}|\{@\})")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "e": "\x1b", "E": "\x1b"}
_MOST = 1000  # commands of one script: a loop of loops, or a function that calls itself, ends here


@dataclass(frozen=True)
class Command:
    words: list[str]
    env: dict[str, str]  # variables as they stand there, those in front of the command too
    line: int  # where it begins, counted from 1
    stdin: str | None = None  # its here-document
    writes: str | None = None  # the file that its output goes to


class ShellError(ValueError):
    """The script cannot be read; `line` says where."""

    def __init__(self, line: int, what: str):
        super().__init__(f"line {line}: {what}")


def commands(text: str) -> tuple[list[Command], list[str]]:
    """The commands of a script in their order, and remarks on lines that bash would read otherwise than they look.

    Raises ShellError where a quote, an expansion or a here-document has no end.
    """
    shell = _Shell(text, {}, {})
    shell.run()
    return shell.found, shell.remarks


def shown(text: str) -> str:
    """A word for people: without the marks."""
    return text.replace(UNKNOWN, "")


@dataclass
class _Word:
    """A word while it is read: one field, or several after an unquoted expansion with blanks in it, or none."""

    fields: list[str] = field(default_factory=list)
    inside: bool = False  # whether the last field goes on

    def add(self, text: str) -> None:
        if not self.inside:
            self.fields.append("")
            self.inside = True
        self.fields[-1] += text

    def split(self, text: str) -> None:
        """An unquoted expansion: blanks in it end fields (2.6.5)."""
        for piece in _BLANKS.findall(text):
            if piece.isspace():
                self.inside = False
            else:
                self.add(piece)


class _Shell:
    def __init__(self, text: str, variables: dict[str, list[str]], functions: dict[str, int], first_line: int = 1):
        self.text = text.replace("\r\n", "\n").replace(UNKNOWN, "")
        self.at, self.first_line = 0, first_line
        self.variables, self.functions = variables, functions
        self.found: list[Command] = []
        self.remarks: list[str] = []
        self.skipping = 0  # depth within a function's body, which is read where it is called
        self.maybe = 0  # depth of conditions: what is set there may not be set
        self.blocks: list[tuple] = []  # open for, case, braces and calls
        self.arguments: list[str] | None = None  # $1 ... of the function that is called
        self.started = 0
        self.tested = False  # whether `[ ... ] &&` stands before the command
        self._reset()

    def _reset(self) -> None:
        self.words: list[str] = []
        self.assigned: dict[str, list[str]] = {}
        self.raw: list[str] = []  # words as they are written, to tell reserved words from quoted ones
        self.documents: list[tuple[str, bool, bool]] = []  # here-documents whose text begins on the next line
        self.stdin: str | None = None
        self.writes: str | None = None

    # --- letters --------------------------------------------------------------------------------------------------------------

    def _line(self, at: int | None = None) -> int:
        return self.first_line + self.text.count("\n", 0, self.at if at is None else at)

    def _next(self, number: int = 1) -> str:
        return self.text[self.at : self.at + number]

    def _continued(self) -> bool:
        """Passes over a backslash at a line's end. Blanks behind it are a slip (bash ends the command there), read as if they were not there."""
        found = re.compile(r"\\([ \t]*)(\n|\Z)").match(self.text, self.at)
        if not found or (found[1] and found[2] == "" and self.text[self.at + 1 :].strip(" \t")):
            return False
        if found[1] and found[2]:
            self.remarks.append(
                f"line {self._line()}: there are blanks behind the backslash, where the shell ends the command; read as one that goes on"
            )
        self.at = found.end()
        return True

    def _blanks(self) -> None:
        while (step := self._next() in (" ", "\t")) or self._continued():
            self.at += step

    # --- commands -------------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        while True:
            self._blanks()
            if self.at >= len(self.text):
                self._end()
                if self.at < len(self.text):  # a function that is called there
                    continue
                if self.documents:
                    raise ShellError(self._line(), f"the here-document has no end ({self.documents[0][0]})")
                return
            if not self.raw and not self.assigned:
                self.started = self.at
            letter = self._next()
            redirect = _REDIRECT.match(self.text, self.at)
            if letter == "#":
                self.at = self._find("\n", self.at)
            elif letter == "\n":
                self.at += 1
                self._read_documents()
                self._end()
            elif redirect:
                self.at = redirect.end()
                self._redirect(redirect[1])
            elif self._case_pattern():
                continue
            elif letter in ";&|":
                operator = _OPERATOR.match(self.text, self.at)
                assert operator
                self.at = operator.end()
                tests = self.words[:1] and self.words[0] in ("[", "[[", "test")
                self._end()
                self.tested = bool(tests) and operator[0] in ("&&", "||")
            elif letter in "()":
                self._parenthesis(letter)
            else:
                self._word_of_command()

    def _find(self, what: str, start: int) -> int:
        found = self.text.find(what, start)
        return len(self.text) if found < 0 else found

    def _parenthesis(self, letter: str) -> None:
        if letter == "(" and len(self.raw) == 1 and (found := re.compile(r"\(\s*\)\s*").match(self.text, self.at)):
            self.at = found.end()  # name() { ... }
            self._define(self.raw[0])
            return
        if letter == "(" and self.raw[:1] == ["for"]:  # for ((i = 0; ...)): its values are numbers that are counted up
            self.at = min(self._find("))", self.at) + 2, len(self.text))
            self.blocks.append(("for", "", [], 0, 0))
            self._reset()
            return
        self.at += 1
        self._end()

    def _define(self, name: str) -> None:
        self._reset()
        if self._next() != "{":
            return
        self.at += 1
        self.functions[name] = self.at
        self.skipping += 1
        self.blocks.append(("body",))

    def _case_pattern(self) -> bool:
        """Within `case`, what stands at a command's place up to `)` is a pattern."""
        if self.words or self.raw or not self.blocks or self.blocks[-1][0] != "case":
            return False
        found = re.compile(r"\(?[^()\n;]*\)").match(self.text, self.at)
        if not found or re.compile(r"esac\b").match(self.text, self.at):
            return False
        self.at = found.end()
        return True

    def _word_of_command(self) -> None:
        first = self.at
        declares = self.words[:1] and self.words[0] in _DECLARE
        if (not self.words or declares) and (assigned := _ASSIGNED.match(self.text, self.at)):
            self.at = assigned.end()
            values = self._array() if self._next() == "(" else ["".join(self._word(split=False).fields)]
            before = self.assigned.get(assigned[1], self.variables.get(assigned[1], []))
            if assigned[2]:
                whole = self.text[assigned.end()] == "(" if assigned.end() < len(self.text) else False
                values = [*before, *values] if whole else ["".join(before[:1]) + values[0]]
            self.assigned[assigned[1]] = values
            return
        word = self._word()
        written = self.text[first : self.at]
        self.raw.append(written)
        self.words += word.fields
        if len(self.raw) == 1 and self._reserved(written):
            return
        if self.raw[0] == "for" and len(self.raw) == 3 and written == "in":
            return
        if self.raw[:1] == ["function"] and len(self.raw) == 2:
            found = re.compile(r"\s*(\(\s*\))?\s*").match(self.text, self.at)
            self.at = found.end() if found else self.at
            self._define(written)
        elif self.raw[:1] == ["case"] and written == "in":
            self._reset()
            self.blocks.append(("case",))
            self.maybe += 1

    def _reserved(self, word: str) -> bool:
        """Whether the word that begins a command is none of its words (2.4)."""
        if word in ("then", "else", "elif", "do", "!", "time", "if", "while", "until", "{"):
            if word == "do" and self.blocks and self.blocks[-1][0] == "for" and self.blocks[-1][4] == 0:
                kind, name, values, index, _ = self.blocks.pop()
                self.blocks.append((kind, name, values, index, self.at))
            if word in ("if", "while", "until"):
                self.maybe += 1
                self.blocks.append((word,))
            if word == "{":
                self.blocks.append(("{",))
            self._reset()
            return True
        if word in ("fi", "done", "esac", "}"):
            self._reset()
            self._close(word)
            return True
        return False

    def _close(self, word: str) -> None:
        if not self.blocks:
            return
        kind, *about = self.blocks.pop()
        if kind in ("if", "while", "until", "case"):
            self.maybe -= 1
        elif kind == "for":
            name, values, index, start = about
            if start and index + 1 < len(values) and not self.skipping:  # once more, with the next value
                self.variables[name] = [values[index + 1]]
                self.blocks.append(("for", name, values, index + 1, start))
                self.at = start
        elif kind == "body":
            self.skipping -= 1
        elif kind == "call":
            self.at, self.arguments = about

    def _array(self) -> list[str]:
        self.at += 1
        values: list[str] = []
        while True:
            while (step := self._next() in (" ", "\t", "\n")) or self._continued():
                self.at += step
            if self._next() == "#":
                self.at = self._find("\n", self.at)
            elif self._next() == ")":
                self.at += 1
                return values
            elif self._next() in ("", "(", ";", "&", "|", "<", ">"):
                raise ShellError(self._line(), "the list in brackets has no end")
            else:
                values += self._word().fields

    def _redirect(self, operator: str) -> None:
        self._blanks()
        if operator in ("<<", "<<-"):
            start = self.at
            word = self._word(expand=False)
            quoted = any(letter in self.text[start : self.at] for letter in "'\"\\")
            self.documents.append(("".join(word.fields), operator == "<<-", quoted))
            return
        target = "".join(self._word().fields)
        if operator in (">", ">>", ">|", "&>", "&>>") and not target.startswith("&"):
            self.writes = target
        elif operator == "<<<":
            self.stdin = target + "\n"

    def _read_documents(self) -> None:
        for end, tabs, quoted in self.documents:
            lines: list[str] = []
            while True:
                if self.at >= len(self.text):
                    raise ShellError(self._line(), f"the here-document has no end ({end})")
                stop = self._find("\n", self.at)
                line = self.text[self.at : stop]
                self.at = min(stop + 1, len(self.text))
                line = line.lstrip("\t") if tabs else line
                if line == end:
                    break
                lines.append(line + "\n")
            self.stdin = "".join(lines) if quoted else self._filled("".join(lines))
        self.documents = []

    def _filled(self, text: str) -> str:
        """Text with its expansions, as within double quotes where `"` means itself."""
        inner = _Shell(text, self.variables, self.functions, self._line())
        inner.arguments = self.arguments
        word = _Word()
        while inner.at < len(inner.text):
            inner._quoted_letter(word, escapes="$`\\\n")
        return "".join(word.fields)

    def _end(self) -> None:
        """A simple command is read."""
        words, assigned = self.words, self.assigned
        stdin, writes, raw, line = self.stdin, self.writes, self.raw, self._line(self.started)
        documents, tested = self.documents, self.tested
        self._reset()
        self.documents, self.tested = documents, False
        if raw[:1] == ["for"] and len(raw) > 1:
            values = words[3:] if raw[2:3] == ["in"] else []
            self.blocks.append(("for", raw[1], values, 0, 0))
            if values and not self.skipping:
                self.variables[raw[1]] = [values[0]]
            return
        if self.skipping or not (words or assigned):
            return
        if words[:1] and words[0] in _DECLARE:
            words = []
        if words[:1] == ["unset"]:
            for name in words[1:]:
                self.variables.pop(name, None)
            return
        if not words:
            for name, values in assigned.items():
                doubtful = (self.maybe or tested) and self.variables.get(name) != values
                self.variables[name] = [f"{UNKNOWN}${name}{UNKNOWN}"] if doubtful else values
            return
        if len(self.found) >= _MOST:
            raise ShellError(line, f"more than {_MOST} commands")
        if words[0] in self.functions and sum(block[0] == "call" for block in self.blocks) < 20:
            self.blocks.append(("call", self.at, self.arguments))
            self.at, self.arguments = self.functions[words[0]], words[1:]
            return
        script = " ".join(words[1:]) if words[0] == "eval" else None
        if words[0].rpartition("/")[2] in ("bash", "sh", "zsh") and len(words) > 2 and re.fullmatch(r"-\w*c", words[1]):
            script = words[2]
        if script is not None:
            inner = _Shell(script, self.variables | assigned, {}, line)
            inner.run()
            self.found += inner.found
            self.remarks += inner.remarks
            return
        env = {name: values[0] if values else "" for name, values in {**self.variables, **assigned}.items()}
        self.found.append(Command(words, env, line, stdin, writes))

    # --- words ----------------------------------------------------------------------------------------------------------------

    def _word(self, split: bool = True, expand: bool = True) -> _Word:
        word = _Word()
        while True:
            letter = self._next()
            if self._continued():
                continue
            if not letter or letter in " \t\n;&|()":
                return word
            if letter in "<>":
                if self._next(2) not in ("<(", ">("):
                    return word
                self._unknown(word, self._balanced(self.at + 1))
            elif letter == "\\":
                word.add(self._next(2)[1:])
                self.at += 2
            elif letter == "'":
                stop = self._find("'", self.at + 1)
                if stop == len(self.text):
                    raise ShellError(self._line(), f"No closing quotation: {self.text[self.at : self.at + 30]}")
                word.add(self.text[self.at + 1 : stop])
                self.at = stop + 1
            elif letter == '"':
                self._double(word, expand)
            elif expand and (letter == "`" or (letter == "$" and len(self._next(2)) == 2)):
                self._expansion(word, quoted=not split)
            else:
                word.add(letter)
                self.at += 1

    def _double(self, word: _Word, expand: bool) -> None:
        start = self.at
        self.at += 1
        before = len(word.fields) + word.inside
        lists = False
        while self._next() != '"':
            if self.at >= len(self.text):
                raise ShellError(self._line(start), f"No closing quotation: {self.text[start : start + 30]}")
            lists = lists or bool(_LIST.match(self.text, self.at))
            if expand:
                self._quoted_letter(word, escapes='$`"\\\n')
            else:
                word.add(self._next())
                self.at += 1
        self.at += 1
        if not (lists and before == len(word.fields) + word.inside):  # "" is a word; "${EMPTY[@]}" is none
            word.add("")

    def _quoted_letter(self, word: _Word, escapes: str) -> None:
        letter = self._next()
        if letter == "\\" and self._next(2)[1:] in escapes and len(self._next(2)) == 2:
            word.add(self._next(2)[1:].replace("\n", ""))
            self.at += 2
        elif letter == "`" or (letter == "$" and _DOLLAR.match(self.text, self.at)):
            self._expansion(word, quoted=True)
        else:
            word.add(letter)
            self.at += 1

    def _balanced(self, at: int) -> str:
        """Moves behind the bracket that closes the one at `at`; gives the whole from where it stood."""
        first, opened, closed = self.at, self.text[at], {"(": ")", "{": "}", "`": "`"}[self.text[at]]
        depth, quote, at = 1, "", at + 1
        while depth:
            if at >= len(self.text):
                raise ShellError(self._line(first), f"no end of {self.text[first : first + 30]}")
            letter = self.text[at]
            if letter == "\\" and quote != "'":
                at += 1
            elif quote:
                quote = "" if letter == quote else quote
            elif letter in "'\"" and opened != "`":
                quote = letter
            elif letter == closed:
                depth -= 1
            elif letter == opened:
                depth += 1
            at += 1
        self.at = at
        return self.text[first:at]

    def _unknown(self, word: _Word, written: str) -> None:
        word.add(UNKNOWN + written + UNKNOWN)

    def _expansion(self, word: _Word, quoted: bool) -> None:
        """Reads what begins with $ or a backquote, and adds what it stands for."""
        start, rest = self.at, self.text[self.at : self.at + 2]
        put = word.add if quoted else word.split
        if rest[0] == "`":
            self._unknown(word, self._balanced(self.at))
        elif rest == "$'":
            self._ansi(word)
        elif rest == '$"':
            self.at += 1
            self._double(word, True)
        elif rest == "$(":
            self._unknown(word, self._balanced(self.at + 1))
        elif rest == "${":
            written = self._balanced(self.at + 1)
            self._parameter(word, written, written[2:-1], put, quoted)
        elif name := _NAME.match(self.text, self.at + 1):
            self.at = name.end()
            values = self.variables.get(name[0])
            self._put(word, self.text[start : self.at], values[:1] if values is not None else None, put)
        elif rest[1:] and rest[1] in "@*#?$!-0123456789":
            self.at += 2
            self._positional(word, rest, put, quoted)
        else:
            word.add("$")
            self.at += 1

    def _put(self, word: _Word, written: str, values: list[str] | None, put) -> None:
        if values is None:
            self._unknown(word, written)
        elif any(UNKNOWN in value for value in values):
            word.add(" ".join(values))
        else:
            put(" ".join(values))

    def _positional(self, word: _Word, written: str, put, quoted: bool) -> None:
        name = written.strip("${}")
        if name in "@*":
            self._list(word, self.arguments or [], quoted and name == "@", put)
        elif name.isdigit() and name != "0" and self.arguments is not None:
            put(self.arguments[int(name) - 1] if int(name) <= len(self.arguments) else "")
        else:
            self._unknown(word, written)

    def _list(self, word: _Word, values: list[str], apart: bool, put) -> None:
        """Every value. Apart: each is a field of its own, as "${A[@]}" has them."""
        for index, value in enumerate(values):
            if index:
                if apart:
                    word.inside = False
                else:
                    put(" ")
            if apart or UNKNOWN in value:
                word.add(value)
            else:
                put(value)

    def _parameter(self, word: _Word, written: str, inner: str, put, quoted: bool) -> None:
        """${...} (2.6.2, and bash's arrays)."""
        if inner in ("@", "*") or inner.isdigit():
            return self._positional(word, "$" + inner, put, quoted)
        found = re.match(r"([A-Za-z_]\w*)(\[[^\]]*\])?(.*)\Z", inner, re.DOTALL)
        if not found:
            return self._unknown(word, written)
        name, index, action = found.groups()
        values = self.variables.get(name)
        if index in ("[@]", "[*]") and not action:
            if values is None:
                return self._unknown(word, written)
            return self._list(word, values, quoted and index == "[@]", put)
        if index:
            number = index[1:-1]
            values = values[int(number) :][:1] if values is not None and re.fullmatch(r"\d+", number) else None
        elif values is not None:
            values = values[:1]
        operator = re.match(r":?[-=+?]|##?|%%?", action)
        if not action:
            return self._put(word, written, values, put)
        known = values is not None and not any(UNKNOWN in value for value in values)
        if not operator or (values is not None and not known):
            return self._unknown(word, written)
        rest = action[operator.end() :]
        value = "".join(values or [])
        if operator[0][-1] in "-=+?":
            absent = values is None or (operator[0][0] == ":" and not value)
            if operator[0][-1] == "+":
                return put("" if absent else self._filled(rest))
            if absent and operator[0][-1] == "?":
                return self._unknown(word, written)
            if absent:
                value = self._unquoted(rest)
                if operator[0][-1] == "=":
                    self.variables[name] = [value]
            return word.add(value) if UNKNOWN in value else put(value)
        if values is None:
            return self._unknown(word, written)
        self._put(word, written, [_cut(value, operator[0], self._unquoted(rest))], put)

    def _unquoted(self, text: str) -> str:
        """The word within ${NAME:-word}: blanks are its own, quotes go."""
        inner = _Shell(text, self.variables, self.functions, self._line())
        inner.arguments = self.arguments
        word = _Word()
        while inner.at < len(inner.text):
            word.add("".join(inner._word(split=False).fields))
            if inner.at < len(inner.text):
                word.add(inner._next())
                inner.at += 1
        return "".join(word.fields)

    def _ansi(self, word: _Word) -> None:
        found = re.compile(r"\$'((?:[^'\\]|\\.)*)'", re.DOTALL).match(self.text, self.at)
        if not found:
            raise ShellError(self._line(), f"No closing quotation: {self.text[self.at : self.at + 30]}")
        self.at = found.end()
        word.add(re.sub(r"\\(x[0-9a-fA-F]{1,2}|u[0-9a-fA-F]{1,4}|[0-7]{1,3}|.)", _escape, found[1], flags=re.DOTALL))


def _escape(found: re.Match[str]) -> str:
    what: str = found[1]
    if what[0] in "xu" and len(what) > 1:
        return chr(int(what[1:], 16))
    if what[0] in "01234567":
        return chr(int(what, 8))
    return _ESCAPES.get(what) or (what if what in "'\"\\?" else "\\" + what)


def _cut(value: str, operator: str, pattern: str) -> str:
    """${name#pattern} and its three relatives: the shortest (one sign) or longest match at the beginning or end goes."""
    matches = re.compile(fnmatch.translate(pattern)).match
    ends = range(len(value) + 1)
    if operator[0] == "#":
        cuts = [end for end in ends if matches(value[:end])]
        return value[(cuts[-1] if len(operator) == 2 else cuts[0]) :] if cuts else value
    cuts = [end for end in ends if matches(value[end:])]
    return value[: (cuts[0] if len(operator) == 2 else cuts[-1])] if cuts else value
