"""Files of one run: run folder paths, run_state.json, provenance and durable writes."""
