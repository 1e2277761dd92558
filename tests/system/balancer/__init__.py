"""Tests with three echods behind a real HAProxy, configured as docs/scaling.md says."""
