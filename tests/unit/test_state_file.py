"""The state file of a live upgrade, written and read by this program and by another version of it."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echod.net.sockets import ListenerSettings
from echod.server.state import ConnectionState
from echod.upgrade import state_file
from echod.upgrade.state_file import HandoverError, ListenerState, ProcessState, ServiceState, State

SAMPLE = Path(__file__).with_name("state-1.sample")
"""A state as version 1 wrote it. `python -m tests.unit.test_state_file` writes the sample of a new version."""

STATE = State(
    ProcessState(
        pid=4711,
        version="0.1.0",
        stopped_at=12345.678,
        directory="/srv",
        inherited=[("web", 5)],
        pidfile=("/run/echod.pid", 6),
        signals=[("HUP", 1), ("USR2", 0)],
        log_dropped=3,
    ),
    ServiceState(
        listeners=[
            ListenerState(
                descriptor=4,
                family=2,
                address=["127.0.0.1", 8888],
                settings=ListenerSettings(name="listen[0]", proxy_protocol=True, reuse_port=True),
            ),
            ListenerState(descriptor=5, family=10, address=["::", 8888, 0, 0, "and IPv4"], is_inherited=True),
            ListenerState(descriptor=7, family=1, address=b"/run/\xff.sock", file=(64, 1234567)),
        ],
        admin_listeners=[ListenerState(descriptor=8, family=2, address=["127.0.0.1", 0], number=1)],
        config={"listen": [{"address": "127.0.0.1:8888", "reuse_port": False}], "limits": {"connections": 50}},
        stats={"accepted": 7, "closed": {"client": 3}, "started_at": 1.5, "reload_error": "no"},
        self_probes=[["127.0.0.1", 40_000], b"\0abcde"],
    ),
)
CLIENTS = [
    ConnectionState(descriptor=9, family=2, peer=["192.0.2.1", 40_001], opened_at=1.5),
    ConnectionState(
        descriptor=10,
        family=1,
        peer=b"",
        is_counted=False,
        opened_at=2.5,
        bytes_in=100,
        bytes_out=99,
        lines=9,
        unanswered=b"begun \xff",
        pending=b"NOT YET TAKEN\n" * 10,
        reason="idle",
        activity={"quiet_since": 1.0, "line_since": None, "owed_bytes": 10},
    ),
]


def read(descriptor: int) -> tuple[State, list[ConnectionState]]:
    try:
        state, clients = state_file.read(os.pread(descriptor, 1 << 20, 0))
        return state, list(clients)
    finally:
        os.close(descriptor)


def test_what_is_written_is_read() -> None:
    """Every field survives."""
    assert read(state_file.save(STATE, CLIENTS)) == (STATE, CLIENTS)


@given(st.binary(max_size=300), st.binary(max_size=300), st.none() | st.text(max_size=20))
def test_any_bytes_survive(unanswered: bytes, pending: bytes, reason: str | None) -> None:
    """Input and pending replies may hold any bytes."""
    past = ConnectionState(
        descriptor=3, family=2, peer=[], opened_at=0.0, unanswered=unanswered, pending=pending, reason=reason
    )
    past.proxy_header = pending or None
    assert read(state_file.save(STATE, [past] * 3)) == (STATE, [past] * 3)


def test_a_state_of_version_1_is_understood() -> None:
    """A program that runs today can be replaced by this one: the sample is of the first version of the format."""
    state, clients = state_file.read(SAMPLE.read_bytes())
    assert (state, list(clients)) == (STATE, CLIENTS)


def test_an_unknown_field_is_ignored_and_a_missing_one_has_its_default() -> None:
    """Versions that differ by a field understand each other."""
    import msgspec

    documents = [
        {"pid": 1, "version": "9", "stopped_at": 1.0, "mood": "fine"},
        {"weather": ["good"]},
        {"descriptor": 3, "family": 2, "peer": ["h", 1], "opened_at": 1.0, "tls": None},
    ]
    encoded = [msgspec.msgpack.encode(each) for each in documents]
    content = b"echod state 1\n" + b"".join(len(each).to_bytes(8, "big") + each for each in encoded)
    state, clients = state_file.read(content)
    assert state == State(ProcessState(pid=1, version="9", stopped_at=1.0), ServiceState())
    assert list(clients) == [ConnectionState(descriptor=3, family=2, peer=["h", 1], opened_at=1.0)]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"echod state 2\n" + SAMPLE.read_bytes()[14:], r"a state of version 2, which echod doesn't know \(1\)"),
        (b"", "no state of echod"),
        (b"echod state\n", "no state of echod"),
        (b"GET / HTTP/1.1\r\n\r\n", "no state of echod"),
        (b"echod state 1\n", "a broken state"),
        (SAMPLE.read_bytes()[:40], "a broken state"),
    ],
)
def test_an_unreadable_state_is_refused(content: bytes, complaint: str) -> None:
    """Another version of the format, another file, or half a file is refused."""
    with pytest.raises(HandoverError, match=complaint):
        state_file.read(content)


@pytest.mark.parametrize("said", ["", "x", "-1", "99999"])
def test_a_wrong_descriptor_is_refused(said: str) -> None:
    """An empty variable means that there is no predecessor; any other value must be a descriptor."""
    if not said:
        assert state_file.receive({state_file.VARIABLE: said}, os.getpid()) is None
        return
    with pytest.raises(HandoverError, match="no state there"):
        state_file.receive({state_file.VARIABLE: said}, os.getpid())


def test_the_state_of_another_process_is_refused() -> None:
    """A child that got the variable by mistake does not take over its parent's clients."""
    descriptor = state_file.save(STATE)
    with pytest.raises(HandoverError, match="the state of another process, 4711"):
        state_file.receive({state_file.VARIABLE: str(descriptor)}, 4712)


if __name__ == "__main__":  # a sample of a new version; those of old versions stay as they are
    Path(__file__).with_name(f"state-{state_file.VERSION}.sample").write_bytes(
        os.pread(state_file.save(STATE, CLIENTS), 1 << 20, 0)
    )
