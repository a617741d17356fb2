"""The recipe, as data: what is trained, and what becomes of it."""

# The exporter writes this module's two names down. It is here for the driver and for the type
# checker; nothing that runs imports it.

from trainer.specs.task import FinalTask, TrainTask

TRAIN: TrainTask
FINAL: FinalTask
