"""Defaults, file, environment and command line become one valid configuration, or every error is reported at once."""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from echod.config.loader import ConfigError, Loaded, load
from echod.config.schema import (
    KEYS,
    LISTEN_KEYS,
    RESERVED_FILES,
    Admin,
    Config,
    Limits,
    Listen,
    Log,
    Timeouts,
    changed_keys,
)
from echod.config.sources import Setting
from echod.config.toml import render
from echod.net.address import identity, parse_address

PLENTY = 2**31 - 1
"""A limit of open files that allows any connection limit."""


def from_file(text: str | bytes, path: Path, open_files: int = PLENTY) -> Loaded:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(str(path), {}, (), open_files)


def errors_of(
    text: str | bytes | None = None,
    path: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Iterable[Setting] = (),
    open_files: int = PLENTY,
) -> list[str]:
    """Return the errors, with FILE for the name of the file."""
    if path and text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as raised:
        load(str(path) if path else None, environment or {}, flags, open_files)
    assert str(raised.value) == "\n".join(raised.value.errors)
    return [error.replace(str(path), "FILE") for error in raised.value.errors]


def flag(key: str, value: str) -> Setting:
    return Setting("--set", key, value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "echod.toml"


# -- the default -------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    """Without any source, the documented defaults are in force."""
    loaded = load(None, {}, (), PLENTY)
    assert loaded == Loaded(Config(), ())
    assert msgspec.to_builtins(loaded.config) == {
        "listen": (
            {
                "address": "127.0.0.1:8888",
                "proxy_protocol": False,
                "reuse_port": False,
                "tls_certificate": "",
                "tls_key": "",
                "tls_client_ca": "",
                "tls_minimum": "1.2",
                "allow": (),
                "deny": (),
            },
        ),
        "limits": {
            "connections": 10_000,
            "connections_per_address": 0,
            "connection_rate": 0,
            "line_bytes": 65_536,
            "held_bytes": 0,
        },
        "timeouts": {
            "handshake": 10,
            "idle": 300,
            "line": 30,
            "write": 30,
            "drain": 8,
            "drain_quiet": 0.5,
            "lame_duck": 0,
        },
        "log": {"level": "info", "format": "auto", "file": ""},
        "admin": {"listen": ""},
    }


# -- precedence --------------------------------------------------------------------------------------------------------


def test_precedence(file: Path) -> None:
    """A later source wins: built-in default, file, environment, command line."""
    file.write_text("[timeouts]\nidle = 1\nline = 1\nwrite = 1\n")
    environment = {"ECHOD_TIMEOUTS_LINE": "2", "ECHOD_TIMEOUTS_WRITE": "2"}
    timeouts = load(str(file), environment, [flag("timeouts.write", "3")], PLENTY).config.timeouts
    assert timeouts == Timeouts(idle=1, line=2, write=3)
    assert timeouts.drain == 8


def test_the_admin_endpoint_may_take_any_port_beside_the_clients(file: Path) -> None:
    """Port 0 is any free port, so two of them never conflict."""
    text = "[[listen]]\naddress = 'a:0'\n[admin]\nlisten = 'a:0'\n"
    assert from_file(text, file).config.admin == Admin(listen="a:0")


def test_listen_is_replaced_as_a_whole(file: Path) -> None:
    """A later source's addresses replace the earlier ones', and are not added to them."""
    file.write_text('[[listen]]\naddress = "a:1"\n[[listen]]\naddress = "a:2"\n')
    environment = {"ECHOD_LISTEN": "b:1, [::1]:2,unix:/b"}
    flags = [Setting("--listen", "listen", ["c:1", "c:2"])]
    assert addresses(load(str(file), {}, (), PLENTY)) == ["a:1", "a:2"]
    assert addresses(load(str(file), environment, (), PLENTY)) == ["b:1", "[::1]:2", "unix:/b"]
    assert addresses(load(str(file), environment, flags, PLENTY)) == ["c:1", "c:2"]


def test_the_packed_default_is_the_weakest_source(file: Path) -> None:
    """ECHOD_DEFAULT_LISTEN holds if no other source sets `listen`, and does not count as a source."""
    file.write_text('[[listen]]\naddress = "a:1"\n')
    packed = {"ECHOD_DEFAULT_LISTEN": "0.0.0.0:1,[::]:1"}
    alone = load(None, packed, (), PLENTY)
    assert addresses(alone) == ["0.0.0.0:1", "[::]:1"]
    assert not alone.is_listen_set
    assert load(None, {"ECHOD_DEFAULT_LISTEN": ""}, (), PLENTY).config == Config()
    for told in (
        load(str(file), packed, (), PLENTY),
        load(None, packed | {"ECHOD_LISTEN": "a:1"}, (), PLENTY),
        load(None, packed, [Setting("--listen", "listen", ["a:1"])], PLENTY),
    ):
        assert (addresses(told), told.is_listen_set) == (["a:1"], True)
    assert errors_of(environment={"ECHOD_DEFAULT_LISTEN": "a"})[0].startswith(
        "ECHOD_DEFAULT_LISTEN: listen[0].address: "
    )


def addresses(loaded: Loaded) -> list[str]:
    return [listen.address for listen in loaded.config.listen]


@pytest.mark.parametrize("key", KEYS)
def test_each_key_from_each_source(key: str, file: Path) -> None:
    """Each key can be set by the file, as ECHOD_<SECTION>_<KEY>, and by a flag."""
    section, _, name = key.partition(".")
    texts = {"log.level": "error", "log.format": "json", "log.file": "/x", "admin.listen": "unix:/x"}
    text = (texts | {"limits.held_bytes": "70000"}).get(key, "7")
    file.write_text(f"[{section}]\n{name} = {text if text.isdigit() else repr(text)}\n")
    variable = f"ECHOD_{section}_{name}".upper()
    loaded = [load(str(file), {}, (), PLENTY), load(None, {variable: text}, (), PLENTY)]
    loaded.append(load(None, {}, [flag(key, text)], PLENTY))
    assert [changed_keys(Config(), each.config) for each in loaded] == [[key]] * 3
    assert loaded[0] == loaded[1] == loaded[2]


def test_a_bad_value_is_an_error_although_a_later_source_wins(file: Path) -> None:
    """A bad value is an error even if a later source overrides it."""
    file.write_text("[timeouts]\nidle = -1\n")
    assert len(errors_of(None, file, flags=[flag("timeouts.idle", "3")])) == 1


# -- each error --------------------------------------------------------------------------------------------------------

FILE_ERRORS = [
    ("[limits]\nheld_bytes = 65535", "limits.held_bytes: expected 0 or at least limits.line_bytes, 65536 (got 65535)"),
    ("[limits]\nconnections = 0", "limits.connections: expected int >= 1 (got 0)"),
    ("[limits]\nconnections = 1000001", "limits.connections: expected int <= 1000000 (got 1000001)"),
    ("[limits]\nconnections = '5'", "limits.connections: expected int (got '5')"),
    ("[limits]\nconnections = 5.5", "limits.connections: expected int (got 5.5)"),
    ("[limits]\nconnections = true", "limits.connections: expected int (got True)"),
    ("[limits]\nline_bytes = 16777217", "limits.line_bytes: expected int <= 16777216 (got 16777217)"),
    ("[timeouts]\nidle = -0.5", "timeouts.idle: expected number >= 0 (got -0.5)"),
    ("[timeouts]\nidle = nan", "timeouts.idle: expected number >= 0 (got nan)"),
    ("[timeouts]\nidle = inf", "timeouts.idle: expected number <= 31536000 (got inf)"),
    ("[timeouts]\nidle = -inf", "timeouts.idle: expected number >= 0 (got -inf)"),
    ("[timeouts]\nidle = false", "timeouts.idle: expected number (got False)"),
    ("[timeouts]\nidle = '3'", "timeouts.idle: expected number (got '3')"),
    ("[timeouts]\nidle = [3]", "timeouts.idle: expected number (got [3])"),
    ("[log]\nfile = 3", "log.file: expected str (got 3)"),
    ('[log]\nfile = "a\\u0000b"', "log.file: contains a NUL character (got 'a\\x00b')"),
    (
        "[log]\nlevel = 'infos'",
        "log.level: expected one of debug, info, warning, error, did you mean info? (got 'infos')",
    ),
    ("[log]\nlevel = 'INFO'", "log.level: expected one of debug, info, warning, error (got 'INFO')"),
    ("[log]\nformat = 1", "log.format: expected one of auto, console, json (got 1)"),
    ("[admin]\nlisten = 3", "admin.listen: expected str (got 3)"),
    ("[admin]\nlisten = '9000'", "admin.listen: expected host:port, [v6]:port or unix:/path (got '9000')"),
    ("[admin]\nlisten = 'unix:a'", "admin.listen: expected an absolute path, unix:/path (got 'unix:a')"),
    ("[admin]\nlisten = ''\nport = 1", "admin.port: unknown key (got 1)"),
    (
        "[admin]\nlisten = '127.0.0.1:8888'",
        "admin.listen: clients are served at this address, choose another (got '127.0.0.1:8888')",
    ),
    (
        "[[listen]]\naddress = 'unix:/a'\n[admin]\nlisten = 'unix:/a'",
        "admin.listen: clients are served at this address, choose another (got 'unix:/a')",
    ),
    ("[limits]\nconection = 3", "limits.conection: unknown key, did you mean limits.connections? (got 3)"),
    ("[timeouts]\nxyzzy = 3", "timeouts.xyzzy: unknown key (got 3)"),
    ("[timeout]\nidle = 3", "timeout: unknown key, did you mean timeouts? (got {'idle': 3})"),
    ("lisen = 3", "lisen: unknown key, did you mean listen? (got 3)"),
    ("limits = 3", "limits: expected a table (got 3)"),
    ("[[limits]]", "limits: expected a table (got [{}])"),
    ("listen = 3", "listen: expected a [[listen]] table for each address (got 3)"),
    ("listen = 'a:1'", "listen: expected a [[listen]] table for each address (got 'a:1')"),
    ("listen = ['a:1']", "listen: expected a [[listen]] table for each address (got ['a:1'])"),
    ("[listen]\naddress = 'a:1'", "listen: expected a [[listen]] table for each address (got {'address': 'a:1'})"),
    ("listen = []", "listen: expected at least one address (got [])"),
    ("[[listen]]", "listen[0].address: missing"),
    ("[[listen]]\naddress = 3", "listen[0].address: expected str (got 3)"),
    (
        "[[listen]]\naddress = ':1'",
        "listen[0].address: no host; 0.0.0.0:PORT or [::]:PORT listens on every address (got ':1')",
    ),
    (
        "[[listen]]\naddress = 'a:1'\n[[listen]]\naddress = 'a:1'",
        "listen[1].address: listed twice (got 'a:1')",
    ),
    (
        "[[listen]]\naddress = 'a:1'\n[[listen]]\naddress = 'a:01'",
        "listen[1].address: listed twice (got 'a:01')",
    ),
    (
        "[[listen]]\naddress = 'unix:/a:0'\n[[listen]]\naddress = 'unix:/a:0'",
        "listen[1].address: listed twice (got 'unix:/a:0')",
    ),
    (
        "[[listen]]\naddress = 'unix:/a/b'\n[[listen]]\naddress = 'unix:/a//c/../b'",
        "listen[1].address: listed twice (got 'unix:/a//c/../b')",
    ),
    (
        "[[listen]]\naddress = '10.0.0.1:1'\n[[listen]]\naddress = '[::ffff:10.0.0.1]:1'",
        "listen[1].address: listed twice (got '[::ffff:10.0.0.1]:1')",
    ),
    (
        "[[listen]]\naddress = '[::1]:1'\n[[listen]]\naddress = '[0::0:1]:1'",
        "listen[1].address: listed twice (got '[0::0:1]:1')",
    ),
    (
        "[[listen]]\naddress = 'unix:/a'\n[admin]\nlisten = 'unix:///a'",
        "admin.listen: clients are served at this address, choose another (got 'unix:///a')",
    ),
    (
        "[admin]\nlisten = '[::ffff:127.0.0.1]:8888'",
        "admin.listen: clients are served at this address, choose another (got '[::ffff:127.0.0.1]:8888')",
    ),
    (
        f"[limits]\nconnections = 0x{'f' * 5_000}",
        "limits.connections: expected int <= 1000000 (got a value too long or nested too deep to show)",
    ),
    (
        f"[log]\nlevel = 0x{'f' * 5_000}",
        "log.level: expected one of debug, info, warning, error (got a value too long or nested too deep to show)",
    ),
    (
        "[limits]\nconnections = " + ("{" + "a." * 90 + "a = ") * 120 + "1" + "}" * 120,
        "limits.connections: expected int (got a value too long or nested too deep to show)",
    ),
    (
        "[[listen]]\naddress = 'a:1'\nreuse_port = 1",
        "listen[0].reuse_port: expected bool (got 1)",
    ),
    (
        "[[listen]]\naddress = 'a:1'\nproxy_protocol = 'v2'",
        "listen[0].proxy_protocol: expected bool (got 'v2')",
    ),
    (
        "[[listen]]\naddress = 'systemd:'",
        "listen[0].address: expected a name that FileDescriptorName= in the socket unit can set (got 'systemd:')",
    ),
    (
        "[[listen]]\naddress = 'a:1'\nadress = 1",
        "listen[0].adress: unknown key, did you mean address? (got 1)",
    ),
    (
        "[log]\nfile = [" + "1, " * 99 + "]",
        "log.file: expected str (got [" + "1, " * 25 + "1...)",
    ),
]


@pytest.mark.parametrize(("text", "error"), FILE_ERRORS)
def test_error_in_a_file(text: str, error: str, file: Path) -> None:
    """Each error is `FILE: key.path: what is wrong (got VALUE)`, with the nearest known name for an unknown key."""
    assert errors_of(text, file) == [f"FILE: {error}"]


TEXT_ERRORS = [
    ("limits.connections", "x", "expected int (got 'x')"),
    ("limits.connections", "", "expected int (got '')"),
    ("limits.connections", "true", "expected int (got 'true')"),
    ("limits.connections", "1.5", "expected int (got '1.5')"),
    ("limits.connections", "0", "expected int >= 1 (got '0')"),
    ("timeouts.idle", "nan", "expected number >= 0 (got 'nan')"),
    ("timeouts.idle", "inf", "expected number <= 31536000 (got 'inf')"),
    ("timeouts.idle", "-1", "expected number >= 0 (got '-1')"),
    ("timeouts.idle", "null", "expected number (got 'null')"),
    ("timeouts.idle", "3s", "expected number (got '3s')"),
    ("log.level", "warn", "expected one of debug, info, warning, error, did you mean warning? (got 'warn')"),
    ("log.level", "\udcff", "expected valid UTF-8 (got '\\udcff')"),
    ("log.file", "/\udcff", "expected valid UTF-8 (got '/\\udcff')"),
    ("timeouts.idle", "\udcff", "expected valid UTF-8 (got '\\udcff')"),
]


@pytest.mark.parametrize(("key", "value", "error"), TEXT_ERRORS)
def test_error_in_text(key: str, value: str, error: str) -> None:
    """An error of the environment or the command line names its source: the variable or the flag."""
    variable = f"ECHOD_{key.replace('.', '_').upper()}"
    assert errors_of(environment={variable: value}) == [f"{variable}: {key}: {error}"]
    assert errors_of(flags=[flag(key, value)]) == [f"--set: {key}: {error}"]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("", "listen[0].address: expected host:port, [v6]:port or unix:/path (got '')"),
        ("a:1,", "listen[1].address: expected host:port, [v6]:port or unix:/path (got '')"),
        ("a:1, a:1", "listen[1].address: listed twice (got 'a:1')"),
        ("unix:/\udcff", "listen[0].address: expected valid UTF-8 (got 'unix:/\\udcff')"),
    ],
)
def test_error_in_listen_as_text(value: str, error: str) -> None:
    """ECHOD_LISTEN is a comma-separated list; the error for a bad address names its index."""
    assert errors_of(environment={"ECHOD_LISTEN": value}) == [f"ECHOD_LISTEN: {error}"]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("limits.connection", "unknown key, did you mean limits.connections?"),
        ("limits.idle", "unknown key"),
        ("connections", "unknown key, did you mean limits.connections?"),
        ("listens", "unknown key, did you mean listen?"),
        ("limits", "unknown key"),
        ("", "unknown key"),
        ("listen[0].proxy_protocol", "unknown key, the keys of a [[listen]] can be set only in the file"),
        ("listen.reuse_port", "unknown key, the keys of a [[listen]] can be set only in the file"),
    ],
)
def test_unknown_key_of_a_flag(key: str, words: str) -> None:
    """The error for an unknown key suggests the nearest known one, from the same section if that exists."""
    assert errors_of(flags=[flag(key, "3")]) == [f"--set: {key}: {words} (got '3')"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('"a\\nb" = 1', "FILE: a\\nb: unknown key (got 1)"),
        ('[log]\n"\\u001b[2J" = 1', "FILE: log.\\x1b[2J: unknown key (got 1)"),
        ('[[listen]]\naddress = "a:1"\n"\\r" = 1', "FILE: listen[0].\\r: unknown key (got 1)"),
    ],
)
def test_an_error_is_one_line(text: str, error: str, file: Path) -> None:
    """An error is one printable line, whatever the key is called."""
    assert errors_of(text, file) == [error]


