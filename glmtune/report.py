"""A run's folder as one page: report.html and loss.png, made from run.yaml, log.jsonl and samples.jsonl.

The page stands alone: no script, no font, no link leads out of it, and its own policy forbids them. Text of data and models
enters it through `_esc` only. Anything may be missing: a run that is still going gets a report too.
"""

import html
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

from . import options
from .errors import UserError
from .files import lenient_jsonl, whole
from .run import Run

OPEN_SAMPLES, MOST_SAMPLES = 12, 200  # shown at once; shown at all (the rest stays in samples.jsonl)
OPEN_TEXT, MOST_TEXT = 300, 2000  # characters, likewise
MOST_POINTS, MOST_STRIPS = 600, 120  # per curve; places on it that can be pointed at
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 238, 62, 464, 28, 210  # a chart's view box, and the plot inside
BEFORE, AFTER = ("Before", "训练前"), ("After", "训练后")
CHARTS = {
    "loss": ("Loss", "损失"),
    "lr": ("Learning rate", "学习率"),
    "grad_norm": ("Gradient norm", "梯度范数"),
    "tokens_per_second": ("Tokens per second", "速度"),
}
LOG_COLUMNS = (  # of every run's log.jsonl; others are a stage's own terms and metrics, and get a curve each
    "step", "epoch", "loss", "eval_loss", "learned_tokens", "tokens", "tokens_per_second", "lr", "grad_norm", "peak_memory_gb", "scale", "skipped",
    "seconds",
)  # fmt: skip
Point = tuple[float, float]


def write(out: Path) -> None:
    """Writes OUT/report.html and OUT/loss.png, each complete or not at all. Raises OSError (disk full, folder gone)."""
    notes: list[str] = []
    try:
        settings = options.read(out / "run.yaml") if (out / "run.yaml").is_file() else {}
    except UserError as error:
        settings, notes = {}, [str(error)]
    rows = [row for row in _rows(out / "log.jsonl", notes) if isinstance(row.get("step"), int)]
    log = sorted(
        {row["step"]: row for row in rows}.values(), key=itemgetter("step")
    )  # of a step done again after a resume, the last
    samples = _rows(out / "samples.jsonl", notes)
    whole(out / "report.html", _page(out, settings, log, samples, notes).encode("utf-8", "replace"))
    whole(out / "loss.png", _png(out.resolve().name, log))


def hits(samples: list[dict]) -> list[dict]:
    """Per set, in order of appearance: {set, wanted, count, before, after}.

    before and after are percent of the rows that were checked, None where none was; wanted None means a hit is neither good nor bad.
    """
    table = []
    for name in dict.fromkeys(sample.get("set") for sample in samples):
        rows = [sample for sample in samples if sample.get("set") == name]
        share = {}
        for time in ("before", "after"):
            checked = [bool(hit) for row in rows if (hit := row.get(f"hit_{time}")) is not None]
            share[time] = 100 * sum(checked) / len(checked) if checked else None
        table.append({"set": name, "wanted": rows[0].get("wanted"), "count": len(rows), **share})
    return table


# Reading and writing


def _rows(path: Path, notes: list[str]) -> list[dict]:
    """The objects of a JSONL file. A line that cannot be read (half written, the run goes on) is left out and noted."""
    if not path.is_file():
        return []
    rows, unreadable = lenient_jsonl(path)
    if unreadable:
        notes.append(f"{path.name}: {unreadable} {'line' if unreadable == 1 else 'lines'} could not be read and are left out here")
    return rows


def _column(log: list[dict], key: str) -> list[float]:
    """One number per step; NaN where it is missing."""
    values = [row.get(key) for row in log]
    return [float(v) if isinstance(v, int | float) and math.isfinite(v) else math.nan for v in values]


