"""Loop as in Accelerate's documentation, with `accumulate`."""

from accelerate import Accelerator

from benchmarks.workload import Job


def train(job: Job, hook_count: int) -> None:
    if hook_count:
        raise ValueError("a plain Accelerate loop has no hooks")
    accelerator = make_accelerator(job)
    model, optimizer, scheduler, loader = accelerator.prepare(
        job.model, job.optimizer, job.scheduler, job.loader
    )
    model.train()
    for inputs, labels in loader:
        with accelerator.accumulate(model):
            loss = job.loss(model(inputs), labels)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def make_accelerator(job: Job) -> Accelerator:
    """Return an accelerator of one process on the CPU, in the job's precision."""
    return Accelerator(
        cpu=True,
        mixed_precision="bf16" if job.settings.bf16 else "no",
        gradient_accumulation_steps=job.settings.accumulate,
    )
