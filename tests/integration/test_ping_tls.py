"""`echod ping --tls`: round trips to a real daemon, and every problem with certificates in words."""

import json
import re
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from echod.cli import args
from echod.client.probe import Plan, TlsOptions
from echod.net.address import TcpAddress, UnixAddress
from tests.integration.test_arguments import echod as command
from tests.integration.test_arguments import run
from tests.support.daemon import DEADLINE_S, UNMEASURED, serving
from tests.support.tls import Files, authority, ca_file, issue, serving_listens, serving_tls


@pytest.fixture
def ca(tmp_path: Path) -> str:
    """The file with the CA of every certificate that does not say otherwise."""
    return str(ca_file(tmp_path))


def ping_once(*arguments: str) -> str:
    """Return the line about a round trip that is lost."""
    done = command("ping", "-c", "1", *arguments)
    assert (done.returncode, done.stderr) == (1, ""), done
    line = done.stdout.splitlines()[1]
    assert line.startswith("seq=1 127.0.0.1:")
    return line.partition(": ")[2]


# -- against echod -----------------------------------------------------------------------------------------------------


def test_round_trips_over_one_connection(tmp_path: Path, ca: str) -> None:
    with serving_tls(tmp_path) as daemon:
        done = command("ping", "--tls", "--ca", ca, "-c", "3", "-i", "0.01", f"127.0.0.1:{daemon.port}")
        closed = daemon.wait_for("connection closed")
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 round trips, 3 answered correctly" in done.stdout
    assert re.fullmatch(
        r"TLSv1\.3 TLS_\w+, handshake \d+\.\d{3} ms, certificate valid until \d{4}-\d\d-\d\d",
        done.stdout.splitlines()[-1],
    )
    assert "new connection" not in done.stdout
    assert {"reason": "client", "lines": 3, "tls": "TLSv1.3"}.items() <= closed.items()


def test_json(tmp_path: Path, ca: str) -> None:
    end = datetime.now(UTC) + timedelta(days=50)
    with serving_tls(tmp_path, days=50) as daemon:
        arguments = ("--tls", "--ca", ca, "--json", "-c", "1", f"127.0.0.1:{daemon.port}")
        summary = json.loads(command("ping", *arguments).stdout.splitlines()[-1])
    assert summary["answered_right"] == 1
    assert 0 < summary["tls"].pop("handshake_ms") < 1000 * DEADLINE_S
    assert summary["tls"].pop("cipher").startswith("TLS_")
    assert abs(datetime.fromisoformat(summary["tls"].pop("certificate_end")) - end) < timedelta(minutes=1)
    assert summary["tls"] == {"version": "TLSv1.3"}


def test_a_long_line(tmp_path: Path, ca: str) -> None:
    """A line of several records."""
    with serving_tls(tmp_path) as daemon:
        address = f"127.0.0.1:{daemon.port}"
        done = command("ping", "--tls", "--ca", ca, "-c", "2", "-i", "0", "-s", "65536", address)
    assert done.stdout.count("65537 bytes from ") == 2


def test_a_name_and_a_unix_socket(tmp_path: Path, ca: str) -> None:
    """The certificate must be for the name in ADDRESS, or for --server-name."""
    keys = issue(tmp_path, hosts=("localhost", "echo.example")).keys
    path = f"unix:{tmp_path}/sock"
    with serving_listens(tmp_path, keys, keys | {"address": path}) as daemon:
        for target in ((f"localhost:{daemon.port}",), ("--server-name", "echo.example", path)):
            done = command("ping", "--tls", "--ca", ca, "-c", "1", *target)
            assert done.returncode == 0, done.stdout


def test_a_client_certificate(tmp_path: Path, ca: str) -> None:
    """Without a client certificate, or with one that the server does not trust, the message says so."""
    client = issue(tmp_path, "client")
    stranger = issue(tmp_path, "stranger", ca=authority("other"))
    expired = issue(tmp_path, "expired", days=-1)
    both = tmp_path / "both.pem"
    both.write_bytes(client.key.read_bytes() + client.certificate.read_bytes())
    with serving_tls(tmp_path, tls_client_ca=ca) as daemon:
        target = ("--tls", "--ca", ca, f"127.0.0.1:{daemon.port}")
        for given in (("--cert", str(client.certificate), "--key", str(client.key)), ("--cert", str(both))):
            assert command("ping", "-c", "1", *given, *target).returncode == 0
        refused = "the server refuses the client certificate: "
        assert ping_once(*target) == "the server requires a client certificate: use --cert and --key"
        for files, why in ((stranger, "it does not know the CA that signed it"), (expired, "it has expired")):
            words = ping_once("--cert", str(files.certificate), "--key", str(files.key), *target)
            assert words == refused + why


