"""Train Kronecker layers from scratch: a small language model, beside a dense one.

It reads four words and predicts the next, on the sentences that come with the package. Table,
layers and the tied decoder are factorised; the dense model has the same sizes and the same steps.
"""

import re
import time
from collections import Counter
from importlib import resources
from math import exp

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kron_kernels as kk
from kroneckerbert.data import read_lines

WORDS, WIDTH, HIDDEN, CONTEXT = 2000, 128, 512, 4
STEPS, BATCH = 300, 256


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        nn.init.normal_(self.table.weight, std=0.1)
        self.up = nn.Linear(CONTEXT * WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def loss(self, words: Tensor, target: Tensor) -> Tensor:
        h = self.down(F.gelu(self.up(self.table(words).flatten(1))))
        return F.cross_entropy(h @ self.table.weight.T, target)


class Kronecker(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = kk.KroneckerEmbedding(WORDS, WIDTH, b_size=4)
        self.table.reset_parameters(std=0.1)
        up = kk.KroneckerLinear(CONTEXT * WIDTH, HIDDEN, a_shape=(8, 2))
        down = kk.KroneckerLinear(HIDDEN, WIDTH, a_shape=(2, 8))
        self.block = kk.KroneckerFeedForward(up, down)  # the hidden vector is never stored

    def loss(self, words: Tensor, target: Tensor) -> Tensor:
        h = self.block(self.table(words).flatten(1))
        return self.table.cross_entropy(h, target)  # a part of the logits at a time


def corpus() -> tuple[Tensor, Tensor]:
    """Windows of CONTEXT + 1 words, as numbers: to train on, and held out."""
    with resources.as_file(resources.files("kroneckerbert.demo") / "text/sentences.txt.gz") as path:
        sentences = [re.findall(r"[\w']+|[.!?]", line.lower()) for line in read_lines(path)]
    counts = Counter(word for sentence in sentences for word in sentence)
    number = {word: i for i, (word, _) in enumerate(counts.most_common(WORDS - 1), 1)}
    windows = [
        [number.get(word, 0) for word in sentence[i : i + CONTEXT + 1]]
        for sentence in sentences
        for i in range(len(sentence) - CONTEXT)
    ]
    rows = torch.tensor(windows)[torch.randperm(len(windows))]
    return rows[5000:], rows[:5000]


torch.manual_seed(0)
torch.set_num_threads(1)  # times are steadier so
train, held_out = corpus()
frequencies = train[:, -1].bincount(minlength=WORDS).float() + 1
guess = F.cross_entropy(frequencies.log().expand(len(held_out), -1), held_out[:, -1])
print(f"{len(train):,} windows; perplexity of the words' frequencies alone {exp(guess):.0f}")

for make in (Dense, Kronecker):
    torch.manual_seed(1)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    start = time.perf_counter()
    for _ in range(STEPS):
        rows = train[torch.randint(len(train), (BATCH,))]
        loss = model.loss(rows[:, :-1], rows[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        perplexity = exp(model.loss(held_out[:, :-1], held_out[:, -1]))
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{make.__name__:10}{size:9,} parameters, perplexity {perplexity:4.0f} "
        f"after {STEPS} steps in {seconds:.0f} s"
    )
