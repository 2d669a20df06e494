"""A process group of torch.distributed, for as long as torch has it."""

from __future__ import annotations

import weakref

import torch.distributed as dist

from revdistill.engine.errors import RankError

if dist.is_available() and not dist.is_initialized():
    # Its functions have the group of all processes for a default, as it is at their import. torch._dynamo imports them,
    # so torch.optim does: after init_process_group, they would keep the group for ever.
    import torch.distributed.nn.functional  # noqa: F401


class Borrowed:
    """Refers to a group without keeping it.

    What is computed under a group (theta with its graph, an attribution) outlives dist.destroy_process_group. A group
    that is kept till the interpreter ends has threads then, and the process aborts ("terminate called without an active
    exception") in some of its ends.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._reference = weakref.ref(group)

    def get(self) -> dist.ProcessGroup:
        """The group. Raises: RankError where it was destroyed."""
        group = self._reference()
        if group is None:
            raise RankError(
                "group was destroyed (dist.destroy_process_group) before this; call it after the last backward pass",
                rank=None,
            )
        return group

    def is_of(self, group: dist.ProcessGroup) -> bool:
        """Whether it refers to this one."""
        return self._reference() is group
