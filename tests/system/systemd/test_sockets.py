"""Socket units: the sockets that echod serves, their names, and the drop-in of docs/systemd.md."""

from tests.support.report import Report
from tests.system.systemd.machine import ADDRESS, Machine

OTHER = """
[Socket]
ListenStream=/run/other.sock
FileDescriptorName=other
Service=echod.service
"""


def listening(machine: Machine, cursor: str) -> list[str]:
    (ready,) = machine.events("echod", "ready", cursor)
    found: list[str] = ready["listen"]
    return found


def test_several_named_sockets_and_one_bound_by_echod(machine: Machine, report: Report) -> None:
    """An entry takes the socket with its name or address, one more is bound, and the rest is served with defaults."""
    machine.write("/run/systemd/system/echod-other.socket", OTHER)
    machine.drop_in("echod.socket", "[Socket]\nListenStream=7777\n")
    machine.configure("[[listen]]\naddress = 'systemd:echod'\n[[listen]]\naddress = '127.0.0.1:9999'\n")
    try:
        machine("systemctl", "start", "echod.socket", "echod-other.socket")
        cursor = machine.cursor()
        machine("systemctl", "start", "echod")
        assert listening(machine, cursor) == [ADDRESS, "[::]:7777", "127.0.0.1:9999", "unix:/run/other.sock"]
        addresses = (ADDRESS, "127.0.0.1:7777", "127.0.0.1:9999", "/run/other.sock")
        for address in addresses:
            assert machine.ask("say_line", address, 5) == {"reply": "XXXXX\n"}
        machine.configure("[[listen]]\naddress = '127.0.0.1:8888'\n")
        machine("systemctl", "restart", "echod")
        for address in (ADDRESS, "127.0.0.1:7777", "/run/other.sock"):
            assert machine.ask("say_line", address, 5) == {"reply": "XXXXX\n"}
    finally:
        machine("sh", "-c", "systemctl stop echod-other.socket; rm /run/systemd/system/echod-other.socket")
    report("sockets", of_two_units=3, bound_beside_them=1, served="4 of 4")


def test_the_documented_drop_in_allows_a_low_port_and_a_log_file(machine: Machine) -> None:
    """The drop-in comes from the installed documentation, so the page shows what is tested."""
    page = machine("cat", "/usr/local/share/doc/echod/docs/systemd.md")
    machine.drop_in("echod.service", page.partition("```ini\n")[2].partition("```")[0])
    machine.configure("[[listen]]\naddress = '127.0.0.1:7'\n[log]\nfile = '/var/log/echod/echod.log'\n")
    machine("systemctl", "start", "echod")
    assert machine.ask("say_line", "127.0.0.1:7", 5) == {"reply": "XXXXX\n"}
    assert '"event":"ready"' in machine("cat", "/var/log/echod/echod.log")


def test_a_socket_does_not_start_a_failing_service_for_ever(machine: Machine, report: Report) -> None:
    """With an invalid configuration and a waiting client the starts end, and a manual start shows the error."""
    machine.drop_in("echod.service", "[Unit]\nStartLimitBurst=5\n")
    machine.configure("[limits]\nconnections = 0\n")
    cursor = machine.cursor()
    machine("systemctl", "start", "echod.socket")
    with machine.load("until_served", ADDRESS) as waiting:
        machine.wait_for(lambda: machine.show("echod.socket", "ActiveState")["ActiveState"] == "failed", "goes on")
        tries = sum("limits.connections" in line for line in machine.journal("echod", cursor))
        machine(
            "sh",
            "-c",
            "systemctl reset-failed echod.service echod.socket && cp /opt/echod-test/systemd/echod.toml /etc/echod/",
        )
        machine("systemctl", "start", "echod.socket", "echod.service")
        assert waiting.next()["seconds"] > 0
    report("socket unit, bad configuration", starts=tries, then="served after it was mended")
