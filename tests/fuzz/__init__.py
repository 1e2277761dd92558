"""Fuzzers look for bytes that echod is wrong about: for seconds as a test, for minutes with `make fuzz`."""
