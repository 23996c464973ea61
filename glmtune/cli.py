"""The command line. Light on purpose: each command imports what it needs. Exit codes: 0 done, 2 the user can mend it,
1 our fault (with a traceback), 130 interrupted after saving, 141 nobody reads the output any more."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__, files
from .errors import Interrupted, UserError
from .terminal import console, line, prepare, print, visible

app = typer.Typer(
    name="glmtune", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Fine-tune, evaluate and use chat models (ChatGLM, GLM, Llama, Qwen, SmolLM2 ...) on a laptop CPU or a GPU.",
    epilog="Start here:  glmtune train model=smollm2-135m-instruct data=train.json out=runs/first",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Look at data before a minute is spent on it.", rich_markup_mode="rich")
app.add_typer(data_app, name="data")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[RUN.yaml] [a.b=c ...]", help="A run file and/or settings.", show_default=False)
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="smollm2-135m-instruct, a folder, a hub id, a run's folder, or its checkpoints/step-N.",
        show_default=False,
    ),
]
Quant = Annotated[
    str | None,
    typer.Option(help="Keep weights packed: nf4, int8, chatglm-int4, chatglm-int8; none: not. Not given: as trained or published."),
]
Adapter = Annotated[str | None, typer.Option(help="An adapter folder (not needed with a run's folder).", show_default=False)]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy; not given: the model's published setting.", show_default=False)
]
TopP = Annotated[float | None, typer.Option(help="Nucleus sampling; not given: the model's published setting.", show_default=False)]
TopK = Annotated[
    int | None,
    typer.Option(help="Only the k likeliest tokens, 0: all; not given: the model's published setting.", show_default=False),
]
Penalty = Annotated[
    float | None,
    typer.Option(help="Of tokens that stand there already, 1: none; not given: the model's published setting.", show_default=False),
]
Columns = Annotated[str | None, typer.Option(help="Which key holds what: prompt=question,response=answer", show_default=False)]
Format = Annotated[str | None, typer.Option(help="The rows' form, if their keys do not show it.", show_default=False)]
Registry = Annotated[
    str | None, typer.Option(help="A data.yaml or dataset_info.json; not given: data.yaml here, if any.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]


def _run(settings: list[str] | None, **missing: Any) -> Any:
    from .run import load_run

    settings = list(settings or [])
    file = settings.pop(0) if settings and "=" not in settings[0] else None
    return load_run(file, settings, **missing)


@app.command(epilog="Example:  glmtune train model=smollm2-135m-instruct data=train.json out=runs/first method.rank=16")
def train(
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue OUT bit for bit from its newest checkpoint.")] = False,
    json_: Json = False,
) -> None:
    """Train a model. Ctrl-C saves and stops; --resume continues."""
    run = _run(settings)
    if resume and settings and "=" not in settings[0] and not any(given.partition("=")[0] == "out" for given in settings):
        from .runfolder import refuse_elsewhere

        refuse_elsewhere(Path(settings[0]), run)
    from .screen import Terminal, print_report
    from .training import train as start

    screen = Terminal(quiet=json_)
    try:
        report = start(run, resume=resume, screen=screen)
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; nothing was saved since the last checkpoint. Continue with: glmtune train {run.out}/run.yaml --resume"
        ) from None
    finally:
        screen.stop()
    if json_:
        found = {
            "out": str(report.out),
            "steps": report.steps,
            "loss": report.loss,
            "dev_loss": report.dev_loss,
            "seconds": round(report.seconds, 1),
            "hits": report.hits,
        }
        print(json.dumps(found, ensure_ascii=False))
    else:
        print_report(report)


@app.command(
    epilog="Example:  glmtune show examples/identity/run.yaml    or    glmtune show model=smollm2-135m-instruct data=train.json"
)
def show(
    settings: Settings = None,
    sample: Annotated[int, typer.Option(help="Which row to show in full (0 is the first).")] = 0,
    tokens: Annotated[bool, typer.Option("--tokens", help="List the sample token by token with ids.")] = False,
    json_: Json = False,
) -> None:
    """Everything short of training: resolved run, coloured sample, lengths, trainable parameters, estimate."""
    run = _run(settings, out="(none)")
    from . import plan

    with _counting(quiet=json_) as progress:
        made = plan.make(run, lambda text: print(text, file=sys.stderr), progress)
    if not 0 <= sample < len(made.examples):
        raise UserError(f"--sample {sample}: there are {len(made.examples)} rows, 0 to {len(made.examples) - 1}")
    example = made.examples[sample]
    from . import estimate
    from .settings import line as settings_line
    from .settings import matmul_rate, resolve, setting

    chosen = resolve(made)
    how = setting(made, chosen)
    need = estimate.memory(made.shape, how)
    rate = matmul_rate(chosen["device"], chosen["precision"])
    epoch = estimate.seconds(made.shape, how, sum(made.lengths), made.examples.num_learned, rate)
    if json_:
        found = {
            "run": run.model_dump(mode="json", serialize_as_any=True), "resolved": chosen, "rows": made.examples.num_rows, "sequences": len(made.examples), "dev_rows": made.dev.num_rows if made.dev else 0,
            "tokens": sum(made.lengths), "learned_tokens": made.examples.num_learned, "longest": max(made.lengths),
            "trainable": made.shape.trainable, "parameters": made.shape.parameters, "memory_gb": round(sum(need.values()) / 1e9, 2), "seconds_per_epoch": round(epoch, 1),
            "notes": made.notes, "sample": {"where": example.where, "ids": example.ids, "labels": example.labels},
        }  # fmt: skip
        print(json.dumps(found, ensure_ascii=False))
        return
    from rich.text import Text

    from . import options, screen

    screen.print_plan(made)
    if sample or len(example.ids) > 160:
        screen.console.print(Text(visible(f"row {sample}, {example.where}:"), "cyan"))
        screen.console.print(screen.coloured(made.template, example))
    if tokens:
        screen.console.print(screen.token_table(made.template, example))
    import yaml

    changed = options.changed(options.plain(run), options.plain(type(run).model_construct(model="", data=[], out=run.out)))
    screen.console.print(Text("options that differ from the defaults:", "cyan"))
    screen.console.print(Text(visible(yaml.safe_dump(changed, sort_keys=False, allow_unicode=True).rstrip())))
    screen.console.print(settings_line(chosen), markup=False)
    screen.console.print(screen.needs(need, epoch, rate), markup=False)


@app.command(
    epilog="Example:  glmtune predict runs/first questions.json --out answers.jsonl --columns prompt=question,response=answer"
)
def predict(
    model: Model,
    data: Annotated[
        list[str], typer.Argument(metavar="DATA...", help="Files of rows; answers are not needed.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help='JSONL file to write: each row\'s own keys plus "prediction".', show_default=False)],
    adapter: Adapter = None,
    columns: Annotated[
        str | None, typer.Option(help="Which key holds what: prompt=question,response=answer", show_default=False)
    ] = None,
    format: Annotated[str | None, typer.Option(help="The rows' form, if their keys do not show it.", show_default=False)] = None,
    system: Annotated[str | None, typer.Option(help="System prompt; not given: the run's own.", show_default=False)] = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Only the first n rows of each file.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest tokens; 0: all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Of tokens that stand there already; 1: none.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows answered at once.")] = 16,
    quant: Quant = None,
    device: Device = "auto",
) -> None:
    """Answer every row of a file, in order. Interrupted, the same command continues."""
    from . import families
    from .generate import Sampling
    from .options import build
    from .run import Source

    sampling = Sampling(temperature, top_p, max_new_tokens, seed, top_k, repetition_penalty)
    how = {"format": format, "columns": _columns(columns), "max_samples": max_samples, "system": system}
    sources = [build(Source, {"path": path, **how}, "DATA") for path in data]
    place = families.locate(model, adapter, _say)
    from . import data as data_module
    from .chat import JOIN

    if out.exists():
        raise UserError(f"{out} exists already and is never overwritten; choose another --out, or remove it")
    join = place.join if place.join is not None else JOIN.get(str(place.template), "\n")
    found = data_module.load(sources, want="prompts", system=place.system, join=join)  # bad rows are told before the model loads
    for note in found.notes:
        _say(line(note))
    from .loaded import load
    from .predict import predict as start
    from .screen import Terminal

    loaded = load(model, device=device, adapter=adapter, quant=quant, say=_say)
    screen = Terminal()
    try:
        with files.naming(out):
            start(loaded, found.rows, out, sampling, batch_size, screen.asking("answers", len(found.rows)), _say)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; answers so far are kept in {out}.part, the same command continues") from None
    finally:
        screen.stop()
    print(f"{len(found.rows)} answers in {out}")


def _columns(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(equals and key and value for key, equals, value in pairs):
        raise UserError(f"--columns {text}: wanted pairs like prompt=question,response=answer")
    return {key.strip(): value.strip() for key, _, value in pairs}


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@contextmanager
def _counting(quiet: bool) -> Iterator[Callable[[int, float | None], None]]:
    """Shows on a terminal how far tokenising is. The screen, and torch with it, is loaded only once there is much to tell."""
    screen: Any = None
    tell: Any = None

    def count(rows: int, done: float | None) -> None:
        nonlocal screen, tell
        if tell is None:
            from .screen import Terminal

            screen = Terminal()
            tell = screen.counting("rows tokenised")
        tell(rows, done)

    try:
        yield count if sys.stdout.isatty() and not quiet else lambda rows, done: None
    finally:
        if screen is not None:
            screen.stop()


@app.command(epilog="Example:  glmtune chat runs/first    or    glmtune chat runs/first --prompt 'Who are you?'")
def chat(
    model: Model,
    adapter: Adapter = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this once and exit.", show_default=False)] = None,
    system: Annotated[
        str | None, typer.Option(help="System prompt; not given: the run's own, else the model's default.", show_default=False)
    ] = None,
    meta: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TEXT",
            help="Another key of the system message, for formats that have one; CharacterGLM: bot_name, bot_info, user_name, user_info.",
            show_default=False,
        ),
    ] = None,
    history: Annotated[bool, typer.Option("--history/--no-history", help="Whether a question comes with those before it.")] = True,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Of sampling; not given: new every time.", show_default=False)] = None,
    quant: Quant = None,
    device: Device = "auto",
) -> None:
    """Talk to a model. In a pipe, each line is one turn of the same conversation."""
    from .generate import Sampling

    given = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty,
        "max_new_tokens": max_new_tokens, "seed": seed,
    }  # fmt: skip
    sampling = {key: value for key, value in given.items() if value is not None}
    Sampling(**sampling)  # refuses bad values before the model loads
    named = {name.strip(): text for name, _, text in (one.partition("=") for one in meta or ())}
    if wrong := next((one for one in meta or () if not one.partition("=")[0].strip() or "=" not in one), None):
        raise UserError(f"--meta {wrong}: wanted NAME=TEXT, like bot_name=Ada")
    from . import repl
    from .loaded import load

    loaded = load(model, device=device, adapter=adapter, quant=quant, say=_say)
    talk = repl.Chat(loaded, sampling, system if system is not None else loaded.system, meta=named, history=history)
    if prompt is not None:
        talk.reply(prompt)
    else:
        repl.run(talk)


@app.command(
    epilog="Example:  glmtune doctor    or    glmtune doctor smollm2-135m-instruct    or    glmtune doctor THUDM/chatglm3-6b --fit 8GB"
)
def doctor(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False)] = None,
    fit: Annotated[
        str | None,
        typer.Option(help="Which ways to tune MODEL fit in this much memory: 8GB. Needs its config.json only.", show_default=False),
    ] = None,
    json_: Json = False,
) -> None:
    """What this machine can do; with MODEL, what that folder is and how it would be used."""
    if fit is not None:
        if model is None:
            raise UserError("--fit needs a MODEL: glmtune doctor smollm2-135m-instruct --fit 8GB")
        from . import doctor as fits

        answer = fits.fit(model, fit, _say)
        print(json.dumps(answer, ensure_ascii=False)) if json_ else _print_fits(answer)
        return
    from . import doctor as findings

    found = findings.model(model, _say) if model else findings.machine()
    if json_:
        print(json.dumps(found, ensure_ascii=False))
        return
    for key, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        print(f"{key}: {'; '.join(value) or 'none' if isinstance(value, list) else value}")


def _print_fits(answer: dict[str, Any]) -> None:
    print(
        f"{answer['model']}: {answer['parameters'] / 1e6:,.0f} M parameters, {answer['memory_gb']:g} GB; bf16 where not packed; estimated"
    )
    for row in answer["settings"]:
        how = " ".join(
            [f"method={row['method']}", *([f"quant={row['quant']}"] if row["quant"] else []),
             *([f"optim={row['optimizer']}"] if row["optimizer"] != "adamw" else []), *(["checkpointing=true"] if row["checkpointing"] else [])]
        )  # fmt: skip
        if row["max_length"] is None:
            print(f"  {how:62} does not fit: {row['gb']:.1f} GB at the least")
        else:
            rows = row["rows at once"]
            print(f"  {how:62} max_length up to {row['max_length']}, {rows} row{'s' * (rows > 1)} at once ({row['gb']:.1f} GB)")


@app.command(
    epilog="Example:  glmtune export runs/first --to models/first    or    glmtune export THUDM/chatglm3-6b --to chatglm3-native    "
    "or    glmtune export runs/first --to first.gguf --outtype q8_0"
)
def export(
    model: Model,
    to: Annotated[Path, typer.Option(help="Folder to write, or NAME.gguf for llama.cpp; it must not exist.", show_default=False)],
    adapter: Adapter = None,
    dtype: Annotated[str, typer.Option(help="auto (the published one), bf16, fp16, fp32.")] = "auto",
    shard_size: Annotated[float, typer.Option(min=0.01, help="Largest weight file, in GB.")] = 4.0,
    unmerged: Annotated[bool, typer.Option("--unmerged", help="Keep the adapter beside the weights, in TO/adapter.")] = False,
    outtype: Annotated[
        str | None, typer.Option(help="Numbers of a GGUF file: f16 (if not given), bf16, q8_0, f32; q4_k_m says how.")
    ] = None,
    layout: Annotated[
        str, typer.Option(help="native; published: the adapter alone, for the code that was published with ChatGLM, Baichuan ...")
    ] = "native",
    rounding: Annotated[
        str, typer.Option(help="Of merged weights: nearest, or stochastic (nothing lost on average, more noise).")
    ] = "nearest",
    json_: Json = False,
) -> None:
    """Write a folder that plain transformers opens, or a GGUF file: weights (adapter merged), tokenizer, chat template."""
    if layout not in ("native", "published"):
        raise UserError(f"--layout {layout}: wanted native or published")
    if layout == "published":
        from .importing import export_published

        if dtype != "auto" or unmerged or outtype is not None:
            raise UserError("--layout published writes the adapter as it is; leave out --dtype, --unmerged and --outtype")
        folder = export_published(adapter, model, to, _say)
        print(json.dumps({"to": str(folder)}) if json_ else f"{folder}: the adapter in the layout that {model} was published in")
        return
    if rounding not in ("nearest", "stochastic"):
        raise UserError(f"--rounding {rounding}: wanted nearest or stochastic")
    from .export import export as start

    made = start(
        model,
        to,
        adapter=adapter,
        dtype=dtype,
        shard_gb=shard_size,
        unmerged=unmerged,
        outtype=outtype,
        rounding=rounding,
        say=_say,
    )
    files = [made] if made.is_file() else sorted(path for path in made.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files)
    if json_:
        folder = made.parent if made.is_file() else made
        found = {"to": str(made), "bytes": total, "files": [str(path.relative_to(folder)) for path in files]}
        print(json.dumps(found, ensure_ascii=False))
    else:
        print(f"{made}: {len(files)} file{'s' * (len(files) > 1)}, {total / 1e9:.2f} GB, read back and compared")


@app.command("import", epilog="Example:  glmtune import old/lora --model THUDM/chatglm3-6b --to adapters/old --prompt self-llm")
def import_(
    old: Annotated[
        str,
        typer.Argument(
            metavar="OLD",
            help="An adapter folder of any tool, a pytorch_model.bin, or a run file (.yaml, .json, .sh).",
            show_default=False,
        ),
    ],
    to: Annotated[Path, typer.Option(help="Folder (or run file) to write; it must not exist.", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help="Its base, as published; not given: what the adapter names.", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Whose prompts it was trained on: self-llm, llm-tuning ...; not given: recognised.", show_default=False),
    ] = None,
    json_: Json = False,
) -> None:
    """Bring an adapter of another tool here: LoRA on the published layers (query_key_value ...) or a published prefix; or a run file."""
    from . import oldruns

    if oldruns.is_run_file(old):
        if model or prompt:
            raise UserError(f"--model and --prompt are for adapters; {old} is a run file, change them in {to} afterwards")
        oldruns.convert(old, to, _say)
        print(json.dumps({"to": str(to)}) if json_ else f"{to}: a run file; look at it, then: glmtune show {to}")
        return
    from .importing import import_adapter

    folder = import_adapter(old, model, to, prompt, _say)
    print(
        json.dumps({"to": str(folder)})
        if json_
        else f"{folder}: an adapter; talk to it: glmtune chat {model or 'MODEL'} --adapter {folder}"
    )


@app.command(epilog="Example:  glmtune mix runs/a=0.7 runs/b=0.3 --to adapters/c")
def mix(
    parts: Annotated[list[str], typer.Argument(metavar="ADAPTER=WEIGHT...", help="Adapter or run folders.", show_default=False)],
    to: Annotated[Path, typer.Option(help="Folder to write; it must not exist.", show_default=False)],
    how: Annotated[str, typer.Option(help="cat: exact, ranks add up. svd: the nearest of --rank. linear, ties, dare.")] = "cat",
    rank: Annotated[int | None, typer.Option(help="Of svd, ties and dare; not given: the largest.", show_default=False)] = None,
    density: Annotated[
        float | None, typer.Option(help="Share that ties and dare keep; not given: 0.5.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Their base, to check them against it.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of dare.")] = 0,
    json_: Json = False,
) -> None:
    """Make one LoRA adapter of several, each with a weight."""
    weighed = []
    for part in parts:
        name, equals, weight = part.rpartition("=")
        try:
            weighed.append((name, float(weight)))
        except ValueError:
            equals = ""
        if not equals or not name:
            raise UserError(f"'{part}': wanted ADAPTER=WEIGHT, as in runs/a=0.7")
    from .blend import mix as start

    folder = start(weighed, to, how, rank, density, model, seed, _say)
    print(json.dumps({"to": str(folder)}) if json_ else f"{folder}: the mix of {len(weighed)} adapters, written and read back")


@app.command(epilog="Example:  glmtune options method.lora")
def options(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Only options whose name starts so.")] = "", json_: Json = False
) -> None:
    """Every option of a run file, from its declaration."""
    from .errors import did_you_mean
    from .options import document
    from .run import Run

    rows = list(document(Run))
    chosen = [row for row in rows if row[0] == name or not name or row[0].startswith((name + ".", name + "["))]
    if not chosen:
        raise UserError(f"there is no option '{name}'{did_you_mean(name, [row[0] for row in rows])}")
    if json_:
        print(json.dumps([dict(zip(("name", "type", "default", "description"), row)) for row in chosen], ensure_ascii=False))
        return
    from rich.table import Table

    table = Table("option", "type", "default", "meaning", box=None, header_style="bold", padding=(0, 1))
    for row in chosen:
        table.add_row(*(cell.replace("[", "\\[") for cell in map(repr_newlines, row)))
    console().print(table)


def repr_newlines(text: str) -> str:
    return text.replace("\n", "\\n")


@data_app.command(
    "check", epilog="Example:  glmtune data check train.json --dev dev.json --model smollm2-135m-instruct --fix clean.json"
)
def data_check(
    files: Annotated[list[str], typer.Argument(metavar="FILES...", show_default=False)],
    dev: Annotated[
        list[str] | None,
        typer.Option(help="A file to watch the training with; rows of it that are trained on are told.", show_default=False),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Count tokens with this model's template.", show_default=False)] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Longest row, in tokens, 1024 if not given (with --model).", show_default=False)
    ] = None,
    too_long: Annotated[
        str | None,
        typer.Option(
            help="The run's policy: error (if not given), skip, cut-left-turns, cut-answer (with --model).", show_default=False
        ),
    ] = None,
    columns: Columns = None,
    format: Format = None,
    registry: Registry = None,
    fix: Annotated[
        Path | None,
        typer.Option(help="Write the clean rows here, and what was removed to FIX.removed.jsonl.", show_default=False),
    ] = None,
    json_: Json = False,
) -> None:
    """Find every malformed row by file and line. Exit code 2 when there are errors."""
    for name, value in (("--max-length", max_length), ("--too-long", too_long)):
        if value is not None and model is None:
            raise UserError(f"{name} {value}: tokens are counted with a model's template only; give --model too")
    if too_long not in (None, "error", "skip", "cut-left-turns", "cut-answer"):
        raise UserError(f"--too-long {too_long}: wanted error, skip, cut-left-turns or cut-answer")
    from . import check

    examples = _encoder(model) if model is not None else None
    encode = None if examples is None else lambda record: max(len(example.ids) for example in examples(record))
    read: dict[str, Any] = {"columns": _columns(columns), "format": format, "registry": registry}
    found = check.check(files, dev=dev or (), encode=encode, max_length=max_length or 1024, too_long=too_long or "error", **read)
    errors = sum(problem["level"] == "error" for problem in found["problems"])
    if json_:
        print(json.dumps(found, ensure_ascii=False))
    else:
        for problem in found["problems"]:
            print(line(f"{problem['file']}:{problem['line']}: {problem['level']}: {problem['message']} [{problem['kind']}]"))
        for note in found["notes"]:
            print(line(note))
        _print_lengths(found["lengths"])
        print(f"{found['rows']} rows, errors: {errors}, warnings: {len(found['problems']) - errors}")
    if fix is not None:
        print(check.fix(files, fix, **read), file=sys.stderr if json_ else sys.stdout)
    elif errors:
        raise typer.Exit(2)


def _encoder(model: str) -> Any:
    """Conversation or document -> its training sequences under the model's own template; a question alone is one too."""
    from . import families
    from .chat import align, encode_document
    from .records import Document

    place = families.locate(model, None, _say)
    template = families.open_template(place.tokenizer, place.template, now=place.now)

    def encode(record: Any) -> Any:
        if isinstance(record, Document):
            return encode_document(template.tokens, record, sys.maxsize)
        if record.turns[-1].role != "assistant":
            ids = template.prompt(record)
            return [align(ids, [0.0] * len(ids), record.where)]
        return [template.encode(part) for part in template.split(record)]

    return encode


