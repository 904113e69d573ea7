"""Modules for hooks, configuration, command-line options, strict JSON and logging."""
