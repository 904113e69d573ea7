"""Hooks, configuration, command lines and logging, each in a module of its own."""
