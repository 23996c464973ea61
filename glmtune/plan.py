"""Everything short of training: a run's rows, template, sequences, targets and needs, checked before a model is loaded.

Needs no torch, so that a wrong run fails in a second. `glmtune show` prints a plan; `glmtune train` carries it out.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from . import data, estimate, families, method, mixing, sources
from .chat import JOIN, Template
from .errors import UserError
from .records import Conversation
from .run import Run, Source, default_lr, moment
from .stages import STAGES, Limits
from .store import Chosen, Store
from .tokenise import Progress, Wanted, date_of, is_store, tokenised


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
    examples: Chosen
    dev: Chosen | None
    questions: list[Question]
    method: Any  # run.method with everything found out: targets by full names, what `start` says of its adapter
    quant: str | None  # how frozen weights are kept: as the run says, or as the model was published
    shape: estimate.Shape
    notes: list[str] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return self.examples.lengths

    @property
    def longest(self) -> int:
        return max([*self.examples.lengths, *(self.dev.lengths if self.dev else ())])


def make(
    run: Run,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda rows, done: None,
    base: Path | None = None,
) -> Plan:
    """Reads and checks everything a run names. say: told about downloads; progress: of tokenising many rows; base: the model's folder, where
    a run that is resumed has recorded it. Raises UserError."""
    for name in run.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"report_to: {name} is not installed; pip install {name}, or leave it out")
    folder, wanted_rows = wanted(run, say, base)
    shapes, template = families.tensor_shapes(folder), wanted_rows.template
    record = method.of(run.method)
    found = record.resolve(run.method, run, folder)
    quant = _quant(run, folder)
    reads = families.reads_at_most(folder)
    reading = {"system": run.system, "variables": run.variables, "join": wanted_rows.join}
    train = tokenised(wanted_rows, say=say, progress=progress)
    notes = [*train.about["notes"], *_said(train)]
    if template.now is not None:
        notes.append(
            f"the chat format writes the date into prompts, here {', '.join(template.dates)}; the same run on another day needs "
            f"date={run.date or template.now.date().isoformat()}"
        )
    examples, dev = _sides(run, train, wanted_rows.sources)
    if run.eval.data:
        with _blamed("eval.data"):
            held, place = _found(run, run.eval.data, say)
            dev_rows = replace(wanted_rows, sources=held, elsewhere=None, stored=place, rows="dev rows")
            other = tokenised(dev_rows, say=say, progress=progress)
        dev = Chosen.rows_of(other, STAGES[run.stage.kind].whole)
        notes += [f"dev: {note}" for note in [*other.about["notes"], *_said(other)]]
    elif dev is not None:
        notes.append(
            f"dev: {len(set(train.arrays['row'][dev.index].tolist()))} of {train.about['rows']} rows, chosen by their content (eval.share {run.eval.share:g})"
        )
    notes += _shares(examples) if len(wanted_rows.sources) > 1 else []
    notes += _learning_rate(run)
    overflows = families.fp16_overflows(folder) if run.precision == "fp16" else None
    notes += [f"warning: precision={overflows}"] if overflows else []
    beyond = [length for length in examples.lengths if reads is not None and length > reads]
    if beyond:
        notes.append(
            f"warning: {len(beyond)} rows are longer than the {reads} tokens this model was made for (longest {max(beyond)})"
        )
    parameters = families.num_parameters(folder)
    trainable = record.count(found, folder)
    linear = sum(math.prod(shapes[f"{name}.weight"]) for name in families.linear_names(folder))
    return Plan(
        run, folder, template, examples, dev, _questions(run, template, wanted_rows.sources, reading, reads), found, quant,
        estimate.Shape.of(families.config_of(folder), parameters, trainable, linear), notes,
    )  # fmt: skip


@contextmanager
def _blamed(option: str) -> Iterator[None]:
    """Errors about the rows of an option, where several options name rows, say which it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{option}: {error}") from None


def _quant(run: Run, folder: Path) -> str | None:
    kept = families.published_quant(folder)
    if kept and method.trains_base(run.method.kind):
        raise UserError(
            f"{run.model} is published in {kept}, which gradient steps cannot change, and method={run.method.kind} trains its weights; "
            "use method=lora or method=prefix, or the 16-bit model"
        )
    return families.quant_kind(folder, run.quant or ("keep" if kept else None))


def wanted(run: Run, say: Callable[[str], None], base: Path | None = None) -> tuple[Path, Wanted]:
    """The base model's folder (`base`, else what the run's `model` names), and the sequences that a run learns from."""
    folder = base or families.resolve(run.model, say)
    found, place = _found(run, run.data, say)
    now = moment(run.date if run.date is not None or place is None else date_of(place))
    template = families.open_template(folder, run.template, learn=getattr(run.stage, "learn", "all"), now=now)
    # Rotary positions go on past what a model was made for, with worse results; a table of positions ends.
    rotary = any(key.startswith(("rope", "position_encoding")) for key in families.config_of(folder))
    limits = Limits(run.max_length, run.too_long, None if rotary else families.reads_at_most(folder))
    join = run.join if run.join is not None else JOIN.get(str(run.template), "\n")
    elsewhere = [text for probe in run.samples or () for text in [*(probe.contains or ()), probe.system or ""]]
    return folder, Wanted(found, run.stage.kind, template, limits, run.system, run.variables, join, elsewhere, stored=place)


