"""Chat in the terminal: streaming, several turns, and in a pipe one answer per line."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import files
from .errors import UserError, did_you_mean
from .loaded import Loaded
from .screen import console, is_interactive

COMMANDS = {
    "/clear": "forget the conversation",
    "/system TEXT": "set the system prompt (without TEXT: show it) and forget the conversation",
    "/regen": "answer the last question again",
    "/save FILE": "write the conversation to FILE as one training row (messages)",
    "/help": "show this list",
    "/exit": "leave (also Ctrl-D)",
}


# What a model writes must not steer the terminal.
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


@dataclass
class Chat:
    """A conversation with a loaded model. Messages are OpenAI-style dicts without the system turn, which is kept apart."""

    loaded: Loaded
    sampling: dict[str, Any]
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)

    def all_messages(self) -> list[dict[str, Any]]:
        head = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*head, *self.messages]

    def reply(self, text: str) -> None:
        """Asks, prints the answer as it is made, and keeps both. Ctrl-C keeps what was said so far."""
        self.messages.append({"role": "user", "content": text})
        made = ""
        try:
            for piece in self.loaded.stream(self.all_messages(), **self.sampling):
                made += piece
                sys.stdout.write(piece.translate(CONTROLS))
                sys.stdout.flush()
        except KeyboardInterrupt:
            sys.stdout.write(" [stopped]")
        except UserError:
            self.messages.pop()
            raise
        sys.stdout.write("\n")
        self.messages.append({"role": "assistant", "content": made})

    def command(self, line: str) -> bool:
        """Carries out a /command; False means leave."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/exit", "/quit"):
            return False
        if name == "/clear":
            self.messages.clear()
            console.print("(forgotten)", style="dim")
        elif name == "/system":
            if rest:
                self.system = rest
                self.messages.clear()
            console.print(
                f"(system: {self.system if self.system is not None else 'the model' + chr(39) + 's own default'})",
                style="dim",
                markup=False,
            )
        elif name == "/regen":
            if not self.messages:
                console.print("(there is nothing to answer again yet)", style="dim")
            else:
                self.messages.pop()
                self.reply(self.messages.pop()["content"])
        elif name == "/save":
            self._save(rest)
        elif name == "/help":
            for command, what in COMMANDS.items():
                console.print(f"  {command:14} {what}", markup=False)
        else:
            known = [command.split()[0] for command in COMMANDS]
            console.print(f"no such command {name}{did_you_mean(name, known)} /help lists them", markup=False)
        return True

    def _save(self, name: str) -> None:
        path = Path(name).expanduser()
        if not name:
            console.print("/save needs a file name, like /save talk.jsonl")
        elif not path.absolute().parent.is_dir():
            console.print(f"there is no folder {path.absolute().parent}", markup=False)
        else:
            files.append(path, json.dumps({"messages": self.all_messages()}, ensure_ascii=False) + "\n")
            console.print(f"(added to {path})", style="dim", markup=False)


def run(chat: Chat) -> None:
    """Reads lines until the end. A line that is not a /command is a question."""
    ask = _terminal_input() if is_interactive() else _piped_input
    if is_interactive():
        console.print("Ask something. /help lists the commands, /exit or Ctrl-D leaves.", style="dim")
    while True:
        try:
            line = ask().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                if not chat.command(line):
                    return
            else:
                chat.reply(line)
        except UserError as error:
            console.print(str(error), style="red", markup=False)


def _piped_input() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _terminal_input() -> Any:
    """A prompt with history (arrow keys), kept between sessions."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    from .families.smollm2 import cache_root

    cache_root().mkdir(parents=True, exist_ok=True)
    session: PromptSession = PromptSession(history=FileHistory(str(cache_root() / "chat_history")))
    return lambda: session.prompt("> ")
