"""echod, a TCP daemon that answers every line in upper case."""

__version__ = "0.1.0"
