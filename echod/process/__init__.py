"""The operating-system process: signals, limits, privileges, pid file, service manager."""