def _finite(values: list[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _reach(values: list[float]) -> int:
    """How many steps to each side the smoothed curve looks: a twentieth of the run in all, at most 51."""
    return min(25, len(values) // 40)


def _smooth(values: list[float]) -> list[float]:
    """Mean of each value and its neighbours; at the ends, of those there are. What is missing stays missing."""
    reach, smooth = _reach(values), []
    for place, value in enumerate(values):
        near = values[max(0, place - reach) : place + reach + 1]
        if math.isnan(sum(near)):
            near = _finite(near)
        smooth.append(math.nan if math.isnan(value) else sum(near) / len(near))
    return smooth


def _png(name: str, log: list[dict]) -> bytes:
    from matplotlib.figure import Figure  # not pyplot: slower to import, and a notebook's backend is not ours to change
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), dpi=100)
    axes = figure.add_axes((0.1, 0.13, 0.875, 0.79))  # not layout="constrained", which would draw everything twice
    steps, loss, dev = _column(log, "step"), _column(log, "loss"), _column(log, "eval_loss")
    points = [(step, value) for step, value in zip(steps, dev) if not math.isnan(value)]
    alone = "o" if len(_finite(loss)) == 1 else ""
    axes.plot(steps, loss, color="#93b4e8", linewidth=1, label="loss")
    axes.plot(steps, _smooth(loss), marker=alone, color="#1d4ed8", linewidth=2.2, label="loss, smoothed")
    if points:
        axes.plot(*zip(*points), marker="o", color="#c2410c", linewidth=1, markersize=6, label="dev loss")
    if _finite(loss) or points:
        axes.legend(frameon=False, fontsize=12)
    else:
        axes.text(0.5, 0.5, "no steps yet", ha="center", transform=axes.transAxes, fontsize=14)
    # The font that comes with matplotlib has no Chinese, and `$` would start a formula.
    axes.set_title(f"Loss: {name}" if name.isascii() else "Loss", fontsize=14, parse_math=False)
    axes.set_xlabel("step", fontsize=12)
    axes.tick_params(labelsize=12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# Numbers and text as HTML


def _esc(value: Any) -> str:
    return html.escape(str(value))


def _breakable(name: str, joints: str) -> str:
    """A path or a dotted name that a narrow screen may break after its joints."""
    return re.sub(f"([{joints}])", r"\1<wbr>", _esc(name))


def _number(value: float, digits: int = 3) -> str:
    """Short for people: 0, 2e-4, 0.412, 12.3, 8,120, 541k, 3.1M."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e9):
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if size >= 99_950:
        return f"{value / 1e6:.{digits}g}M" if size >= 999_500 else f"{value / 1e3:.{digits}g}k"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.{digits}g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}\N{NO-BREAK SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02}m"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0f}\N{NO-BREAK SPACE}%"


def _both(english: str, chinese: str) -> str:
    return f'{english} <span lang="zh">{chinese}</span>'


# Curves


def _ticks(low: float, high: float, smallest: float = 0.0) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from below low to above high, two to seven of them."""
    rough = ((high - low) or abs(high) / 10 or 1.0) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(smallest, next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999))
    first = math.floor(low / step + 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, max(math.ceil(high / step - 1e-9), first + 1) + 1)]


def _thin(points: list[Point]) -> list[Point]:
    """At most MOST_POINTS points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    kept: list[Point] = []
    size = math.ceil(len(points) / (MOST_POINTS // 2))
    for start in range(0, len(points), size):
        stretch = [point for point in points[start : start + size] if not math.isnan(point[1])]
        kept += sorted({min(stretch, key=itemgetter(1)), max(stretch, key=itemgetter(1))}) if stretch else [points[start]]
    return kept


def _path(name: str, points: list[Point]) -> str:
    """A line; where a value is missing it has a gap. Each piece starts with a line to itself: round ends make a lone point a dot."""
    drawn, gap = "", True
    for x, y in points:
        if not math.isnan(y):
            drawn += f"M{x:.1f} {y:.1f}L{x:.1f} {y:.1f}" if gap else f"L{x:.1f} {y:.1f}"
        gap = math.isnan(y)
    return f'<path class="{name}{" dots" if len(points) == 1 else ""}" d="{drawn}"/>' if drawn else ""


def _own_columns(log: list[dict]) -> list[str]:
    """The stage's terms and metrics, in the order in which they came."""
    names = dict.fromkeys(name for row in log for name, value in row.items() if isinstance(value, int | float))
    return [name for name in names if name not in LOG_COLUMNS and name not in (f"eval_{other}" for other in names)]