def test_all_errors_at_once(file: Path) -> None:
    """Every error of every source is reported at once."""
    file.write_text(
        "[limits]\nconnections = 0\nconection = 1\n[log]\nlevel = 1\n[[listen]]\n[[listen]]\naddress = 'x'\n"
    )
    environment = {"ECHOD_TIMEOUTS_IDLE": "x", "ECHOD_LIMITS_CONECTIONS": "3"}
    errors = errors_of(None, file, environment, [flag("timeouts.line", "x"), flag("a", "b")])
    places = [": ".join(error.split(": ")[:2]) for error in errors]
    assert sorted(places) == sorted(
        [
            "FILE: limits.connections",
            "FILE: limits.conection",
            "FILE: log.level",
            "FILE: listen[0].address",
            "FILE: listen[1].address",
            "ECHOD_LIMITS_CONECTIONS: unknown key, did you mean ECHOD_LIMITS_CONNECTIONS? (got '3')",
            "ECHOD_TIMEOUTS_IDLE: timeouts.idle",
            "--set: timeouts.line",
            "--set: a",
        ]
    )


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b"[limits\n", "FILE: not valid TOML: "),
        (b"a = 1\na = 2\n", "FILE: not valid TOML: "),
        (b"[limits]\nline_bytes = 1_\n", "FILE: not valid TOML: "),
        (b"x = " + b"[" * 5_000, "FILE: not valid TOML: arrays or tables nested too deep"),
        (b"x = " + b"{x = " * 5_000, "FILE: not valid TOML: arrays or tables nested too deep"),
        (b"\nx = " + b"9" * 5_000, "FILE: a number has too many digits (at line 2)"),
        (b"x = -" + b"9_" * 5_000 + b"9", "FILE: a number has too many digits (at line 1)"),
        (b"\n\nx" + b".x" * 20_000 + b" = 1", "FILE: a key has more than 100 parts (at line 3)"),
        (b"[" + b" 'x' .\t" * 100 + b"x]", "FILE: a key has more than 100 parts (at line 1)"),
        (b"x = {" + b'"\\"." . ' * 100 + b"x = 1}", "FILE: a key has more than 100 parts (at line 1)"),
        (b"\xef\xbb\xbf", "FILE: begins with a byte order mark"),
        (b"\xff", "FILE: not valid TOML: not UTF-8 (at byte 0)"),
        (b"# \xc3\n", "FILE: not valid TOML: not UTF-8 (at byte 2)"),
    ],
)
def test_not_toml(text: bytes, error: str, file: Path) -> None:
    """A file that is not TOML is one error, which says where."""
    [found] = errors_of(text, file)
    assert found.startswith(error)
    assert "\n" not in found


