"""Which studies a step sees: drawn from the seed and the number of the step, shared by all processes."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from medctkit.training.gradients import seed_from
from medctkit.training.settings import FineTuneConfig


def studies_of(step: int, studies: int, batch_size: int, seed: int) -> tuple[list[int], int]:
    """Indices of a step's whole batch, and its epoch, from 0; each has an order of its own, cut to whole batches."""
    epoch, place = divmod(step - 1, studies // batch_size)
    order = torch.randperm(studies, generator=torch.Generator().manual_seed(seed_from(seed, "epoch", epoch)))
    return order[place * batch_size :][:batch_size].tolist(), epoch


class StepBatches(Sampler):
    """Indices of one process's small batches, step after step: each epoch a new order, drawn from seed and epoch.

    `steps` are numbered from 1. A step has `parts` small batches in this process, and `EmbeddedBatch` reads each of
    them `rounds` times.

    Raises:
        ValueError: fewer studies than one batch, or a batch that the processes cannot share equally.
    """

    def __init__(self, studies: int, config: FineTuneConfig, steps: range, process: int = 0, processes: int = 1):
        if studies < config.batch_size:
            raise ValueError(f"{studies} training studies are fewer than one batch of {config.batch_size}")
        self.share = config.batch_size // processes
        self.size = min(config.micro_batch_size or self.share, self.share)
        if config.batch_size % processes or self.share % (config.micro_batch_size or 1):
            raise ValueError(
                f"a batch of {config.batch_size} in small batches of {config.micro_batch_size or 'any size'} cannot be "
                f"shared equally by {processes} processes; choose a batch_size that can"
            )
        self.studies, self.config, self.steps, self.process = studies, config, steps, process
        self.parts = self.share // self.size
        self.rounds = 1 if self.parts == 1 else 2

    def __len__(self) -> int:
        return len(self.steps) * self.parts * self.rounds

    def batch(self, step: int) -> list[int]:
        """Indices of a step's whole batch, of all processes."""
        return studies_of(step, self.studies, self.config.batch_size, self.config.seed)[0]

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            share = self.batch(step)[self.process * self.share :][: self.share]
            for _ in range(self.rounds):
                yield from (share[i : i + self.size] for i in range(0, self.share, self.size))
