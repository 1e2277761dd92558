"""The phase of the daemon."""

import pytest

from echod.process.phase import Life, Phase


def test_a_stop_is_known_in_the_phases_that_follow_it() -> None:
    life = Life()
    seen = [(life.phase, life.is_leaving, life.is_draining)]
    for phase in [*Phase][1:]:
        life.enter(phase)
        seen.append((life.phase, life.is_leaving, life.is_draining))
    assert seen == [
        (Phase.STARTING, False, False),
        (Phase.SERVING, False, False),
        (Phase.LAME_DUCK, True, False),
        (Phase.DRAINING, True, True),
        (Phase.STOPPED, True, True),
    ]


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.SERVING, Phase.DRAINING])
def test_no_phase_comes_twice_or_again(phase: Phase) -> None:
    life = Life()
    life.enter(Phase.DRAINING)
    with pytest.raises(AssertionError):
        life.enter(phase)
