"""Run files: strict, typed, with errors that name the option and guess what was meant."""

import pytest
import yaml

from glmtune import options
from glmtune.errors import UserError
from glmtune.run import Run, load_run

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
