"""The life of a service: start, serve, reload, drain."""
