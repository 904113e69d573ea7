"""Training runs as files: described, checked, built and repeated."""
