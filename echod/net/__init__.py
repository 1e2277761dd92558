"""Sockets and listening: addresses, binding, accepting, socket activation."""
