"""When a client has had its time: each timeout while serving, and the quiet that ends a connection in a drain.

Called by the owner now and then: a timeout is at most two of those intervals late and never early.
"""

from echod.config.schema import Timeouts
from echod.net import sockets
from echod.server.connection import Connection, State


def enforce_timeouts(connection: Connection, now: float, timeouts: Timeouts) -> None:
    """End the connection if a timeout is over; to be called again and again while serving."""
    if connection.state is State.CLOSED:
        return
    connection.look(now)
    pace = connection.pace
    if timeouts.write and pace.owed and now - pace.taken_since >= timeouts.write:
        sockets.reset_on_close(connection.descriptor)
        connection.abort("write timeout")
    elif connection.state is not State.OPEN:
        return
    elif timeouts.line and pace.line_since is not None and now - pace.line_since >= timeouts.line:
        # A client that waits for memory is not read from: its unread input must not keep it, and its memory, forever.
        if connection.lacks_memory or not connection.unread_bytes():
            connection.finish("line timeout", f"line not finished within {timeouts.line:.15g} s")
    elif timeouts.idle and now - pace.quiet_since >= timeouts.idle:
        _time_out(connection, "idle", f"idle for {timeouts.idle:.15g} s")


def _time_out(connection: Connection, reason: str, error: str) -> None:
    # What has arrived and waits for us, as after a pause of the whole process, is not the client's delay: it is read
    # before the next look.
    if not connection.unread_bytes():
        connection.finish(reason, error)


def settle(connection: Connection, now: float, quiet_s: float) -> None:
    """Finish the connection if it has been quiet for so long; to be called after each `tend` while draining."""
    pace = connection.pace
    if connection.state is not State.OPEN:
        connection.close_if_done()
    elif now - pace.quiet_since >= quiet_s and _is_settled(connection):
        connection.finish("drained")


def _is_settled(connection: Connection) -> bool:
    """Whether nothing is begun, owed or unread."""
    return not (connection.echo.held_bytes or connection.pace.owed or connection.unread_bytes())


def end_at_line_boundary(connection: Connection) -> None:
    """End a drain that takes too long: a line begun is owed nothing, replies that the kernel hasn't taken are."""
    if connection.is_owed:
        connection.abort("cut")
    else:
        connection.finish("drained")
