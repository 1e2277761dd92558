"""The command line: parsing of arguments, and real processes."""

import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from echod import __version__
from echod.cli import args
from echod.config.schema import Config, Listen
from echod.config.sources import Serve, Setting, Sources
from echod.net.address import TcpAddress, UnixAddress
from tests.support.gate import Gate

PYTHON_M_ECHOD = (sys.executable, "-m", "echod")

WITH_SOURCES = [("serve", Serve), ("check", args.Check)]
COMMANDS = ["serve", "check", "config", "ping", "stats", "reload"]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of the tests, without variables that configure echod or unbuffer Python's output."""
    strange = ("ECHOD_", "PYTHONUNBUFFERED", "RUNTIME_DIRECTORY")
    return {name: value for name, value in os.environ.items() if not name.startswith(strange)} | dict(more or {})


def echod(*arguments: str, more: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return run([*PYTHON_M_ECHOD, *arguments], more)


def run(command: list[str], more: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment(more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=20,
        check=False,
    )


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "kind"), WITH_SOURCES)
def test_no_options(command: str, kind: type[Serve | args.Check]) -> None:
    """`serve` and `check` need no option."""
    assert args.parse([command]) == kind(Sources(None, ()))


@pytest.mark.parametrize(("command", "kind"), WITH_SOURCES)
@pytest.mark.parametrize(
    ("arguments", "sources"),
    [
        (["-c", "FILE"], Sources("FILE", ())),
        (["--config", "FILE"], Sources("FILE", ())),
        (["--config=FILE"], Sources("FILE", ())),
        (["-l", "a:1"], Sources(None, (Setting("--listen", "listen", ["a:1"]),))),
        (["--listen", "a:1", "-l", "a:2"], Sources(None, (Setting("--listen", "listen", ["a:1", "a:2"]),))),
        (["--log-level", "debug"], Sources(None, (Setting("--log-level", "log.level", "debug"),))),
        (["--log-format", "json"], Sources(None, (Setting("--log-format", "log.format", "json"),))),
        (["--set", "a.b=c"], Sources(None, (Setting("--set", "a.b", "c"),))),
        (["--set", "a=b=c"], Sources(None, (Setting("--set", "a", "b=c"),))),
        (["--set", "log.file="], Sources(None, (Setting("--set", "log.file", ""),))),
        (["--set", "a=1", "--set", "a=2"], Sources(None, (Setting("--set", "a", "1"), Setting("--set", "a", "2")))),
        (["--log-level", ""], Sources(None, (Setting("--log-level", "log.level", ""),))),
        (["-c", ""], Sources("", ())),
    ],
)
def test_options(command: str, kind: type[Serve | args.Check], arguments: list[str], sources: Sources) -> None:
    """Each option of `serve` and `check` becomes one setting that names its flag; --listen repeats."""
    assert args.parse([command, *arguments]) == kind(sources)


def test_options_of_serve() -> None:
    """Only `serve` has the options of the process."""
    arguments = ["--daemon", "--pidfile", "FILE", "--user", "U", "--group", "G"]
    asked = Serve(Sources(None, ()), is_daemon=True, pidfile="FILE", user="U", group="G")
    assert args.parse(["serve", *arguments]) == asked
    with pytest.raises(SystemExit):
        args.parse(["check", "--daemon"])


def test_config_has_no_options() -> None:
    """`config` has no options."""
    assert args.parse(["config"]) == args.ShowDefaults()


@pytest.mark.parametrize(
    ("arguments", "target"),
    [
        ([], args.Target(None, None)),
        (["-c", "FILE"], args.Target(None, "FILE")),
        (["--config=FILE"], args.Target(None, "FILE")),
        (["--admin", "unix:/a"], args.Target(UnixAddress("/a"), None)),
        (["--admin=[::1]:9", "-c", "FILE"], args.Target(TcpAddress("::1", 9), "FILE")),
    ],
)
def test_questions(arguments: list[str], target: args.Target) -> None:
    """`stats` and `reload` take the daemon to ask, and `stats` the output format."""
    assert args.parse(["stats", *arguments]) == args.AskStats(target, as_json=False)
    assert args.parse(["stats", "--json", *arguments]) == args.AskStats(target, as_json=True)
    watched = args.AskStats(target, as_json=False, is_watched=True)
    assert args.parse(["stats", *arguments, "--watch"]) == watched
    assert args.parse(["reload", *arguments]) == args.AskReload(target)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bogus"],
        ["serv"],
        ["--bogus"],
        ["serve", "extra"],
        ["serve", "--bogus"],
        ["serve", "--conf", "FILE"],
        ["serve", "--log", "debug"],
        ["serve", "-c"],
        ["serve", "--listen"],
        ["serve", "--pidfile"],
        ["serve", "--pidfile", ""],
        ["serve", "--user", ""],
        ["serve", "--daemon=yes"],
        ["check", "--pidfile", "FILE"],
        ["check", "--set", "a.b"],
        ["check", "--set"],
        ["config", "extra"],
        ["config", "-c", "FILE"],
    ],
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage exits 2, with the usage on standard error; no option can be abbreviated."""
    with pytest.raises(SystemExit) as ended:
        args.parse(arguments)
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert shown.out == ""
    assert shown.err.startswith("usage: echod")
    assert "error: " in shown.err


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_told_with_the_usage_of_its_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The usage is that of the command, not that of all commands."""
    with pytest.raises(SystemExit) as ended:
        args.parse([command, *(["a:1"] if command == "ping" else []), "--bogus", "-x"])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"usage: echod {command} [-h]")
    assert f"echod {command}: error: unrecognized arguments: --bogus -x" in shown


