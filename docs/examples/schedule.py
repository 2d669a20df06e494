"""A learning rate for each of 100 steps and a weight decay for each layer, learned through whole trainings.

From scikit-learn's digits, 300 to train on. Each outer step trains four fresh networks, side by side, and descends on
their loss on 500 other digits, so that what is learned serves any start. Expect: rates that rise and then fall, decays
near 0 (7 epochs need none), and ten fresh networks that do better on new digits than with the best of five constants.
"""

import sys

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn import GELU, Linear, Sequential

import revdistill as rd

STEPS, OUTER_STEPS = (30, 10) if "--small" in sys.argv else (100, 40)
torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
train, validation, test = ((x[rows], y[rows]) for rows in torch.randperm(len(x)).split((300, 500, 997)))
batches = rd.Minibatches(train, rd.epochs(300, 20, epochs=7))  # step k takes the examples that row k names


# %% Training several fresh networks at once: one rate per step, one decay per layer.
def outcome(data, lr, decay, count):
    nets = [Sequential(Linear(64, 64), GELU(), Linear(64, 64), GELU(), Linear(64, 10)) for _ in range(count)]
    loss, params = rd.stack_modules(nets, torch.nn.functional.cross_entropy)  # the loss is the sum of the networks'
    decays = {name: decay[int(name[0]) // 2].exp() for name in params}  # 0.weight, 0.bias, 2.weight, ... 4.bias
    theta = rd.unroll(loss, params, batches, rd.SGD(lr.exp(), momentum=0.9, weight_decay=decays), steps=STEPS)
    return loss(theta, data) / count


def constant(rate):
    return torch.full((STEPS,), rate).log(), torch.full((3,), -7.0)


# %% Learning: fresh networks at each outer step.
lr, decay = (t.requires_grad_() for t in constant(0.05))
outer = torch.optim.Adam([{"params": lr, "lr": 0.1}, {"params": decay, "lr": 0.3}])
for _ in range(OUTER_STEPS):
    outer.zero_grad()
    outcome(validation, lr, decay, count=4).backward()
    outer.step()

# %% Ten other fresh networks, on digits that nothing has seen.
rates = (0.05, 0.02, 0.03, 0.07, 0.1)
with torch.no_grad():
    rate = min(rates, key=lambda r: outcome(validation, *constant(r), count=10))
    start, best, learned = (outcome(test, *s, count=10) for s in (constant(0.05), constant(rate), (lr, decay)))
print(f"loss on new digits: start {start:.3f}, best of five constants {best:.3f}, learned {learned:.3f}")
print("weight decay of each layer: 0.00091 at the start, learned", ", ".join(f"{d:.5f}" for d in decay.exp().tolist()))
plt.figure(figsize=(6, 2.6), layout="constrained")
plt.plot(lr.exp().tolist(), label="learned")
plt.axhline(rate, color="C1", linestyle="--", label="best of five constants")
plt.gca().set(xlabel="step", ylabel="learning rate", ylim=(0, None))
plt.legend(loc="upper left")
plt.savefig("schedule.png")
