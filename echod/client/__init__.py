"""The client's side of both protocols: ping, and requests to the admin endpoint."""
