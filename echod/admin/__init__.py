"""The admin endpoint: HTTP for operators and monitoring."""
