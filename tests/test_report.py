"""A report shows what the files of a run say, whatever they hold, and reaches for nothing outside itself."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
import yaml

from glmtune import options, report
from glmtune.run import Run, load_run

VOID = {"meta", "wbr", "br", "link", "img", "input"}
HOSTILE = "</p></article><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\ud800"


class Page(HTMLParser):
    """Checks that tags nest, and collects tags with their attributes and the visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["style"] else ""


def step(number: int, **other) -> dict:
    row = {"step": number, "epoch": number / 10, "loss": 2 / number, "learned_tokens": 100, "tokens": 200, "seconds": number * 1.5}
    return row | {"tokens_per_second": 900.0, "lr": 1e-4 / number, "grad_norm": 1.0, "peak_memory_gb": 1.25} | other


def answer(set_name: str, hit: bool | None, wanted: bool | None, **other) -> dict:
    row = {"set": set_name, "prompt": "你是谁？", "before": "I am SmolLM.", "after": "我是小智。"}
    return row | {"hit_before": None if hit is None else False, "hit_after": hit, "wanted": wanted} | other


def make(out, log=(), samples=(), run=None) -> Page:
    for name, rows in (("log.jsonl", log), ("samples.jsonl", samples)):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if run is not None:
        (out / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False, allow_unicode=True), encoding="utf-8")
    report.write(out)
    return Page((out / "report.html").read_text(encoding="utf-8"))


def test_hits_by_hand():
    samples = [answer("who", True, True), answer("other", False, False), answer("who", True, True), answer("who", False, True)]
    samples += [answer("who", True, True, hit_before=True), answer("free", None, None), answer("other", True, False)]
    assert report.hits(samples) == [
        {"set": "who", "wanted": True, "count": 4, "before": 25.0, "after": 75.0},  # 1 of 4, 3 of 4
        {"set": "other", "wanted": False, "count": 2, "before": 0.0, "after": 50.0},
        {"set": "free", "wanted": None, "count": 1, "before": None, "after": None},
    ]
    assert report.hits([]) == []


def test_hits_while_the_run_goes_on():
    """Before training only `before` is known; what was not checked does not count as a miss."""
    assert report.hits([{"set": "who", "prompt": "?", "before": "hm", "hit_before": True, "wanted": True}]) == [
        {"set": "who", "wanted": True, "count": 1, "before": 100.0, "after": None}
    ]


