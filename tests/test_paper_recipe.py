"""The paper's loop, step by step, against the same numbers computed by hand."""

import math

import pytest
import torch

import ltmp
import train
from extras import landing, run
from flops import flops_ratio

RATES = {"prune": 0.02, "merge": 4.0}
TARGET, WEIGHT, STEPS = 0.6, 7.0, 6
FLAGS = ["--model", "tiny", "--weights", "none", "--recipe", "paper", "--no-landing", "--epochs"]
FLAGS += ["2", "-b", "4", "--limit-train", "12", "--limit-val", "4", "--target", str(TARGET)]
FLAGS += ["--reg-weight", str(WEIGHT), "--lr", str(RATES["prune"]), str(RATES["merge"])]


def thresholds_of(model):
    return {key: masker.threshold.item() for key, masker in landing.maskers(model).items()}


@pytest.fixture
def recorded(monkeypatch, tiny, tmp_path):
    """A function (method) -> the model, and of each step thresholds, images, labels."""

    def record(method):
        seen, found = [], {}
        batches, learn = run.Run.batches, train.learn

        def recorded_batches(self, *args):
            for images, labels in batches(self, *args):
                seen.append((thresholds_of(found["model"]), images, labels))
                yield images, labels

        def recorded_learn(model, *args):
            found["model"] = model
            return learn(model, *args)

        monkeypatch.setattr(run.Run, "batches", recorded_batches)
        monkeypatch.setattr(train, "learn", recorded_learn)
        train.main([*FLAGS, "--method", method, "--out", str(tmp_path)])
        seen.append((thresholds_of(found["model"]), None, None))
        return found["model"], seen

    return record


@pytest.mark.parametrize("method", ["ltmp", "ltm", "ltp", "ltpm"])
def test_each_step_is_that_of_the_paper(recorded, method):
    model, seen = recorded(method)
    maskers = landing.maskers(model)
    assert len(seen) == STEPS + 1
    assert seen[0][0] == {key: pytest.approx(0.9 * (key[1] == "merge")) for key in maskers}
    clamped, moved = [], []
    for step, (before, images, labels) in enumerate(seen[:-1]):
        for key, masker in maskers.items():
            masker.threshold.data.fill_(before[key])
        logits, kept = model(images, drop=False)
        log_p = logits.log_softmax(1)
        # A tenth of the label is spread over all classes.
        entropy = -0.9 * log_p.gather(1, labels[:, None])[:, 0] - 0.1 * log_p.mean(1)
        r = flops_ratio(kept, model.config)
        loss = entropy.mean() + WEIGHT * (r - TARGET) ** 2
        grads = torch.autograd.grad(loss, [masker.threshold for masker in maskers.values()])
        scale = 0.5 + 0.5 * math.cos(math.pi * step / STEPS)
        after = seen[step + 1][0]
        for (key, threshold), grad in zip(before.items(), grads, strict=True):
            free = threshold - scale * RATES[key[1]] * grad.item()
            assert after[key] == pytest.approx(min(max(free, 0.0), 1.0), abs=1e-6), (step, key)
            clamped.append(not 0 <= free <= 1)
            moved.append(abs(after[key] - threshold) > 1e-5)
    # Else the comparison would show little.
    assert any(clamped) and sum(moved) >= len(moved) / 3


def test_lr_is_of_prune_first_whatever_the_method():
    args = train.parse_args([*FLAGS[2:], "--model", "deit_tiny_patch16_224"])
    for method, rates in {"ltm": [4.0], "ltp": [0.02], "ltmp": [0.02, 4.0]}.items():
        args.method = method
        optimizer = train.make_optimizer(ltmp.create_model("deit_tiny_patch16_224", method), args)
        train.set_learning_rate(optimizer, 0.0, args)
        assert [group["lr"] for group in optimizer.param_groups] == rates
