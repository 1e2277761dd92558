"""Fuzzing of the protocol, the configuration and addresses: for seconds as a test, for minutes with `make fuzz`."""
