"""The greeting for a user at a terminal: how to talk to the running echod."""

from collections.abc import Sequence


def greeting(addresses: Sequence[str], pid: int) -> str:
    """Return the lines to show in the terminal that runs `echod serve`."""
    lines = [
        "",
        "echod is serving. In another terminal, talk to it, a line at a time:",
        "",
        *(f"    {_client(address)}" for address in addresses),
        "",
        f"    {f'kill -HUP {pid}':<18}reload the configuration",
        f"    {f'kill -USR1 {pid}':<18}log the statistics",
        f"    {f'kill -USR2 {pid}':<18}upgrade to what is installed now",
        f"    {'Ctrl-C':<18}drain and stop (twice: at once)",
        "",
        "",
    ]
    return "\n".join(lines)


def _client(address: str) -> str:
    if address.startswith("unix:"):
        return f"nc -U {address.removeprefix('unix:')}"
    host, _, port = address.rpartition(":")
    host = host.strip("[]").replace("0.0.0.0", "127.0.0.1")  # noqa: S104 (a name to show, not to bind)
    return f"nc {'::1' if host == '::' else host} {port}"
