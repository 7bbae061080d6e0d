"""Data loader workers, to which a launcher's SIGTERM goes as well as to their rank."""

import signal

from torch.utils.data import DataLoader, Dataset

from megatron_smlp.training.batches import _begun


class Held(Dataset[bool]):
    """Each item says whether SIGTERM is blocked in the process that reads it."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> bool:
        return signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_they_never_see_sigterm_and_the_rank_does():
    assert [bool(value) for value in _begun(DataLoader(Held(), num_workers=1))] == [True]
    assert not Held()[0]
