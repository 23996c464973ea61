"""What an entry of `data:` stands for, with real files, and a hub of data sets of our own on localhost."""

import gzip
import hashlib
import json
import os
import pickle
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from itertools import pairwise
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from glmtune import blocks, check, cli, data, forms, hub, reading, sources
from glmtune.errors import UserError
from glmtune.records import Conversation, Turn
from glmtune.run import Source, load_run

from .cases import cases
from .served import served


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(count: int, start: int = 0) -> list[dict]:
    return [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(start, start + count)]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(name: str, content: bytes | list[dict]) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else lines(content))
    return name


def load(*paths: str, **options) -> data.Loaded:
    return data.load([Source(path=path) for path in paths], **options)


def answers(loaded: data.Loaded) -> list[str]:
    return [row.turns[-1].text for row in loaded.rows]


def error(*paths: str, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(*paths, **options)
    return str(caught.value)


# --- files ---------------------------------------------------------------------------------------------------------------


def test_gzip_is_read_by_content_and_keeps_lines() -> None:
    write("a.jsonl.gz", gzip.compress(lines(rows(3))))
    write("b.json", gzip.compress(json.dumps(rows(2, 3)).encode()))
    write("c.csv.gz", gzip.compress(b"question,answer\nq,a\n"))
    loaded = load("a.jsonl.gz", "b.json", "c.csv.gz")
    assert answers(loaded) == ["a0", "a1", "a2", "a3", "a4", "a"]
    assert loaded.rows[2].where == "a.jsonl.gz:3"
    assert "a.jsonl.gz:2: the answer is empty" in error(
        write("a.jsonl.gz", gzip.compress(lines([*rows(1), {"instruction": "x", "output": ""}])))
    )


def test_a_damaged_gzip_file_is_told() -> None:
    packed = gzip.compress(b"".join(hashlib.sha256(b"%d" % i).hexdigest().encode() for i in range(2_000)))
    assert "a.gz:1: this is a binary file (gzip) that cannot be unpacked: it ends too early" in error(write("a.gz", packed[:100]))


@pytest.mark.slow
def test_a_gzip_file_that_is_damaged_far_behind_its_beginning_is_told() -> None:
    whole = gzip.compress(
        b"".join(lines([{"instruction": str(i), "output": hashlib.sha256(b"%d" % i).hexdigest()}]) for i in range(12_000))
    )
    assert re.search(r"a.gz:\d{5}: .*it ends too early", error(write("a.gz", whole[:-1000])))


def test_a_gzip_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BOMB", (1_000_000, 100))
    bomb = write("bomb.jsonl.gz", gzip.compress(lines(rows(1)) * 80_000))
    assert "the gzip file unpacks to more than 100 times its size" in error(bomb)


def test_parquet_rows_have_their_number_and_no_nulls() -> None:
    import pyarrow
    from pyarrow import parquet

    chat = [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a", "name": "Ann"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": chat, "id": None}] * 700), "a.parquet")
    loaded = load("a.parquet")
    assert len(loaded.rows) == 700 and loaded.rows[699].where == "a.parquet:700"
    assert [turn.extra for turn in loaded.rows[0].turns] == [{}, {"name": "Ann"}]
    parquet.write_table(pyarrow.Table.from_pylist([*rows(2), {"instruction": "x", "output": " "}]), "b.parquet")
    assert "b.parquet:3: the answer is empty" in error("b.parquet")
    check.fix(["b.parquet"], "clean.jsonl")
    assert answers(load("clean.jsonl")) == ["a0", "a1"]
    assert "that cannot be read" in error(write("c.parquet", Path("a.parquet").read_bytes()[:500]))


def test_parquet_that_is_damaged_is_told_with_the_row_reached() -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {"instruction": [f"q{i}" for i in range(9)], "output": ["a" * 99] * 9}
    years = pyarrow.array([0] * 7 + [2**55] * 2, pyarrow.timestamp("ms"))
    texts = pyarrow.array([b"q"] * 3 + [b"q\xff"] * 6)
    bad_text = pyarrow.Array.from_buffers(pyarrow.string(), 9, texts.buffers())
    for made, said in (
        (pyarrow.table({**columns, "when": years}), "a.parquet:8: this is a binary file (Parquet) that cannot be read: "),
        (
            pyarrow.table({**columns, "instruction": bad_text}),
            "a.parquet:4: this is a binary file (Parquet) that cannot be read: 'utf-8'",
        ),
        (
            pyarrow.table([["q"], ["a"], ["b"]], ["instruction", "output", "output"]),
            "a.parquet:1: two columns have the name 'output'",
        ),
    ):
        parquet.write_table(made, "a.parquet")
        assert said in error("a.parquet")
    parquet.write_table(pyarrow.table(columns), "a.parquet", use_dictionary=False)
    whole = Path("a.parquet").read_bytes()
    for at in range(4, 200, 8):
        write("a.parquet", whole[:at] + bytes(255 - byte for byte in whole[at : at + 8]) + whole[at + 8 :])
        try:
            load("a.parquet")
        except UserError as caught:
            assert "a.parquet:" in str(caught)
    assert "this is a Parquet file packed with gzip; unpack it first" in error(write("b.parquet.gz", gzip.compress(whole)))


