"""Run files: strict, typed, with errors that name the option and guess what was meant."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from glmtune import options
from glmtune.errors import UserError
from glmtune.run import DEFAULT_LR, UNKNOWN_LR, Full, Prefix, Run, default_lr, load_run, moment

from .cases import cases

GIVEN = ("model=m", "data=a.json", "out=o")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["method.rnak=4"], "unknown option 'method.rnak'; did you mean 'rank'?"),
        (["metod.rank=4"], "unknown option 'metod'; did you mean 'method'?"),
        (["method.rank=four"], "method.rank: wanted a valid integer, got 'four' (str)"),
        (["method.rank=0"], "method.rank: wanted greater than 0, got 0 (int)"),
        (["method=lroa"], "method.kind: 'lroa' is not one of lora, prefix, freeze, full; did you mean 'lora'?"),
        (["method=full", "method.rank=3"], "option 'method.rank' belongs to kind lora; the kind here is 'full'"),
        (["method.rank=3", "method=full"], "option 'method.rank' belongs to kind lora; the kind here is 'full'"),
        (
            ["method.start=a", "method={kind: full}"],
            "option 'method.start' belongs to kind lora or prefix; the kind here is 'full'",
        ),
        (["optim.epochs=.inf"], "optim.epochs: wanted a finite number, got inf (float)"),
        (["optim.epochs=1e308"], "optim.epochs: wanted less than or equal to 1000000000, got 1e+308 (float)"),
        (["optim.lr=.nan"], "optim.lr: wanted a finite number, got nan (float)"),
        (["data.0.weight=.inf"], "data.0.weight: wanted a finite number"),
        (["method.alphas={q_proj: .inf}"], "method.alphas.q_proj: wanted a finite number"),
        (["method.alphas={q_proj: 0}"], "method.alphas.q_proj: wanted greater than 0, got 0 (int)"),
        (["method.ranks={q_proj: 0}"], "method.ranks.q_proj: wanted greater than 0, got 0 (int)"),
        (["resolved=5"], "resolved: wanted a valid dictionary, got 5 (int)"),
        (["resolved.lr=abc"], "resolved.lr: wanted a valid number, got 'abc' (str)"),
        (["optim.schedule=cosin"], "optim.schedule: 'cosin' is not one of cosine, linear, constant; did you mean 'cosine'?"),
        (["stage=dpoo"], "stage.kind: 'dpoo' is not one of"),
        (["template=chatm"], "did you mean 'chatml'?"),
        (["template={user: 'no place'}"], "template.user: must hold {content} exactly once"),
        (["eval.share=1.5"], "eval.share: below 1 it is a share of the rows"),
        (["eval.share=0.1", "eval.data=b.json"], "eval.data and eval.share exclude each other"),
        (["data=[{path: a, weigth: 2}]"], "unknown option 'data.0.weigth'; did you mean 'weight'?"),
        (["data=[1]"], "data.0: wanted a group of options"),
        (["checkpointing=maybe"], "checkpointing: 'maybe' is not one of auto"),
        (["out"], "'out' is neither a run file nor a setting"),
        (["data.3.weight=2"], "'3' is not a position in a list of 1"),
    ],
)
def test_a_wrong_setting_is_named(settings, said):
    with pytest.raises(UserError) as error:
        load_run(None, [*GIVEN, *settings])
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_everything_wrong_is_told_at_once():
    with pytest.raises(UserError) as error:
        load_run(None, [*GIVEN, "method.rnak=1", "optm.lr=1"])
    assert "rnak" in str(error.value) and "optm" in str(error.value)


def test_what_is_missing_is_told_with_what_to_paste():
    with pytest.raises(UserError, match=r"'model', 'out' are missing.*model=smollm2-135m-instruct out=runs/first"):
        load_run(None, ["data=a.json"])


def test_numbers_as_people_write_them():
    run = load_run(None, [*GIVEN, "optim.lr=2e-4", "optim.weight_decay=1E-2", "method.alpha=32", "optim.epochs=.5"])
    assert (run.optim.lr, run.optim.weight_decay, run.method.alpha, run.optim.epochs) == (2e-4, 1e-2, 32, 0.5)


def test_data_takes_a_path_a_list_or_groups(tmp_path):
    for value in ("a.json", "[a.json]", "{path: a.json}", "[{path: a.json}]"):
        assert [s.path for s in load_run(None, ["model=m", f"data={value}", "out=o"]).data] == ["a.json"]
    run = load_run(None, [*GIVEN, "data.0.max_samples=5"])
    assert run.data[0].max_samples == 5


def test_paths_may_be_relative_to_the_run_file(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "rows.json").write_text("[]")
    (tmp_path / "sub" / "run.yaml").write_text("model: m\ndata: rows.json\nout: o\n")
    monkeypatch.chdir(tmp_path)
    assert load_run("sub/run.yaml").data[0].path == "sub/rows.json"


def test_the_written_run_reads_back_equal(tmp_path):
    run = load_run(
        None, [*GIVEN, "method=full", "template={user: 'Q: {content}\n', stop: </s>}", "variables={name: 小智}", "optim.lr=3e-5"]
    )
    options.write(run, tmp_path / "run.yaml", "# header\n")
    assert load_run(tmp_path / "run.yaml") == run


def test_broken_run_files_are_told_by_line(tmp_path):
    (tmp_path / "run.yaml").write_text("model: x\ndata: [a\nout: b\n")
    with pytest.raises(UserError, match=r"run.yaml:3:4: not valid YAML"):
        load_run(tmp_path / "run.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(UserError, match=r"holds `name: value` lines"):
        load_run(tmp_path / "list.yaml")
    with pytest.raises(UserError, match=r"there is no run file .*rum.yaml; did you mean 'run.yaml'"):
        load_run(tmp_path / "rum.yaml")


def test_yaml_cannot_make_objects(tmp_path):
    (tmp_path / "run.yaml").write_text("model: !!python/object/apply:os.system ['touch marker']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_run(tmp_path / "run.yaml")


def test_every_option_is_documented():
    rows = list(options.document(Run))
    assert len(rows) < 110  # the design asks for under 80 options; shared groups (sources) are listed once per place
    assert all(description for _, _, _, description in rows)
    names = [row[0] for row in rows]
    assert {"method.lora.rank", "optim.adamw.lr", "data[].columns", "too_long"} <= set(names)
    assert len(names) == len(set(names))


def test_differences_name_both_values():
    old, new = yaml.safe_load("a: {b: 1, c: 2}\nd: x"), yaml.safe_load("a: {b: 1, c: 3}\nd: x\ne: 1")
    assert list(options.differences(old, new)) == ["a.c (2 there, 3 now)", "e (null there, 1 now)"]


def test_text_on_the_command_line_is_taken_as_it_stands():
    given = ["system=Answer # briefly: yes", "variables.name=42", "out=1", "template.user=Q: {content} - no", "join=null"]
    run = load_run(None, [*GIVEN, "template.stop=</s>", *given])
    assert (run.system, run.variables, run.out, run.template.user, run.join) == (
        "Answer # briefly: yes",
        {"name": "42"},
        "1",
        "Q: {content} - no",
        None,
    )
    assert load_run(None, [*GIVEN, 'join="\\n\\n"']).join == "\n\n"
    with pytest.raises(UserError, match="not a newline"):
        load_run(None, [*GIVEN, "join=\\n"])


def test_changed_options_are_what_differs_from_the_defaults():
    run = load_run(None, [*GIVEN, "optim.lr=1e-3", "method=full"])
    default = options.plain(Run.model_construct(model="", data=[], out="o"))
    found = options.changed(options.plain(run), default)
    assert (
        found["optim"] == {"lr": 1e-3}
        and found["method"] == {"kind": "full"}
        and found["data"] == [{"path": "a.json", "weight": 1.0}]
    )


def test_another_kind_on_the_command_line_takes_over_the_options_both_have(tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\nout: o\nmethod: {rank: 3, dropout: 0.1}\n")
    run = load_run(tmp_path / "run.yaml", ["optim.steps=4", "optim=adafactor", "method=prefix"])
    assert run.optim.kind == "adafactor" and run.optim.steps == 4 and run.method.kind == "prefix" and run.method.dropout == 0.1


HEAD = "model: m\ndata: a.json\nout: o\n"
LINES = {
    # (the run file after its first three lines, what is said)
    "twice": ("optim: {lr: 1.0}\noptim: {epochs: 2}\n", "'optim' is given twice, in line 4 and in line 5"),
    "twice inside": ("optim:\n  lr: 1.0\n  lr: 2.0\n", "'lr' is given twice, in line 5 and in line 6"),
    "twice in a list": ("samples:\n- {path: a, path: b}\n", "'path' is given twice"),
    "twice in other words": ("variables:\n  a: x\n  'a': y\n", "'a' is given twice"),
    "twice merged": ("optim:\n  <<: {lr: 1.0}\n  <<: {lr: 2.0}\n", "'<<' is given twice"),
    "merged": ("optim: {<<: 5}\n", "expected a mapping or list of mappings for merging"),
    "int": ("seed: !!int x\n", "'x' is no int, in line 4"),
    "empty int": ("seed: !!int ''\n", "'' is no int"),
    "timestamp": ("seed: !!timestamp x\n", "'x' is no timestamp"),
    "bool": ("seed: !!bool x\n", "'x' is no bool"),
    "float": ("seed: !!float x\n", "'x' is no float"),
    "binary": ("seed: !!binary x\n", "failed to decode base64 data"),
    "no date": ("seed: 2026-99-99\n", "'2026-99-99' is no timestamp"),
    "python": ("seed: !!python/object/apply:os.system [ls]\n", "could not determine a constructor for the tag"),
    "tag": ("seed: !" + "x" * 9000 + " 1\n", "could not determine a constructor"),
    "a list as a key": ("? [a, b]\n: 1\n", "found unhashable key"),
    "digits": ("seed: " + "9" * 9000 + "\n", "is no int"),
    "deep": ("samples: " + "[" * 3000, "nested too deeply, in line 4"),
    "deep groups": ("optim: " + "{a: " * 500, "nested too deeply"),
    "deep blocks": ("optim:\n" + "".join(" " * (i + 1) + "a:\n" for i in range(600)), "nested too deeply"),
    "deep by aliases": ("a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}]\n" for i in range(500)), "what aliases repeat"),
    "laughs": ("a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9)), "what aliases repeat"),
    "keys that laugh": ("a0: &a0 {x: y}\n" + "".join(f"a{i + 1}: &a{i + 1} {{b: *a{i}, c: *a{i}}}\n" for i in range(40)), "what aliases repeat"),
    "within itself": ("samples: &a [*a]\n", "samples.0: wanted a group of options"),
    "long list": ("system: [" + "x" * 100_000 + "]\n", "system: wanted a valid string, got"),
    "long text": ("template: " + "x" * 100_000 + "\n", "is not one of auto, plain"),
    "long kind": ("method: " + "x" * 100_000 + "\n", "method.kind: "),
    "long name": ("x" * 1000 + ": 1\n", "unknown option 'xxx"),
    "long form": ("template: {user: " + "x" * 100_000 + "}\n", "template.user: must hold {content} exactly once"),
    "half a character": ('system: "\\udcff"\n', "system: holds a byte or a half of a character"),
    "no date of ours": ("date: yesterday\n", "date: wanted a date like 2026-07-31"),
    "too much": ("system: " + "x" * 1_100_000 + "\n", "has more than 1,000,000 bytes"),
}  # fmt: skip


@pytest.mark.few(16)
@pytest.mark.parametrize("name", LINES)
def test_a_run_file_that_cannot_be_meant_is_told_in_short_lines(name, tmp_path):
    (tmp_path / "run.yaml").write_text(HEAD + LINES[name][0])
    with pytest.raises(UserError) as error:
        load_run(tmp_path / "run.yaml")
    said = str(error.value)
    assert LINES[name][1] in said and "run.yaml" in said
    assert len(said.splitlines()) <= 3 and len(said) < 1000 + len(str(tmp_path))


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "a: {b: 1, b: 2}\n", "- a: 1\n  a: 2\n", "[" * 200, "a: !!int x\n"])
def test_all_yaml_is_read_by_one_loader(text, tmp_path):
    from glmtune import design, oldruns, sources

    path = tmp_path / "file.yaml"
    path.write_text(text)
    for read in (
        options.read_yaml,
        options.read,
        sources.read_registry,
        design.load_schema,
        lambda path: oldruns.convert(path, tmp_path / "new.yaml"),
    ):
        with pytest.raises(UserError, match=r"file\.yaml"):
            read(path)


@cases(100)
@given(st.recursive(st.one_of(st.booleans(), st.integers(), st.text("abc你 :'-", max_size=6), st.floats(allow_nan=False, allow_infinity=False)),
                    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text("abc", max_size=3), inner, max_size=3))))  # fmt: skip
def test_yaml_that_is_written_reads_back(value):
    assert options.plain_value(yaml.safe_dump(value)) == value


def test_merge_keys_and_aliases_work(tmp_path):
    (tmp_path / "run.yaml").write_text(
        HEAD + "eval: {data: &d [{path: b.json, weight: 2.0}]}\nsamples: [&p {path: c}, {<<: *p, name: n}]\n"
    )
    run = load_run(tmp_path / "run.yaml")
    assert [(probe.path, probe.name) for probe in run.samples] == [("c", None), ("c", "n")] and run.eval.data[0].weight == 2


@pytest.mark.parametrize("setting", ["data", "model", "out", "samples", "eval.data", "registry", "method.start"])
def test_a_path_that_can_be_none_names_its_option(setting):
    for path in ("a" * 5000, "b/" * 3000, "~no-such-user/x"):
        with pytest.raises(UserError, match=setting.split(".")[0]) as error:
            load_run(None, [*GIVEN, f"{setting}={path}"])
        assert len(str(error.value)) < 400


leaves = st.sampled_from(["a", "a" * 9000, 7, 10**4000, b"x" * 9000, None, 1.5])


@cases(100)
@given(
    st.recursive(
        leaves, lambda one: st.lists(one, max_size=9) | st.dictionaries(st.text("ab", max_size=3), one, max_size=9), max_leaves=30
    )
)
def test_a_value_in_a_message_is_short(value):
    from glmtune.errors import shown

    assert len(shown(value)) < 3000
    assert shown(value) == repr(value) or len(repr(value)) > 60 or isinstance(value, list | dict)


def test_a_date_is_a_date_however_it_is_written(tmp_path):
    for text in ("2026-03-01", "'2026-03-01'", "2026-03-01T00:00:00"):
        (tmp_path / "run.yaml").write_text(HEAD + f"date: {text}\n")
        assert str(moment(load_run(tmp_path / "run.yaml").date)) == "2026-03-01 00:00:00"
    assert load_run(None, [*GIVEN, "date=2026-03-01"]).date == "2026-03-01"


def test_a_default_rate_is_that_of_stage_and_method(monkeypatch):
    """A variant's before its method's, a stage's before any's; a method without a line has one too."""
    plain, projected = Prefix(), Prefix(projection=True)
    assert default_lr(plain, "sft") == default_lr(plain) == (1e-2, "prefix")
    assert default_lr(projected, "sft") == (1e-4, "prefix with projection")
    monkeypatch.setitem(DEFAULT_LR, ("dpo", "prefix"), 3e-3)
    assert default_lr(plain, "dpo") == (3e-3, "prefix in stage dpo") and default_lr(plain, "sft")[0] == 1e-2
    assert default_lr(projected, "dpo") == (1e-4, "prefix with projection")
    monkeypatch.setitem(DEFAULT_LR, ("dpo", "prefix with projection"), 5e-5)
    assert default_lr(projected, "dpo") == (5e-5, "prefix with projection in stage dpo")
    monkeypatch.delitem(DEFAULT_LR, (None, "full"))
    assert default_lr(Full()) == (UNKNOWN_LR, "full")
