"""What scripts need beside the pipeline."""