def test_errors_of_keys_that_do_not_fit_together_are_reported_at_once() -> None:
    flags = (
        flag("admin.listen", "127.0.0.1:8888"),
        flag("limits.held_bytes", "1"),
        flag("limits.connections", "1000"),
    )
    keys = [error.split(": ")[1] for error in errors_of(flags=flags, open_files=100)]
    assert keys == ["admin.listen", "limits.held_bytes", "limits.connections"]


def test_unreadable_file(tmp_path: Path) -> None:
    """A missing file or a directory is one error, reported together with those of the other sources."""
    assert errors_of(None, tmp_path / "no") == ["FILE: cannot be read: No such file or directory"]
    assert errors_of(None, tmp_path) == ["FILE: cannot be read: a directory, expected a regular file"]
    assert len(errors_of(None, tmp_path, flags=[flag("timeouts.idle", "x")])) == 2


def test_empty_file(file: Path) -> None:
    """An empty file leaves every default in force."""
    assert from_file("", file) == Loaded(Config(), ())
    assert from_file("[limits]\n[timeouts]\n[log]\n", file) == Loaded(Config(), ())


def test_port_0_twice(file: Path) -> None:
    """Port 0 is any free port, so two of them are two listeners."""
    loaded = from_file("[[listen]]\naddress = 'a:0'\n[[listen]]\naddress = 'a:0'\n", file)
    assert addresses(loaded) == ["a:0", "a:0"]


