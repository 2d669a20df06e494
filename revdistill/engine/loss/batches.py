"""The forms in which batches are given: a table, a function of k, a list of batches, or a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

_EACH = "give batches as a function of k"


def is_table(batches: Any) -> bool:
    """Whether the batches are tensors [s, ...] whose rows are the steps' batches.

    Args:
        batches: as given to rd.unroll.

    Returns:
        True for a tuple, list or dict that holds nothing but tensors.
    """
    if isinstance(batches, Mapping):
        return all(isinstance(t, Tensor) for t in batches.values())
    return isinstance(batches, (tuple, list)) and all(isinstance(t, Tensor) for t in batches)


def function_of(batches: Any) -> Callable[[int], Any]:
    """Batches that are no table, as a function k -> batch that gives the same each time.

    Args:
        batches: a function of k; a list or tuple of batches, which are tuples, lists or dicts; or a DataLoader that
            goes through its data in order.

    Returns:
        The function. Of a list, step k gets batches[k % len(batches)]; a DataLoader's batches are put together when
        they are asked for.

    Raises:
        TypeError: they are none of these.
        ValueError: a DataLoader that shuffles, whose data set is a stream, or with an __iter__ of its own; or one
            without batches.
    """
    if callable(batches):
        function: Callable[[int], Any] = batches
        return function
    if isinstance(batches, DataLoader):
        return _of_loader(batches)
    if isinstance(batches, (tuple, list)) and all(isinstance(b, (tuple, list, Mapping)) for b in batches):
        listed = tuple(batches)
        return lambda k: listed[k % len(listed)]
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches is a {type(batches).__name__}, which gives each batch once, but the way back needs it again; "
            "list them first: batches=list(...)"
        )
    sized = hasattr(batches, "__getitem__") and hasattr(batches, "__len__") and not isinstance(batches, (Tensor, str))
    if sized and not isinstance(batches, (tuple, list, Mapping)):
        if isinstance(batches, TensorDataset):
            raise TypeError(
                "batches is a TensorDataset, which gives single examples; for batches of them give rd.Minibatches("
                "dataset.tensors, rd.epochs(len(dataset), batch_size, epochs)), or a DataLoader without shuffling"
            )
        raise TypeError(
            f"batches must be a tuple of tensors [s, ...], a list of batches or a function k -> batch, got "
            f"{type(batches).__name__}; {_EACH}: lambda k: batches[k % len(batches)]"
        )
    raise TypeError(
        "batches must be a tuple of tensors [s, ...] (or a dict of them), rd.Minibatches(data, order), a list of "
        "batches (tuples or dicts of tensors), a DataLoader without shuffling or a function k -> batch, got "
        f"{_described(batches)}"
    )


def _described(batches: Any) -> str:
    if isinstance(batches, (tuple, list, Mapping)):
        kinds = sorted({type(b).__name__ for b in (batches.values() if isinstance(batches, Mapping) else batches)})
        return f"a {type(batches).__name__} of {' and '.join(kinds)}"
    return type(batches).__name__


def _of_loader(loader: DataLoader[Any]) -> Callable[[int], Any]:
    if type(loader).__iter__ is not DataLoader.__iter__ or type(loader)._get_iterator is not DataLoader._get_iterator:
        raise ValueError(
            f"batches is a {type(loader).__name__}, a DataLoader with an __iter__ of its own, which an unroll would go "
            "past: it asks for the batch of any step, in any order; list its batches once: batches=list(loader)"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "batches is a DataLoader of an IterableDataset, which gives its data one after another, but the way back "
            "needs them again; list its batches once: batches=list(loader)"
        )
    plain = type(loader.batch_sampler) is BatchSampler or loader.batch_sampler is None
    if not plain or type(loader.sampler) is not SequentialSampler:
        raise ValueError(
            "batches is a DataLoader that does not go through its data in order (shuffle=True, or a sampler of its "
            "own), so it gives others each time; give shuffle=False, or list its batches once: batches=list(loader)"
        )
    dataset, collate = loader.dataset, loader.collate_fn
    groups: Sequence[Any] = range(len(dataset)) if loader.batch_sampler is None else list(loader.batch_sampler)  # type: ignore[arg-type]
    if not len(groups):
        raise ValueError("batches is a DataLoader without batches")

    def batch(k: int) -> Any:
        group = groups[k % len(groups)]
        if isinstance(group, int):
            return collate(dataset[group])
        several = getattr(dataset, "__getitems__", None)
        return collate(several(group) if several is not None else [dataset[i] for i in group])

    return batch