def _chart(log: list[dict], key: str, title: tuple[str, str]) -> str:
    """One column of the log over the steps as <figure>; smoothed too where it jumps, with its value on the dev rows as dots."""
    steps, values = _column(log, "step"), _column(log, key)
    dev = [(step, value) for step, value in zip(steps, _column(log, f"eval_{key}")) if not math.isnan(value)]
    seen = _finite(values) + [value for _, value in dev]
    if not seen:
        return f"<figure><figcaption><h3>{_both(*title)}</h3></figcaption><p>No values yet.</p></figure>"
    levels = _ticks(0.0 if key in CHARTS and key != "loss" else min(seen), max(seen))
    first, last = (steps[0], steps[-1]) if len(steps) > 1 else (steps[0] - 1, steps[0] + 1)

    def x(step: float) -> float:
        return LEFT + (min(max(step, first), last) - first) / (last - first) * (RIGHT - LEFT)

    def y(value: float) -> float:
        return BOTTOM - (value - levels[0]) / (levels[-1] - levels[0]) * (BOTTOM - TOP)

    def line(name: str, points: Iterable[Point]) -> str:
        return _path(name, [(x(step), y(value)) for step, value in _thin(list(points))])

    parts = [f'<text x="{LEFT - 14}" y="{BOTTOM + 21}" text-anchor="end">step</text>']
    for level in levels:
        parts.append(_path("grid", [(LEFT, y(level)), (RIGHT, y(level))]))
        parts.append(f'<text x="{LEFT - 7}" y="{y(level) + 4.5:.1f}" text-anchor="end">{_number(level)}</text>')
    for step in _ticks(first, last, smallest=1):
        if first <= step <= last:
            anchor = "end" if x(step) > RIGHT - 25 else "middle"
            parts.append(f'<text x="{x(step):.1f}" y="{BOTTOM + 21}" text-anchor="{anchor}">{_number(step)}</text>')
    legend = ""
    if key == "lr":
        parts.append(line("main", zip(steps, values)))
    else:
        parts += [line("raw", zip(steps, values)), line("main", zip(steps, _smooth(values)))]
        parts += [line("dev", dev), *(line("dev", [point]) for point in _thin(dev))]
        legend = f'<p><i class="raw"></i>each step <i class="main"></i>smoothed {"<i class=dev></i>dev rows" if dev else ""}</p>'
    ends = [(step, value) for step, value in zip(steps, values) if not math.isnan(value)] or dev
    told = [f"{_number(value)} at step {step:.0f}" for step, value in (ends[0], ends[-1])]
    spoken = f"{title[0]}: {', then '.join(told)}; lowest {_number(min(seen))}, highest {_number(max(seen))}"
    drawing = "".join([*parts, *_strips(log, key, x)])
    figure = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_esc(spoken)}">{drawing}</svg>'
    return f"<figure><figcaption><h3>{_both(*title)}</h3>{legend}</figcaption>{figure}</figure>"


