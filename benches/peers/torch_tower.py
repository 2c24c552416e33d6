"""The peer of `cargo bench --bench tower`: InternViT-300M in PyTorch, its tokens and its gradients.

    python torch_tower.py [--device cuda] [--precision bf16] [--tiles 8] [--blocks 24] [--steps 10] [--compile]

Weights are in f32 and cast for every pass, as in the bench, by autocast.
"""
import argparse
import json
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

WIDTH, HEADS, GRID, PATCH = 1024, 16, 32, 14


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, 1e-6), nn.LayerNorm(WIDTH, 1e-6)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.ls1, self.ls2 = (nn.Parameter(0.1 * torch.ones(WIDTH)) for _ in range(2))

    def forward(self, x):
        b, n, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, HEADS, w // HEADS).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, w)
        x = x + self.ls1.to(x.dtype) * self.proj(a)
        return x + self.ls2.to(x.dtype) * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Tower(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos = nn.Parameter(torch.randn(1, GRID * GRID + 1, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, pixels):
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.to(x.dtype).expand(x.shape[0], 1, WIDTH), x], 1) + self.pos.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return x


def timed(steps, run):
    times = []
    for i in range(steps + 3):
        t = time.perf_counter()
        run()
        if i >= 3:
            times.append(time.perf_counter() - t)
    return statistics.median(times)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--device", default="cpu")
    p.add_argument("--precision", default="f32")
    p.add_argument("--tiles", type=int, default=8)
    p.add_argument("--blocks", type=int, default=24)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--compile", action="store_true")
    a = p.parse_args()
    torch.manual_seed(0)
    tower = Tower(a.blocks).to(a.device)
    run = torch.compile(tower) if a.compile else tower
    narrow = a.precision == "bf16"
    pixels = torch.randn(a.tiles, 3, GRID * PATCH, GRID * PATCH, device=a.device)
    pixels = pixels.bfloat16() if narrow else pixels

    def forward():
        with torch.no_grad(), torch.autocast(a.device, torch.bfloat16, enabled=narrow):
            run(pixels)[:1].float().sum().item()

    def both():
        with torch.autocast(a.device, torch.bfloat16, enabled=narrow):
            loss = run(pixels).float().mean()
        tower.zero_grad(set_to_none=True)
        loss.backward()
        tower.cls.grad.sum().item()

    f, b = timed(a.steps, forward), timed(a.steps, both)
    print(json.dumps({"torch": torch.__version__, "device": a.device, "precision": a.precision, "tiles": a.tiles,
                      "compiled": a.compile, "forward_s": f, "forward_tiles_per_s": a.tiles / f,
                      "forward_backward_s": b, "forward_backward_tiles_per_s": a.tiles / b}))


if __name__ == "__main__":
    main()
