"""Since when: what a client's pace tells after looks at these moments and figures."""

from echod.server.activity import Activity


def look(
    pace: Activity, now: float, *, received: int = 0, lines: int = 0, is_in_line: bool = False, is_unread: bool = False
) -> None:
    pace.look(now, received, lines, is_in_line=is_in_line, is_unread=is_unread)


def test_quiet_counts_from_the_last_look_that_saw_something_new() -> None:
    """What came between two looks came at the second: the span of quiet is never too long."""
    pace = Activity(0.0)
    look(pace, 1.0)
    assert pace.quiet_since == 0.0
    look(pace, 2.0, received=10)
    look(pace, 3.0, received=10)
    assert pace.quiet_since == 2.0


def test_a_client_that_is_owed_something_or_in_a_line_is_not_quiet() -> None:
    """Idle means: nothing from the client, nothing owed to it, no line begun."""
    pace = Activity(0.0)
    pace.measure(1.0, taken=0, owed=5)
    look(pace, 1.0)
    assert pace.quiet_since == 1.0
    pace.measure(2.0, taken=5, owed=0)
    look(pace, 2.0, is_in_line=True)
    assert pace.quiet_since == 2.0


def test_a_line_is_timed_from_the_look_that_first_saw_it() -> None:
    """More bytes of the same line don't begin it anew; another line does, and its end ends it."""
    pace = Activity(0.0)
    look(pace, 1.0, received=1, is_in_line=True)
    look(pace, 2.0, received=2, is_in_line=True)
    assert pace.line_since == 1.0
    look(pace, 3.0, received=9, lines=1, is_in_line=True)
    assert pace.line_since == 3.0
    look(pace, 4.0, received=10, lines=2)
    assert pace.line_since is None


def test_a_line_that_we_don_t_read_is_not_timed() -> None:
    """While replies are unsent the rest of the line waits in the kernel: not the client's delay."""
    pace = Activity(0.0)
    look(pace, 1.0, received=1, is_in_line=True)
    look(pace, 2.0, received=1, is_in_line=True, is_unread=True)
    assert pace.line_since == 2.0


def test_taking_a_part_of_the_replies_is_progress() -> None:
    """The `write` span counts from when the client last took a byte, or was last owed none."""
    pace = Activity(0.0)
    pace.measure(1.0, taken=100, owed=50)
    pace.measure(2.0, taken=100, owed=50)
    assert pace.taken_since == 1.0
    pace.measure(3.0, taken=101, owed=49)
    assert pace.taken_since == 3.0
    pace.measure(4.0, taken=150, owed=0)
    pace.measure(9.0, taken=150, owed=20)
    assert pace.taken_since == 9.0
