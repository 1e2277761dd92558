"""The protocols on the wire: bytes in, bytes out, no I/O."""