def _found(run: Run, given: Sequence[Source], say: Callable[[str], None]) -> tuple[list[sources.Found], Path | None]:
    """The files of sources; or a folder of tokenised rows, which stands alone and as it was made."""
    stored = next((source for source in given if is_store(source.path)), None)
    if stored is None:
        return sources.find(given, run.registry, say), None
    if len(given) > 1:
        raise UserError(f"{stored.path} holds tokenised rows and must be the only entry of data; tokenise the others with it")
    usual = Source(path=stored.path)
    changed = [name for name in type(usual).model_fields if getattr(stored, name) != getattr(usual, name)]
    if changed or run.mixing_temperature != 1:
        raise UserError(
            f"{stored.path} holds tokenised rows: {', '.join(changed) or 'mixing_temperature'} cannot change them; give it to `glmtune data tokenize`"
        )
    return [], Path(stored.path).expanduser()


def _shares(examples: Chosen) -> list[str]:
    """What each source is of an epoch: of its rows, and of what is learned."""
    rows, learned = examples.store.arrays["row"][examples.index], examples.store.arrays["learned"][examples.index]
    said = []
    for span in examples.store.about["spans"]:
        here = (rows >= span["start"]) & (rows < span["start"] + span["count"])
        share, part = here.sum() / len(rows), learned[here].sum() / max(1, learned.sum())
        said.append(f"{span['path']}: {share:.1%} of the sequences of an epoch, {part:.1%} of the learned tokens")
    return said


def _said(made: Store) -> list[str]:
    return [f"{count} {reason}" for reason, count in made.about["counts"].items()]


def _sides(run: Run, made: Store, found: Sequence[sources.Found]) -> tuple[Chosen, Chosen | None]:
    """What is learned, in the order and as often as the sources' weights say; and with eval.share the rows that are kept apart."""
    rows, starts, whole = made.arrays["row"], made.row_starts, STAGES[run.stage.kind].whole
    dev = np.zeros(len(starts), dtype=bool)
    if run.eval.share:
        with _blamed("eval.share"):
            dev = np.array(mixing.split_hashes(made.arrays["hash"][starts].tolist(), run.eval.share), dtype=bool)
    train = np.flatnonzero(~dev)
    counts = [
        int(np.count_nonzero((rows[starts[train]] >= span["start"]) & (rows[starts[train]] < span["start"] + span["count"])))
        for span in made.about["spans"]
    ]
    # A tokenised folder keeps no sources: its rows stand as they were made.
    order = mixing.mix(counts, found, run.seed, run.mixing_temperature) if found else np.arange(len(train))
    return Chosen.rows_of(made, whole, train[order]), Chosen.rows_of(made, whole, np.flatnonzero(dev)) if dev.any() else None


def _learning_rate(run: Run) -> list[str]:
    (usual, name), given = default_lr(run.method, run.stage.kind), run.optim.lr
    if given is None:
        return [f"learning rate {usual:g}, the default of method {name}"]
    if not usual / 10 < given < usual * 10:
        return [
            f"warning: optim.lr={given:g} is {'above' if given > usual else 'below'} the usual {usual:g} of method {name} by ten times or more"
        ]
    return []


def _questions(
    run: Run, template: Template, found: list[sources.Found], reading: dict[str, Any], reads: int | None
) -> list[Question]:
    if run.samples is None:
        if STAGES[run.stage.kind].want != "answers":
            return []
        first = islice(data.stream(found, want="answers", elsewhere=None, **reading), 3)
        usual = [_question("training data", row, template, None, None) for _, row in first]
        return [question for question in usual if reads is None or len(question.ids) < reads]
    made = []
    for number, probe in enumerate(run.samples):
        source = Source(path=probe.path, format=probe.format, columns=probe.columns)
        system = probe.system if probe.system is not None else reading["system"]
        with _blamed(f"samples.{number}"):
            asked = data.load([source], want="prompts", elsewhere=None, **{**reading, "system": system})
        contains = [data.fill(text, run.variables) for text in probe.contains] if probe.contains else None
        name = probe.name or Path(probe.path).stem
        made += [_question(name, row, template, contains, probe.wanted if contains else None) for row in asked.rows]
    for question in made:
        if reads is not None and len(question.ids) >= reads:
            raise UserError(f"{question.where}: the question has {len(question.ids)} tokens; this model reads {reads} at most")
    return made


def _question(name: str, row: Conversation, template: Template, contains: list[str] | None, wanted: bool | None) -> Question:
    turns = row.turns[:-1] if row.turns[-1].role == "assistant" else row.turns
    return Question(name, turns[-1].text, template.prompt(replace(row, turns=turns)), contains, wanted, row.where)