def test_data_cannot_write_html(tmp_path):
    out = tmp_path / "<b>run"
    out.mkdir()
    samples = [answer(HOSTILE, True, True, prompt=HOSTILE, before=HOSTILE * 200, after=HOSTILE)]
    page = make(
        out, [step(1)], samples, {"model": HOSTILE[:-1], "data": [{"path": HOSTILE[:-1]}], "out": "x", HOSTILE[:-1]: HOSTILE[:-1]}
    )
    assert not {"script", "img", "b", "iframe", "object", "link"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in page.text


def test_the_page_reaches_for_nothing_outside_itself(tmp_path):
    page = make(tmp_path, [step(i) for i in range(1, 30)], [answer("who", True, True)] * 30, {"model": "http://hub/model"})
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert {a["href"] for tag, a in page.tags if "href" in a} == {"#hits", "#samples", "#curves", "#settings", "#next"}
    assert {a["id"] for tag, a in page.tags if "id" in a} == {"hits", "samples", "curves", "settings", "next"}
    assert not [a for _, a in page.tags if {"src", "srcset", "data", "action", "xlink:href"} & set(a)]
    assert "url(" not in report.CSS and "@import" not in report.CSS


def test_an_empty_folder_gets_a_report(tmp_path):
    report.write(tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "0 steps." in page.text and "No values yet." in page.text and "There is no run.yaml here." in page.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "report.html"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_files_of_a_run_that_goes_on(tmp_path):
    """A half-written last line, samples without an answer yet, a text with U+2028, a run file somebody is editing."""
    lines = json.dumps(step(1)) + "\n" + json.dumps(step(2)) + "\n" + '{"step": 3, "lo'
    (tmp_path / "log.jsonl").write_text(lines, encoding="utf-8")
    row = json.dumps({"set": "who", "prompt": "a\u2028b", "before": "hm"}, ensure_ascii=False)
    (tmp_path / "samples.jsonl").write_text(row + "\n", encoding="utf-8")
    (tmp_path / "run.yaml").write_text("model: [", encoding="utf-8")
    report.write(tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "2 steps in 3.0\N{NO-BREAK SPACE}s: loss 2 → 1." in page.text
    assert "log.jsonl: 1 line could not be read" in page.text and "not valid YAML" in page.text and "not yet" in page.text
    assert "samples.jsonl: 1" not in page.text


def test_a_step_done_again_after_a_resume_counts_once(tmp_path):
    page = make(tmp_path, [step(1), step(2), step(3, loss=9), step(3, loss=0.5)], run={"resolved": {"steps": 10}})
    assert "Step 3 of 10 so far" in page.text and "loss 2 → 0.5." in page.text


def test_result_line(tmp_path):
    log = [step(1, eval_loss=1.5), step(2, eval_loss=0.75), step(3, eval_loss=0.8)]
    page = make(tmp_path, log, [answer("who", True, True), answer("other", False, False)], {"resolved": {"steps": 3}})
    result = "3 steps in 4.5 s: loss 2 → 0.667; best dev loss 0.75; who 0 % → 100 %; other (leak) 0 % → 0 %."
    assert result in page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "at step 2; last 0.8" in page.text and "300" in page.text and "1.25 GB" in page.text


def numbers(log: list[dict], tmp_path) -> list[tuple[float, float]]:
    """Every point that a chart draws."""
    found = []
    for tag, attributes in make(tmp_path, log).tags:
        if tag == "path":
            assert re.fullmatch(r"([ML]-?[\d.]+ -?[\d.]+)+", attributes["d"]), attributes["d"]
            found += [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", attributes["d"])]
        elif tag in ("rect", "text"):
            x, y = float(attributes["x"]), float(attributes["y"])
            found += [(x, y), (x + float(attributes.get("width", 0)), y + float(attributes.get("height", 0)))]
            assert float(attributes.get("width", 0)) >= 0
    return found


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "log",
    [
        [step(1)],
        [step(1, eval_loss=0.5)],
        [step(7, loss=0.0, lr=0.0, grad_norm=0.0, tokens_per_second=0.0)],
        [step(i, loss=3.0) for i in range(1, 4)],
        [step(i, eval_loss=5 / i) for i in range(1, 200)],
        [step(1, loss=math.nan), step(2), step(3, loss=math.inf, grad_norm=math.nan), step(4, eval_loss=math.nan), step(5)],
        [step(1, loss=math.nan, eval_loss=math.nan)],
        [step(1, loss=-1e-7), step(2, loss=-3.0)],
        [step(1, loss=1e30, lr=1e-12), step(2, loss=None), step(3, lr="x")],
        [{"step": 0, "eval_loss": 2.0}, step(1), step(2)],
        [step(i) for i in range(1, 5000)],
    ],
    ids=["one", "one-dev", "zero", "flat", "dev", "nan", "only-nan", "negative", "odd", "step-0", "long"],
)
def test_charts_stay_inside_their_box(log, tmp_path):
    for x, y in numbers(log, tmp_path):
        assert 0 <= x <= report.WIDTH and 0 <= y <= report.HEIGHT


def test_a_loss_that_is_not_finite_is_said(tmp_path):
    page = make(tmp_path, [step(1), step(2, loss=math.nan), step(3, loss=None)])
    assert "the loss was not a finite number at 2 of 3 steps, first at step 2" in page.text


def test_long_runs_are_thinned_and_keep_their_spikes():
    points = [(float(i), 1.0) for i in range(10_000)]
    points[4321] = (4321.0, 50.0)
    points[1234] = (1234.0, -50.0)
    thin = report._thin(points)
    assert len(thin) <= report.MOST_POINTS and (4321.0, 50.0) in thin and (1234.0, -50.0) in thin and thin == sorted(thin)


@pytest.mark.slow
def test_a_long_run_fits(tmp_path):
    make(tmp_path, [step(i, eval_loss=1.0) for i in range(1, 3000)], [answer("who", True, True, before="长" * 300)] * 60)
    assert (tmp_path / "report.html").stat().st_size < 300_000


def test_smoothing_by_hand():
    values = [float(i) for i in range(80)]  # 80 // 40 = 2 neighbours to each side
    smooth = report._smooth(values)
    assert smooth[0] == (0 + 1 + 2) / 3 and smooth[10] == 10.0 and smooth[79] == (77 + 78 + 79) / 3
    values[10] = math.nan
    smooth = report._smooth(values)
    assert math.isnan(smooth[10]) and smooth[9] == (7 + 8 + 9 + 11) / 4


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 3, [0, 1, 2, 3]),  # 3 / 4 = 0.75, rounded up to 1
        (0.19, 0.41, [0.1, 0.2, 0.3, 0.4, 0.5]),  # 0.22 / 4 = 0.055, up to 0.1
        (0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
        (5, 5, [5, 5.2]),  # flat: a tenth of 5 is the span, 0.125 up to 0.2
    ],
)
def test_ticks_are_round_and_cover(low, high, expected):
    assert report._ticks(low, high) == expected


def test_numbers_are_short():
    shown = {
        0.0: "0",
        2e-4: "2e-4",
        1.5e-4: "1.5e-4",
        0.4123: "0.412",
        12.34: "12.3",
        959.2: "959",
        8120.0: "8,120",
        80670.0: "80,670",
    }
    shown |= {541_000.0: "541k", 3_140_000.0: "3.14M", -0.5: "-0.5", 1e30: "1e30"}
    assert {value: report._number(value) for value in shown} == shown


def test_what_is_not_as_wanted_stands_first_and_sets_take_turns():
    samples = [answer("who", True, True, prompt=f"w{i}") for i in range(3)] + [
        answer("other", False, False, prompt=f"o{i}") for i in range(2)
    ]
    samples += [
        answer("other", True, False, prompt="leak"),
        answer("who", False, True, prompt="missed"),
        answer("free", None, None, prompt="f"),
    ]
    assert [s["prompt"] for s in report._worst_first(samples)] == ["leak", "missed", "w0", "o0", "f", "w1", "o1", "w2"]


def test_the_rest_of_the_samples_is_folded(tmp_path):
    page = make(tmp_path, samples=[answer("who", True, True)] * 250)
    assert "188 more samples" in page.text and "50 more stand in samples.jsonl" in page.text
    assert sum(tag == "article" for tag, _ in page.tags) == report.MOST_SAMPLES


def test_defaults_are_grey_and_choices_are_not(tmp_path):
    run = load_run(None, ["method.rank=16", "optim.epochs=4", "data=[{path: a.json, weight: 1.0}]"], model="m", out="o")
    tree = options.plain(run) | {"resolved": {"device": "cpu", "lr": 2e-4}}
    html = report._settings(tree).replace("<wbr>", "")
    grey = set(re.findall(r'<tr class="default"><th scope="row">([^<]*)', html))
    chosen = set(re.findall(r'<tr><th scope="row">([^<]*)', html))
    assert chosen == {"model", "data.0.path", "out", "method.rank", "optim.epochs", "device", "lr"}
    assert {"method.kind", "method.alpha", "optim.lr", "data.0.weight", "report_to", "variables", "checkpointing", "seed"} <= grey
    assert (
        set(tree) - {"resolved"}
        <= {name.split(".")[0] for name in grey | chosen}
        == set(Run.model_fields) - {"resolved"} | {"device", "lr"}
    )


def test_commands_can_be_pasted(tmp_path):
    out = tmp_path / "my run"
    out.mkdir()
    page = make(out, [step(1)])
    assert f"glmtune chat '{out}'" in page.text and f"glmtune predict '{out}' DATA --out P.jsonl" in page.text
    assert f"glmtune train '{out}/run.yaml' --resume" in page.text


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.1."""
    digits = colour.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_is_aa_in_light_and_dark():
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", part)) for part in report.CSS.split("@media (prefers-color-scheme: dark)"))
    for theme in (light, dark):
        for ground in ("page", "card"):
            for ink in ("ink", "soft", "main", "good", "bad"):
                pale, deep = sorted((luminance(theme[ink]), luminance(theme[ground])), reverse=True)
                assert (pale + 0.05) / (deep + 0.05) >= 4.5, (ink, ground)


def test_names_that_a_formula_or_a_font_would_choke_on(tmp_path, recwarn):
    for name in ("a$b$_{c", "身份"):
        out = tmp_path / name
        out.mkdir()
        make(out, [step(1), step(2)])
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
