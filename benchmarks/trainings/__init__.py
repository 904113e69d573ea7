"""Trainings of `end_to_end`: workloads.py has the models and data, sample.py runs one training.

Every other module is a contender. Its `train(job)` trains the job's model as the framework's users
do, with a progress bar, the framework's log of the loss, an evaluation and a checkpoint at the end
of each epoch, and returns the loss of each evaluation.
"""
