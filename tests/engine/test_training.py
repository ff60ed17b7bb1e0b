"""One step and its loss, which does not depend on batching; parity with peers; settings that cannot work."""

import pytest
import torch

import leantune as lt
from helpers_training import padded, prepared, records, trained, trainer
from leantune.data.batch import collate
from leantune.optim import Schedule


def follow_peft(directory, data, start, steps: int, tolerance: float, **settings) -> None:
    """Asserts that losses and rates are those of Hugging Face + PEFT + torch's AdamW, from the adapter in `start`."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = lt.load(directory)
    model.load_adapter(start)
    t = trainer(model, data, schedule="cosine", warmup=3, weight_decay=0.01, max_grad_norm=0.5, **settings)
    t.fit(max_steps=steps)
    assert len(t.history) == steps

    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, start, is_trainable=True)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=t.config.lr, weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 3, steps)
    for number, log in enumerate(t.history):
        epoch, position = t._locate(number)
        loss = theirs(**padded([data[i] for i in t._plan(epoch)[position][0]])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        assert log.lr == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert log.loss == pytest.approx(float(loss.detach()), abs=tolerance), f"step {number + 1}"


# ---- one step --------------------------------------------------------------------------------------------------------


def gradients_of_one_step(directory, data, dropout=0.0, **settings):
    model = prepared(directory, dropout)
    t = trainer(model, data, shuffle=False, **settings)
    seen = {}
    step = t.optimizer.step

    def watch(*arguments):
        seen.update({n: p.grad.clone() for n, p in t.optimizer.parameters.items()})
        step(*arguments)

    t.optimizer.step = watch
    t.fit(max_steps=1)
    return t.history[0], seen


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_loss_and_gradients_do_not_depend_on_batching(tiny_directory, data, dropout):
    """8 samples a step: together, one by one, in pairs, in fours; each relative to the largest gradient's norm."""
    ways = [
        {"batch_size": 8, "accumulation": 1},
        {"batch_size": 1, "accumulation": 8},
        {"batch_size": 2, "accumulation": 4},
        {"batch_size": 4, "accumulation": 2},
    ]
    reference, expected = gradients_of_one_step(tiny_directory, data, dropout, **ways[0])
    for way in ways[1:]:
        log, gradients = gradients_of_one_step(tiny_directory, data, dropout, **way)
        assert log.label_tokens == reference.label_tokens and log.tokens == reference.tokens
        assert log.loss == pytest.approx(reference.loss, rel=1e-5)
        for name, gradient in gradients.items():
            scale = expected[name].norm()
            assert (gradient - expected[name]).norm() <= 1e-5 * scale, f"{name} with {way}"


def test_loss_is_the_mean_over_label_tokens_of_the_step(tiny_directory, data):
    """Not the mean of micro-batch means: labels are unevenly spread over these samples."""
    log, _ = gradients_of_one_step(tiny_directory, data, batch_size=1, accumulation=8)
    model = prepared(tiny_directory)
    total, count = 0.0, 0
    for i in range(8):
        ids = torch.from_numpy(data[i].input_ids).long()
        with torch.no_grad():
            log_probabilities = model(ids[None])[0].double().log_softmax(-1)
        for t in range(1, len(ids)):
            if data[i].label_mask[t]:
                total -= float(log_probabilities[t - 1, ids[t]])
                count += 1
    assert log.label_tokens == count
    assert log.loss == pytest.approx(total / count, rel=1e-5)


def test_evaluation_does_not_depend_on_batching(tiny, data):
    results = [lt.evaluate(tiny, data, batch_tokens=n) for n in (1, 100, 10_000)]
    for result in results:
        assert result.tokens == data.stats.label_tokens
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)


def test_a_micro_batch_without_labels_contributes_nothing(tiny_directory, data, monkeypatch):
    real = collate

    def without(samples, indices):
        batch = real(samples, indices)
        if 1 in indices:
            batch.targets.fill_(-100)
            object.__setattr__(batch, "label_tokens", 0)
        return batch

    monkeypatch.setattr("leantune.loop.collate", without)
    model = prepared(tiny_directory)
    t = trainer(model, data, batch_size=1, accumulation=2, shuffle=False)
    t.fit(max_steps=1)
    assert t.history[0].label_tokens == int(data[0].label_mask.sum())
    with pytest.raises(lt.DataError, match="step 1 has no label token; its samples are records.1."):
        monkeypatch.setattr("leantune.loop.collate", lambda s, i: without(s, [1]))
        trainer(prepared(tiny_directory), data, batch_size=1).fit(max_steps=1)


