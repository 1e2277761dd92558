"""The balancer suite: three echods behind a real HAProxy, configured as docs/scaling.md says."""
