"""Several processes that share the calibration rows: the bytes of one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from awq_ext.calibrate import Statistics
from awq_ext.quantizer import quantize, quantize_to
from awq_ext.ranks import SLOTS, Ranks, SlotSum, generator

LENGTHS = [16] * 6 + [5, 9, 7, 16, 8, 16, 12, 16, 10, 16, 11]  # 13 batches: uneven slots, rows of other lengths
PROCESSES = (1, 2, 4)


def rank(number: int, count: int) -> Ranks:
    """One of several, without the others."""
    ranks = Ranks(alone=True)
    each = SLOTS // count
    ranks.slots = range(number * each, (number + 1) * each)
    return ranks


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("batches", [0, 1, 3, 8, 13, 64])
def test_batches_are_divided_in_order(count: int, batches: int) -> None:
    each = [rank(number, count).batches(batches) for number in range(count)]
    assert [batch for part in each for batch, _ in part] == list(range(batches))
    slots = [slot for part in each for _, slot in part]
    assert slots == sorted(slots) and [part[0] for part in each[:1] if part] == [(0, 0)] * bool(batches)
    assert max(slots.count(slot) for slot in slots or [0]) - min(slots.count(slot) for slot in set(slots) or [0]) <= 1


@pytest.mark.parametrize("batches", [1, 3, 8, 13])
def test_sums_are_those_of_one_tree(batches: int) -> None:
    """The sum of every process is a node of the tree that one process adds up, bit for bit."""
    values = torch.randn(batches, 1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 1000)

    def total(number: int, count: int) -> Tensor | None:
        ranks = rank(number, count)
        sums = SlotSum(ranks)
        for batch, slot in ranks.batches(batches):
            partial = sums.of_slot(slot)
            if partial is None:
                sums.begin([values[batch].clone()])
            else:
                partial[0] += values[batch]
        return None if sums.total is None else sums.total[0]

    def tree(count: int) -> Tensor:
        nodes = [total(number, count) for number in range(count)]
        while len(nodes) > 1:
            pairs = zip(nodes[::2], nodes[1::2], strict=True)
            nodes = [a if b is None else b if a is None else a + b for a, b in pairs]
        assert nodes[0] is not None
        return nodes[0]

    one = tree(1)
    assert all(torch.equal(tree(count), one) for count in (2, 4, 8))
    torch.testing.assert_close(one, values.double().sum(0).float(), rtol=1e-5, atol=1e-5)
    if batches > SLOTS:
        in_order = values[0].clone()
        for value in values[1:]:
            in_order += value
        assert not torch.equal(in_order, one)  # the order matters to these values


def test_random_numbers_depend_on_their_key_only() -> None:
    first = torch.randint(0, 2, (64,), generator=generator(0, 1, 2))
    assert torch.equal(first, torch.randint(0, 2, (64,), generator=generator(0, 1, 2)))
    for other in ((0, 2, 1), (1, 1, 2), (0, 1, 3), (0, 12)):
        assert not torch.equal(first, torch.randint(0, 2, (64,), generator=generator(*other)))


def test_statistics_of_no_rank() -> None:
    assert Statistics(rank(1, 2)).tokens == 0


@pytest.mark.parametrize("count", [3, 5, 6, 7, 16])
def test_a_number_of_processes_that_does_not_fit(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: count)
    with pytest.raises(ValueError, match=f"torch.distributed has {count} processes; calibration takes 1, 2, 4 or 8"):
        Ranks()


def test_one_two_and_four_processes_give_the_same_bytes(tmp_path: Path) -> None:
    """Of the model that each of them has, of the checkpoint that one of them writes, and the same errors."""
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert [len(results[str(count)]) for count in PROCESSES] == list(PROCESSES)
    (alone,) = results["1"]
    assert alone["awq+"] != alone["gptq"]
    assert "no linear of this model" in alone["error"]
    for count in PROCESSES:
        assert results[str(count)] == [alone] * count
        assert (tmp_path / f"out-{count}" / "model.safetensors").read_bytes() == (
            tmp_path / "out-1" / "model.safetensors"
        ).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["original", "out-1", "out-2", "out-4"]


def digest(model: Any) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def one_process(number: int, count: int, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet-{count}", rank=number, world_size=count)
    tokens = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 96, (length,), generator=tokens).tolist() for length in LENGTHS]
    options: dict[str, Any] = {"calibration": rows, "samples": len(rows), "seq_len": 16, "q_group_size": 16}
    original = directory / "original"
    result = {method: digest(quantize(original, method=method, **options)) for method in ("gptq", "awq")}
    options |= {"generated": 2, "tune_steps": 2}
    result["awq+"] = digest(quantize(original, method="awq+", out=directory / f"out-{count}", **options))
    options |= {"generated": 0, "tune_steps": 0}
    try:
        quantize_to(original, directory / "none", **{**options, "q_group_size": 48})
    except ValueError as error:
        result["error"] = str(error)
    (directory / f"{count}-{number}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def main(directory: Path) -> None:
    from test_quantizer import small_model

    torch.set_num_threads(1)
    small_model("llama", torch.bfloat16).save_pretrained(directory / "original")
    results = {}
    for count in PROCESSES:
        children = []
        for number in range(count):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    one_process(number, count, directory)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        assert all(os.waitpid(child, 0)[1] == 0 for child in children)
        results[count] = [json.loads((directory / f"{count}-{number}.json").read_text()) for number in range(count)]
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
