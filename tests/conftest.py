import gc
import os
import random
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; the suite runs on two processes

import glmtune  # noqa: F401  (sets how threads wait, before torch is loaded)

from . import cases, tiny

MEMORY = Path("/dev/shm")  # files in memory, on Linux

gc.disable()  # until all files are read: there is no garbage yet


def pytest_collection_finish() -> None:
    gc.freeze()  # torch, transformers and the tests: millions of objects that stay, and need not be looked at again
    gc.enable()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data beside the project, where it is there."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("the real data is not beside the project")
    return folder


# --- a few cases of many: @pytest.mark.few(count) -----------------------------------------------------------------------------------


class _Few:
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Marks all cases of a test as slow but a few: those that together show most of its parameters' values, the first before others."""
        tests: dict[tuple[object, int], list[pytest.Item]] = {}
        for item in items:
            if (few := item.get_closest_marker("few")) and hasattr(item, "callspec") and not item.get_closest_marker("slow"):
                tests.setdefault((item.function, *few.args), []).append(item)  # type: ignore
        for (_, count), left in tests.items():
            shown: set[tuple[str, int]] = set()
            for _ in range(min(count, len(left))):
                best = max(left, key=lambda item: len(item.callspec.indices.items() - shown))
                shown |= best.callspec.indices.items()
                left.remove(best)
            for item in left:
                item.add_marker(pytest.mark.slow)


# --- a suite that ends in time: --budget ------------------------------------------------------------------------------------------

GRACE = 120.0  # seconds that a test may go on when the budget is over
LEFT_OUT = "left out: the budget is over"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--budget", type=float, metavar="SECONDS", help="start no test after this time; what was left out is no failure"
    )
    parser.addoption(
        "--order",
        type=int,
        metavar="N",
        help="with --budget: shuffles the files; default: another one each day, so that all get their turn",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "few(count): of the cases of this test, all but so many are slow")
    config.pluginmanager.register(_Few())
    cases.QUICK = "not slow" in config.option.markexpr
    if cases.QUICK and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 4e9:  # thousands of small files, fsynced and deleted
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    if config.option.budget is None:
        return
    told = getattr(config, "workerinput", {"end": time.time() + config.option.budget, "order": config.option.order})
    config.option.budget_end = told["end"]
    config.option.order = told["order"] if told["order"] is not None else int(time.time() // 86400)
    config.option.loadscopereorder = False  # xdist's own order of files: by their number of tests


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """xdist's workers keep the time and the order of the process that starts them."""
    if node.config.option.budget is not None:
        node.workerinput |= {"end": node.config.option.budget_end, "order": node.config.option.order}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.budget is not None:
        files = list(dict.fromkeys(item.path for item in items))
        random.Random(config.option.order).shuffle(files)
        items.sort(key=lambda item: files.index(item.path))


@contextmanager
def _cut_off(config: pytest.Config):
    """Ends a test that goes on too long after the budget's end."""

    def end(number: int, frame: object) -> None:
        pytest.skip(LEFT_OUT)

    held = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, config.option.budget_end + GRACE - time.time()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, held)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_setup(item: pytest.Item):
    if item.config.option.budget is None:
        return (yield)
    if time.time() >= item.config.option.budget_end:
        pytest.skip(LEFT_OUT)
    with _cut_off(item.config):
        return (yield)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item):
    if item.config.option.budget is None:
        return (yield)
    with _cut_off(item.config):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int):
    """A run that was stopped from outside after its budget fails only where a test failed."""
    option = session.config.option
    late = option.budget is not None and not hasattr(session.config, "workerinput") and time.time() >= option.budget_end
    if late and exitstatus == pytest.ExitCode.INTERRUPTED:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED if session.testsfailed else pytest.ExitCode.OK
    return (yield)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.option.budget is None:
        return
    reports = [report for reports in terminalreporter.stats.values() for report in reports if isinstance(report, pytest.TestReport)]
    out = {report.nodeid for report in reports if report.skipped and LEFT_OUT in str(report.longrepr)}
    seen = {report.nodeid for report in reports if report.when == "call" or not report.passed} - out
    never = max(0, terminalreporter._numcollected - len(seen) - len(out))  # stopped from outside
    terminalreporter.write_line(
        f"budget of {config.option.budget:g} s: {len(seen)} tests ran, {len(out) + never} were left out (--order {config.option.order})"
    )
