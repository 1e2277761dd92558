"""The manual page describes every command and option."""

import argparse
import re
from pathlib import Path

from echod.cli import args
from echod.process.signals import TABLE

PAGE = (Path(__file__).parents[2] / "docs" / "echod.8").read_text().replace("\\-", "-")


def _command(name: str) -> argparse.ArgumentParser:
    parser = args._parser(name)
    (commands,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    command: argparse.ArgumentParser = commands[name]
    return command


def _commands() -> dict[str, argparse.ArgumentParser]:
    return {name: _command(name) for name in args._COMMANDS}


def test_every_command_and_option_is_in_the_manual() -> None:
    """`man echod` names every command and every option, and no others."""
    commands = _commands()
    options = {option for command in commands.values() for option in command._option_string_actions} - {"-h", "--help"}
    synopsis = PAGE.partition(".SH DESCRIPTION")[0]
    assert set(re.findall(r"\.SY echod\n\.B (\w+)", synopsis)) == commands.keys()
    assert set(re.findall(r"(?<![\w-])--?[A-Za-z][a-z-]*", PAGE.partition(".SH COMMANDS")[2])) >= options
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGE)) <= options


def test_every_signal_is_in_the_manual() -> None:
    """`man echod` says what each signal does."""
    signals = PAGE.partition(".SH SIGNALS")[2].partition(".SH EXIT")[0]
    assert {number.name.removeprefix("SIG") for number in TABLE} == set(re.findall(r"\b[A-Z]{3,4}\d?\b", signals))
