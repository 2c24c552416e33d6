"""The operations of `benches/operations.rs --large` in PyTorch: milliseconds, one line of JSON each, and what the card's
products reach at best (`ceiling` lines, in TFLOP/s and GB/s)."""
import json
import statistics
import time

import torch
import torch.nn.functional as F

batch, seq, hidden, heads, head_dim, ffn, experts, vocab, top_k = 8, 2048, 1024, 8, 256, 2048, 32, 32768, 2
tokens, pairs, device, dtype = batch * seq, batch * seq * top_k, "cuda", torch.bfloat16
grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def timed(work, repeat=4):
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    times = []
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(repeat):
            work()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / repeat)
    return statistics.median(times)


def report(name, work):
    print(json.dumps({"operation": name, "ms": timed(work) * 1e3}), flush=True)


def random(*shape, grad=False):
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(grad)


def backward(output):
    # Like a gradient that arrives from above: not the expanded one of a sum, which some kernels refuse.
    output.backward(torch.ones_like(output))


a, b = random(8192, 8192), random(8192, 8192)
print(json.dumps({"ceiling": "products, TFLOP/s", "value": 2 * 8192**3 / timed(lambda: a @ b) / 1e12}))
a = torch.empty(1 << 30, dtype=torch.uint8, device=device)
b = torch.empty_like(a)
print(json.dumps({"ceiling": "copies, GB/s", "value": 2 * a.numel() / timed(lambda: b.copy_(a)) / 1e9}))
del a, b

x, w = random(tokens, hidden, grad=True), random(hidden, 4 * hidden, grad=True)
with torch.no_grad():
    report("linear", lambda: x @ w)
report("linear, forward and backward", lambda: backward(x @ w))

rows, up, down = random(pairs, hidden, grad=True), random(experts, hidden, 2 * ffn, grad=True), random(experts, ffn, hidden, grad=True)
weights = [100 ** (-e / (experts - 1)) for e in range(experts)]
uneven = [int(pairs * w / sum(weights)) for w in weights]
uneven[0] += pairs - sum(uneven)
for name, counts in [("equal loads", [pairs // experts] * experts), ("unequal loads", uneven)]:
    offs = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)

    def run():
        gate, value = grouped_mm(rows, up, offs=offs).chunk(2, -1)
        return grouped_mm(F.silu(gate) * value, down, offs=offs)

    with torch.no_grad():
        report(f"experts, {name}", run)
    report(f"experts, {name}, forward and backward", lambda: backward(run()))

q, k, v = (random(batch, seq, heads, head_dim, grad=True) for _ in range(3))


def attention():
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)


with torch.no_grad():
    report("attention", attention)
report("attention, forward and backward", lambda: backward(attention()))

angles = torch.rand(seq, head_dim // 2, device=device)
cos, sin = (torch.cat([t, t], -1).to(dtype) for t in (angles.cos(), angles.sin()))


def rotary(x):
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.cat([-x2, x1], -1) * sin


x = random(batch, heads, seq, head_dim)
report("rotary", lambda: rotary(x))
x, w = random(tokens, hidden, grad=True), torch.ones(hidden, device=device, dtype=dtype, requires_grad=True)
with torch.no_grad():
    report("rms_norm", lambda: F.rms_norm(x, (hidden,), w, 1e-6))
report("rms_norm, forward and backward", lambda: backward(F.rms_norm(x, (hidden,), w, 1e-6)))
x = random(pairs, 2 * ffn)
report("swiglu", lambda: F.silu(x[:, :ffn]) * x[:, ffn:])

chosen = (torch.arange(pairs, device=device) * 7919 % experts).view(tokens, top_k)


def order():
    flat = chosen.reshape(-1)
    return flat.argsort(stable=True), torch.bincount(flat, minlength=experts)


report("dispatch order", order)
x, weight, by_expert = random(tokens, hidden), random(tokens, top_k), order()[0]


def dispatch_and_combine():
    token = by_expert // top_k
    y = x[token] * weight.reshape(-1)[by_expert].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, token, y)


report("dispatch and combine", dispatch_and_combine)

labels = torch.arange(tokens, device=device) * 7919 % vocab
x, w = random(tokens, hidden, grad=True), random(hidden, vocab, grad=True)
report("head and cross-entropy, forward and backward", lambda: F.cross_entropy((x @ w).float(), labels).backward())

param = torch.rand(experts * hidden * 2 * ffn, device=device, requires_grad=True)
param.grad = torch.rand_like(param)
optimizer = torch.optim.AdamW([param], 3e-4, (0.9, 0.95), weight_decay=0.1, fused=True)
report("adamw, one layer's gate and up", optimizer.step)
report("sum of squares, the same", lambda: torch.linalg.vector_norm(param.grad))
