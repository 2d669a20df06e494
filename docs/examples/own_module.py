"""Which inputs matter: a penalty for each input, learned through whole trainings of one's own module and loss.

Of 20 inputs 3 say something about y; 17 only help to learn the noise of 200 made-up points by heart. The loss has a
penalty for each input's weights. These and the learning rate descend on the error on 200 other points. Expect: smaller
penalties for the 3, and a smaller error on points that nothing has seen than with the best of seven penalties for all.
"""

import sys

import matplotlib.pyplot as plt
import torch

import revdistill as rd

OUTER_STEPS = 6 if "--small" in sys.argv else 40
torch.manual_seed(0)
x = torch.randn(2400, 20)
y = (2 * x[:, 0]).sin() + x[:, 1] - (2 * x[:, 2]).tanh() + 0.3 * torch.randn(2400)
train, validation, test = zip(x.split((200, 200, 2000)), y.split((200, 200, 2000)), strict=True)


# %% One's own module, and one's own loss: any torch code of parameters, batch and hyperparameters.
class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.mix, self.out = (torch.nn.Linear(*size) for size in ((20, 32), (32, 32), (32, 1)))

    def forward(self, x):
        h = self.read(x).tanh()
        return self.out(h + self.mix(h).tanh())[:, 0]


error, params = rd.from_module(Residual(), torch.nn.functional.huber_loss)  # error(theta, (x, y)) -> scalar


def loss(theta, batch, penalty):
    return error(theta, batch) + (penalty.exp() * theta["read.weight"].square()).sum()


def trained(penalty, lr):  # the logarithms of both; [train] is a list of one batch, which each step takes
    return rd.unroll(loss, params, [train], rd.SGD(lr.exp(), momentum=0.9), steps=100, hyper=penalty)


# %% First one penalty for all inputs. Then each outer step trains anew, and descends on the error on other points.
lr, penalty = torch.tensor(-2.5, requires_grad=True), torch.full((20,), -6.0, requires_grad=True)
one = [trained(torch.full((20,), value), lr.detach()) for value in (-6.0, -8.0, -7.0, -5.0, -4.0, -3.0, -2.0)]
outer = torch.optim.Adam([{"params": penalty, "lr": 0.5}, {"params": lr, "lr": 0.05}], betas=(0.5, 0.99))
for _ in range(OUTER_STEPS):
    outer.zero_grad()
    error(trained(penalty, lr), validation).backward()
    outer.step()

# %% The error on points that nothing has seen, and the penalties.
best = min(one, key=lambda theta: error(theta, validation))
start, best, learned = (error(theta, test).item() for theta in (one[0], best, trained(penalty, lr)))
print(f"Huber loss on new points: start {start:.3f}, best of seven {best:.3f}, learned {learned:.3f}")
plt.figure(figsize=(6, 2.6), layout="constrained")
plt.bar(range(20), penalty.exp().tolist(), color=["C1"] * 3 + ["C0"] * 17, log=True)
plt.gca().set(xlabel="input (y depends on the orange ones)", ylabel="learned penalty", xticks=range(20))
plt.savefig("own_module.png")
