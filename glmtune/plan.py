"""Everything short of training: a run's rows, template, sequences, targets and needs, checked before a model is loaded.

Needs no torch, so that a wrong run fails in a second. `glmtune show` prints a plan; `glmtune train` carries it out.
"""

import hashlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import data, estimate, families
from .chat import JOIN, Template
from .errors import UserError
from .records import Conversation, Example
from .run import DEFAULT_LR, Run, Source
from .stages import STAGES, Encoded, Limits


@dataclass(frozen=True)
class Question:
    """One row of a probe: asked before and after training."""

    set: str
    prompt: str  # the last user turn, for people
    ids: list[int]
    contains: list[str] | None
    wanted: bool | None
    where: str = ""


@dataclass
class Plan:
    run: Run
    folder: Path  # of the base model
    template: Template
    examples: list[Example]
    dev: list[Example]
    questions: list[Question]
    targets: list[str]  # layers that get LoRA; empty for full tuning
    shape: estimate.Shape
    notes: list[str] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return [len(example.ids) for example in self.examples]

    @property
    def fingerprint(self) -> str:
        """Of the sequences that are learned: a resumed run must meet the same ones."""
        digest = hashlib.blake2b(digest_size=16)
        for example in self.examples:
            digest.update(repr((example.ids, example.weights)).encode())
        return digest.hexdigest()


def make(run: Run, say: Callable[[str], None] = lambda text: None) -> Plan:
    """Reads and checks everything a run names. say: told about downloads. Raises UserError."""
    for name in run.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"report_to: {name} is not installed; pip install {name}, or leave it out")
    stage = STAGES[run.stage.kind]
    join = run.join if run.join is not None else JOIN.get(str(run.template), "\n")
    reading: dict[str, Any] = {"system": run.system, "variables": run.variables, "join": join}
    loaded = data.load(run.data, want=stage.want, **reading)
    folder = families.resolve(run.model, say)
    shapes = families.tensor_shapes(folder)
    template = families.open_template(folder, run.template, learn=getattr(run.stage, "learn", "all"))
    targets, shared = [], []
    if run.method.kind == "lora":
        wanted = families.published_targets(run.method.targets, folder)
        targets = families.pick_targets(wanted, families.linear_names(folder))
        shared = families.sharing(targets) if run.method.share_a else []
    reads = families.reads_at_most(folder)
    # Rotary positions go on past what a model was made for, with worse results; a table of positions ends.
    rotary = any(key.startswith(("rope", "position_encoding")) for key in families.config_of(folder))
    limits = Limits(run.max_length, run.too_long, None if rotary else reads)
    rows, dev_rows, notes = loaded.rows, [], list(loaded.notes)
    if run.eval.data:
        dev = data.load(run.eval.data, want=stage.want, all_variables=False, **reading)
        dev_rows = dev.rows
        notes += [f"dev: {note}" for note in dev.notes]
    elif run.eval.share:
        rows, dev_rows = data.split(rows, run.eval.share)
        notes.append(f"dev: {len(dev_rows)} of {len(loaded.rows)} rows, chosen by their content (eval.share {run.eval.share})")
    train = stage.encode(template, rows, limits)
    dev = _dev(stage.encode, template, dev_rows, limits)
    notes += [f"{count} {reason}" for reason, count in (train.counts + dev.counts).items()]
    notes += _learning_rate(run)
    beyond = [example for example in train.examples if reads is not None and len(example.ids) > reads]
    if beyond:
        longest = max(len(example.ids) for example in beyond)
        notes.append(f"warning: {len(beyond)} rows are longer than the {reads} tokens this model was made for (longest {longest})")
    parameters = families.num_parameters(folder)
    trainable = estimate.lora_parameters(shapes, targets, run.method.rank, shared) if targets else parameters
    return Plan(
        run, folder, template, train.examples, dev.examples, _questions(run, template, rows, reading, reads), targets,
        estimate.Shape.of(families.config_of(folder), parameters, trainable), notes,
    )  # fmt: skip


def _dev(encode: Callable[..., Encoded], template: Template, rows: Sequence[Any], limits: Limits) -> Encoded:
    template.differs.clear()
    if not rows:
        return Encoded()
    made = encode(template, rows, limits)
    return Encoded(made.examples, Counter({f"dev {reason}": count for reason, count in made.counts.items()}))


def _learning_rate(run: Run) -> list[str]:
    usual, given = DEFAULT_LR[run.method.kind], run.optim.lr
    if given is None:
        return [f"learning rate {usual:g}, the default of method {run.method.kind}"]
    if not usual / 10 < given < usual * 10:
        return [
            f"warning: optim.lr={given:g} is {'above' if given > usual else 'below'} the usual {usual:g} of method {run.method.kind} by ten times or more"
        ]
    return []


def _questions(run: Run, template: Template, rows: Sequence[Any], reading: dict[str, Any], reads: int | None) -> list[Question]:
    if run.samples is None:
        usual = [_question("training data", row, template, None, None) for row in rows[:3] if isinstance(row, Conversation)]
        return [question for question in usual if reads is None or len(question.ids) < reads]
    made = []
    for probe in run.samples:
        source = Source(path=probe.path, format=probe.format, columns=probe.columns)
        system = probe.system if probe.system is not None else reading["system"]
        found = data.load([source], want="prompts", all_variables=False, **{**reading, "system": system})
        contains = [_filled(text, run.variables) for text in probe.contains] if probe.contains else None
        name = probe.name or Path(probe.path).stem
        made += [_question(name, row, template, contains, probe.wanted if contains else None) for row in found.rows]
    for question in made:
        if reads is not None and len(question.ids) >= reads:
            raise UserError(f"{question.where}: the question has {len(question.ids)} tokens; this model reads {reads} at most")
    return made


def _filled(text: str, variables: dict[str, str]) -> str:
    for name, value in variables.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def _question(name: str, row: Conversation, template: Template, contains: list[str] | None, wanted: bool | None) -> Question:
    turns = row.turns[:-1] if row.turns[-1].role == "assistant" else row.turns
    return Question(name, turns[-1].text, template.prompt(replace(row, turns=turns)), contains, wanted, row.where)