@pytest.mark.parametrize("text", ["1000", "1_000", "1e3"])
def test_ways_to_write_a_number(text: str) -> None:
    """`ping` takes numbers as the configuration does."""
    asked = args.parse(["ping", "-c", text, "-i", text, "-W", text, "-s", text, "a:1"])
    assert isinstance(asked, args.Ping)
    assert (asked.plan.rounds, asked.plan.interval_s, asked.plan.wait_s, asked.plan.text_bytes) == (1000,) * 4


def test_set_says_what_it_expects(capsys: pytest.CaptureFixture[str]) -> None:
    """The error for --set without `=` shows an example."""
    with pytest.raises(SystemExit):
        args.parse(["check", "--set", "verbose"])
    assert "--set: expected KEY=VALUE, such as limits.connections=100 (got 'verbose')" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--version"], *[[command, "--version"] for command in COMMANDS]])
def test_version_everywhere(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """--version works everywhere and exits 0."""
    with pytest.raises(SystemExit) as ended:
        args.parse(arguments)
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"echod {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], *[[command, "--help"] for command in COMMANDS]])
def test_help_everywhere(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """--help works everywhere and exits 0."""
    with pytest.raises(SystemExit) as ended:
        args.parse(arguments)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: echod")


# -- real processes ----------------------------------------------------------------------------------------------------


def test_version_of_the_process() -> None:
    """`echod --version` prints it and exits 0."""
    done = echod("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"echod {__version__}\n", "")


def test_usage_error_of_the_process() -> None:
    """Wrong usage of a real process exits 2 and prints nothing on standard output."""
    done = echod("serve", "--bogus")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--bogus" in done.stderr


def test_config() -> None:
    """`echod config` prints the default config as TOML, and exits 0, whatever the environment says."""
    done = echod("config", more={"ECHOD_TIMEOUTS_IDLE": "bad", "ECHOD_CONFIG": "/nonexistent"})
    assert (done.returncode, done.stderr) == (0, "")
    assert msgspec.convert(tomllib.loads(done.stdout), Config) == Config()


def test_config_of_a_packed_echod() -> None:
    """`echod config` prints the default from ECHOD_DEFAULT_LISTEN, and reports a bad one."""
    done = echod("config", more={"ECHOD_DEFAULT_LISTEN": "0.0.0.0:1,[::]:1"})
    assert [entry["address"] for entry in tomllib.loads(done.stdout)["listen"]] == ["0.0.0.0:1", "[::]:1"]
    done = echod("config", more={"ECHOD_DEFAULT_LISTEN": "0.0.0.0"})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ECHOD_DEFAULT_LISTEN: listen[0].address: ")


def test_check_prints_the_config_in_force(tmp_path: Path) -> None:
    """`echod check` prints the config in force as TOML and exits 0: file, then environment, then command line."""
    file = tmp_path / "echod.toml"
    file.write_text("[timeouts]\nidle = 1\nline = 1\nwrite = 1\n")
    more = {"ECHOD_CONFIG": str(file), "ECHOD_TIMEOUTS_LINE": "2", "ECHOD_TIMEOUTS_WRITE": "2"}
    done = echod("check", "--set", "timeouts.write=3", "--set", "limits.connections=5", "-l", "b:0", more=more)
    assert (done.returncode, done.stderr) == (0, "")
    printed = tomllib.loads(done.stdout)
    assert [printed["timeouts"][name] for name in ("idle", "line", "write", "drain")] == [1, 2, 3, 8]
    assert msgspec.convert(printed["listen"], list[Listen]) == [Listen(address="b:0")]
    assert printed["limits"]["connections"] == 5


def test_check_reads_back_what_it_printed(tmp_path: Path) -> None:
    """The output of `check` is a configuration file with the same meaning."""
    file = tmp_path / "echod.toml"
    first = echod(
        "check", "--set", "timeouts.idle=12345.67", "--set", "log.file=/ß\x7f", "--set", "limits.connections=5"
    )
    file.write_text(first.stdout)
    second = echod("check", "-c", str(file))
    assert (first.returncode, second.returncode) == (0, 0)
    assert second.stdout == first.stdout


def test_config_option_wins_over_the_variable(tmp_path: Path) -> None:
    """-c FILE is read, and ECHOD_CONFIG then is not; an empty ECHOD_CONFIG names no file."""
    file = tmp_path / "echod.toml"
    file.write_text("[limits]\nconnections = 5\n")
    assert echod("check", "-c", str(file), more={"ECHOD_CONFIG": "/nonexistent"}).returncode == 0
    assert echod("check", "--set", "limits.connections=5", more={"ECHOD_CONFIG": ""}).returncode == 0


def test_an_empty_file_name_is_no_default() -> None:
    """-c with an empty name, as from an unset variable, is an error and does not mean the defaults."""
    done = echod("check", "-c", "")
    assert (done.returncode, done.stdout) == (78, "")
    assert "cannot be read" in done.stderr


def test_check_lowers_the_default_with_a_warning() -> None:
    """If the default connection limit exceeds the limit of open files, it is lowered with a warning."""
    done = run(["sh", "-c", 'ulimit -n 256 && exec "$@"', "sh", *PYTHON_M_ECHOD, "check"])
    assert done.returncode == 0
    assert done.stderr.startswith("warning: limits.connections: only 256 open files are allowed")
    assert tomllib.loads(done.stdout)["limits"]["connections"] == 191


@pytest.mark.parametrize("command", ["check", "serve"])
def test_bad_config(command: str, tmp_path: Path) -> None:
    """A bad config exits 78, with each of its errors on a line of standard error, and nothing else."""
    file = tmp_path / "echod.toml"
    file.write_text("[limits]\nconnections = 0\nconection = 1\n")
    done = echod(command, "-c", str(file), "--set", "log.level=x", more={"ECHOD_TIMEOUTS_IDLE": "x"})
    assert (done.returncode, done.stdout) == (78, "")
    assert sorted(done.stderr.splitlines()) == sorted(
        [
            f"{file}: limits.connections: expected int >= 1 (got 0)",
            f"{file}: limits.conection: unknown key, did you mean limits.connections? (got 1)",
            "ECHOD_TIMEOUTS_IDLE: timeouts.idle: expected number (got 'x')",
            "--set: log.level: expected one of debug, info, warning, error (got 'x')",
        ]
    )


@pytest.mark.parametrize("name", ["ECHOD_LOG_LEVEL", "ECHOD_LOG_FILE", "ECHOD_LISTEN", "ECHOD_CONFIG"])
def test_a_variable_that_is_not_utf8(name: str) -> None:
    """A variable with arbitrary bytes is an error and exits 78, never a traceback."""
    done = echod("check", more={name: "unix:/\udcff"})
    assert (done.returncode, done.stdout) == (78, "")
    assert len(done.stderr.splitlines()) == 1


def test_a_log_file_with_nul(tmp_path: Path) -> None:
    """A log file name that no kernel could open is a configuration error: `serve` exits 78."""
    file = tmp_path / "echod.toml"
    file.write_text('[log]\nfile = "a\\u0000b"\n')
    done = echod("serve", "-c", str(file), "-l", "127.0.0.1:0")
    assert (done.returncode, done.stderr) == (78, f"{file}: log.file: contains a NUL character (got 'a\\x00b')\n")


@pytest.mark.parametrize(
    "command",
    [
        "config",
        "check",
        "--help",
        "--version",
    ],
)
def test_broken_pipe(command: str) -> None:
    """A reader that stops early, as in `echod config | head -1`, causes no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*PYTHON_M_ECHOD, command],
            env=environment({"ECHOD_LIMITS_CONNECTIONS": "5"}),
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=20,
            check=False,
        )
    finally:
        os.close(writing)
    assert done.stderr == b""
    assert done.returncode in (0, 1)


@pytest.mark.parametrize("command", ["config", "check", "--help", "--version"])
def test_full_disk(command: str) -> None:
    """An error of standard output is reported in one line and exits 1."""
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*PYTHON_M_ECHOD, command], env=environment(), stdout=full, stderr=subprocess.PIPE, timeout=20, check=False
        )
    assert (done.returncode, done.stderr) == (1, b"echod: standard output: No space left on device\n")


def test_nobody_reads_the_errors() -> None:
    """The exit status of a bad configuration is 78, even if standard error is broken."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        for command in ("check", "serve"):
            done = subprocess.run(
                [*PYTHON_M_ECHOD, command, "--set", "limits.connections=x"],
                env=environment(),
                stderr=writing,
                timeout=20,
            )
            assert done.returncode == 78
    finally:
        os.close(writing)


def test_the_last_of_several_flags_wins() -> None:
    """Among flags the last one on the command line wins, whichever flag sets the key."""
    parsed = args.parse(["check", "--log-level", "debug", "--set", "log.level=error", "--log-level", "warning"])
    assert isinstance(parsed, args.Check)
    assert [(setting.source, setting.value) for setting in parsed.sources.flags] == [
        ("--log-level", "debug"),
        ("--set", "error"),
        ("--log-level", "warning"),
    ]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_check_ends_by_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    """A signal ends `check` as any other command, however long its file takes to read."""
    gate, file = Gate(tmp_path / "gate"), tmp_path / "echod.toml"
    file.touch()
    gate.shut()
    with subprocess.Popen([*PYTHON_M_ECHOD, "check", "-c", str(file)], env=environment(gate.environment)) as check:
        release = gate.wait()
        check.send_signal(number)
        assert check.wait() == -number
        release()
