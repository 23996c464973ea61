"""What people see in the terminal: the coloured sample, the plan, the live bar, the before/after tables. Fits one screen."""

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from . import __version__, estimate, method, terminal
from .chat import Template
from .plan import Plan
from .progress import Report, Screen
from .records import Example
from .terminal import line, visible

console = terminal.console(soft_wrap=False)
BARS = " ▁▂▃▄▅▆▇█"


def coloured(template: Template, example: Example, limit: int | None = None) -> Text:
    """The sample as the model reads it: learned tokens green and underlined (in a pipe: inside ⟦ ⟧), special tokens dim.

    limit: show this many tokens, cut in the middle.
    """
    tokens = template.show(example)
    if limit is not None and len(tokens) > limit:
        half = limit // 2
        tokens = [*tokens[:half], (f" … {len(tokens) - 2 * half} tokens … ", -1.0), *tokens[-half:]]
    text, inside = Text(), False
    for token, weight in [*tokens, ("", 0.0)]:
        if not console.is_terminal and inside != (weight > 0):  # no colours there
            text.append("⟦" if weight > 0 else "⟧")
            inside = weight > 0
        style = "yellow" if weight < 0 else "bold green underline" if weight else "dim" if token in template.tokens.special else ""
        text.append(visible(token), style)
    return text


def token_table(template: Template, example: Example) -> Table:
    """Every token with its id and whether it is learned, for `show --tokens`."""
    table = Table("position", "id", "token", "learned", box=None)
    for i, token in enumerate(example.ids):
        weight = example.weights[i - 1] if i else 0.0
        table.add_row(
            str(i), str(token), escape(repr(template.tokens.decode([token], keep_special=True))), f"{weight:g}" if weight else ""
        )
    return table