def test_a_socket_may_be_named_like_a_path(file: Path) -> None:
    """The name of an inherited socket and the path of a Unix socket are different, even if spelt alike."""
    named = "[[listen]]\naddress = 'systemd:/x'\n"
    assert addresses(from_file(f"{named}[[listen]]\naddress = 'unix:/x'", file)) == ["systemd:/x", "unix:/x"]
    assert from_file(f"{named}[admin]\nlisten = 'unix:/x'", file).config.admin.listen == "unix:/x"


@pytest.mark.parametrize(
    ("text", "idle"), [("0", 0.0), ("0.5", 0.5), ("1e2", 100.0), ("31536000", 31_536_000.0), ("12345.67", 12_345.67)]
)
def test_seconds(text: str, idle: float, file: Path) -> None:
    """A timeout is a number of seconds, whole or not; 0 = never."""
    assert from_file(f"[timeouts]\nidle = {text}\n", file).config.timeouts.idle == idle
    assert load(None, {"ECHOD_TIMEOUTS_IDLE": text}, (), PLENTY).config.timeouts.idle == idle


# -- variables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "ECHOD_SERVICE_HOST",
        "ECHOD_SERVICE_PORT",
        "ECHOD_SERVICE_PORT_HTTP",
        "ECHOD_PORT",
        "ECHOD_PORT_8888_TCP",
        "ECHOD_PORT_8888_TCP_PROTO",
        "ECHOD_PORT_8888_TCP_PORT",
        "ECHOD_PORT_8888_TCP_ADDR",
        "ECHOD_LOG_SERVICE_HOST",
        "ECHOD_LOG_PORT_80_UDP",
        "ECHOD_LIMITS_SERVICE_PORT",
    ],
)
def test_variables_of_kubernetes(name: str) -> None:
    """Variables that Kubernetes sets for a Service called echod are ignored."""
    assert load(None, {name: "tcp://10.0.0.1:8888"}, (), PLENTY) == Loaded(Config(), ())