def test_follows_peft_step_by_step(tiny_directory, data, tmp_path):
    prepared(tiny_directory).save_adapter(tmp_path / "start")
    follow_peft(tiny_directory, data, tmp_path / "start", steps=30, tolerance=1e-4)


def test_follows_peft_on_the_real_model(real_model_directory, tmp_path):
    """30 steps of short samples, fp32: within 1e-3 at every step."""
    model = lt.load(real_model_directory)
    lt.LoRA(rank=16, alpha=32).apply(model)
    model.save_adapter(tmp_path / "start")
    data = lt.data.chat(records(60), model.tokenizer)
    follow_peft(real_model_directory, data, tmp_path / "start", steps=30, tolerance=1e-3, lr=2e-4, batch_size=2)


def test_full_fine_tuning_follows_transformers(tiny_directory, data):
    transformers = pytest.importorskip("transformers")
    model = lt.load(tiny_directory)
    lt.Full().apply(model)
    t = trainer(model, data, lr=1e-3, max_grad_norm=None)
    t.fit(epochs=2)
    assert t.history[-1].loss < t.history[0].loss - 0.5

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_directory, dtype=torch.float32)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    for step, log in zip([step for epoch in range(2) for step in t._plan(epoch)], t.history, strict=True):
        loss = theirs(**padded([data[i] for i in step[0]])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert log.loss == pytest.approx(float(loss.detach()), abs=1e-4)
    finals = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, finals[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("policy", ["all", "full"])
def test_policies_train_to_the_same_bits(tiny_directory, data, policy):
    results = []
    for kept in ("selective", policy):
        model = prepared(tiny_directory, dropout=0.1)
        trainer(model, data, policy=kept).fit(max_steps=3)
        results.append(trained(model))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_a_steady_step_takes_no_new_memory_for_the_arena(tiny_directory, data):
    model = prepared(tiny_directory)
    t = trainer(model, data)
    t.fit(epochs=1)
    held = model.arena.allocated_bytes
    assert held > 0
    t.fit(epochs=3)
    assert model.arena.allocated_bytes == held


# ---- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")],
)
def test_schedules_are_hugging_faces(kind, name):
    transformers = pytest.importorskip("transformers")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=20)
    mine = Schedule(kind, 0.5, 20, warmup=0.2)
    for step in range(20):
        assert mine.rate(step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr=0.0 must be a positive number"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number"),
        ({"accumulation": 1.5}, "accumulation=1.5"),
        ({"schedule": "sawtooth"}, "schedule='sawtooth' is unknown; use constant, linear, cosine"),
        ({"warmup": -1}, "warmup=-1"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"policy": "none"}, "policy='none'"),
        ({"save_every": 3}, "save_every=3 needs out="),
        ({"eval_every": 3}, "eval_every=3 needs eval_data"),
        ({"resume": True}, "resume=True needs out="),
        ({"learning_rate": 1e-3}, "unknown setting 'learning_rate'; settings are lr, batch_size"),
    ],
)
def test_settings_that_cannot_work(tiny_directory, data, settings, message):
    with pytest.raises(lt.ConfigError, match=message):
        trainer(prepared(tiny_directory), data, **settings)


def test_nothing_trainable(tiny, data):
    with pytest.raises(lt.ConfigError, match="apply a method first"):
        trainer(tiny, data)


def test_trainable_half_precision_is_refused(tiny_directory, data):
    model = lt.load(tiny_directory, dtype=torch.bfloat16)
    model.model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(lt.ConfigError, match=r"embed_tokens.weight is trainable in torch.bfloat16"):
        trainer(model, data)


def test_data_that_does_not_fit_the_model(tiny_directory, tmp_path):
    from helpers_model import tiny_model

    short = lt.load(tiny_model(tmp_path / "short", max_position_embeddings=8))
    lt.LoRA(rank=2).apply(short)
    with pytest.raises(lt.DataError, match="the model's context is 8; use max_length=8"):
        trainer(short, lt.data.chat(records(4), short.tokenizer))
    small = lt.load(tiny_model(tmp_path / "small", vocab_size=50))
    lt.LoRA(rank=2).apply(small)
    with pytest.raises(lt.DataError, match="the model's vocabulary has 50"):
        trainer(small, lt.data.chat(records(4), small.tokenizer))
