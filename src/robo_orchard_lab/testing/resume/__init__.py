"""The proof that a run which is stopped or killed, and resumed, is the run that never stopped."""