@pytest.mark.parametrize("name", ["PATH", "ECHOD", "ECHO_LISTEN", "ECHOD_IMAGE_DIGEST", "ECHOD_CONFIG", "echod_listen"])
def test_variables_of_others(name: str) -> None:
    """Variables of other programs are ignored, also if they only start with ECHOD_."""
    assert load(None, {name: "x"}, (), PLENTY) == Loaded(Config(), ())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("ECHOD_LISTN", "ECHOD_LISTEN"),
        ("ECHOD_CONFG", "ECHOD_CONFIG"),
        ("ECHOD_LIMITS_CONECTIONS", "ECHOD_LIMITS_CONNECTIONS"),
        ("ECHOD_LIMIT_CONNECTIONS", "ECHOD_LIMITS_CONNECTIONS"),
        ("ECHOD_TIMEOUTS_DRAINQUIET", "ECHOD_TIMEOUTS_DRAIN_QUIET"),
        ("ECHOD_LOG_XYZZY", ""),
        ("ECHOD_CONFIG_FILE", "ECHOD_CONFIG"),
        ("ECHOD_CONFIG_PATH", "ECHOD_CONFIG"),
    ],
)
def test_misspelt_variables(name: str, nearest: str) -> None:
    """A misspelt variable is an error that suggests the nearest known name."""
    words = f", did you mean {nearest}?" if nearest else ""
    assert errors_of(environment={name: "3"}) == [f"{name}: unknown key{words} (got '3')"]


