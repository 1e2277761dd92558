"""The configuration: every source becomes one frozen `Config`, or a list of all errors."""