def _print_lengths(lengths: dict[str, Any]) -> None:
    """A histogram as bars, in a terminal only: in a pipe one line."""
    if not lengths:
        return
    from rich.bar import Bar
    from rich.table import Table

    print(
        f"length in {lengths['unit']}: shortest {lengths['shortest']}, median {lengths['p50']}, "
        f"95 % up to {lengths['p95']}, longest {lengths['longest']}"
    )
    shown = console()
    if not shown.is_terminal:
        return
    most = max(count for _, _, count in lengths["histogram"])
    table = Table.grid(padding=(0, 1))
    for low, high, count in lengths["histogram"]:
        table.add_row(f"{low}-{high}", str(count), Bar(most, 0, count, width=40, color="cyan"))
    shown.print(table)


@data_app.command("stats", epilog="Example:  glmtune data stats train.json more.jsonl --model smollm2-135m-instruct")
def data_stats(
    files: Annotated[list[str], typer.Argument(metavar="FILES...", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help="Count tokens, and those learned, with this model's template.", show_default=False)
    ] = None,
    columns: Columns = None,
    format: Format = None,
    registry: Registry = None,
    json_: Json = False,
) -> None:
    """Rows, forms, turns, lengths, languages and, with --model, the share of tokens that is learned."""
    from . import convert

    encode = _encoder(model) if model is not None else None
    found = convert.stats(files, encode=encode, columns=_columns(columns), format=format, registry=registry)
    if json_:
        print(json.dumps(found, ensure_ascii=False))
        return
    unusable = f" ({found['unusable']} of them unusable: glmtune data check)" if found["unusable"] else ""
    print(f"rows: {found['rows']}{unusable}")
    for what in ("sources", "forms", "turns", "languages"):
        print(f"{what}: " + ", ".join(f"{name} {count}" for name, count in found[what].items()))
    if learned := found.get("learned"):
        print(f"tokens: {learned['tokens']}, learned {learned['learned']} ({learned['share']:.1%})")
    _print_lengths(found["lengths"])
    for note in found["notes"]:
        print(line(note))


