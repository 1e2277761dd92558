"""The command line: arguments, commands and terminal output."""