def test_what_is_neither_a_file_nor_a_folder_is_refused_and_not_waited_for() -> None:
    os.mkfifo("a.json")
    assert "'a.json' is neither a file nor a folder (a pipe?); write what it gives to a file first" in error("a.json")


def test_binary_files_are_not_called_utf_16() -> None:
    with sqlite3.connect("a.json") as base:
        base.execute("CREATE TABLE a (b)")
    base.close()
    assert "this is a binary file (SQLite)" in error("a.json")
    assert "this is a binary file (zip or Excel)" in error(write("b.json", b"PK\x03\x04\x14" + bytes(99)))
    for content in (b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\0>\0\x01\0\0\0" + bytes(400), bytes(99)):
        assert "this is a binary file, not text" in error(write("b.json", content))
    for encoding, said in (("utf-16", "UTF-16"), ("utf-16-be", "UTF-16BE"), ("utf-32", "UTF-32"), ("utf-32-le", "UTF-32LE")):
        content = json.dumps(rows(2)).encode(encoding)
        assert f"this is {said}, not UTF-8; convert it: iconv -f {said} -t UTF-8 c.json" in error(write("c.json", content))


@pytest.mark.parametrize(
    "content",
    ['"prompt, the";response\nq;a\n', 'sep=;\r\n"prompt, the";response\r\nq;a\r\n', 'sep=|\n"prompt, the"|response\nq|a\n', '\n"prompt, the"\tresponse\nq\ta\n'],
)  # fmt: skip
def test_what_separates_the_columns_of_csv_is_seen(content: str) -> None:
    assert [item.value for item, _ in items("a.csv", content.encode())] == [{"prompt, the": "q", "response": "a"}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"prompt,response\rq,a\rq,b\r", "a.csv:1: the lines end with \\r alone (old Mac); wanted \\n: tr '\\r' '\\n' < FILE"),
        (
            b"prompt,response\nq,a\nq,b\rq,c\n",
            "a.csv:3: broken CSV: new-line character seen in unquoted field (is a quote missing?)",
        ),
        ("问,response\n".encode("gbk") + b"q,a\n" * 20, "a.csv:1: the header has bytes that are not UTF-8"),
    ],
)
def test_csv_that_cannot_be_read_says_why(content: bytes, said: str) -> None:
    assert said in error(write("a.csv", content))


def test_one_row_of_bad_bytes_does_not_spoil_a_short_file() -> None:
    bad = '{"instruction": "你好", "output": "b"}\n'.encode("gbk")
    for content in (lines(rows(1)) + bad, bad + lines(rows(4))):
        found = [item for item, _ in items("a.jsonl", content)]
        assert [item.kind for item in found if isinstance(item, reading.Broken)] == ["encoding-damage"]
        assert len(found) == content.count(b"\n")
    assert "convert it: iconv -f GB18030" in error(write("a.jsonl", bad)) and "iconv -f GB18030" in error(write("a.jsonl", bad * 2))


@pytest.mark.parametrize("blanks", [b"\n\n", b"\n" + b" \r\n" * 100])
def test_blank_lines_separate_texts_wherever_they_first_come(blanks: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 256)
    poem = b"a line of it\n" * 50
    found = [item.value["text"] for item, _ in items("a.txt", b"\n\n" + poem.strip() + blanks + b"two\nlines" + b"\n" * 600)]
    assert found == [poem.decode().strip(), "two\nlines"]
    assert len(items("a.txt", b"\n\n" + poem + b"\n" * 600)) == 50


def test_a_pattern_and_a_folder_give_data_files_in_order() -> None:
    for i, name in enumerate(("data/b.jsonl", "data/a.jsonl.gz", "data/c.json", "data/deep/d.jsonl", "data/README.md")):
        write(name, gzip.compress(lines(rows(1, i))) if name.endswith(".gz") else rows(1, i))
    assert answers(load("data")) == ["a1", "a0", "a2"]
    assert answers(load("data/*.jsonl*")) == ["a1", "a0"]
    assert answers(load("data/**/*.jsonl")) == ["a0", "a3"]
    assert "'data/*.md' matches no data file" in error("data/*.md") and "README.md" in error("data/*.md")
    write("run/run.yaml", b"model: smollm2-135m-instruct\ndata: sets/*.jsonl\nout: x\n")
    write("run/sets/e.jsonl", rows(1))
    assert load_run("run/run.yaml").data[0].path == "run/sets/*.jsonl"


# --- bounded memory --------------------------------------------------------------------------------------------------------


def items(name: str, content: bytes, **options) -> list:
    file = reading.open_file(Path(write(name, content)), name, lambda value: "instruction" in value, **options)
    return [(found, file.raw(found)) for found in file.items]


