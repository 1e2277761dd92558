"""Since when: what a client's pace tells after looks at these moments and figures."""

from echod.server.activity import Activity


def sample(
    activity: Activity,
    now: float,
    *,
    received: int = 0,
    lines: int = 0,
    is_in_line: bool = False,
    is_read_paused: bool = False,
) -> None:
    activity.sample(now, received, lines, is_in_line=is_in_line, is_read_paused=is_read_paused)


def test_quiet_counts_from_the_last_look_that_saw_something_new() -> None:
    """What came between two looks came at the second: the span of quiet is never too long."""
    activity = Activity(0.0)
    sample(activity, 1.0)
    assert activity.quiet_since == 0.0
    sample(activity, 2.0, received=10)
    sample(activity, 3.0, received=10)
    assert activity.quiet_since == 2.0


def test_a_client_that_is_owed_something_or_in_a_line_is_not_quiet() -> None:
    """Idle means: nothing from the client, nothing owed to it, no line begun."""
    activity = Activity(0.0)
    activity.measure(1.0, accepted_bytes=0, owed_bytes=5)
    sample(activity, 1.0)
    assert activity.quiet_since == 1.0
    activity.measure(2.0, accepted_bytes=5, owed_bytes=0)
    sample(activity, 2.0, is_in_line=True)
    assert activity.quiet_since == 2.0


def test_a_line_is_timed_from_the_look_that_first_saw_it() -> None:
    """More bytes of the same line don't begin it anew; another line does, and its end ends it."""
    activity = Activity(0.0)
    sample(activity, 1.0, received=1, is_in_line=True)
    sample(activity, 2.0, received=2, is_in_line=True)
    assert activity.line_since == 1.0
    sample(activity, 3.0, received=9, lines=1, is_in_line=True)
    assert activity.line_since == 3.0
    sample(activity, 4.0, received=10, lines=2)
    assert activity.line_since is None


def test_a_line_that_we_don_t_read_is_not_timed() -> None:
    """While replies are unsent the rest of the line waits in the kernel: not the client's delay."""
    activity = Activity(0.0)
    sample(activity, 1.0, received=1, is_in_line=True)
    sample(activity, 2.0, received=1, is_in_line=True, is_read_paused=True)
    assert activity.line_since == 2.0


def test_taking_a_part_of_the_replies_is_progress() -> None:
    """The `write` span counts from when the client last took a byte, or was last owed none."""
    activity = Activity(0.0)
    activity.measure(1.0, accepted_bytes=100, owed_bytes=50)
    activity.measure(2.0, accepted_bytes=100, owed_bytes=50)
    assert activity.accepted_at == 1.0
    activity.measure(3.0, accepted_bytes=101, owed_bytes=49)
    assert activity.accepted_at == 3.0
    activity.measure(4.0, accepted_bytes=150, owed_bytes=0)
    activity.measure(9.0, accepted_bytes=150, owed_bytes=20)
    assert activity.accepted_at == 9.0
