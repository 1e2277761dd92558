"""Confinement: a read-only file system, no capability, any user, little memory."""

import asyncio
import json
import resource

from tests.support.clients import open_stream
from tests.support.report import Report
from tests.system.docker.conftest import Start
from tests.system.docker.engine import Container, Engine

CONFINED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
CONNECTIONS = 1000
DIRECTORIES = ("/", "/etc", "/opt/echod", "/run", "/tmp", "/usr/local/lib", "/var/tmp")


async def _crowd(container: Container) -> tuple[int, int]:
    """Return the memory without clients, and with this many clients after a reply to each."""
    alone = container.memory_bytes()
    streams = await asyncio.gather(*(open_stream(container.address) for _ in range(CONNECTIONS)))
    for _, writer in streams:
        writer.write(b"Stra\xc3\x9fe\n")
    assert {await reader.readline() for reader, _ in streams} == {b"STRASSE\n"}
    crowded = container.memory_bytes()
    for _, writer in streams:
        writer.close()
    return alone, crowded


def test_it_serves_a_thousand_clients_in_64_megabytes_as_any_user(start: Start, report: Report) -> None:
    """It runs read-only, without a capability, as a user that the image does not know."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * CONNECTIONS)), hard))
    container = start(*CONFINED, "--user", "12345:12345", "--memory", "64m")
    container.wait_until(lambda: container.health == "healthy", "not healthy")
    alone, crowded = asyncio.run(_crowd(container))
    container.kill("USR1")
    stats = container.wait_for("stats")
    container.stop()
    assert (container.state["ExitCode"], container.state["OOMKilled"]) == (0, False)
    assert crowded < 48e6
    report(
        "4 confined, 64 MB",
        clients_answered=CONNECTIONS,
        memory_alone_MB=f"{alone / 1e6:.1f}",
        memory_with_them_MB=f"{crowded / 1e6:.1f}",
        of_which_resident_MB=f"{stats['rss_bytes'] / 1e6:.1f}",
        exit_status=0,
    )


def test_the_process_has_no_privileges(start: Start, engine: Engine, report: Report) -> None:
    """The process has no capability, no new privileges, a seccomp filter, and no writable file."""
    container = start(*CONFINED)
    script = f"""if 1:
        import json, os
        status = dict(line.split(":\\t") for line in open("/proc/1/status").read().splitlines() if ":\\t" in line)
        print(json.dumps([status, [directory for directory in {DIRECTORIES} if os.access(directory, os.W_OK)]]))
    """
    status, writable = json.loads(engine("exec", container.name, "python", "-c", script))
    assert status["Uid"].split() == ["10001"] * 4
    capabilities = {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    assert capabilities == {0}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert writable == []
    report("4 confined", user=10001, capabilities="none", new_privileges="none", seccomp="on", writable_folders="none")


def test_the_limit_of_open_files_lowers_the_default(engine: Engine, image: str) -> None:
    """The default of connections is lowered to fit, with a warning; a value that was set is an error."""
    few = ("run", "--rm", "--ulimit", "nofile=1024:1024")
    done = engine.run(*few, image, "check")
    assert "connections = 958\n" in done.stdout
    assert "lowered to 958" in done.stderr
    assert engine.run(*few, "--env", "ECHOD_LIMITS_CONNECTIONS=1000", image).returncode == 78