LAYOUTS = {
    "array": lambda rows: json.dumps(rows, ensure_ascii=False),
    "pretty": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1),
    "lines": lambda rows: "\n".join(json.dumps(row) for row in rows),
    "wrapped": lambda rows: json.dumps({"about": [1, 2], "data": rows, "n": {"a": "]"}}, ensure_ascii=False),
    "back to back": lambda rows: "".join(json.dumps(row, indent=1) for row in rows),
    "csv": lambda rows: "instruction,output\n" + "".join('"{}","{}"\n'.format(*row.values()) for row in rows),
    "text": lambda rows: "\n".join(f"{row['instruction']} {row['output']}" for row in rows),
}


@pytest.mark.few(5)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [300, 1000])
def test_where_a_block_ends_changes_nothing(layout: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name = {"csv": "a.csv", "text": "a.txt"}.get(layout, "a.json")
    many = [{"instruction": "你好" * (i % 7), "output": f"ünï 😀 {i} " + "x" * (i % 90)} for i in range(200)]
    text = LAYOUTS[layout](many)
    broken = text.replace(" 77 ", ' 77" ', 1)
    for content in (text.encode(), broken.encode(), text.encode("utf-8-sig")):
        whole = items(name, content)
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "BLOCK", block)
            assert items(name, content) == whole
        assert len(whole) >= 199 or (layout == "wrapped" and content == broken.encode()), "then one row a line, and one line"


@pytest.mark.slow
def test_a_row_beyond_the_limit_is_refused_with_its_line_and_not_held() -> None:
    long = json.dumps({"instruction": "x", "output": "y" * 9_000_000}).encode()
    for name, content in (("a.jsonl", lines(rows(2)) + long), ("a.json", b"[\n" + b",\n".join([b'{"a": 1}', long]) + b"]")):
        with pytest.raises(reading.DataError, match="no row ends within 2,000,000 characters") as caught:
            items(name, content, limit=2_000_000)
        assert caught.value.line == 3 and caught.value.kind == "row-too-long"
    assert len(items("a.jsonl", lines(rows(2)) + long)) == 3
    broken = b'{"a": {"b": 1} ' + b", ".join([*lines(rows(9)).splitlines(), b'{"a" 1}', *lines(rows(90_000)).splitlines()]) + b"]}"
    with pytest.raises(reading.DataError, match="expected ',', got '{.*no row ends within") as caught:
        items("a.json", broken, limit=2_000_000)
    assert (caught.value.line, caught.value.column) == (1, 16)


