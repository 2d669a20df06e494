"""Loops as machine code: kept for the next process, where nobody else can have written it; else compiled again."""

from __future__ import annotations

import ctypes
import gc
import linecache
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import revdistill as rd
from revdistill.engine.integers import native, object_cache
from revdistill.engine.integers.loops import BITS, FLOAT, INT, Loop

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owner here, and nothing is kept")


def scaled(target: Any, source: Any, numel: int, factor: float) -> None:
    for i in range(numel):
        target[i] += source[i] * factor


def least_bits(bits: Any, numel: int, start: int) -> Any:
    least = start
    for i in range(numel):
        if bits[i] < least:
            least = bits[i]
    return least


def calls_numba(target: Any, numel: int, most: int) -> None:
    if most < 0:
        raise ValueError  # which calls the interpreter
    for i in range(numel):
        target[i] = max(target[i], most)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where loops are kept in a test: an empty cache, and processes that know of nothing."""
    where = tmp_path / "cache"
    monkeypatch.setattr(object_cache, "_folders", lambda: iter([where]))
    native._Machine.this.cache_clear()
    yield where
    native._Machine.this.cache_clear()


def works(monkeypatch: pytest.MonkeyPatch) -> int:
    """Run `scaled` as a new process would; how often numba compiled."""
    native._Machine.this.cache_clear()
    made = []
    compiled = native._compiled_by_numba
    with monkeypatch.context() as patched:
        patched.setattr(native, "_compiled_by_numba", lambda *a: (made.append(a), compiled(*a))[1])
        target, source = torch.ones(5, dtype=torch.float64), torch.arange(5.0)
        Loop(scaled, (FLOAT,))((target, source), 0.5)
    assert target.tolist() == [1, 1.5, 2, 2.5, 3]
    return len(made)


def only(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_a_loop_is_compiled_once_and_kept_for_the_user_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [works(monkeypatch), works(monkeypatch)] == [1, 0]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert only(folder).stat().st_mode & 0o777 == 0o600


def test_results_and_integers_of_the_same_bits(folder: Path) -> None:
    loop = Loop(least_bits, (BITS,), result=BITS, bits=True)
    for dtype, same in ((torch.float32, torch.int32), (torch.float64, torch.int64)):
        x = torch.tensor([1.0, -2.0, 3.0], dtype=dtype)
        assert loop((x,), 0) == int(x.view(same).min())
        assert loop((x[:0],), 7) == 7


def test_other_threads_run_meanwhile(folder: Path) -> None:
    run = Loop(scaled, (FLOAT,))._make((torch.float64, torch.float32))
    assert not type(run)._flags_ & ctypes._FUNCFLAG_PYTHONAPI  # type: ignore[attr-defined]


def test_the_code_lasts_as_long_as_its_function(folder: Path) -> None:
    """Regression: it was gone with the machine that had loaded it, and the function called what was there then."""
    run = Loop(scaled, (FLOAT,))._make((torch.float64, torch.float32))
    machine = weakref.ref(native._Machine.this())
    native._Machine.this.cache_clear()
    gc.collect()
    assert machine() is not None
    del run
    gc.collect()
    assert machine() is None


def flipped(file: Path) -> None:
    text = bytearray(file.read_bytes())
    text[len(text) // 2] ^= 1
    file.write_bytes(text)


def swapped(file: Path) -> None:
    """The right checksum, of another loop's name."""
    other = file.with_name("other")
    other.write_bytes(object_cache._checksum("other", file.read_bytes()[32:]) + file.read_bytes()[32:])
    other.rename(file)


def linked(file: Path) -> None:
    file.symlink_to(file.rename(file.parent.parent / "elsewhere"))


DISTRUSTED: dict[str, Callable[[Path], Any]] = {
    "damaged": flipped,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "empty": lambda file: file.write_bytes(b""),
    "another loop's": swapped,
    "a file that the group writes": lambda file: file.chmod(0o660),
    "a file that all write": lambda file: file.chmod(0o606),
    "a link": linked,
}


@pytest.mark.parametrize("change", DISTRUSTED)
def test_what_is_damaged_or_could_be_anothers_is_compiled_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    assert works(monkeypatch) == 1
    DISTRUSTED[change](only(folder))
    assert [works(monkeypatch), works(monkeypatch)] == [1, 0]  # and put right


def test_a_folder_that_others_write_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert works(monkeypatch) == 1
    folder.chmod(0o777)
    assert [works(monkeypatch), works(monkeypatch)] == [1, 1]


