"""The peer of `cargo bench --bench pages`: pages a second through Pillow, and a training step of the toy with an image
tower before it in PyTorch.

    python torch_pages.py CONFIG.json DIR [--threads 2] [--steps 10]

DIR holds the pages, which the bench writes. Pages go through worker processes, one for each thread.
"""
import argparse
import glob
import json
import multiprocessing
import os
import statistics
import sys
import time

import numpy
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, os.path.dirname(__file__))
from torch_yuan import Yuan  # noqa: E402

ROWS, TOKENS, TILES_PER_ROW, SIDE, GRID, WIDTH = 8, 256, 2, 224, 16, 256
MEAN = numpy.array([0.485, 0.456, 0.406], numpy.float32)
STD = numpy.array([0.229, 0.224, 0.225], numpy.float32)


def grid(w, h, tile, most):
    found, best = (1, 1), float("inf")
    pairs = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if c * r <= most]
    for c, r in sorted(pairs, key=lambda pair: pair[0] * pair[1]):
        difference, growth = abs(w / h - c / r), abs(tile * (c + r) - (w + h)) / (w + h)
        if difference < best and growth <= 1.0:
            found, best = (c, r), difference
        elif difference == best and w * h > 0.5 * tile * tile * c * r:
            found = (c, r)
    return found


def preprocess(path):
    page, tile = Image.open(path).convert("RGB"), 448
    c, r = grid(*page.size, tile, 9)
    whole = page.resize((tile * c, tile * r), Image.BICUBIC)
    tiles = [whole.crop((x * tile, y * tile, (x + 1) * tile, (y + 1) * tile)) for y in range(r) for x in range(c)]
    if len(tiles) > 1:
        tiles.append(page.resize((tile, tile), Image.BICUBIC))
    arrays = [((numpy.asarray(t, numpy.float32) / 255.0 - MEAN) / STD).transpose(2, 0, 1) for t in tiles]
    return len([numpy.ascontiguousarray(array) for array in arrays])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, 1e-6), nn.LayerNorm(WIDTH, 1e-6)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.ls1, self.ls2 = (nn.Parameter(0.1 * torch.ones(WIDTH)) for _ in range(2))

    def forward(self, x):
        b, n, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, 8, w // 8).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, w)
        x = x + self.ls1 * self.proj(a)
        return x + self.ls2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Seeing(nn.Module):
    def __init__(self, c):
        super().__init__()
        h, f = c["hidden_size"], c["ffn_hidden_size"]
        self.language = Yuan(c, TOKENS, 0.0)
        self.patch = nn.Conv2d(3, WIDTH, 14, 14)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos = nn.Parameter(torch.randn(1, GRID * GRID + 1, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.gate, self.up = (nn.Linear(4 * WIDTH, f, bias=False) for _ in range(2))
        self.down, self.norm = nn.Linear(f, h, bias=False), nn.RMSNorm(h, 1e-6)

    def rows(self, pixels):
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], 1, WIDTH), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        b, half = x.shape[0], GRID // 2
        x = x[:, 1:].reshape(b, half, 2, half, 2, WIDTH).permute(0, 1, 3, 5, 2, 4).reshape(b, half * half, 4 * WIDTH)
        return self.norm(self.down(F.silu(self.up(x)) * self.gate(x)))

    def forward(self, ids, pixels):
        m = self.language
        x = m.embed(ids).clone()
        rows = TILES_PER_ROW * (GRID // 2) ** 2
        x[:, 1:1 + rows] = self.rows(pixels).reshape(ids.shape[0], rows, -1)
        for n1, attn, n2, moe in zip(m.n1, m.attn, m.n2, m.moe):
            x = x + attn(n1(x), m.rope)
            x = x + moe(n2(x))
        logits = m.head(m.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


def main():
    p = argparse.ArgumentParser()
    p.add_argument("config")
    p.add_argument("directory")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--steps", type=int, default=10)
    a = p.parse_args()
    pages = sorted(glob.glob(os.path.join(a.directory, "*.png")) + glob.glob(os.path.join(a.directory, "*.jpg")))
    best, tiles = float("inf"), 0
    with multiprocessing.get_context("fork").Pool(a.threads) as pool:
        for _ in range(4):
            t = time.perf_counter()
            tiles = sum(pool.map(preprocess, pages, chunksize=1))
            best = min(best, time.perf_counter() - t)
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    c = json.load(open(a.config))
    model = Seeing(c)
    opt = torch.optim.AdamW(model.parameters(), 3e-4, (0.9, 0.95), weight_decay=0.1)
    times = []
    for i in range(a.steps + 3):
        ids = torch.randint(0, c["vocab_size"], (ROWS, TOKENS))
        pixels = torch.randn(ROWS * TILES_PER_ROW, 3, SIDE, SIDE)
        t = time.perf_counter()
        loss = model(ids, pixels)
        loss.backward()
        opt.step()
        opt.zero_grad()
        assert torch.isfinite(loss)
        if i >= 3:
            times.append(time.perf_counter() - t)
    step = statistics.median(times)
    print(json.dumps({"torch": torch.__version__, "threads": a.threads, "pages_per_s": len(pages) / best, "tiles": tiles,
                      "median_step_s": step, "tokens_per_s": ROWS * TOKENS / step}))


if __name__ == "__main__":
    main()