MEASURE = """
import re, sys
from glmtune import data
from glmtune.run import Source
for path in sys.argv[1:]:
    count = sum(1 for _ in data.stream([Source(path=path)]))
    print(count, re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory of this process alone: Linux")
@pytest.mark.parametrize("counts", [(2_000, 9_000), pytest.param((10_000, 100_000), marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_file(counts: tuple[int, int]) -> None:
    for count in counts:
        row = json.dumps({"instruction": "question", "output": "x" * 60}).encode()
        write(f"{count}.json", b"[" + b",".join([row] * count) + b"]")
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, *(f"{count}.json" for count in counts)], stdout=subprocess.PIPE, check=True
    )
    read, peaks = zip(*(map(int, line.split()) for line in ended.stdout.splitlines()))
    assert read == counts and peaks[1] - peaks[0] < 4_000, peaks


# --- streams ---------------------------------------------------------------------------------------------------------------


def test_a_stream_gives_every_row_once_with_its_source() -> None:
    write("a.jsonl", rows(1500))
    write("b.jsonl", rows(3, 1500))
    flow = data.stream([Source(path="a.jsonl", weight=2), Source(path="b.jsonl", max_samples=2, system="S")])
    found = [(number, record.turns[-1].text, record.where) for number, record in flow]
    assert found == [(0, f"a{i}", f"a.jsonl:{i + 1}") for i in range(1500)] + [
        (1, f"a{1500 + i}", f"b.jsonl:{i + 1}") for i in range(2)
    ]
    assert flow.spans == [data.Span("a.jsonl", "alpaca", 0, 1500), data.Span("b.jsonl", "alpaca", 1500, 2)]
    assert "a.jsonl: 1500 rows" in flow.notes[0] and "only the first 2" in flow.notes[1]
    assert len(list(flow)) == 1502, "it can be read again"


LINES = [
    '{"instruction": "q", "output": "a"}', '{"instruction": "q {{name}}", "output": "a", "more": 1}', '{"messages": []}', "", "7",
    '{"question": "q", "human_answers": ["a", "b"], "chatgpt_answers": []}', '{"instruction": "q", "output": ', '{"foo": 1}, ',
    '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "{{ other }}"}]}',
]  # fmt: skip


def told_by(flow: data.Stream, run: Callable[[data.Stream], list]) -> tuple:
    try:
        return run(flow), flow.notes, flow.spans
    except UserError as error:
        return (str(error),)


@cases(60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.sampled_from(LINES[:3] + LINES[:1] * 12), min_size=1, max_size=12), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from(LINES)), max_size=3),
    st.sampled_from([None, 1, 5, 30]), st.sampled_from([{}, {"name": "N"}, {"name": "N", "nobody": "M"}]), st.integers(1, 5),
)  # fmt: skip
def test_who_reads_a_lot_and_how_far_ahead_changes_nothing(files, odd, most, variables, size) -> None:
    for place, line in odd:
        files[place % len(files)].insert(place, line)
    for number, written in enumerate(files):
        write(f"{number}.jsonl", "\n".join(written).encode())
    given = [Source(path=f"{number}.jsonl", max_samples=most) for number in range(len(files))]

    def elsewhere(flow: data.Stream) -> list:
        """All is read ahead, as far as it can be read, and passed between processes; then what became of it is told."""
        ahead, error, made = [], None, []
        try:
            ahead += flow.lots(size)
        except UserError as found:
            error = found
        for lot, take in ahead:
            read = flow.read(pickle.loads(pickle.dumps(lot)))
            take(pickle.loads(pickle.dumps(read)))
            made += [(lot.source, record) for record in read.records]
        if error:
            raise error
        flow.finish()
        return made

    here, there = (told_by(data.stream(given, variables=variables), run) for run in (list, elsewhere))
    assert here == there


def test_a_form_that_first_comes_late_is_still_recognised_or_refused() -> None:
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    write("a.jsonl", [*rows(1200), chat, {"foo": 1}, *rows(1), {"foo": 2}])
    flow, seen = data.stream([Source(path="a.jsonl")]), []
    with pytest.raises(UserError) as caught:
        seen.extend(flow)
    assert len(seen) == 1202
    assert str(caught.value).startswith("a.jsonl:1202: an 'alpaca' row needs the key 'instruction'")
    assert "and 1 more bad row: line 1204" in str(caught.value)


def test_columns_may_first_come_after_the_rows_that_decide() -> None:
    columns = {"prompt": "instruction", "response": "output", "system": "sys"}
    write("a.jsonl", [*rows(1200), {**rows(1)[0], "sys": "Be."}])
    assert data.load([Source(path="a.jsonl", columns=columns)]).rows[-1].turns[0].text == "Be."
    write("a.jsonl", rows(1200))
    with pytest.raises(UserError, match="system names the key 'sys', which no row has"):
        data.load([Source(path="a.jsonl", columns=columns)])


def test_bad_rows_are_counted_and_few_are_kept() -> None:
    write("a.jsonl", [{"instruction": "q", "output": ""}] * 5000)
    assert "and 4999 more bad rows: lines 2, 3, 4, 5, 6, 7, 8, 9, ..." in error("a.jsonl")


def test_variables_are_looked_for_in_all_rows() -> None:
    write("a.jsonl", [*rows(1100), {"instruction": "{{name}}?", "output": "yes"}])
    assert load("a.jsonl", variables={"name": "Xiaozhi"}).rows[-1].turns[0].text == "Xiaozhi?"
    assert "stands in no row" in error("a.jsonl", variables={"nme": "x"})


def test_a_row_of_several_answers_is_several_records() -> None:
    write("a.jsonl", [{"question": "q", "human_answers": ["a", "b"], "chatgpt_answers": ["c"]}])
    flow = data.stream([Source(path="a.jsonl", format="hc3")])
    assert [(record.turns[-1].text, record.where) for _, record in flow] == [
        ("a", "a.jsonl:1"),
        ("b", "a.jsonl:1"),
        ("c", "a.jsonl:1"),
    ]


# --- mixing ----------------------------------------------------------------------------------------------------------------


def mixed(*amounts: dict, counts: list[int], **options) -> list[int]:
    chosen = data.mix(counts, [Source(path=f"{i}", **amount) for i, amount in enumerate(amounts)], **options)
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return [sum(start <= index < end for index in chosen) for start, end in pairwise(starts)]


def test_weights_and_shares_make_an_epoch() -> None:
    assert mixed({"weight": 2}, {"weight": 0.5}, counts=[10, 40]) == [20, 20]
    assert mixed({}, {"share": 0.05}, counts=[1900, 7]) == [1900, 100], "identity rows are repeated until they are 5 %"
    assert mixed({}, {"share": 0.2}, {"share": 0.3}, counts=[500, 1000, 10]) == [500, 200, 300]
    assert data.mix([3, 2], [Source(path="a", weight=2), Source(path="b")]) == [0, 1, 2, 0, 1, 2, 3, 4]
    one, other = (data.mix([100], [Source(path="a", weight=0.5)], seed=seed) for seed in (1, 2))
    assert one != other and one == data.mix([100], [Source(path="a", weight=0.5)], seed=1)
    for wrong, said in (
        ([{"share": 0.5}], "every source has a share"),
        ([{}, {"share": 0.6}, {"share": 0.4}], "the shares make 1 of all"),
    ):
        with pytest.raises(UserError, match=said):
            mixed(*wrong, counts=[10] * len(wrong))
    with pytest.raises(UserError, match="share 0.01 leaves none of the 9 rows"):
        mixed({}, {"share": 0.01}, counts=[9, 9])
    for amounts, said in (
        ([{"weight": 1e9}], "2,000,000,000 rows: 0 has 2 with weight"),
        ([{}, {"share": 1 - 1e-10}], "the most is"),
    ):
        with pytest.raises(UserError, match=said):
            mixed(*amounts, counts=[2] * len(amounts))
    with pytest.raises(ValueError, match="weight and share exclude each other"):
        Source(path="a", weight=2, share=0.1)


def test_temperature_brings_sizes_nearer_and_keeps_their_sum() -> None:
    assert mixed({}, {}, counts=[900, 100], temperature=1) == [900, 100]
    assert mixed({}, {}, counts=[900, 100], temperature=2) == [750, 250]  # 30 : 10
    assert mixed({}, {}, {"share": 0.5}, counts=[900, 100, 10], temperature=2) == [750, 250, 1000]


def test_load_mixes() -> None:
    write("a.jsonl", rows(95))
    write("b.jsonl", rows(1, 95))
    loaded = data.load([Source(path="a.jsonl"), Source(path="b.jsonl", share=0.05)])
    assert answers(loaded)[95:] == ["a95"] * 5
    assert loaded.spans[1] == data.Span("b.jsonl", "alpaca", 95, 5)


def test_a_split_needs_hashes_only() -> None:
    made = [Conversation((Turn("system", str(i)), Turn("user", f"q{i}"), Turn("assistant", "a"))) for i in range(100)]
    hashes = [data.content_hash(row) for row in made]
    assert data.content_hash(made[3]) == data.content_hash(Conversation(made[3].turns[1:])) == hashes[3]
    for share in (0.2, 7):
        dev = data.split_hashes(hashes, share)
        assert [row for row, is_dev in zip(made, dev) if is_dev] == data.split(made, share)[1]


# --- the registry ----------------------------------------------------------------------------------------------------------


def test_a_name_stands_for_its_entry() -> None:
    write("sets/mine.jsonl", [{"q": f"{i}", "a": "b"} for i in range(6)])
    write(
        "data.yaml",
        b"mine: {path: sets/mine.jsonl, columns: {prompt: q, response: a}, system: S, max_samples: 4, weight: 0.5, note: Ours.}\n",
    )
    loaded = load("mine")
    assert [row.turns[0].text for row in loaded.rows] == ["S", "S"] and loaded.rows[0].where.startswith("sets/mine.jsonl:")
    assert loaded.notes[0] == "mine: Ours."
    assert "did you mean 'mine'?" in error("mien")
    assert "did you mean 'belle_1m'?" in error("bele_1m")
    own = data.load([Source(path="mine", columns={"prompt": "a", "response": "q"}, max_samples=1, weight=2)]).rows
    assert own[0].turns[-1].text == "0", "what the run file says of a source comes before the registry's word"
    write("mine", rows(1))
    assert load("mine").notes[0] == "mine: the file here is meant, not the data set of that name"
    assert "there is no file 'no.yaml'" in error("mine", registry="no.yaml")


def test_a_registry_may_stand_elsewhere_and_its_paths_are_its_own() -> None:
    write("there/sets/a.jsonl", rows(2))
    write("there/data.yaml", b"a: {path: sets/a.jsonl}\n")
    assert answers(load("a", registry="there/data.yaml")) == ["a0", "a1"]
    found = sources.find([Source(path="a")], "there/data.yaml")
    assert data.files_of(found[0]) == found[0].files and sources.find(found) == found


@pytest.mark.few(6)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: x.json", "data.yaml: a: wanted `name: {path: FILE}`"),
        ("a: {pth: x}", "data.yaml: a: unknown option 'pth'; options are path, hub"),
        ("a: {path: x, columns: q}", "data.yaml: a: columns: wanted dict, got 'q'"),
        ("a: {path: x, weight: 0}", "weight: wanted more than 0"),
        ("a: {note: x}", "a: needs path:, hub: or modelscope:"),
        ("a: {path: x, weight: .inf}", "a: weight: wanted more than 0 and finite, got inf"),
        ("a: {path: x, weight: .nan}", "a: weight: wanted more than 0, got nan"),
        ("a: {path: x, max_samples: 1000000000000000000000}", "a: max_samples: wanted more than 0 and finite"),
        ("a: {path: x, tags: {a: b}}", "a: tags: unknown option 'a'; options are role_tag"),
        ("a: {path: x, tags: {role_tag: 1}}", "a: tags: role_tag: wanted str, got 1"),
        ("a: {path: x, format: messages, tags: {role_tag: who}}", "a: tags: say which key holds the messages"),
        ("a: {path: x, columns: {prmpt: q, response: a}}", "data.yaml: a: columns: unknown option 'prmpt'"),
        ("a: {path: x, columns: {prompt: 3, response: a}}", "data.yaml: a: columns: prompt: wanted str, got 3"),
        ("a: {path: x}\nb: {path: y}\na: {path: z}", "data.yaml: 'a' is given twice"),
        ("a: {path: x, path: y}", "data.yaml: 'path' is given twice"),
        ("[1]", "data.yaml: a registry of data sets holds `name: {path: FILE}`"),
        ("[" * 100_000, "data.yaml: not valid YAML: nested too deeply"),
    ],
)
def test_a_wrong_registry_is_told_by_name(text: str, said: str) -> None:
    write("data.yaml", text.encode())
    assert said in error("a") and error("a").count("\n") < 3


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("a.json", "wanted `name: "),
        ({"columns": ["a"]}, "columns: wanted dict, got ['a']"),
        ({"columns": {"prmpt": "a"}}, "columns: unknown option 'prmpt'; options are prompt"),
        ({"columns": {"prompt": 5}}, "columns: prompt: wanted str, got 5"),
        ({"tags": ["a"]}, "tags: wanted dict"),
        ({"tags": {"roletag": "a"}}, "did you mean 'role_tag'?"),
        ({"file_name": 5}, "file_name: wanted str, got 5"),
        ({"file_name": ["a"]}, "file_name: wanted str"),
        ({"hf_hub_url": 5}, "hf_hub_url: wanted str"),
        ({"num_samples": "2"}, "num_samples: wanted int, got '2'"),
        ({"num_samples": 0}, "num_samples: wanted more than 0, got 0"),
        ({"num_samples": -1}, "num_samples: wanted more than 0, got -1"),
        ({"formatting": "sharegtp"}, "formatting: 'sharegtp' is not one of alpaca, sharegpt, openai; did you mean 'sharegpt'?"),
        ({"formating": "alpaca"}, "unknown option 'formating'"),
        ({"ranking": "yes"}, "ranking: wanted bool"),
    ],
)  # fmt: skip
def test_a_wrong_entry_of_dataset_info_breaks_its_own_name_only(entry: object, said: str, capsys: pytest.CaptureFixture) -> None:
    write("a.json", rows(2))
    whole = {"file_name": "a.json", **entry} if isinstance(entry, dict) else entry
    write("info.json", json.dumps({"x": whole, "good": {"file_name": "a.json"}}).encode())
    assert len(load("good", registry="info.json").rows) == 2
    message = error("x", registry="info.json")
    assert "info.json: x: " in message and said in message
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", "list", "--registry", "info.json"])
    listed = capsys.readouterr().out
    assert not stopped.value.code and "\ngood " in listed and "cannot be used: " in listed and said in listed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"x": {"file_name": "a.json"}, "x": {"file_name": "b.json"}}', "'x' is given twice"),
        ('{"x": {"columns": {"prompt": "a", "prompt": "b"}}}', "'prompt' is given twice"),
        ("[1]", 'a registry of data sets holds `"name": {"file_name": "FILE"}`; this one is a list'),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_wrong_dataset_info_is_told(text: str, said: str) -> None:
    write("info.json", text.encode())
    message = error("x", registry="info.json")
    assert message.startswith("info.json: ") and said in message


def test_names_of_columns_are_those_that_forms_know() -> None:
    assert {*sources._OURS["columns"]} == {*forms.COLUMNS}


def test_sha256_is_held_to() -> None:
    write("a.jsonl", rows(2))
    digest = hashlib.sha256(lines(rows(2))).hexdigest()
    write("data.yaml", f"a: {{path: a.jsonl, sha256: {digest}}}\n".encode())
    assert len(load("a").rows) == 2
    write("a.jsonl", rows(3))
    other = hashlib.sha256(lines(rows(3))).hexdigest()
    assert digest in error("a") and other in error("a") and error("a").count("\n") == 2
    sha1 = hashlib.sha1(lines(rows(3))).hexdigest()
    theirs = {name: {"file_name": "a.jsonl", "file_sha1": given} for name, given in (("good", sha1), ("wrong", "0" * 40))}
    write("info.json", json.dumps(theirs).encode())
    assert len(load("good", registry="info.json").rows) == 3
    assert f"its sha1 is {sha1}\nwanted        {'0' * 40}" in error("wrong", registry="info.json")


def test_dataset_info_of_llama_factory_is_read() -> None:
    talk = [{"speaker": "u", "said": "q"}, {"speaker": "bot", "said": "a"}]
    info = {
        "plain": {"file_name": "plain.json"},
        "named": {"file_name": "named.json", "columns": {"prompt": "q", "query": "more", "response": "a"}, "num_samples": 2},
        "tagged": {
            "file_name": "tagged.json",
            "formatting": "sharegpt",
            "columns": {"messages": "talk"},
            "tags": {"role_tag": "speaker", "content_tag": "said", "user_tag": "u", "assistant_tag": "bot"},
        },
        "wiki": {"file_name": "wiki.json", "columns": {"prompt": "body"}},
        "pair": {"file_name": "pair.json", "ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
        "pictures": {"file_name": "p.json", "columns": {"messages": "m", "images": "i"}},
        "code": {"script_url": "x"},
        "split": {"hf_hub_url": "a/b", "ms_hub_url": "c/d", "split": "train_sft"},
        "subset": {"hf_hub_url": "a/b", "subset": "en", "split": "train"},
    }
    write("lf/dataset_info.json", json.dumps(info).encode())
    write("lf/plain.json", json.dumps(rows(2)).encode())
    write("lf/named.json", json.dumps([{"q": "x", "more": "y", "a": "z"}] * 3).encode())
    write("lf/tagged.json", json.dumps([{"talk": talk}]).encode())
    write("lf/wiki.json", json.dumps([{"body": "text"}]).encode())
    write("lf/pair.json", json.dumps([{"q": "x", "good": "y", "bad": "z"}]).encode())

    def read(name: str, **options) -> list:
        return load(name, registry="lf/dataset_info.json", **options).rows

    assert len(read("plain")) == 2
    assert [[turn.text for turn in row.turns] for row in read("named")] == [["x\ny", "z"]] * 2
    assert [(turn.role, turn.text) for turn in read("tagged")[0].turns] == [("user", "q"), ("assistant", "a")]
    assert read("tagged")[0].meta["row"] == {"talk": talk}
    assert read("wiki", want="text")[0].text == "text"
    assert read("pair", want="preferences")[0].chosen.text == "y"
    for name, said in (("pictures", "it has images"), ("code", "never run")):
        with pytest.raises(UserError, match=said):
            read(name)
    known = sources.names("lf/dataset_info.json")
    assert (known["split"].hub, known["split"].modelscope, known["subset"].hub) == (
        "a/b:train_sft",
        "c/d:train_sft",
        "a/b:*en*train*",
    )
    assert "belle_1m" in known


def test_tags_are_those_of_the_answers_to_choose_from_too_and_must_be_there() -> None:
    tags = {"role_tag": "speaker", "content_tag": "utt", "user_tag": "U", "assistant_tag": "B"}
    answers = [{"speaker": "B", "utt": "yo"}, {"speaker": "B", "utt": "no"}]
    entry = {"formatting": "sharegpt", "columns": {"messages": "conv", "chosen": "good", "rejected": "bad"}, "tags": tags}
    for name, (good, bad) in (("one", answers), ("list", [[answer] for answer in answers])):
        write(f"{name}.jsonl", [{"conv": [{"speaker": "U", "utt": "hi"}], "good": good, "bad": bad}])
        write("info.json", json.dumps({name: {**entry, "file_name": f"{name}.jsonl", "ranking": True, "split": "train"}}).encode())
        loaded = load(name, registry="info.json", want="preferences")
        row = loaded.rows[0]
        assert (row.turns[0].text, row.chosen.text, row.rejected.text) == ("hi", "yo", "no")
        assert loaded.notes[0] == f"{name}: not used here: split"
    write("a.jsonl", [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}])
    for tag, key, near in (("role_tag", "rolee", "; did you mean 'role'?"), ("content_tag", "what", "")):
        usual = {"role_tag": "role", "content_tag": "content", tag: key}
        write("data.yaml", json.dumps({"a": {"path": "a.jsonl", "columns": {"messages": "messages"}, "tags": usual}}).encode())
        assert error("a") == f"data.yaml: a: tags: {tag} is '{key}', but a message has the keys ['role', 'content']{near}"


def test_the_shipped_registry_is_sound() -> None:
    for name, entry in sources.names().items():
        assert entry.licence and entry.hub, name
        for id in filter(None, (entry.hub, "modelscope:" + entry.modelscope if entry.modelscope else None)):
            scheme, rest = ("modelscope:", id[11:]) if id.startswith("modelscope:") else ("", id)
            assert hub.is_id(scheme + rest.partition(":")[0]), name
        if entry.columns:
            forms.form_of_columns(entry.columns, entry.format, "answers")
        elif entry.format:
            forms.form_of_format(entry.format, "answers")


# --- hubs ------------------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    repos: ClassVar[dict] = {}  # id -> {name: bytes}
    asked: ClassVar[list] = []

    def log_message(self, *args):
        pass

    def do_GET(self):
        url = urlsplit(self.path)
        path, query = unquote(url.path), {key: value[0] for key, value in parse_qs(url.query).items()}
        self.asked.append(query.get("FilePath", path))
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            if found[1] not in self.repos:
                return self.answer(b"{}", 401, **{"X-Error-Code": "RepoNotFound"})
            siblings = [
                {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
                for name, content in self.repos[found[1]].items()
            ]
            return self.answer(json.dumps({"id": found[1], "sha": "c" * 40, "siblings": siblings}).encode())
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/c{40}/(.+)", path):
            return self.answer(self.repos[found[1]][found[2]])
        if found := re.fullmatch(r"/api/v1/datasets/([^/]+/[^/]+)(/repo/tree|/repo)?", path):
            files = self.repos.get(found[1])
            if found[2] is None or files is None:
                return self.answer(b"{}", 200 if files else 404)
            if found[2] == "/repo":
                return self.answer(files[query["FilePath"]])
            listed = [{"Path": name, "Type": "blob", "Size": len(content)} for name, content in files.items()]
            start = (int(query["PageNumber"]) - 1) * int(query["PageSize"])
            page = [{"Path": "data", "Type": "tree"}, *listed][start : start + int(query["PageSize"])]
            return self.answer(json.dumps({"Data": {"Files": page}}).encode())
        return self.answer(b"", 404)

    def answer(self, content, status=200, **headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture(scope="module")
def endpoint():
    with served(Hub) as address:
        yield address


@pytest.fixture
def a_hub(monkeypatch, tmp_path, endpoint):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("GLMTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", endpoint)
    Hub.asked.clear()
    Hub.repos.clear()
    Hub.repos["a/b"] = {
        "README.md": b"hello",
        "dataset_infos.json": b"{}",
        "b.py": b"raise SystemExit",
        "data/train-0.jsonl": lines(rows(2)),
        "data/train-1.jsonl.gz": gzip.compress(lines(rows(1, 2))),
        "data/test-0.jsonl": lines(rows(1, 3)),
        "extra/en.json": lines(rows(1, 4)),
    }
    return Hub


@pytest.mark.few(1)
@pytest.mark.parametrize("scheme", ["", "hf:", "modelscope:"])
def test_a_data_set_of_a_hub_is_fetched_once_and_only_its_data(a_hub, scheme) -> None:
    loaded = load(f"{scheme}a/b")
    assert answers(loaded) == ["a0", "a1", "a2"]
    assert [row.where for row in loaded.rows[1:]] == [f"{scheme}a/b/data/train-0.jsonl:2", f"{scheme}a/b/data/train-1.jsonl.gz:1"]
    fetched = [path.rpartition("/")[2] for path in a_hub.asked if "." in path]
    assert sorted(fetched) == ["train-0.jsonl", "train-1.jsonl.gz"], "no scripts, no other splits"
    a_hub.asked.clear()
    assert answers(load(f"{scheme}a/b")) == ["a0", "a1", "a2"]
    assert not [path for path in a_hub.asked if "." in path]
    assert answers(load(f"{scheme}a/b:test")) == ["a3"]
    assert answers(load(f"{scheme}a/b:extra/en.json")) == answers(load(f"{scheme}a/b:extra/*")) == ["a4"]
    assert "has no data file 'nosuch'; it has ['data/test-0.jsonl'" in error(f"{scheme}a/b:nosuch")


def test_a_data_set_is_named_by_the_registry_on_either_hub(a_hub) -> None:
    write("data.yaml", b'both: {hub: "a/b:test", modelscope: "a/b:extra/en.json"}\nhere: {path: x.json}\n')
    assert answers(load("both")) == ["a3"] and answers(load("modelscope:both")) == ["a4"]
    assert "nothing is known of the data set 'modelscope:here' on ModelScope" in error("modelscope:here")
    assert load("both").rows[0].where == "both/data/test-0.jsonl:1"


def test_what_is_not_there_is_told_as_a_data_set(a_hub) -> None:
    said = error("nobody/nothing")
    assert "there is no data set 'nobody/nothing' on the Hugging Face hub" in said and "no such file here" in said
    assert "is not there" in error("no/where.json") and not [path for path in a_hub.asked if "where" in path]
    Path("data").mkdir()
    assert "is not there" in error("data/train"), "a folder that exists makes it a path"
    Hub.repos["a/code"] = {"a.py": b"raise SystemExit"}
    assert "loading scripts are never run" in error("a/code")


def test_a_copy_in_the_cache_does_without_the_hub(a_hub, monkeypatch) -> None:
    assert len(load("a/b").rows) == 3
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    heard: list[str] = []
    assert len(load("a/b", say=heard.append).rows) == 3
    assert "using the complete copy in the cache" in heard[-1]


def test_an_unknown_format_of_a_registry_names_registry_and_entry(tmp_path, monkeypatch):
    from glmtune import check, data

    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"instruction": "q", "output": "a"}\n')
    Path("data.yaml").write_text("mine: {path: a.jsonl, format: alpacca}\n")
    for use in (lambda: data.load([Source(path="mine")]), lambda: check.check(["mine"])):
        with pytest.raises(UserError, match=r"^data\.yaml: mine: .*alpacca"):
            use()


def test_subfolders_that_are_left_out_are_told_before_training(tmp_path):
    from glmtune import data

    (tmp_path / "rows" / "more").mkdir(parents=True)
    for name in ("rows/a.jsonl", "rows/more/b.jsonl"):
        (tmp_path / name).write_text('{"instruction": "q", "output": "a"}\n')
    notes = data.load([Source(path=str(tmp_path / "rows"))]).notes
    assert [note for note in notes if "subfolders are left out (more/b.jsonl" in note]


@pytest.mark.parametrize(
    ("target", "said"),
    [("loop.jsonl", "leads in a circle"), ("other.jsonl", "leads in a circle"), ("gone/a.jsonl", "leads to 'gone/a.jsonl'")],
)
@pytest.mark.parametrize("given", ["loop.jsonl", ".", "l*.jsonl"])
def test_a_link_that_leads_nowhere_is_told(tmp_path, monkeypatch, target, said, given):
    from glmtune.reading import DataError, find_files

    monkeypatch.chdir(tmp_path)
    Path("loop.jsonl").symlink_to(target)
    if target == "other.jsonl":
        Path("other.jsonl").symlink_to("loop.jsonl")
    Path("a.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=f"is a link that {said}"):
        find_files(given)
