"""A script is read as bash reads it: the same commands with the same words. bash itself is the oracle, where it is there."""

import contextlib
import shutil
import subprocess
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmtune import shell

from .cases import cases

needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="bash is the oracle")
TOLD = 'run() { printf "%s\\0" run "$@" $\'\\1\'; }\n'


def words(text: str) -> list[list[str]]:
    return [command.words for command in shell.commands(text)[0]]


def runs(text: str) -> list[list[str]]:
    """Our words of each command `run ...`."""
    return [found for found in words(text) if found[0] == "run"]


def bash(text: str) -> list[list[str]]:
    """The words that bash passes to each command `run ...`."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh", encoding="utf-8") as file:
        file.write(TOLD + text)
        file.flush()
        done = subprocess.run(["bash", file.name], capture_output=True, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"})
    return [piece.split("\0")[:-1] for piece in done.stdout.decode("utf-8").split("\1\0")[:-1]]


SCRIPTS = [
    "run --a '' --b \"\" --c ''''",
    "run --a 1 # a comment with a ' in it\nrun --b 2",
    "run --a a#b '#' \\# # rest",
    "run --a \\\n  1 \\\n  --b 2\n",
    "run --a 1 \\\n  # --b 2 \\\n  --c 3",
    "run --a 1 \\",
    "run --a 1 \\\n",
    "run --a 1 && run --b 2; run --c 3 || run --d 4 & wait",
    "A=1 B='two words'\nrun $A $B \"$B\" '$B' \"${A}x\" ${A}x",
    "A=\nrun $A \"$A\" x$A",
    "A=' x  y '\nrun $A\nrun a$A'b'\nrun \"$A\"",
    "A=(a 'b c' \"\")\nrun \"${A[@]}\" ; run ${A[@]} ; run ${A[1]} $A; A+=(d)\nrun \"${A[@]}\"",
    "A=()\nrun \"${A[@]}\" x",
    "A=(\n  --x 1  # why\n  --y 'a b'\n)\nrun \"${A[@]}\"",
    "A='--x 1'\nA+=' --y 2'\nrun $A",
    "run ${N:-7} ${N-8} \"${N:-a b}\" ${N:+z} ${N:=4} $N",
    "F=/a/b/c.tar.gz; run ${F##*/} ${F#*/} ${F%.*} ${F%%.*}",
    "export A=1 B=\"x y\"\nrun $A \"$B\"",
    "for x in 1 2 'a b'; do run --x $x; done",
    "for x in 1 2; do for y in a b\ndo\n run $x $y\ndone; done",
    "for i in 1; do if true; then run $i; fi; done; run end",
    "f() { run --name \"$1\" --all \"$@\"; }\nf one 'two three'\nf x",
    "function f {\n run in $1\n}\nf a; f b",
    "run --a 1 2> /dev/null 2>&1; run --b 2 2>/dev/null; run x 2>&1 | cat; run y 2>&1>&1 z",
    "run $'a\\tb\\n\\'' \"a\\\"b\\$c\\\\d\\e\" a\\ b\\'c",
    "run \"a\nb\" 'c\nd'",
    "cat > /dev/null <<E\nrun not this\nE\nrun this",
    "cat > /dev/null <<-'E'\n\trun not $this\n\tE\nrun this",
    "run a;run b\n\n\n  run c\t--d\t1",
    "run --a=1 --b='x y' --c=\"$\"'z'",
    "(run a; run b)\n{ run c; }",
    "case x in x) run yes;; esac",
    "bash -c \"printf x\" > /dev/null; run a",
    "eval run --a '\"x y\"' 1",
    "A='x y'; eval \"run $A\"",
    "true && { run a; }\nif [ 1 = 1 ]; then\n  run b\nfi",
    "if true\nthen run a\nelse :\nfi",
    "if true; then run a; elif true; then :; else :; fi",
    "while false; do :; done; run end",
    "time run a; ! run b",
    "run a \\\r\n".replace("\r", "") + " b",
    "X=1 run a; run ${X-gone}",
    "unset Q; Q=1; unset Q; run ${Q-gone}",
    "A=*; run 'a*' \"?\"",
    "run {} a{b 'x}' }",
    "run -- --a -1",
    "run \u00a0x 你好 '“' “a",
    "local_var=3;run $local_var",
    "run a|cat;run b|& cat",
    "run <<< 'here' a",
    "run a<<<b c",
]  # fmt: skip


@needs_bash
@pytest.mark.parametrize("text", SCRIPTS)
def test_a_script_is_read_as_bash_reads_it(text):
    wanted = bash(text)
    if "case" not in text and "else" not in text and "||" not in text:  # of those every branch is read
        assert runs(text) == wanted
    else:
        assert all(found in runs(text) for found in wanted)


TEXTS = st.text(st.sampled_from("ab1 .,-_=/#'\"\\$`;&|<>(){}*!~%\t\n中é"), max_size=6)
NAMES = st.sampled_from(["--lr", "--a-b", "--flag", "-x", "plain", "--name=1"])


@st.composite
def quoted(draw: st.DrawFn) -> str:
    """A word of a script: pieces of some text, each in another way of quoting."""
    made = ""
    for _ in range(draw(st.integers(1, 3))):
        text = draw(TEXTS)
        how = draw(st.sampled_from(["single", "double", "backslash", "ansi"]))
        if how == "single":
            made += "'" + text.replace("'", "'\\''") + "'"
        elif how == "double":
            made += '"' + "".join("\\" + one if one in '"\\$`' else one for one in text) + '"'
        elif how == "ansi":
            made += "$'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
        else:
            made += "".join(f"'{one}'" if one.isspace() else "\\" + one for one in text)
    return made or "''"


@st.composite
def scripts(draw: st.DrawFn) -> str:
    lines: list[str] = []
    known: list[str] = []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            name = f"V{len(known)}"
            known.append(name)
            lines.append(f"{draw(st.sampled_from(['', 'export ']))}{name}={draw(quoted())}")
        gap = st.sampled_from([" ", "  ", "\t", " \\\n  ", "\\\n "])
        command = "run"
        for _ in range(draw(st.integers(0, 5))):
            word = draw(NAMES | quoted())
            if known and draw(st.booleans()):
                used = draw(st.sampled_from(known))
                word = draw(st.sampled_from([f'"${used}"', f"${{{used}}}", f"x${used}", f'"a${{{used}}}b"']))
            command += draw(gap) + word
        lines.append(command + draw(st.sampled_from(["", ' # it\'s "so" \\', " ;", " 2> /dev/null", " && true", " \\\n", "  "])))
    return "\n".join(lines) + draw(st.sampled_from(["", "\n"]))


@needs_bash
@cases(60)
@given(scripts())
def test_generated_scripts_are_read_as_bash_reads_them(text):
    assert runs(text) == bash("set -f\n" + text)  # no file names: a pattern stays as it is written


def test_what_only_a_running_shell_knows_stays_and_is_marked():
    found = words('run $HOME "$(date +%s)" `date` $((1 + 2)) $1 \'$HOME\' "x${NOT_SET}y" <(cat x)')[0]
    assert [shell.shown(one) for one in found] == [
        "run", "$HOME", "$(date +%s)", "`date`", "$((1 + 2))", "$1", "$HOME", "x${NOT_SET}y", "<(cat x)"]  # fmt: skip
    assert [shell.UNKNOWN in one for one in found] == [False, True, True, True, True, True, False, True, True]


@pytest.mark.parametrize(
    "text",
    [
        "if [ -z $1 ]; then A=1; else A=2; fi\nrun $A",
        "A=1\n[ -z $1 ] && A=2\nrun $A",
        "case $1 in a) A=1;; *) A=2;; esac\nrun $A",
        "while read x; do A=$x; done\nrun $A",
    ],
)
def test_a_variable_that_may_have_two_values_has_none(text):
    assert shell.UNKNOWN in runs(text)[0][1]


def test_blanks_behind_a_backslash_are_a_slip_that_is_told():
    found, remarks = shell.commands("run --a 1 \\  \n --b 2\n")
    assert found[0].words == ["run", "--a", "1", "--b", "2"]
    assert remarks == ["line 1: there are blanks behind the backslash, where the shell ends the command; read as one that goes on"]


def test_a_document_is_what_its_command_gets():
    text = "A=3\ncat <<EOF > run.yaml\nlr: $A\nname: 'x'\nEOF\ntee b.yaml <<'EOF'\nlr: $A\nEOF\n"
    first, second = shell.commands(text)[0]
    assert (first.stdin, first.writes, first.line) == ("lr: 3\nname: 'x'\n", "run.yaml", 2)
    assert (second.words, second.stdin, second.line) == (["tee", "b.yaml"], "lr: $A\n", 6)


def test_variables_in_front_of_a_command_are_its_environment():
    found = shell.commands("A=1\nB=2 C='x y' run a\nrun b\n")[0]
    assert [command.env for command in found] == [{"A": "1", "B": "2", "C": "x y"}, {"A": "1"}]


@pytest.mark.parametrize("text", ["run 'a", 'run "a', "run ${A", "run $(a", "run `a", "A=(a", "cat <<E\nx", "run $'a"])
def test_what_has_no_end_is_an_error(text):
    with pytest.raises(shell.ShellError, match="^line 1: |^line 2: "):
        shell.commands(text)


@cases(300)
@given(st.text(st.sampled_from("ab $\"'\\`(){}[]<>|&;#=\n\t@*!-:~%1/iffordone"), max_size=40))
def test_any_text_is_read_or_refused(text):
    """Never a traceback, and never without end."""
    with contextlib.suppress(shell.ShellError):
        shell.commands(text)


def test_a_loop_of_loops_ends():
    text = "".join(f"for x{i} in 1 2 3 4 5 6 7 8 9; do " for i in range(8)) + "run" + "; done" * 8
    with pytest.raises(shell.ShellError, match="commands"):
        shell.commands(text)
    with pytest.raises(shell.ShellError, match="commands"):
        shell.commands("f() { f; f; }\nf\n")
