"""Chat in the terminal: streaming, several turns, and in a pipe one answer per line."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import files
from .errors import UserError, did_you_mean
from .generate import NotFinite
from .loaded import Loaded
from .rendering import keys_read
from .screen import console, is_interactive
from .terminal import quiet, read_line

COMMANDS = {
    "/clear": "forget the conversation",
    "/system TEXT": "set the system prompt (without TEXT: show it) and forget the conversation",
    "/regen": "answer the last question again",
    "/save FILE": "write the conversation to FILE as one training row (messages)",
    "/help": "show this list",
    "/exit": "leave (also Ctrl-D)",
}


@dataclass
class Chat:
    """A conversation with a loaded model. Messages are OpenAI-style dicts without the system turn, which is kept apart.

    meta: other keys of the system turn (CharacterGLM's bot_name ...). history: whether a question is asked with what came before it.
    """

    loaded: Loaded
    sampling: dict[str, Any]
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    meta: dict[str, str] = field(default_factory=dict)
    history: bool = True

    def __post_init__(self) -> None:
        known = keys_read(self.loaded.template.jinja) - {"role", "content"} if self.meta else set()
        for name in self.meta:
            if name not in known:
                raise UserError(
                    f"--meta {name}: this model's chat format reads no such key of a message{did_you_mean(name, known)}"
                )

    def all_messages(self) -> list[dict[str, Any]]:
        head = [{"role": "system", "content": self.system or "", **self.meta}] if self.system is not None or self.meta else []
        return [*head, *self.messages]

    def reply(self, text: str) -> None:
        """Asks, prints the answer as it is made, and keeps both. Ctrl-C keeps what was said so far."""
        if not self.history:
            self.messages.clear()
        self.messages.append({"role": "user", "content": text})
        made = ""
        try:
            for piece in self.loaded.stream(self.all_messages(), **self.sampling):
                made += piece
                sys.stdout.write(quiet(piece))
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
        elif not self.messages:
            console.print("nothing was said yet, so there is nothing to save")
        else:
            files.append(path, json.dumps({"messages": self.all_messages()}, ensure_ascii=False) + "\n")
            console.print(f"(added to {path})", style="dim", markup=False)


def run(chat: Chat) -> None:
    """Reads lines until the end. A line that is not a /command is a question."""
    ask = _terminal_input() if is_interactive() else read_line
    if is_interactive():
        console.print("Ask something. /help lists the commands, /exit or Ctrl-D leaves.", style="dim")
    while True:
        try:
            try:
                line = ask().strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line.startswith("/"):
                if not chat.command(line):
                    return
            elif line:
                chat.reply(line)
        except UserError as error:
            if isinstance(error, NotFinite) and not is_interactive():
                raise  # at a terminal, what was said so far can still be saved
            console.print(str(error), style="red", markup=False)


def _terminal_input() -> Any:
    """A prompt with history (arrow keys), kept between sessions."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    from .families.smollm2 import cache_root

    cache_root().mkdir(parents=True, exist_ok=True)
    session: PromptSession = PromptSession(history=FileHistory(str(cache_root() / "chat_history")))
    return lambda: session.prompt("> ")