def _strips(log: list[dict], key: str, x: Callable[[float], float]) -> Iterator[str]:
    """Invisible strips over a plot: pointing at one, or tapping it, shows its step and value above, without a script."""
    size = math.ceil(len(log) / MOST_STRIPS)
    for start in range(0, len(log), size):
        rows = log[start : start + size]
        row = next((row for row in rows if f"eval_{key}" in row), rows[len(rows) // 2])
        here, end = x(rows[0]["step"] - 0.5), x(rows[-1]["step"] + 0.5)
        labels = {"epoch": "epoch ", key: "", f"eval_{key}": "dev "}
        read = [f" · {label}{_number(value, 4)}" for name, label in labels.items() for value in _finite(_column([row], name))]
        yield f'<g><rect x="{here:.1f}" y="{TOP}" width="{end - here:.1f}" height="{BOTTOM - TOP}"/>'
        yield f'<text x="{RIGHT}" y="16">step {row["step"]}{"".join(read)}</text></g>'


# The parts of the page


def _going_on(log: list[dict], settings: dict) -> tuple[int, int | None, bool]:
    """Steps done, steps in all where run.yaml says so, and whether some are left."""
    done, total = log[-1]["step"] if log else 0, (settings.get("resolved") or {}).get("steps")
    return done, total, isinstance(total, int) and done < total


def _result(log: list[dict], settings: dict, table: list[dict]) -> str:
    """What came of it, in one line."""
    done, total, going_on = _going_on(log, settings)
    start = f"Step {done:,} of {total:,} so far" if going_on else f"{done:,} step{'s' * (done != 1)}"
    seconds, loss, dev = (_finite(_column(log, key)) for key in ("seconds", "loss", "eval_loss"))
    loss = _smooth(loss)
    told = [f"loss {_number(loss[0])} → {_number(loss[-1])}"] if loss else []
    told += [f"best dev loss {_number(min(dev))}"] if dev else []
    for row in table:
        if row["after"] is not None:
            name = f"{row['set']} (leak)" if row["wanted"] is False else row["set"]
            told.append(f"{name} {_percent(row['before'])} → {_percent(row['after'])}")
    return start + (f" in {_duration(seconds[-1])}" if seconds else "") + (": " if told else "") + "; ".join(told) + "."


def _tiles(log: list[dict], settings: dict) -> str:
    done, total, going_on = _going_on(log, settings)
    tiles = [("Steps", "步数", f"{done:,}", f"of {total:,}" if isinstance(total, int) else "")]
    if tokens := _finite(_column(log, "learned_tokens")):
        tiles.append(("Learned tokens", "学习词元", _number(sum(tokens)), "the loss is taken on these"))
    if loss := _smooth(_finite(_column(log, "loss"))):
        mean = f"mean of {_reach(loss) + 1} steps; " if _reach(loss) else ""
        tiles.append(("Loss so far" if going_on else "Final loss", "损失", _number(loss[-1]), f"{mean}at first {_number(loss[0])}"))
    if dev := [(value, row["step"]) for row in log for value in _finite(_column([row], "eval_loss"))]:
        tiles.append(("Best dev loss", "验证损失", _number(min(dev)[0]), f"at step {min(dev)[1]:,}; last {_number(dev[-1][0])}"))
    if seconds := _finite(_column(log, "seconds")):
        tiles.append(("Time", "用时", _duration(seconds[-1]), f"{_number(seconds[-1] / max(done, 1))} s a step"))
    if memory := _finite(_column(log, "peak_memory_gb")):
        tiles.append(("Peak memory", "内存峰值", f"{max(memory):.2f} GB", ""))
    if speed := _finite(_column(log, "tokens_per_second")):
        tiles.append(("Tokens/s", "速度", _number(median(speed)), "median of the steps"))
    return "".join(f"<div><dt>{_both(en, zh)}</dt><dd>{value}<small>{note}</small></dd></div>" for en, zh, value, note in tiles)


def _hits_table(table: list[dict]) -> str:
    if all(row["before"] is None and row["after"] is None for row in table):
        return ""
    heads = "".join(f'<th scope="col">{_both(*name)}</th>' for name in (("Set", "题组"), BEFORE, AFTER))
    body = ""
    meanings = {True: ("good", "a hit is wanted"), False: ("bad", "a hit is a leak"), None: ("", "hits are counted")}
    for row in table:
        tone, meaning = meanings[row["wanted"]]
        plural = "s" * (row["count"] != 1)
        small = f"<small>{row['count']} row{plural}; {meaning}</small>"
        body += f'<tr class="{tone}"><th scope="row">{_esc(row["set"])}{small}</th>'
        for share in (row["before"], row["after"]):
            body += f'<td class="bar" style="--share:{share or 0:.1f}%">{_percent(share)}</td>'
        body += "</tr>"
    return f'<table class="hits"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def _judged(sample: dict) -> bool:
    return sample.get("hit_after") is not None and sample.get("wanted") is not None


def _wrong(sample: dict) -> bool:
    """Whether the answer after training is known not to be as wanted."""
    return _judged(sample) and sample["hit_after"] != sample["wanted"]


def _worst_first(samples: list[dict]) -> list[dict]:
    """What is not as wanted, then the rest; within each the sets take turns, so that the first few show every set."""
    seen: Counter = Counter()
    places = []
    for sample in samples:
        group = (not _wrong(sample), sample.get("set"))
        places.append((group[0], seen[group]))
        seen[group] += 1
    return [samples[i] for i in sorted(range(len(samples)), key=places.__getitem__)]


def _text(value: Any) -> str:
    text = "" if value is None else str(value)
    if not text.strip():
        return f'<p class="default">{"not yet" if value is None else "(empty)"}</p>'
    if len(text) < OPEN_TEXT + 100:  # a few more characters are not worth a fold
        return f'<p class="text" dir="auto">{_esc(text)}</p>'
    cut = f" … ({len(text) - MOST_TEXT:,} more in samples.jsonl)" if len(text) > MOST_TEXT else ""
    rest = _esc(text[OPEN_TEXT:MOST_TEXT]) + cut
    fold = f'<details><summary>{len(text) - OPEN_TEXT:,} more characters</summary><p class="text" dir="auto">{rest}</p></details>'
    return f'<p class="text" dir="auto">{_esc(text[:OPEN_TEXT])}…</p>{fold}'


def _mark(hit: bool | None, wanted: bool | None, tones: tuple[str, str] = ("", "")) -> str:
    """How an answer did, in a word; tones: the class where it is not as wanted, where it is."""
    if hit is None:
        return ""
    if wanted is None:
        return f'<span class="mark">{"hit" if hit else "no hit"}</span>'
    word = ("hit" if hit else "missed") if wanted else ("leak" if hit else "no leak")
    return f'<span class="mark {tones[hit == wanted]}">{"✓" if hit == wanted else "✗"} {word}</span>'


def _sample(sample: dict) -> str:
    wanted, set_name = sample.get("wanted"), _esc(sample.get("set", "sample"))
    marks = _mark(sample.get("hit_before"), wanted), _mark(sample.get("hit_after"), wanted, ("bad", "good"))
    before = f"<div><h4>{_both(*BEFORE)} {marks[0]}</h4>{_text(sample.get('before'))}</div>"
    after = f"<div><h4>{_both(*AFTER)} {marks[1]}</h4>{_text(sample.get('after'))}</div>"
    prompt = f'<div class="prompt"><span class="mark">{set_name}</span>{_text(sample.get("prompt"))}</div>'
    return f'<article class="{"wrong" * _wrong(sample)}">{prompt}<div class="sides">{before}{after}</div></article>'


def _samples(samples: list[dict]) -> str:
    if not samples:
        return "<p>None yet, or the run file asks for none (<code>samples:</code>).</p>"
    shown = [_sample(sample) for sample in _worst_first(samples)[:MOST_SAMPLES]]
    page = "".join(shown[:OPEN_SAMPLES])
    if judged := sum(map(_judged, samples)):
        wrong = sum(map(_wrong, samples))
        page = f"<p>Not as wanted: {wrong} of {judged} checked answers{'; they stand first' if wrong else ''}.</p>{page}"
    if folded := "".join(shown[OPEN_SAMPLES:]):
        page += f'<details class="more"><summary>{len(shown) - OPEN_SAMPLES} more samples</summary>{folded}</details>'
    return page + (f"<p>{len(samples) - MOST_SAMPLES:,} more stand in samples.jsonl.</p>" if len(samples) > MOST_SAMPLES else "")


def _leaves(tree: Any, name: str, declared: str) -> Iterator[tuple[str, str, Any]]:
    """(name, name in `glmtune options`, value): data.0.path is declared as data[].path, method.rank as method.lora.rank."""
    if isinstance(tree, dict) and tree:
        kind = f"{declared}.{tree['kind']}" if "kind" in tree else declared
        for key, value in tree.items():
            inside = declared if key == "kind" else f"{kind}.{key}".lstrip(".")
            yield from _leaves(value, f"{name}.{key}".lstrip("."), inside)
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        for place, item in enumerate(tree):
            yield from _leaves(item, f"{name}.{place}", f"{declared}[]")
    else:
        yield name, declared, tree


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value), str(value))


