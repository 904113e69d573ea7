"""Contenders that train one job, one file each.

Each module has a `train(job, hook_count)` that runs the job's model over its loader once, with that
many empty hooks around each step, and leaves the trained weights in the model. A peer's logging,
checkpoints, progress bar and evaluation are off.
"""
