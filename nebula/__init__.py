"""Nebula: one model, several GPU clusters, slow untrusted links."""

__version__ = "0.1.0"