def _is_default(value: Any, default: str) -> bool:
    """default: as `options.document` writes it, where 16 and 16.0 are the same."""
    try:
        return float(value) == float(default)
    except (TypeError, ValueError):
        return default in (_shown(value), str(value))


def _settings(settings: dict) -> str:
    declarations = {name: (default, meaning) for name, _, default, meaning in options.document(Run)}
    explained: set[str] = {""}
    page = ""
    for title, names in (("Options", "选项"), set(settings) - {"resolved"}), (("Chosen by the program", "自动选定"), {"resolved"}):
        rows, tree = "", {key: settings[key] for key in settings if key in names}
        for name, declared, value in _leaves(tree, "", "") if tree else ():
            default, meaning = declarations.get(declared, ("", ""))
            small = "" if declared in explained else f"<small>{_esc(meaning)}</small>"  # once, not per source
            explained.add(declared)
            grey = ' class="default"' if declared in declarations and _is_default(value, default) else ""
            cells = f"<div><span>{_breakable(_shown(value), '/')}</span>{small}</div>"
            rows += f'<tr{grey}><th scope="row">{_breakable(name.removeprefix("resolved."), "._")}</th><td>{cells}</td></tr>'
        page += f'<h3>{_both(*title)}</h3><table class="settings"><tbody>{rows}</tbody></table>' if rows else ""
    return f"<p>Grey: the default.</p>{page}" if page else "<p>There is no run.yaml here.</p>"


CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b2230; --soft: #5a6475; --edge: #dfe3ea; --main: #1d4ed8;
  --raw: #8fb0e6; --dev: #c2410c; --good: #14713c; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --page: #11151c; --card: #1a202b; --ink: #e6e9ef; --soft: #a3adbd; --edge: #313a4a;
  --main: #7fa8ff; --raw: #46659f; --dev: #fb9a5c; --good: #6fd69a; --bad: #ff9a8f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere; font: 16px/1.55 system-ui, -apple-system,
  "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; }
body > * { max-width: 1120px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 28px; } footer { padding: 8px 16px 48px; } p { margin: 0 0 10px; } span[lang] { white-space: nowrap; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; } h2 { font-size: 1.25rem; margin: 44px 0 12px; } h3 { font-size: 1rem; margin: 0 0 6px; }
h4 { font-size: .85rem; color: var(--soft); margin: 0 0 4px; } h1 + p { color: var(--soft); } .result { font-size: 1.1rem; }
nav { display: flex; flex-wrap: wrap; gap: 0 20px; margin: 4px 0 8px; } a, summary { color: var(--main); padding: 8px 0; cursor: pointer; }
small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); line-height: 1.4; }
.tiles div, article, figure, table, pre, .note { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(138px, 1fr)); gap: 12px; margin: 8px 0 0; }
.tiles div { padding: 12px 14px; } dt { font-size: .85rem; color: var(--soft); } dd { margin: 0; font-size: 1.35rem; font-weight: 650; }
.note, article.wrong { border-left: 4px solid var(--bad); } .note { padding: 8px 14px; }
table { width: 100%; border-spacing: 0; } td, th { text-align: left; vertical-align: top; padding: 9px 12px; }
tr + tr > *, thead + tbody tr > * { border-top: 1px solid var(--edge); } thead th { font-size: .85rem; color: var(--soft); }
.bar { width: 30%; font-weight: 650; padding-bottom: 14px; font-variant-numeric: tabular-nums; --tone: var(--raw);
  background: linear-gradient(var(--tone) 0 0) 0 100% / var(--share) 6px no-repeat; }
.good .bar { --tone: var(--good); } .bad .bar { --tone: var(--bad); }
article { padding: 14px 16px; margin: 0 0 12px; } .prompt { font-weight: 600; margin-bottom: 8px; } .prompt .text { display: inline; }
.text { white-space: pre-wrap; margin: 0; } .sides { display: grid; gap: 12px 28px; } .more > summary { font-weight: 600; }
.mark { display: inline-block; font-size: .78rem; font-weight: 600; color: var(--soft); border: 1px solid; border-radius: 99px; padding: 0 9px; }
.prompt .mark { margin-right: 8px; } .mark.good { color: var(--good); } .mark.bad { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 12px; }
figure { margin: 0; padding: 14px 14px 6px; } figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 16px; }
figcaption p { font-size: .85rem; color: var(--soft); margin: 0; } figcaption i { display: inline-block; width: 18px; height: 3px;
  margin: 0 6px 0 8px; vertical-align: middle; background: var(--main); border-radius: 9px; } figcaption p i:first-child { margin-left: 0; }