def test_what_another_user_owns_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything put there, where root may write everywhere."""
    assert works(monkeypatch) == 1
    looked = os.stat_result((0o700, *[0] * 3, 12345, *[0] * 5))
    assert not object_cache._is_ours(looked)
    owner = os.geteuid()
    monkeypatch.setattr(object_cache, "_is_ours", lambda looked: looked.st_uid == owner + 1)
    assert [works(monkeypatch), works(monkeypatch)] == [1, 1]
    assert len(list(folder.iterdir())) == 1


def test_nothing_is_made_in_another_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    object_cache._made(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_where_nothing_can_be_kept_loops_are_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("a file")
    assert [works(monkeypatch), works(monkeypatch)] == [1, 1]
    monkeypatch.setattr(object_cache, "_folders", lambda: iter([folder, folder.with_name("second")]))
    assert [works(monkeypatch), works(monkeypatch)] == [1, 0]


def test_another_machine_source_or_number_is_another_loop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = native._Machine.this()
    signature = native.Signature(("int64",), (INT,), None)
    names = [machine.digest("source", signature), machine.digest("other", signature)]
    names.append(machine.digest("source", native.Signature(("int32",), (INT,), None)))
    for name in ("_cpu", "_features", "_triple"):
        with monkeypatch.context() as patched:
            patched.setattr(machine, name, "another")
            names.append(machine.digest("source", signature))
    with monkeypatch.context() as patched:
        patched.setattr(native, "version", lambda name: "0.0")
        names.append(machine.digest("source", signature))
    assert len(set(names)) == len(names)
    code = compile("def f():\n return STEP", "nowhere", "exec")
    texts = []
    for step in (1, 2):
        exec(code, found := {"STEP": step})
        texts.append(native._text(found["f"]))
    assert texts[0] != texts[1]


def test_a_loop_that_calls_numba_is_not_kept(folder: Path) -> None:
    """A process without numba would be aborted by loading it."""
    target = torch.tensor([1, 5, 3])
    Loop(calls_numba, (INT,))((target,), 3)
    assert target.tolist() == [3, 5, 3]
    assert not folder.exists()


@pytest.mark.parametrize("tensors", [(torch.ones(4, 2).t(), torch.ones(2, 4)), (torch.ones(3), torch.ones(4))])
def test_what_a_c_function_would_not_notice_is_noticed(folder: Path, tensors: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(AssertionError, match="scaled"):
        Loop(scaled, (FLOAT,))(tensors, 1.0)


def test_many_who_write_at_once_leave_a_whole_file(folder: Path) -> None:
    contents = [bytes([i]) * 100_000 for i in range(8)]
    seen = []

    def work(content: bytes) -> None:
        for _ in range(20):
            assert object_cache.write("loop", content)
            seen.append(object_cache.read("loop"))

    threads = [threading.Thread(target=work, args=(c,)) for c in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 160
    assert set(seen) <= set(contents)
    assert [path.name for path in folder.iterdir()] == ["loop"]


@pytest.mark.parametrize(
    ("cache", "home", "expected"),
    [("/c", "/h", "/c"), ("", "/h", "/h/.cache"), ("relative", "/h", "/h/.cache")],
)
def test_the_users_cache_goes_first(monkeypatch: pytest.MonkeyPatch, cache: str, home: str, expected: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setenv("HOME", home)
    assert next(object_cache._folders()) == Path(expected) / "revdistill" / "loops"


_UNROLL = """
found = []
for optimizer in (rd.SGD(0.1, 0.9), rd.Adam(0.1), rd.AdamW(0.1), rd.RMSprop(0.1, momentum=0.9, centered=True)):
    w = {"w": torch.ones(3, dtype=torch.float64, requires_grad=True)}
    theta = rd.unroll(lambda p, b: p["w"].square().sum(), w, lambda k: (), optimizer, steps=3)
    theta["w"].sum().backward()
    found.append(w["w"].grad.tolist())
"""
_LATER = f"import sys, torch, revdistill as rd\n{_UNROLL}assert 'numba' not in sys.modules\nprint(found)"


def test_a_later_process_does_without_numba() -> None:
    """It finds what this one has kept, in the user's own cache."""
    exec(_UNROLL, names := {"torch": torch, "rd": rd})
    done = subprocess.run([sys.executable, "-c", _LATER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{names['found']}\n"


def test_a_file_that_changes_under_a_process_poisons_nothing(folder: Path, tmp_path: Path) -> None:
    """What is kept belongs to the code that was imported, not to what stands in its file by now."""
    file, source = tmp_path / "released.py", "def rounded(target, numel):\n    for i in range(numel):\n        {}\n"
    found = []
    before, after = ("target[i] = target[i] + 1", "target[i] = target[i] + 2")
    file.write_text(source.format(before))
    old: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), old)
    file.write_text(source.format(after))  # an upgrade, while a notebook is open
    linecache.checkcache()
    new: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), new)
    for module in (old, new):
        native._Machine.this.cache_clear()
        target = torch.zeros(2, dtype=torch.int64)
        Loop(module["rounded"], ())((target,))
        found.append(target.tolist())
    assert found == [[1, 1], [2, 2]]


def test_a_process_is_not_forked_while_a_thread_compiles() -> None:
    holding, done = threading.Event(), threading.Event()

    def compiles() -> None:
        with native.LOCK:
            holding.set()
            done.wait(0.3)

    thread = threading.Thread(target=compiles)
    thread.start()
    holding.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fork beside a thread
        child = os.fork()
    if child == 0:
        os._exit(0 if native.LOCK.acquire(timeout=5) else 1)
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_threads_that_want_a_loop_at_once_have_it_loaded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, loaded = [], native.loaded
    monkeypatch.setattr(native, "loaded", lambda *a: (time.sleep(0.1), made.append(a), loaded(*a))[2])
    loop, key = Loop(scaled, (FLOAT,)), (torch.float64, torch.float32)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: loop._make(key), range(4)))
    assert len(made) == 1
    assert all(run is found[0] for run in found)
