"""Ways to train one job, one file each.

Each module has a `train(job, hook_count)` that runs the job's model over its loader once, with so
many hooks that do nothing before and after a step, and leaves the trained weights in the model. A
peer's logging, checkpoints, progress bar and evaluation are switched off.
"""
