"""Fault tests: attacks and failures around a real echod, while a well-behaved client measures its round trips."""