def test_a_plain_client_of_a_tls_listener(tmp_path: Path) -> None:
    with serving_tls(tmp_path) as daemon:
        assert ping_once(f"127.0.0.1:{daemon.port}").endswith("if the server expects TLS, use --tls")


def test_tls_to_a_plain_listener() -> None:
    with serving() as daemon:
        words = ping_once("--tls", "--insecure", f"127.0.0.1:{daemon.port}")
    assert words == "the server does not speak TLS: leave out --tls"


# -- certificates ------------------------------------------------------------------------------------------------------


@contextmanager
def tls_server(context: ssl.SSLContext) -> Iterator[int]:
    """A server of any certificate and version, which echod would not use; it answers one line of each client."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):  # it is shut down
                while True:
                    accepted, _ = listener.accept()
                    accepted.settimeout(DEADLINE_S)
                    with suppress(OSError), context.wrap_socket(accepted, server_side=True) as client:
                        client.sendall(client.recv(65536).decode().upper().encode())
                        client.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def context_with(issued: Files) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.certificate, issued.key)
    return context


def words_about(issued: Files, *arguments: str) -> str:
    with tls_server(context_with(issued)) as port:
        return ping_once("--tls", *arguments, f"127.0.0.1:{port}")


def test_an_expired_certificate(tmp_path: Path, ca: str) -> None:
    issued = issue(tmp_path, days=-400)
    end = datetime.now(UTC) - timedelta(days=400)
    words = words_about(issued, "--ca", ca)
    assert re.fullmatch(rf"the server's certificate expired on {end:%b} [ \d]\d \d\d:\d\d:\d\d {end:%Y} GMT", words)


def test_a_certificate_that_is_not_valid_yet(tmp_path: Path, ca: str) -> None:
    issued = issue(tmp_path, begin=datetime(2090, 1, 1, tzinfo=UTC), days=36_500)
    words = words_about(issued, "--ca", ca)
    assert words == "the server's certificate is not valid before Jan  1 00:00:00 2090 GMT; is the clock right?"


def test_a_certificate_for_other_names(tmp_path: Path, ca: str) -> None:
    issued = issue(tmp_path, hosts=("a.example", "10.0.0.1"))
    advice = "give one of its names as --server-name"
    words = words_about(issued, "--ca", ca)
    assert words == f"the server's certificate is for a.example, 10.0.0.1, not for 127.0.0.1: {advice}"
    words = words_about(issued, "--ca", ca, "--server-name", "b.example")
    assert words == f"the server's certificate is for a.example, 10.0.0.1, not for b.example: {advice}"


def test_an_unknown_ca(tmp_path: Path, ca: str) -> None:
    issued = issue(tmp_path, ca=authority("other"))
    words = words_about(issued, "--ca", ca)
    assert words == "an unknown CA signed the server's certificate: give that CA's certificate as --ca"
    assert words_about(issued) == words


def test_a_self_signed_certificate(tmp_path: Path) -> None:
    issued = Files(tmp_path / "self.pem", tmp_path / "self.key")
    made = run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=self", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"),
            *("-keyout", str(issued.key), "-out", str(issued.certificate)),
        ]
    )
    assert made.returncode == 0, made.stderr
    words = words_about(issued)
    assert words == "the server's certificate is self-signed: give it as --ca to trust it"
    with tls_server(context_with(issued)) as port:
        done = command("ping", "--tls", "--ca", str(issued.certificate), "-c", "1", f"127.0.0.1:{port}")
    assert done.returncode == 0, done.stdout


def test_insecure_accepts_any_certificate(tmp_path: Path) -> None:
    issued = issue(tmp_path, hosts=("a.example",), days=-1)
    with tls_server(context_with(issued)) as port:
        done = command("ping", "--tls", "--insecure", "-c", "1", f"127.0.0.1:{port}")
    assert done.returncode == 0, done.stdout
    assert f"certificate valid until {datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}" in done.stdout


# -- servers -----------------------------------------------------------------------------------------------------------


def test_a_server_that_refuses_the_version(tmp_path: Path, ca: str) -> None:
    context = context_with(issue(tmp_path))
    context.set_ciphers("ALL@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="deprecated"):
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with tls_server(context) as port:
        words = ping_once("--tls", "--ca", ca, f"127.0.0.1:{port}")
    assert words == "the server refuses TLS 1.2 and 1.3"


def test_a_handshake_refused_without_a_reason(tmp_path: Path, ca: str) -> None:
    """TLS 1.2 has no alert for a missing client certificate."""
    context = context_with(issue(tmp_path))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ca)
    with tls_server(context) as port:
        words = ping_once("--tls", "--ca", ca, f"127.0.0.1:{port}")
    assert words == "the server refuses the handshake: it may require a client certificate (--cert, --key)"


def test_a_server_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        words = ping_once("--tls", "--insecure", "-W", "0.5", f"127.0.0.1:{listener.getsockname()[1]}")
    assert words == "TLS handshake not finished in time; does the server speak TLS?"


@contextmanager
def raw_server(answer: bytes) -> Iterator[int]:
    """A server that sends one client these bytes and closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def test_a_server_that_closes_during_the_handshake() -> None:
    with raw_server(b"") as port:
        assert ping_once("--tls", "--insecure", f"127.0.0.1:{port}") == "connection closed during the TLS handshake"


