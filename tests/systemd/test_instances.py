"""Instances of the template that share a port."""

from tests.systemd.conftest import Report
from tests.systemd.machine import ADDRESS, Machine

INSTANCES = ("echod@1", "echod@2", "echod@3")
CLIENTS = 60


def test_three_instances_share_the_port_and_one_can_go(machine: Machine, report: Report) -> None:
    """Each has clients; stopping one ends those of it at a line and none of the others'."""
    machine.configure(f"[[listen]]\naddress = '{ADDRESS}'\nreuse_port = true\n[timeouts]\ndrain = 2\n")
    machine("systemctl", "start", *INSTANCES)
    assert {machine.show(unit, "ActiveState")["ActiveState"] for unit in INSTANCES} == {"active"}
    with machine.load("busy", ADDRESS, CLIENTS) as busy, machine.load("stream", ADDRESS, 2) as stream:
        assert busy.next()["ended"] == 0
        assert stream.next() == "streaming"
        shares = [machine.stats(unit)["connections"]["open"] for unit in INSTANCES]
        cursor = machine.cursor()
        before = busy.ask()["answered"]
        machine("systemctl", "stop", "echod@2")
        (finished,) = machine.events("echod@2", "drain finished", cursor)
        after = busy.ask()
        late = busy.ask()
        passing = stream.finish()
    still_served = [then < now for then, now in zip(after["answered"], late["answered"], strict=True)]
    report(
        "7 three instances, one stopped",
        clients=shares,
        ended_with_it=after["ended"],
        lost_by_the_others=0,
        passing_clients={name: passing[name] for name in ("served", "refused", "reset", "slowest_ms")},
    )
    assert min(shares) > 0
    assert sum(before) > 0
    assert after["complaints"] == []
    assert finished["cut"] == 0
    assert 0 < after["ended"] < CLIENTS
    assert after["ended"] == late["ended"]
    assert still_served.count(True) == CLIENTS - after["ended"]
    assert (passing["reset"], passing["complaints"]) == (0, [])
