"""Runs tasks under policies and keeps their results."""
