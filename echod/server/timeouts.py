"""Enforces the timeouts of a client while serving, and ends connections during a drain.

The owner calls these functions periodically: a timeout is at most two of those intervals late, and never early.
"""

from echod.config.schema import Timeouts
from echod.net import sockets
from echod.server.connection import Connection, State
from echod.telemetry.reasons import CloseReason


def enforce_timeouts(connection: Connection, now: float, timeouts: Timeouts) -> None:
    """Sample the connection, and end it if one of its timeouts has ended."""
    if connection.state is State.CLOSED:
        return
    connection.sample(now)
    activity = connection.activity
    if timeouts.write and activity.owed_bytes and now - activity.accepted_at >= timeouts.write:
        sockets.reset_on_close(connection.descriptor)
        connection.abort(CloseReason.WRITE_TIMEOUT)
    elif connection.state is not State.OPEN:
        return
    # Unread input, as after a pause of the whole process, is not the client's delay: it is read before the next sample.
    elif timeouts.line and activity.line_since is not None and now - activity.line_since >= timeouts.line:
        # A client that waits for memory is not read from: unread input must not let it keep its memory forever.
        if connection.lacks_memory or not connection.unread_bytes():
            connection.finish(CloseReason.LINE_TIMEOUT, f"line not finished within {timeouts.line:.15g} s")
    elif timeouts.idle and now - activity.quiet_since >= timeouts.idle and not connection.unread_bytes():
        connection.finish(CloseReason.IDLE, f"idle for {timeouts.idle:.15g} s")


def finish_if_quiet(connection: Connection, now: float, quiet_s: float) -> None:
    """Finish a draining connection that has been quiet for `quiet_s`; call it after each `enforce_timeouts`."""
    activity = connection.activity
    if connection.state is not State.OPEN:
        connection.close_if_done()
    elif (
        now - activity.quiet_since >= quiet_s
        and not (connection.echo.held_bytes or activity.owed_bytes)
        and not connection.unread_bytes()
    ):
        connection.finish(CloseReason.DRAINED)


def end_at_line_boundary(connection: Connection) -> None:
    """End a connection at the deadline of a drain: pending replies are still owed, a partial line is not answered."""
    if connection.is_owed:
        connection.abort(CloseReason.CUT)
    else:
        connection.finish(CloseReason.DRAINED)
