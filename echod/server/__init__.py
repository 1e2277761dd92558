"""Clients and their connections."""
