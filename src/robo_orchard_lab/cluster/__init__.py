"""Training jobs on a SLURM cluster, or in local processes, through submitit.

- `submission`: settings of a job, its folder in the run folder, and the submission.
- `training_job`: the function that submitit runs in the job: training, save, requeue.
- `report.jobs` reads the state of a job.

Requires the extra ``cluster``: ``pip install "robo-orchard-hooks[cluster]"``.
"""

from robo_orchard_lab.cluster.submission import ClusterSettings, submit

__all__ = ["ClusterSettings", "submit"]