@pytest.mark.parametrize(
    "name", ["ECHOD_LISTEN_PROXY_PROTOCOL", "ECHOD_LISTEN_REUSE_PORT", "ECHOD_LISTEN_0_REUSE_PORT"]
)
def test_keys_of_a_listener_in_the_environment(name: str) -> None:
    """A variable for a key of a [[listen]] is an error that says where such a key is set."""
    words = "unknown key, the keys of a [[listen]] can be set only in the file"
    assert errors_of(environment={name: "true"}) == [f"{name}: {words} (got 'true')"]


@pytest.mark.parametrize("name", ["ECHOD_HOST", "ECHOD_PORT"])
@pytest.mark.parametrize("value", ["8888", ""])
def test_variables_that_are_expected_to_work(name: str, value: str) -> None:
    """A variable that many programs use but echod ignores causes a warning."""
    loaded = load(None, {name: value}, (), PLENTY)
    warning = f"{name} is ignored (got {value!r}): set ECHOD_LISTEN=HOST:PORT instead"
    assert loaded == Loaded(Config(), (warning,))


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1000", "1_000", "1e3", "1.0e3"])
def test_ways_to_write_a_number(text: str, file: Path) -> None:
    """A number can be written in every notation of TOML, in each source."""
    keys = ("limits.connections", "limits.line_bytes", "timeouts.idle")
    found = [
        from_file(f"limits.connections = {text}\nlimits.line_bytes = {text}\ntimeouts.idle = {text}\n", file),
        load(None, {f"ECHOD_{key.replace('.', '_').upper()}": text for key in keys}, (), PLENTY),
        load(None, {}, [flag(key, text) for key in keys], PLENTY),
    ]
    for config in (each.config for each in found):
        assert (config.limits.connections, config.limits.line_bytes, config.timeouts.idle) == (1000, 1000, 1000)


