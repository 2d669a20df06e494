"""A weight for each training example, learned through whole trainings, and stopped early.

From scikit-learn's digits, 400 to train on, two of five with a wrong label. The weights descend on the loss on 100
others with right labels; 100 more say which outer step to keep. Expect: small weights for wrong labels, and half the
loss of equal weights on digits that nothing has seen. Outer steps after the one that is kept make it larger again.
"""

import sys

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import revdistill as rd

EPOCHS, OUTER_STEPS = (4, 10) if "--small" in sys.argv else (20, 60)
torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
rows = torch.randperm(len(x)).split((400, 100, 100, 1197))
train, validation, stopping, test = ((x[part], y[part]) for part in rows)
wrong = torch.rand(400) < 0.4
train[1][wrong] = (train[1][wrong] + torch.randint(1, 10, (int(wrong.sum()),))) % 10

net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 10))
each_loss, params = rd.from_module(net, torch.nn.CrossEntropyLoss(reduction="none"))  # (params, (x, y)) -> [B]
order = rd.epochs(400, 50, EPOCHS)  # row k: the examples of step k


def loss(theta, batch):
    logits, *examples = batch
    return (2 * logits.sigmoid() * each_loss(theta, examples)).mean()


logits = torch.zeros(400, requires_grad=True)  # a weight is 2 sigmoid(logit): 1 at the start
outer = torch.optim.Adam([logits], lr=0.2)
curves, weights = [], []  # of each outer step: the losses on validation, stopping and test; the weights
for _ in range(OUTER_STEPS):
    outer.zero_grad()
    batches = rd.Minibatches((logits, *train), order)  # gradients flow to the logits of all that a batch takes
    theta = rd.unroll(loss, params, batches, rd.SGD(0.05, momentum=0.9), steps=len(order))
    losses = [each_loss(theta, data).mean() for data in (validation, stopping, test)]
    losses[0].backward()
    curves.append([value.item() for value in losses])
    weights.append(2 * logits.detach().sigmoid())
    outer.step()

kept = min(range(OUTER_STEPS), key=lambda k: curves[k][1])  # by the loss on `stopping`, which nothing is fitted to
equal, early, last = (curves[k][2] for k in (0, kept, -1))
print(f"loss on new digits: equal weights {equal:.3f}, stopped at outer step {kept} {early:.3f}, at the end {last:.3f}")
print("mean weight: right labels {:.2f}, wrong ones {:.2f}".format(*(weights[kept][m].mean() for m in (~wrong, wrong))))
plt.figure(figsize=(6, 2.6), layout="constrained")
for name, curve in zip(
    ("100 digits to learn from", "100 to stop by", "new ones"), zip(*curves, strict=True), strict=True
):
    plt.plot(curve, label=name)
plt.axvline(kept, color="k", linestyle=":")
plt.gca().set(xlabel="outer step", ylabel="loss")
plt.legend()
plt.savefig("weights.png")
