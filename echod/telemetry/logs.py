"""Set up structlog: one stream of events from echod, asyncio, warnings and the standard library, as JSON or as text.

A new level, format or file also takes effect on loggers that are already in use.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from datetime import datetime
from typing import Any

import msgspec
import structlog
from structlog.typing import EventDict, ProcessorReturnValue

from echod.config.schema import Log
from echod.telemetry.log_writer import LogWriter

Renderer = Callable[[Any, str, EventDict], ProcessorReturnValue]

STANDARD_ERROR = 2

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class Logs:
    """The current log. Opening its file with `open_file` can fail; nothing in this class does."""

    def __init__(self, config: Log, descriptor: int | None) -> None:
        """Start to log; `descriptor` is the result of `open_file` for `config`."""
        self.sink = _sink(descriptor)
        self._in_force = _InForce(self.sink)
        self._configure(config)
        structlog.configure(
            processors=[self._in_force.render],
            wrapper_class=_Logger,
            logger_factory=lambda *_: self._in_force,
            cache_logger_on_first_use=True,  # creating a logger takes half the time of an event
        )
        _divert_standard_library()

    def apply(self, config: Log, descriptor: int | None) -> None:
        """Switch to `config`, and to a new descriptor even if the file name is the same, as logrotate expects."""
        if descriptor is None:
            self.sink.redirect(STANDARD_ERROR, is_owned=False)
        else:
            self.sink.redirect(descriptor, is_owned=True)
        self._configure(config)

    def always(self, event: str, **fields: Any) -> None:
        """Log an event with level info, whatever the current level is."""
        self.sink.write(_as_line(self._in_force.render(None, "info", {"event": event, **fields})))

    def _configure(self, config: Log) -> None:
        self.is_at_terminal = _is_at_terminal(config)
        is_text = config.format == "console" or (config.format == "auto" and self.is_at_terminal)
        self._in_force.renderer = _console(self.is_at_terminal) if is_text else render_json
        self._in_force.level = _LEVELS[config.level]
        logging.getLogger().setLevel(self._in_force.level)


def _is_at_terminal(config: Log) -> bool:
    return not config.file and os.isatty(STANDARD_ERROR)


def open_file(config: Log) -> int | None:
    """Open the log file; return None if the log goes to standard error. Raise OSError."""
    return open_path(config.file) if config.file else None


def open_path(file: str, more_flags: int = 0) -> int:
    """Open a file for appending, and create it if necessary; raise OSError."""
    # O_NONBLOCK prevents waiting for the reader of a FIFO; writes block again afterwards.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    descriptor = os.open(file, flags | more_flags, 0o640)
    os.set_blocking(descriptor, True)
    return descriptor


def _sink(descriptor: int | None) -> LogWriter:
    return LogWriter(STANDARD_ERROR) if descriptor is None else LogWriter(descriptor, is_owned=True)


# -- rendering ---------------------------------------------------------------------------------------------------------


def render_json(_: Any, level: str, event: MutableMapping[str, Any]) -> bytes:
    """Render an event as JSON: timestamp, level, event, then its fields. A chain of processors takes twice as long."""
    fields: dict[str, Any] = {"timestamp": _now(), "level": level, "event": event.pop("event", "")}
    fields.update(event)
    if fields.get("exc_info"):
        fields["exception"] = _traceback(fields.pop("exc_info"))
    try:
        return msgspec.json.encode(fields, enc_hook=str)
    except (TypeError, ValueError):
        # An odd value, such as a file name that is not UTF-8, must not lose the event.
        return msgspec.json.encode({key: _harmless(value) for key, value in fields.items()})


class _Clock:
    """Formats the current time; everything but the microseconds is formatted once a second."""

    def __init__(self) -> None:
        self._second = (0, "")

    def __call__(self) -> str:
        now_s, now_us = divmod(time.time_ns() // 1000, 1_000_000)
        second, text = self._second
        if now_s != second:
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now_s))
            self._second = (now_s, text)
        return f"{text}.{now_us:06}Z"


_now = _Clock()


def _harmless(value: Any) -> str:
    return repr(value).encode(errors="backslashreplace").decode()


def _traceback(exc_info: Any) -> str:
    from traceback import format_exception

    if isinstance(exc_info, BaseException):
        exc_info = (type(exc_info), exc_info, exc_info.__traceback__)
    elif not isinstance(exc_info, tuple):
        exc_info = sys.exc_info()
    return "".join(format_exception(*exc_info))


def _console(is_at_terminal: bool) -> Renderer:
    colors = is_at_terminal and "NO_COLOR" not in os.environ
    console = structlog.dev.ConsoleRenderer(
        colors=colors, exception_formatter=structlog.dev.plain_traceback, pad_event_to=18, sort_keys=False
    )

    def render(logger: Any, level: str, event: EventDict) -> ProcessorReturnValue:
        return console(logger, level, {"timestamp": datetime.now().strftime("%H:%M:%S"), "level": level, **event})

    return render


def _as_line(rendered: Any) -> bytes:
    return (rendered if isinstance(rendered, bytes) else rendered.encode(errors="backslashreplace")) + b"\n"


# -- loggers -----------------------------------------------------------------------------------------------------------


class _InForce:
    """The state that every logger is bound to permanently; a new configuration changes it in place."""

    def __init__(self, sink: LogWriter) -> None:
        self.level = logging.INFO
        self.renderer: Renderer = render_json
        self._sink = sink

    def render(self, logger: Any, level: str, event: EventDict) -> ProcessorReturnValue:
        """Render an event: the only processor of structlog."""
        return self.renderer(logger, level, event)

    def _write(self, rendered: bytes | str) -> None:
        self._sink.write(_as_line(rendered))

    debug = info = warning = error = _write


class _Logger(structlog.BoundLoggerBase):
    """A logger that checks the level at each event, so that a new level takes effect on loggers in use."""

    _logger: _InForce

    def debug(self, event: str, **fields: Any) -> None:
        if self._logger.level <= logging.DEBUG:
            self._proxy_to_logger("debug", event, **fields)

    def info(self, event: str, **fields: Any) -> None:
        if self._logger.level <= logging.INFO:
            self._proxy_to_logger("info", event, **fields)

    def warning(self, event: str, **fields: Any) -> None:
        if self._logger.level <= logging.WARNING:
            self._proxy_to_logger("warning", event, **fields)

    def error(self, event: str, **fields: Any) -> None:
        self._proxy_to_logger("error", event, **fields)

    def exception(self, event: str, **fields: Any) -> None:
        self.error(event, exc_info=True, **fields)

    def log(self, level: int, event: str, **fields: Any) -> None:
        if self._logger.level <= level:
            self._proxy_to_logger(logging.getLevelName(level).lower(), event, **fields)


# -- the standard library ----------------------------------------------------------------------------------------------


class _Forward(logging.Handler):
    """Forwards records of the standard library's logging (asyncio, warnings, dependencies) to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        level = min(max(record.levelno // 10 * 10, logging.DEBUG), logging.ERROR)
        fields: Mapping[str, Any] = {"exc_info": record.exc_info} if record.exc_info else {}
        structlog.get_logger().log(level, record.getMessage(), logger=record.name, **fields)


def _divert_standard_library() -> None:
    logging.basicConfig(handlers=[_Forward()], force=True)
    logging.captureWarnings(capture=True)
    threading.excepthook = _log_failed_thread


def _log_failed_thread(failed: threading.ExceptHookArgs) -> None:
    structlog.get_logger().error("thread failed", thread=getattr(failed.thread, "name", ""), exc_info=failed.exc_value)
