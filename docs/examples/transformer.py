"""Which of two sources a small transformer should learn from: a weight for each example, through AdamW and dropout.

From scikit-learn's digits, each read as 8 tokens, the rows of the image. Of 300 to train on, half come from a source
that counts from one: its labels are all one too high. The weights of the 300 descend on the loss on 200 digits with the
labels that are wanted. Expect: weights that tell the sources apart, and far more of the new digits read as wanted.
"""

import sys

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import revdistill as rd

EPOCHS, OUTER_STEPS = (3, 3) if "--small" in sys.argv else (12, 25)
torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.images).float() / 16, torch.tensor(digits.target)
train, validation, test = ((x[rows], y[rows]) for rows in torch.randperm(len(x)).split((300, 200, 1297)))
other = torch.arange(300) >= 150  # the source of each example
train[1][other] = (train[1][other] + 1) % 10

layers = [torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True) for _ in range(2)]
net = torch.nn.Sequential(torch.nn.Linear(8, 32), *layers, torch.nn.Flatten(), torch.nn.Linear(8 * 32, 10))
each_loss, params = rd.from_module(net, torch.nn.CrossEntropyLoss(reduction="none"))  # (params, (x, y)) -> [B]
order = rd.epochs(300, 50, EPOCHS)  # row k: the examples of step k


def loss(theta, batch):
    logits, *examples = batch
    return (2 * logits.sigmoid() * each_loss(theta, examples)).mean()


def trained():  # with dropout, and left in the mode in which losses and accuracy are asked for
    net.train()
    batches, adamw = rd.Minibatches((logits, *train), order), rd.AdamW(0.002, eps=1e-3, weight_decay=0.01)
    theta = rd.unroll(loss, params, batches, adamw, steps=len(order))
    net.eval()
    return theta, (torch.func.functional_call(net, theta, test[0]).argmax(1) == test[1]).float().mean().item()


logits = torch.zeros(300, requires_grad=True)  # a weight is 2 sigmoid(logit): 1 at the start
outer = torch.optim.Adam([logits], lr=1.0)
before = trained()[1]
for _ in range(OUTER_STEPS):
    outer.zero_grad()
    each_loss(trained()[0], validation).mean().backward()
    outer.step()

after, weights = trained()[1], 2 * logits.detach().sigmoid()
print(f"new digits read as wanted: {before:.1%} with equal weights, {after:.1%} with learned ones")
print(
    f"mean weight: {weights[~other].mean():.2f} of the source that is wanted, {weights[other].mean():.2f} of the other"
)
plt.figure(figsize=(6, 2.6), layout="constrained")
plt.hist([weights[~other].tolist(), weights[other].tolist()], 20, label=["source that is wanted", "other source"])
plt.gca().set(xlabel="learned weight", ylabel="examples")
plt.legend()
plt.savefig("transformer.png")