def histogram(lengths: Sequence[int], bins: int = 30) -> str:
    """Lengths as a line of bars with their range."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // bins))
    counts = [0] * ((high - low) // width + 1)
    for length in lengths:
        counts[(length - low) // width] += 1
    top = max(counts)
    bars = "".join(BARS[-(-8 * count // top)] for count in counts)
    mean = sum(lengths) / len(lengths)
    return f"{low} {bars} {high} tokens, mean {mean:.0f}"


def needs(need: dict[str, float], epoch: float, rate: float) -> str:
    """The estimate in words: bytes by purpose, seconds an epoch, FLOP a second."""
    return (
        f"estimated memory {sum(need.values()) / 1e9:.1f} GB ({estimate.words(need)}); {span(epoch)} an epoch "
        f"(products run at {rate / 1e9:,.0f} GFLOP/s here; the first steps will tell it better)"
    )


def span(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.0f} {name}" if seconds >= 10 * size else f"about {seconds / size:.1f} {name}"
    return f"about {max(1, seconds):.0f} s"


def print_plan(made: Plan) -> None:
    run, shape = made.run, made.shape
    console.print(
        f"[bold]glmtune {__version__}[/]  {escape(run.model)} ({shape.parameters / 1e6:.1f} M parameters)  ->  {escape(run.out)}"
    )
    for note in made.notes:
        console.print(Text(line(note), "yellow" if note.startswith("warning") else ""))
    rows, sequences = made.examples.num_rows, len(made.examples)
    rows_and_sequences = f"{rows} rows" + (f" ({sequences} sequences)" if sequences != rows else "")
    learned = made.examples.num_learned
    total = sum(made.lengths)
    console.print(
        f"{rows_and_sequences}, {total} tokens, {learned} of them learned ({100 * learned / total:.0f} %); lengths {histogram(made.lengths)}"
    )
    share = 100 * shape.trainable / shape.parameters
    what = method.of(made.method).describe(made.method)
    console.print(f"{run.method.kind}: {shape.trainable:,} trainable parameters ({share:.2f} %), {escape(what)}")
    console.print(
        Text.assemble(
            (line(f"sample {made.examples[0].where}, "), "cyan"), ("learned tokens", "bold green underline"), (":", "cyan")
        )
    )
    console.print(coloured(made.template, made.examples[0], 160))


class Terminal(Screen):
    """Progress on a terminal: one live bar; in a pipe or log file, a line every tenth of the way."""

    def __init__(self, quiet: bool = False):
        self.bar: Progress | None = None
        self.task: Any = None
        self.quiet = quiet
        self.tokens = 0
        self.seconds = 0.0

    def say(self, text: Any) -> None:
        if not self.quiet:
            (self.bar.console if self.bar else console).print(Text(visible(str(text))), soft_wrap=not console.is_terminal)

    def plan(self, made: Plan) -> None:
        if not self.quiet:
            print_plan(made)

    def needs(self, memory: dict[str, float], epoch: float, rate: float) -> None:
        self.say(needs(memory, epoch, rate))

    def _open(self, *columns: Any) -> Progress:
        self.stop()
        self.bar = Progress(*columns, console=console, disable=self.quiet or not console.is_terminal, transient=True)
        self.bar.start()
        return self.bar

    def start(self, total: int, done: int) -> None:
        bar = self._open(
            TextColumn("step {task.completed}/{task.total}"), BarColumn(None),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s  left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.task = bar.add_task("train", total=total, completed=done, loss="-", rate="-")

    def step(self, row: dict[str, Any], total: int) -> None:
        assert self.bar is not None
        rate = f"{row['tokens_per_second']:.0f}"
        self.bar.update(self.task, completed=row["step"], loss=f"{row['loss']:.3f}", rate=rate)
        line = f"step {row['step']}/{total}  loss {row['loss']:.4f}  {rate} tokens/s"
        if "eval_loss" in row:
            self.say(f"{line}  dev loss {row['eval_loss']:.4f}")
        elif not console.is_terminal and (row["step"] * 10 // total) != ((row["step"] - 1) * 10 // total):
            left = row["seconds"] / row["step"] * (total - row["step"])
            self.say(f"{line}  {left:.0f} s left")

    def asking(self, what: str, total: int) -> Callable[[int], None]:
        bar = self._open(
            TextColumn(what), BarColumn(None), TextColumn("{task.completed}/{task.total}  left"), TimeRemainingColumn()
        )
        task = bar.add_task(what, total=total)
        return lambda count: bar.advance(task, count)

    def counting(self, what: str) -> Callable[[int, float | None], None]:
        """A count with its rate and, where the share that is done is known, the time left; the bar opens with the first count."""
        task: Any = None
        first, before, began = 0, 0, 0.0

        def count(number: int, done: float | None) -> None:
            nonlocal task, first, before, began
            if task is None or number < before:  # a count from the beginning is another one
                bar = self._open(
                    TextColumn("{task.fields[count]:,} " + what), BarColumn(None), TextColumn("{task.fields[rate]}  left"),
                    TimeRemainingColumn(),
                )  # fmt: skip
                task, first, began = bar.add_task(what, total=None, count=number, rate=""), number, time.monotonic()
            before = number
            assert self.bar is not None
            rate = (number - first) / max(1e-3, time.monotonic() - began)
            total = None if done is None else 1.0
            self.bar.update(task, total=total, completed=done or 0.0, count=number, rate=f"{rate:,.0f}/s" if rate else "")

        return count

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def print_report(report: Report, limit: int = 3) -> None:
    """Before and after: a few answers side by side, the table of hits, and where to go next."""
    pairs = Table("question", "before", "after", header_style="bold", show_lines=False, expand=True)
    shown: list[str] = []
    for name in dict.fromkeys(row["set"] for row in report.samples):
        fresh = [row for row in report.samples if row["set"] == name and row["prompt"] not in shown][:limit]
        for row in fresh:
            pairs.add_row(*(Text(_short(row[key])) for key in ("prompt", "before", "after")))
        shown += [row["prompt"] for row in report.samples if row["set"] == name]
    if shown:
        console.print(pairs)
    dev = f", best dev loss {report.dev_loss:.4f}" if report.dev_loss is not None else ""
    console.print(f"[bold]done[/] {report.steps} steps in {report.seconds:.0f} s, last loss {report.loss:.4f}{dev}")
    checked = [row for row in report.hits if row["wanted"] is not None]
    if checked:
        table = Table("questions", "", "before", "after", box=None, header_style="bold")
        for row in checked:
            what = "with the wanted words" if row["wanted"] else "leaks (fewer is better)"
            table.add_row(escape(f"{row['set']} ({row['count']})"), what, _percent(row["before"]), _percent(row["after"]))
        console.print(table)
    if report.best_step is not None and report.best_step != report.steps:
        console.print(
            f"the best dev loss was at step {report.best_step}: {escape(str(report.out))}/checkpoints/step-{report.best_step}"
        )
    out = escape(shlex.quote(str(report.out)))
    console.print(f"the page of this run: {out}/report.html", soft_wrap=True)
    console.print(f"talk to it:    [bold]glmtune chat {out}[/]", soft_wrap=True)
    console.print(f"ask a file:    [bold]glmtune predict {out} questions.json --out answers.jsonl[/]", soft_wrap=True)
    console.print("your own rows: [bold]glmtune train model=smollm2-135m-instruct data=train.json out=runs/mine[/]", soft_wrap=True)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} %"


def _short(text: str | None, limit: int = 110) -> str:
    text = " ".join(visible(text or "").split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def is_interactive() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()
