"""What an activity reports after samples at given times."""

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


def test_quiet_time_starts_at_the_last_sample_with_new_input() -> None:
    """Input between two samples counts for the second, so a quiet span is never too long."""
    activity = Activity(0.0)
    sample(activity, 1.0)
    assert activity.quiet_since == 0.0
    sample(activity, 2.0, received=10)
    sample(activity, 3.0, received=10)
    assert activity.quiet_since == 2.0


def test_a_client_with_owed_bytes_or_a_partial_line_is_not_quiet() -> None:
    """Idle means no input, no reply that is owed and no partial line."""
    activity = Activity(0.0)
    activity.measure(1.0, accepted_bytes=0, owed_bytes=5)
    sample(activity, 1.0)
    assert activity.quiet_since == 1.0
    activity.measure(2.0, accepted_bytes=5, owed_bytes=0)
    sample(activity, 2.0, is_in_line=True)
    assert activity.quiet_since == 2.0


def test_a_partial_line_ages_from_the_first_sample_that_saw_it() -> None:
    """More bytes of it change nothing; another line starts anew, and its end stops the time."""
    activity = Activity(0.0)
    sample(activity, 1.0, received=1, is_in_line=True)
    sample(activity, 2.0, received=2, is_in_line=True)
    assert activity.line_since == 1.0
    sample(activity, 3.0, received=9, lines=1, is_in_line=True)
    assert activity.line_since == 3.0
    sample(activity, 4.0, received=10, lines=2)
    assert activity.line_since is None


def test_a_partial_line_does_not_age_while_reading_is_paused() -> None:
    """While replies are pending, its rest waits in the kernel, which is not the client's delay."""
    activity = Activity(0.0)
    sample(activity, 1.0, received=1, is_in_line=True)
    sample(activity, 2.0, received=1, is_in_line=True, is_read_paused=True)
    assert activity.line_since == 2.0


def test_accepting_part_of_the_replies_is_progress() -> None:
    """The write timeout counts from when the client last accepted a byte, or was owed none."""
    activity = Activity(0.0)
    activity.measure(1.0, accepted_bytes=100, owed_bytes=50)
    activity.measure(2.0, accepted_bytes=100, owed_bytes=50)
    assert activity.accepted_at == 1.0
    activity.measure(3.0, accepted_bytes=101, owed_bytes=49)
    assert activity.accepted_at == 3.0
    activity.measure(4.0, accepted_bytes=150, owed_bytes=0)
    activity.measure(9.0, accepted_bytes=150, owed_bytes=20)
    assert activity.accepted_at == 9.0