@pytest.mark.parametrize("text", ["1.5", "1_", "_1", "1__0", "1 0", "1e-3"])
def test_what_is_no_whole_number(text: str) -> None:
    """Text that is not an integer is an error, which shows it as written."""
    assert errors_of(flags=[flag("limits.connections", text)])[0].endswith(f"(got {text!r})")


def test_digits_in_a_name_are_left_alone() -> None:
    """Underscores between digits are kept in text values."""
    assert load(None, {}, [flag("log.file", "/a/1_000")], PLENTY).config.log.file == "/a/1_000"


# -- connections and open files ----------------------------------------------------------------------------------------

SPARE = RESERVED_FILES + 1  # for one listener


def test_connections_set_by_hand_must_fit(file: Path) -> None:
    """A `limits.connections` set by hand that exceeds NOFILE is an error with the number that fits."""
    wrong = (
        "limits.connections: only 100 open files are allowed (ulimit -n, LimitNOFILE=), "
        "at most 35 connections fit: lower the value or raise the hard limit (got 36)"
    )
    assert from_file("[limits]\nconnections = 35\n", file, 100) == Loaded(Config(limits=Limits(connections=35)), ())
    assert errors_of("[limits]\nconnections = 36\n", file, open_files=100) == [f"FILE: {wrong}"]
    environment = {"ECHOD_LIMITS_CONNECTIONS": "36"}
    assert errors_of(environment=environment, open_files=100) == [f"ECHOD_LIMITS_CONNECTIONS: {wrong}"]
    assert errors_of(flags=[flag("limits.connections", "36")], open_files=100) == [f"--set: {wrong}"]
    assert load(None, environment, (), 36 + SPARE).config.limits.connections == 36


def test_the_default_of_connections_set_by_hand_must_fit_too() -> None:
    """A value set by hand is never lowered, even if it equals the default."""
    assert len(errors_of(flags=[flag("limits.connections", "10000")], open_files=100)) == 1


