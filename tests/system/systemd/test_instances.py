"""Instances of the template unit: sharing a port, and behind a balancer."""

import json

from tests.support.report import Report
from tests.system.balancer.haproxy import fenced
from tests.system.systemd.machine import ADDRESS, Machine

INSTANCES = ("echod@1", "echod@2", "echod@3")
CLIENTS = 60


def test_three_instances_share_a_port_and_one_can_stop(machine: Machine, report: Report) -> None:
    """Stopping one instance ends its clients at a line boundary, and none of the others'."""
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


def test_instances_with_ports_of_their_own(machine: Machine, report: Report) -> None:
    """Instances configured as docs/scaling.md says have two ports each, reload, and get the time to stop."""
    drop_in = fenced("/etc/systemd/system/echod@.service.d/override.conf")
    machine.configure("[timeouts]\nlame_duck = 4\n")
    machine.drop_in("echod@.service", f"{drop_in}TimeoutStopSec=2\n")
    machine("systemctl", "start", *INSTANCES)
    for number, unit in enumerate(INSTANCES, 1):
        assert machine.ask("say_line", f"127.0.0.1:888{number}", 3)["reply"] == "XXX\n"
        stats = json.loads(machine("echod", "stats", "--json", "--admin", f"127.0.0.1:889{number}"))
        assert str(stats["pid"]) == machine.show(unit, "MainPID")["MainPID"]
    cursor = machine.cursor()
    machine("systemctl", "reload", *INSTANCES)
    assert [len(machine.events(unit, "reload applied", cursor)) for unit in INSTANCES] == [1, 1, 1]
    machine("systemctl", "stop", "echod@2")
    (stopped,) = machine.events("echod@2", "stopped", cursor)
    result = machine.show("echod@2", "Result")["Result"]
    report("7 a lame duck of 4 s, TimeoutStopSec=2", exit_status=stopped["exit_status"], result=result)
    assert (stopped["exit_status"], result) == (0, "success")
