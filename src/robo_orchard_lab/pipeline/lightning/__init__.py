"""Adapter for modules of Lightning, which is imported only by its modules.

- `processor`: LightningModuleProcessor, the batch processor.
- `hooks`: the module's hooks, its `self.trainer`, and values for the epoch.
- `module`: inspection of a module, and the forms of `configure_optimizers`.
"""

from robo_orchard_lab.pipeline.lightning.processor import LightningModuleProcessor

__all__ = ["LightningModuleProcessor"]