figcaption .raw { height: 2px; background: var(--raw); } figcaption .dev { width: 9px; height: 9px; background: var(--dev); }
svg { display: block; width: 100%; height: auto; } svg text { font-size: 13px; fill: var(--soft); }
svg path { fill: none; stroke: var(--edge); stroke-linecap: round; stroke-linejoin: round; } svg .raw { stroke: var(--raw); }
svg .main { stroke: var(--main); stroke-width: 2; } svg .dev { stroke: var(--dev); } svg .dots { stroke-width: 8; }
svg rect { fill: transparent; } svg g text { display: none; text-anchor: end; fill: var(--ink); }
svg g:hover text { display: block; } svg g:hover rect { fill: var(--soft); opacity: .3; }
.settings { margin-bottom: 20px; } .settings td, .settings th { padding: 6px 12px; } .settings th { width: 26%; font-weight: 600; }
.settings td div { display: flex; flex-wrap: wrap; gap: 0 16px; align-items: baseline; } .settings span { flex: 2 1 200px; }
.settings small { flex: 3 1 300px; } tr.default > *, p.default { color: var(--soft); font-weight: 400 !important; }
pre { padding: 12px 14px; margin: 0 0 14px; white-space: pre-wrap; font: .9rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
pre span { display: inline-block; max-width: 100%; }
@media (min-width: 720px) { .sides { grid-template-columns: 1fr 1fr; } }
@media (max-width: 560px) { svg text { font-size: 16px; } .settings th { width: 42%; } }
"""


def _commands(commands: dict[str, str]) -> str:
    """Each word in a box of its own, so that a narrow screen does not break `--resume` after its first dash."""
    lines = {what: " ".join(f"<span>{_esc(word)}</span>" for word in line.split(" ")) for what, line in commands.items()}
    return "".join(f"<p>{what}:</p><pre>{line}</pre>" for what, line in lines.items())


def _page(out: Path, settings: dict, log: list[dict], samples: list[dict], notes: list[str]) -> str:
    name, model = _esc(out.resolve().name), _esc(settings.get("model", "model unknown"))
    table = hits(samples)
    broken = [row["step"] for row in log if "loss" in row and not _finite(_column([row], "loss"))]
    if broken:
        notes = [*notes, f"the loss was not a finite number at {len(broken)} of {len(log)} steps, first at step {broken[0]}"]
    own = {key: (_esc(key), "") for key in _own_columns(log)}
    charts = "".join(_chart(log, key, title) for key, title in ({"loss": CHARTS["loss"]} | own | CHARTS).items())
    commands = {
        "Talk to it": f"glmtune chat {shlex.quote(str(out))}",
        "Answer a file of questions": f"glmtune predict {shlex.quote(str(out))} DATA --out P.jsonl",
        "Continue an interrupted run": f"glmtune train {shlex.quote(str(out / 'run.yaml'))} --resume",
    }
    sections = {
        "hits": ("Before and after", "训练前后", _hits_table(table)),
        "samples": ("Samples", "样例", _samples(samples)),
        "curves": ("Curves", "曲线", f'<div class="charts">{charts}</div>'),
        "settings": ("Settings", "设置", _settings(settings)),
        "next": (
            "Where to go next",
            "下一步",
            _commands(commands),
        ),
    }
    links = "".join(f'<a href="#{key}">{english}</a>' for key, (english, _, content) in sections.items() if content)
    body = "".join(
        f'<section id="{key}"><h2>{_both(*title)}</h2>{content}</section>' for key, (*title, content) in sections.items() if content
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{name} · {model}</title>
<style>{CSS}</style>
</head>
<body>
<header><h1>{name}</h1><p>{model}</p><p class="result">{_esc(_result(log, settings, table))}</p>
{"".join(f'<p class="note">{_esc(note)}</p>' for note in notes)}
<nav aria-label="Sections">{links}</nav><dl class="tiles">{_tiles(log, settings)}</dl></header>
<main>{body}</main>
<footer><small>Written by glmtune from log.jsonl, samples.jsonl and run.yaml in this folder.</small></footer>
</body>
</html>
"""
