"""Runs projects on this machine."""
