"""The framework-agnostic part: hooks, configuration, command lines, logging.

Importing it loads neither torch nor accelerate.
"""