def test_a_tls_alert_for_a_plain_client() -> None:
    with raw_server(bytes.fromhex("15030100020246")) as port:
        assert ping_once(f"127.0.0.1:{port}") == "the server speaks TLS: use --tls"


def test_a_stream_that_ends_without_close_notify(tmp_path: Path, ca: str) -> None:
    context = context_with(issue(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            client = context.wrap_socket(listener.accept()[0], server_side=True)
            client.recv(65536)
            socket.socket(fileno=client.detach()).close()

        thread = threading.Thread(target=serve)
        thread.start()
        words = ping_once("--tls", "--ca", ca, f"127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert words == "connection closed without close_notify: data may be missing"


# -- files -------------------------------------------------------------------------------------------------------------


def encrypted(issued: Files) -> bytes:
    key = serialization.load_pem_private_key(issued.key.read_bytes(), None)
    form, how = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    return key.private_bytes(serialization.Encoding.PEM, form, how)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    """The message names the file, and nothing is asked on the terminal."""
    issued, other = issue(tmp_path), issue(tmp_path, "other")
    bad, locked, nothing = tmp_path / "bad", tmp_path / "locked", tmp_path / "nothing"
    bad.write_text("no PEM")
    locked.write_bytes(encrypted(issued))
    certificate = ("--cert", str(issued.certificate), "--key")
    for given, words in (
        (("--ca", str(nothing)), f"--ca: {nothing}: no such file or directory"),
        (("--ca", str(bad)), f"--ca: {bad}: "),
        (("--cert", str(nothing)), f"--cert: {nothing}: no such file or directory"),
        ((*certificate, str(nothing)), f"--key: {nothing}: no such file or directory"),
        ((*certificate, str(bad)), f"--key: {bad}: "),
        ((*certificate, str(other.key)), f"--key: {other.key}: key values mismatch"),
        ((*certificate, str(locked)), f"--key: {locked}: the key is encrypted"),
    ):
        done = command("ping", "--tls", *given, "-c", "1", "127.0.0.1:9")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"echod: {words}"), (done.stderr, words)


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_options() -> None:
    """The expected name is that of the address, unless it is given."""
    named = args.parse(["ping", "--tls", "a.example:1"])
    assert named == args.Ping(
        Plan(TcpAddress("a.example", 1), None, 1, 5, 56, TlsOptions(server_name="a.example")), False
    )
    arguments = ["ping", "--tls", "--ca=a", "--cert=b", "--key=c", "--server-name=d", "unix:/e"]
    plan = Plan(UnixAddress("/e"), None, 1, 5, 56, TlsOptions("a", "b", "c", "d"))
    assert args.parse(arguments) == args.Ping(plan, as_json=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a:1", "--ca", "f"], "need --tls"),
        (["a:1", "--cert", "f"], "need --tls"),
        (["a:1", "--server-name", "f"], "need --tls"),
        (["a:1", "--insecure"], "need --tls"),
        (["a:1", "--tls", "--key", "f"], "--key needs --cert"),
        (["a:1", "--tls", "--ca", "f", "--insecure"], "leave out --ca"),
        (["unix:/a", "--tls"], "give --server-name"),
        (["a:1", "--tls", "--ca", ""], "expected a name"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        args.parse(["ping", *arguments])
    assert ended.value.code == 2
    complaint = capsys.readouterr().err
    assert words in complaint
    assert "usage: echod ping" in complaint


@pytest.mark.parametrize("is_tls", [False, True])
def test_only_tls_imports_ssl(is_tls: bool) -> None:
    options = ["--tls"] if is_tls else []
    script = (
        "from echod.__main__ import main\nimport sys\n"
        f"main(['ping', '-c', '1', *{options}, '127.0.0.1:1'])\nprint('ssl' in sys.modules)"
    )
    assert run([sys.executable, "-c", script], UNMEASURED).stdout.splitlines()[-1] == str(is_tls)
