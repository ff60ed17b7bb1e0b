"""Packing and the order of an epoch."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_data import tokenizer
from leantune import data
from leantune.data import Sample, collate, plan_epoch
from leantune.data.batch import IGNORED
from leantune.errors import ConfigError, DataError
from leantune.nn import decoder


def sample(ids: list[int], mask: list[bool]) -> Sample:
    return Sample(np.array(ids, np.int32), np.array(mask), [("text", 0, len(ids))], "s", False)


def test_targets_shift_within_each_sequence() -> None:
    samples = [
        sample([10, 11, 12], [False, False, True]),
        sample([99], [False]),
        sample([20, 21], [True, True]),  # a mask at 0 must not reach the sequence before
    ]
    batch = collate(samples, [2, 0])
    assert batch.input_ids.tolist() == [20, 21, 10, 11, 12]
    assert batch.targets.tolist() == [21, -100, -100, 12, -100]
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 2, 5]
    assert batch.indices == [2, 0]
    assert (batch.tokens, batch.label_tokens) == (5, 2)
    assert [t.dtype for t in (batch.input_ids, batch.targets, batch.position_ids)] == [torch.int64] * 3
    assert batch.cu_seqlens.dtype == torch.int32
    after_another = collate(samples, [0, 2])
    assert after_another.targets.tolist() == [-100, 12, -100, 21, -100]
    assert batch.to("cpu").indices == batch.indices
    assert batch.to("meta").targets.device.type == "meta"
    with pytest.raises(DataError, match="indices is empty"):
        collate(samples, [])


def test_the_network_ignores_the_targets_that_packing_leaves_out() -> None:
    # Two constants, as leantune.nn imports nothing of leantune.data.
    assert decoder.IGNORED == IGNORED


def test_packing_keeps_every_target_of_each_sample() -> None:
    records = [{"prompt": "hello " * n, "completion": "the answer is four"} for n in (1, 7, 3)]
    dataset = data.chat(records, tokenizer())
    packed = collate(dataset, [1, 2, 0])
    alone = [collate(dataset, [i]) for i in (1, 2, 0)]
    for name in ("input_ids", "targets", "position_ids"):
        assert torch.equal(getattr(packed, name), torch.cat([getattr(b, name) for b in alone]))
    assert packed.label_tokens == dataset.stats.label_tokens == sum(b.label_tokens for b in alone)
    assert packed.label_tokens == int((packed.targets != -100).sum())
    # Writing to a batch does not reach the data set.
    before = dataset.fingerprint
    packed.input_ids.zero_()
    assert data.chat(records, tokenizer()).fingerprint == before
    assert dataset[0].input_ids.any()


plans = st.fixed_dictionaries(
    {
        "batch_size": st.none() | st.integers(1, 5),
        "batch_tokens": st.none() | st.integers(20, 60),
        "accumulation": st.integers(1, 3),
        "shuffle": st.booleans(),
        "seed": st.integers(0, 3),
        "epoch": st.integers(0, 3),
    }
).filter(lambda plan: plan["batch_size"] or plan["batch_tokens"])


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=40), plan=plans)
def test_plans_take_every_sample_once_within_the_limits(lengths: list[int], plan: dict) -> None:
    steps = plan_epoch(lengths, **plan)
    assert steps == plan_epoch(np.array(lengths, dtype=np.int64), **plan)
    flat = [i for step in steps for batch in step for i in batch]
    assert sorted(flat) == list(range(len(lengths)))
    if not plan["shuffle"]:
        assert flat == sorted(flat)
    assert all(len(step) == plan["accumulation"] for step in steps[:-1])
    size, budget = plan["batch_size"], plan["batch_tokens"]
    batches = [batch for step in steps for batch in step]
    for batch, following in zip(batches, [*batches, None][1:], strict=True):
        tokens = sum(lengths[i] for i in batch)
        assert batch
        assert size is None or len(batch) <= size
        assert budget is None or tokens <= budget
        if following:  # greedy: the next sample did not fit
            assert len(batch) == size or (budget and tokens + lengths[following[0]] > budget)


def test_limits_are_reached_exactly_and_steps_gather_micro_batches() -> None:
    plan: dict[str, Any] = {"shuffle": False, "seed": 0, "epoch": 0}
    lengths = [5, 5, 6, 4, 1]
    by_tokens = plan_epoch(lengths, batch_size=None, batch_tokens=10, accumulation=2, **plan)
    assert by_tokens == [[[0, 1], [2, 3]], [[4]]]
    by_both = plan_epoch(lengths, batch_size=2, batch_tokens=11, accumulation=1, **plan)
    assert by_both == [[[0, 1]], [[2, 3]], [[4]]]
    assert plan_epoch([], batch_size=2, batch_tokens=None, accumulation=1, **plan) == []


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int, batch_size: int) -> list[int]:
        plan = plan_epoch(
            [1] * 50,
            batch_size=batch_size,
            batch_tokens=None,
            accumulation=1,
            shuffle=True,
            seed=seed,
            epoch=epoch,
        )
        return [i for step in plan for batch in step for i in batch]

    assert order(0, 0, 3) == order(0, 0, 7)
    assert len({tuple(order(seed, epoch, 3)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    # Pinned, since a resumed run must draw what the interrupted one drew.
    assert order(0, 0, 3)[:5] == np.random.Generator(np.random.PCG64([0, 0])).permutation(50)[:5].tolist()


def test_plan_settings_are_checked() -> None:
    good: dict[str, Any] = {
        "batch_size": 2,
        "batch_tokens": 10,
        "accumulation": 1,
        "shuffle": True,
        "seed": 0,
        "epoch": 0,
    }
    with pytest.raises(DataError, match="sample 1 has 11 tokens and batch_tokens=10; raise"):
        plan_epoch([3, 11], **good)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"batch_size": None, "batch_tokens": None}, "neither batch_size nor batch_tokens"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_tokens": -1}, "batch_tokens=-1"),
        ({"accumulation": 0}, "accumulation=0"),
        ({"seed": -1}, "seed=-1"),
        ({"epoch": -1}, "epoch=-1"),
    ]
    for change, message in changes:
        with pytest.raises(ConfigError, match=message):
            plan_epoch([3], **{**good, **change})