def test_default_connections_are_lowered() -> None:
    """The default is lowered to the number that fits, with a warning."""
    loaded = load(None, {}, (), 100)
    assert loaded.config == Config(limits=Limits(connections=35))
    assert loaded.warnings == (
        (
            "limits.connections: only 100 open files are allowed (ulimit -n, LimitNOFILE=), "
            "so the default of 10000 is lowered to 35"
        ),
    )
    assert load(None, {}, (), 10_000 + SPARE) == Loaded(Config(), ())
    assert load(None, {}, (), 10_000 + SPARE - 1).config.limits.connections == 9_999


def test_each_listener_takes_one_file() -> None:
    """Each listener needs a descriptor, which reduces the number of connections that fit."""
    assert load(None, {"ECHOD_LISTEN": "a:1,a:2,a:3"}, (), 100).config.limits.connections == 33


@pytest.mark.parametrize("flags", [[], [flag("limits.connections", "5")]])
def test_too_few_files_for_anyone(flags: list[Setting]) -> None:
    """If not even one client could be served, the error names the number of files that is needed."""
    [error] = errors_of(flags=flags, open_files=SPARE)
    assert error.partition(": ")[2].startswith(
        "limits.connections: only 65 open files are allowed (ulimit -n, LimitNOFILE=), "
        "at least 66 are needed: raise the hard limit"
    )
    assert load(None, {}, (), SPARE + 1).config.limits.connections == 1


# -- what is printed ---------------------------------------------------------------------------------------------------

seconds = st.integers(0, 31_536_000) | st.floats(0, 31_536_000)
configs = st.builds(
    Config,
    listen=st.lists(
        st.builds("unix:/{}".format, st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20))
        | st.builds("{}:{}".format, st.sampled_from(["a", "[::1]"]), st.integers(0, 65_535)),
        min_size=1,
        max_size=3,
        unique_by=lambda text: str(identity(parse_address(text))),
    ).flatmap(
        lambda texts: st.tuples(
            *(
                st.builds(Listen, address=st.just(text), proxy_protocol=st.booleans(), reuse_port=st.booleans())
                for text in texts
            )
        )
    ),
    limits=st.builds(Limits, connections=st.integers(1, 1_000_000), line_bytes=st.integers(1, 16_777_216)),
    timeouts=st.builds(Timeouts, idle=seconds, line=seconds, write=seconds, drain=seconds, drain_quiet=seconds),
    log=st.builds(
        Log,
        level=st.sampled_from(["debug", "info", "warning", "error"]),
        format=st.sampled_from(["auto", "console", "json"]),
        file=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
    ),
    admin=st.builds(Admin, listen=st.sampled_from(["", "b:1", "[::1]:0", "unix:/ß"])),
)


@given(configs, st.booleans())
@example(config=Config(log=Log(file='\x7f"\'\\\b\n\t\x1f\u2028 ß😀 # """')), with_comments=True)
@example(
    config=Config(timeouts=Timeouts(idle=12_345.67, line=1e-7, write=31_535_999.999999996, drain=0.1)),
    with_comments=True,
)
@example(config=Config(timeouts=Timeouts(idle=1_234_567, line=999_999, write=1e6, drain=0.0)), with_comments=False)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, config: Config, with_comments: bool) -> None:
    """The output of `check` reads back as the same configuration."""
    file = tmp_path_factory.getbasetemp() / "printed.toml"
    assert from_file(render(config, with_comments=with_comments), file) == Loaded(config, (), is_listen_set=True)


def test_config_prints_the_defaults_with_comments() -> None:
    """`echod config` prints every default with a comment."""
    text = render(Config(), with_comments=True)
    document = tomllib.loads(text)
    assert msgspec.convert(document, Config) == Config()
    assert document.keys() == set(Config.__struct_fields__)
    keys = [line for line in text.splitlines() if line and not line.startswith("[")]
    assert len(keys) == len(KEYS) + len(LISTEN_KEYS)
    for line in keys:
        assert line.partition(" # ")[2].strip(), line


def test_changed_keys() -> None:
    """A reload names every key that changed, and no other."""
    old = Config()
    new = Config(listen=(Listen(address="a:1"),), limits=Limits(line_bytes=1), log=Log(level="debug"))
    assert changed_keys(old, new) == ["listen", "limits.line_bytes", "log.level"]
    assert changed_keys(new, new) == []
