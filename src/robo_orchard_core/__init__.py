"""Framework-agnostic hooks, configuration, command-line options and logging, without torch."""
