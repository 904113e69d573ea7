"""Processes of one job: agreement, collectives, failure detection and shutdown."""
