"""Which training examples hurt: one way back through a training gives what each example does to the loss on others.

From scikit-learn's digits, 300 to train on, 30 of them with a wrong label. rd.attribute gives each example's influence
on the loss of each of 200 other digits. Expect: most of the wrong labels at the top of the list. A training without the
30 at the top is about as much better as the influences say, and better on 1,297 digits that nothing has seen, too.
"""

import sys

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import revdistill as rd

LR, EPOCHS = (0.05, 6) if "--small" in sys.argv else (0.02, 40)
torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
train, queries, test = ((x[rows], y[rows]) for rows in torch.randperm(len(x)).split((300, 200, 1297)))
flipped = torch.randperm(300) < 30
train[1][flipped] = (train[1][flipped] + torch.randint(1, 10, (30,))) % 10

net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 10))
each_loss, params = rd.from_module(net, torch.nn.CrossEntropyLoss(reduction="none"))  # (params, (x, y)) -> [B]
order = rd.epochs(len(flipped), 50, EPOCHS)  # row k: the examples of step k
optimizer = rd.SGD(LR, momentum=0.9)

found = rd.attribute(each_loss, params, train, optimizer, order=order, queries=queries)
influence = found.scores.mean(0)  # [300], over the queries: above 0, leaving it out lowers the loss
worst = influence.argsort(descending=True)[:30]
own_loss = each_loss(found.theta, train).detach()  # what costs nothing: how badly each example is fitted itself
by_loss = own_loss.argsort(descending=True)[:30]
print(
    f"of 30 wrong labels, among the 30 first: {flipped[worst].sum()} by influence, {flipped[by_loss].sum()} by own loss"
)


def weighted_loss(theta, batch):
    weights, *examples = batch
    return (weights * each_loss(theta, examples)).mean()


weights = torch.ones(300).index_fill(0, worst, 0.0)
without = rd.unroll(weighted_loss, params, rd.Minibatches((weights, *train), order), optimizer, steps=len(order))
predicted, before = found.predict(worst).mean().item(), found.losses.mean().item()
after = each_loss(without, queries).mean().item()
print(f"loss of the queries: {before:.3f}; without the 30 first {after:.3f}, predicted {predicted:.3f}")
before_new, after_new = (each_loss(theta, test).mean().item() for theta in (found.theta, without))
print(f"loss of new digits: {before_new:.3f}; without the 30 first {after_new:.3f}")
plt.figure(figsize=(6, 2.6), layout="constrained")
plt.scatter(own_loss[~flipped], influence[~flipped], s=8, label="right label")
plt.scatter(own_loss[flipped], influence[flipped], s=16, label="wrong label")
plt.gca().set(xlabel="loss of the training example itself", ylabel="influence on other digits")
plt.legend()
plt.savefig("flipped_labels.png")
