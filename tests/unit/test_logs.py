"""The log: one stream of events, as JSON or text, that can be changed while in use."""

import json
import logging
import os
import pty
import threading
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog

from echod.config.schema import Log
from echod.telemetry import logs
from tests.support.daemon import DEADLINE_S


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Restore pytest's logging, because the log belongs to the whole process."""
    root = logging.getLogger()
    handlers, level, hook = root.handlers[:], root.level, threading.excepthook
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)
    threading.excepthook = hook
    structlog.reset_defaults()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The pipe that receives the events."""
    return tmp_path / "log"


def _open(file: Path, **settings: Any) -> logs.Logs:
    config = Log(file=str(file), **settings)
    return logs.Logs(config, logs.open_file(config))


def _events(opened: logs.Logs, file: Path) -> list[dict[str, Any]]:
    assert opened.sink.close(DEADLINE_S)
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_an_event_is_one_json_object_a_line(file: Path) -> None:
    """JSON has one object per line: `timestamp` (UTC, ISO 8601), `level`, `event`, then fields."""
    opened = _open(file)
    structlog.get_logger().info("something happened", count=3, names=["a", "ß"], nothing=None)
    (event,) = _events(opened, file)
    assert list(event) == ["timestamp", "level", "event", "count", "names", "nothing"]
    assert datetime.now(UTC) - datetime.fromisoformat(event.pop("timestamp")) < timedelta(seconds=DEADLINE_S)
    assert event == {"level": "info", "event": "something happened", "count": 3, "names": ["a", "ß"], "nothing": None}


def test_the_level_holds_and_can_be_changed_for_loggers_in_use(file: Path) -> None:
    """A new level takes effect on loggers already in use."""
    log = structlog.get_logger()
    opened = _open(file, level="warning")
    log.info("dropped")
    log.warning("kept")
    opened.apply(Log(file=str(file), level="debug"), logs.open_file(Log(file=str(file))))
    log.debug("kept now")
    assert [event["event"] for event in _events(opened, file)] == ["kept", "kept now"]


def test_always_is_written_whatever_the_level(file: Path) -> None:
    """`always` writes at any log level."""
    opened = _open(file, level="error")
    opened.always("stats", lines=1)
    assert [(event["event"], event["lines"]) for event in _events(opened, file)] == [("stats", 1)]


def test_asyncio_and_warnings_are_in_the_same_stream(file: Path) -> None:
    """Events of asyncio and warnings are in the same stream, with exceptions in a field."""
    opened = _open(file)
    logging.getLogger("asyncio").error("task %s failed", 7, exc_info=ValueError("why"))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.warn("careful", stacklevel=1)
    failed, warned = _events(opened, file)
    assert (failed["event"], failed["logger"], failed["level"]) == ("task 7 failed", "asyncio", "error")
    assert "ValueError: why" in failed["exception"]
    assert (warned["level"], warned["logger"]) == ("warning", "py.warnings")
    assert "careful" in warned["event"]


def test_a_thread_that_fails_is_an_event(file: Path) -> None:
    """An exception in a thread is an event, not a bare traceback."""
    opened = _open(file)
    thread = threading.Thread(target=lambda: 1 // 0, name="unlucky")
    thread.start()
    thread.join()
    (event,) = _events(opened, file)
    assert (event["event"], event["thread"]) == ("thread failed", "unlucky")
    assert "ZeroDivisionError" in event["exception"]


def test_an_exception_is_rendered_from_where_it_is_caught(file: Path) -> None:
    """`log.exception` has the traceback in the field `exception`."""
    opened = _open(file)
    try:
        raise KeyError("gone")
    except KeyError:
        structlog.get_logger().exception("caught")
    (event,) = _events(opened, file)
    assert "KeyError: 'gone'" in event["exception"]
    assert "exc_info" not in event


def test_an_odd_value_doesn_t_lose_the_event(file: Path) -> None:
    """A value that JSON cannot represent, such as a file name that is not UTF-8, is shown in another form."""
    opened = _open(file)
    structlog.get_logger().info("odd", name=os.fsdecode(b"\xff"), path=Path("/x"), number=1)
    structlog.get_logger().info("odder", thing={1, 2}, name=os.fsdecode(b"\xff"))
    odd, odder = _events(opened, file)
    assert odd["event"].strip("'") == "odd"
    assert "xff" in odd["name"] or "udcff" in odd["name"]
    assert "1, 2" in str(odder["thing"])


def test_console_is_for_people(file: Path) -> None:
    """The console format is a line of text, without colours in a file."""
    opened = _open(file, format="console")
    structlog.get_logger().info("ready", listen=["127.0.0.1:8888"])
    assert opened.sink.close(DEADLINE_S)
    line = file.read_text()
    assert "ready" in line
    assert "listen=['127.0.0.1:8888']" in line
    assert "\x1b" not in line


def test_auto_is_console_on_a_terminal_else_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is console on a terminal, else json."""
    reader, terminal = pty.openpty()
    monkeypatch.setattr(logs, "STANDARD_ERROR", terminal)
    opened = logs.Logs(Log(), None)
    structlog.get_logger().info("hello")
    assert opened.is_at_terminal
    assert opened.sink.close(DEADLINE_S)
    assert b"hello" in os.read(reader, 1000)
    os.close(terminal)
    os.close(reader)


def test_a_file_that_cannot_be_opened_is_an_error_before_anything_changes(tmp_path: Path) -> None:
    """`open_file` raises OSError for a file that cannot be opened."""
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        logs.open_file(Log(file=str(tmp_path / "file" / "log")))
    assert logs.open_file(Log()) is None
