"""The recipe, as data: what is trained, by how many workers, and what becomes of it."""

# The exporter writes this module's names down. It is here for the driver and for the type
# checker; nothing that runs imports it.

from trainer.specs.task import FinalTask, TrainTask

TRAIN: TrainTask
FINAL: FinalTask
WORLD_SIZE: int