@data_app.command("convert", epilog="Example:  glmtune data convert train.json --to messages --out train.messages.jsonl")
def data_convert(
    files: Annotated[list[str], typer.Argument(metavar="FILES...", show_default=False)],
    to: Annotated[str, typer.Option(help="messages, alpaca or sharegpt.", show_default=False)],
    out: Annotated[Path, typer.Option(help="JSONL file to write.", show_default=False)],
    columns: Columns = None,
    format: Format = None,
    registry: Registry = None,
) -> None:
    """Write rows in another form. Every row is read back; what the form cannot hold is an error, and nothing is written."""
    from . import convert

    print(convert.convert(files, to, out, columns=_columns(columns), format=format, registry=registry))


@data_app.command(
    "tokenize",
    epilog="Example:  glmtune data tokenize model=smollm2-135m-instruct data=train.json --to tokens    then    data=tokens",
)
def data_tokenize(
    settings: Settings = None,
    to: Annotated[
        Path | None, typer.Option(help="Folder to write, usable as data= anywhere; not given: the cache.", show_default=False)
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; not given: one for each core.", show_default=False)] = None,
    json_: Json = False,
) -> None:
    """Turn rows into training sequences once; runs with the same data, model and options then start at once."""
    run = _run(settings, out="(none)")
    import time

    from . import plan
    from .tokenise import tokenised

    if to is not None and to.exists():
        raise UserError(f"{to} exists already and is never overwritten; choose another --to, or remove it")
    _, wanted = plan.wanted(run, _say)
    began = time.monotonic()
    with _counting(quiet=json_) as progress:
        made = tokenised(wanted, to, _say, workers, progress, keep=True)
    found = {
        "folder": str(made.folder), "rows": made.about["rows"], "sequences": len(made), "tokens": int(made.lengths.sum()),
        "learned_tokens": int(made.arrays["learned"].sum()), "seconds": round(time.monotonic() - began, 2), "notes": made.about["notes"],
    }  # fmt: skip
    if json_:
        print(json.dumps(found, ensure_ascii=False))
        return
    for note in [*made.about["notes"], *(f"{n} {why}" for why, n in made.about["counts"].items())]:
        print(line(note))
    print(
        f"{found['rows']} rows, {found['sequences']} sequences, {found['tokens']} tokens ({found['learned_tokens']} learned) in {made.folder}"
    )


@data_app.command(
    "design",
    epilog="Example:  glmtune data design records.jsonl --schema schema.yml --preset ES-SDE --set format=json --out train.jsonl",
)
def data_design(
    records: Annotated[
        str | None, typer.Argument(metavar="[RECORDS]", help="A file of structured records.", show_default=False)
    ] = None,
    schema: Annotated[Path | None, typer.Option(help="YAML: fields, labels and their wording.", show_default=False)] = None,
    preset: Annotated[str, typer.Option(help="ES-SDE (empirically strong) or EW-SDE (weak).")] = "ES-SDE",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="OPTION=VALUE", help="Change one option, as in format=json.", show_default=False),
    ] = None,
    language: Annotated[str | None, typer.Option(help="en or zh; not given: the schema's.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="JSONL file to write.", show_default=False)] = None,
    parse: Annotated[str | None, typer.Option(help="Read predictions back; --out takes what they say.", show_default=False)] = None,
    sweep: Annotated[
        Path | None, typer.Option(help="Write a data file and a run file for every design here.", show_default=False)
    ] = None,
    test: Annotated[str | None, typer.Option(help="Records to predict on (with --sweep).", show_default=False)] = None,
    model: Annotated[str, typer.Option(help="The model of a sweep's runs.")] = "smollm2-135m-instruct",
    table: Annotated[Path | None, typer.Option(help="Print the scores of a sweep's folder.", show_default=False)] = None,
    json_: Json = False,
) -> None:
    """Structured records <-> training samples (sample design, arXiv 2404.13033)."""
    import shlex
    from dataclasses import asdict

    from . import design

    if [records, parse, table].count(None) != 2:
        raise UserError("give one of RECORDS (with --out or --sweep), --parse PREDICTIONS or --table FOLDER")
    given = {"--schema": schema, "--set": set_, "--language": language, "--out": out, "--test": test, "--sweep": sweep}
    if table is not None:
        how, unused = "with --table", list(given)
    elif parse is not None:
        how, unused = "with --parse", ["--test", "--sweep"]
    else:
        how, unused = ("without --sweep", ["--test"]) if sweep is None else ("with --sweep", ["--out"])
    for name in unused:
        if given[name]:
            raise UserError(f"{name} is of no use {how}; leave it out")
    if table is not None:
        scores = design.table(table)
        if json_:
            print(json.dumps({name: one and asdict(one) for name, one in scores.items()}, ensure_ascii=False))
        else:
            _print_designs(scores)
        return
    if schema is None:
        raise UserError("--schema FILE is missing: the YAML file that names the fields and labels (docs/sample-design.md)")
    read = design.load_schema(schema, language)
    chosen = design.design(preset, set_ or ())
    if parse is not None:
        rows, parsed, scored = design.parse_rows(parse, read, chosen)
        if out is not None:
            design.write_rows(out, rows)
        counts = {how: sum(one.how == how for one in parsed) for how in ("strict", "soft", "failed")}
        if json_:
            print(json.dumps({"rows": len(rows), **counts, "scores": scored and asdict(scored)}, ensure_ascii=False))
            return
        print(f"{len(rows)} predictions: " + ", ".join(f"{how} {count}" for how, count in counts.items()))
        if scored is not None:
            _print_designs({chosen.name: scored})
            print("right of each field: " + ", ".join(f"{name} {share:.1%}" for name, share in scored.fields.items()))
        return
    items = design.read(str(records), read)
    strange = design.not_in_text(items)
    if strange:
        _say(f"note: {len(strange)} spans do not stand in their text, so a model cannot copy them: {'; '.join(strange[:3])}")
    if sweep is not None:
        if test is None:
            raise UserError("--sweep needs --test FILE: records that are not trained on, to compare the designs with")
        asked = design.read(test, read)
        known = design.trained_on(items, asked)
        if known:
            _say(f"note: {len(known)} of {len(asked)} test texts are trained on too: {', '.join(known[:3])}")
        names = design.sweep(items, asked, read, schema, chosen, sweep, model)
        if json_:
            print(json.dumps({"folder": str(sweep), "designs": names}))
            return
        script = shlex.quote(str(sweep / "run.sh"))
        print(f"{len(names)} designs in {sweep}; `sh {script}` trains and compares them, and continues where it was interrupted")
        return
    if out is None:
        raise UserError("--out FILE is missing: where to write the samples (or --sweep FOLDER for every design)")
    rows = [design.sample(item, read, chosen) for item in items]
    design.write_rows(out, rows)
    if json_:
        print(json.dumps({"rows": len(rows), "design": asdict(chosen), "learn": chosen.learn}, ensure_ascii=False))
        return
    print(f"{len(rows)} samples in {out}, design {chosen.name}; the first:")
    print("\n".join(f"{message['role']}: {message['content']}" for message in rows[0]["messages"]))
    if chosen.learn != "all":
        print(f"MI: the run must learn the prompt too: glmtune train data={out} stage.learn={chosen.learn} ...")


def _print_designs(scores: dict[str, Any]) -> None:
    width = max(map(len, scores))
    print(f"{'design':{width}}   rows   exact  fields right      F1  wrong format  also with tolerance")
    for name, one in scores.items():
        shares = (
            f"{one.rows:4}  {one.exact:6.1%}  {one.accuracy:12.1%}  {one.f1:6.1%}  {one.wrong_strict:12}  {one.wrong_soft:19}"
            if one
            else "no predictions yet"
        )
        print(f"{name:{width}}   {shares}")


@data_app.command("list", epilog="Example:  glmtune data list    then    glmtune train model=... data=alpaca_zh out=...")
def data_list(
    registry: Registry = None,
    json_: Json = False,
) -> None:
    """Data sets that `data=` knows by name: your own registry's, and public ones."""
    from . import sources

    known = sources.names(registry)
    if json_:
        print(
            json.dumps(
                {name: {k: v for k, v in vars(entry).items() if v} for name, entry in known.items()},
                ensure_ascii=False,
                default=str,
            )
        )
        return
    width = max(map(len, known))
    for name, entry in known.items():
        print(f"{name:{width}}  {entry.path or entry.hub or ''}  {entry.note or ''}".rstrip())


def version(show_it: bool) -> None:
    if show_it:
        print(f"glmtune {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


# What is wrong with a path, or with the disk behind it: nothing of that is a defect of the program.
def main(arguments: list[str] | None = None) -> None:
    """Runs a command and turns what happened into an exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    usage: Any = typer.BadParameter.__base__  # click's UsageError, of whichever click typer carries
    try:
        prepare()
        for given in sys.argv[1:] if arguments is None else arguments:
            if any("\ud800" <= letter <= "\udfff" for letter in given):
                raise UserError(f"the argument '{given}' is not UTF-8 text; write it in UTF-8, or rename the file")
        code = app(args=arguments, prog_name="glmtune", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as error:
        _fail(str(error))
        sys.exit(2)
    except usage as error:
        if "NoArgs" in type(error).__name__:
            error.show()
        else:
            command = error.ctx.command_path if error.ctx else "glmtune"
            _fail(f"{' '.join(error.format_message().split())}\n{command} --help shows how it is used")
        sys.exit(2)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except SystemExit as end:  # typer and rich make 1 of a closed pipe, `glmtune ... | head`
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if isinstance(error, OSError) and ((error.filename and error.errno in files.ADVICE) or error.errno in files.DISK):
            _fail(files.told(error))
            sys.exit(2)
        import traceback

        print(traceback.format_exc(), file=sys.stderr, end="")
        print(f"\nThis is a defect of glmtune {__version__}, not of your input. Please report the lines above.", file=sys.stderr)
        sys.exit(1)


def _fail(message: str) -> None:
    red, plain = ("\033[1;31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    with suppress(OSError):  # where nobody reads it, the exit code stays
        sys.stderr.write(f"{red}error:{plain} {visible(message)}\n")
