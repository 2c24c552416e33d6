#!/usr/bin/env python3
"""Greedy incremental decoding speed of Hugging Face's MixtralForCausalLM on the CPU: random weights, float32.
Needs torch and transformers 5; the last line printed is the result as JSON, with medians over the repeats."""
import argparse
import inspect
import json
import sys
from statistics import median
from time import perf_counter

try:
    import torch
    from transformers import DynamicCache, StaticCache, MixtralConfig, MixtralForCausalLM, __version__
except ImportError as error:
    sys.exit(f"mixtral_decode.py: {error}")

SIZES = {"vocab": 4096, "hidden": 256, "layers": 4, "heads": 4, "head-dim": 128, "ffn": 512, "experts": 16,
         "top-k": 2, "prompt": 128, "new-tokens": 128, "batch": 1, "threads": 2, "repeats": 3}
CHOICES = {"attention": ["sdpa", "eager"], "moe": ["grouped_mm", "eager", "batched_mm"]}
# Recent versions call it `cache`, and spend time on a warning at each step about the old name.
CACHE = "cache" if "cache" in inspect.signature(MixtralForCausalLM.forward).parameters else "past_key_values"


def arguments():
    parser = argparse.ArgumentParser(usage="%(prog)s [OPTIONS]", description=__doc__)
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size, help="default %(default)s")
    for name, choices in CHOICES.items():
        parser.add_argument(f"--{name}", choices=choices, default=choices[0], help="default %(default)s")
    parser.add_argument("--answers", type=int, default=0, help="draw so many to each prompt, and time nothing else")
    parser.add_argument("--compile", action="store_true", help="steps through torch.compile and a static cache")
    args = parser.parse_args()
    if min(getattr(args, name.replace("-", "_")) for name in SIZES) < 1 or args.new_tokens < 2:
        parser.error("sizes must be at least 1, and --new-tokens at least 2, as the prompt pass gives the first")
    if args.top_k > args.experts or args.head_dim % 2:
        parser.error("--top-k must not exceed --experts, and --head-dim must be even")
    return args


def build(args):
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, num_hidden_layers=args.layers, head_dim=args.head_dim,
        num_attention_heads=args.heads, num_key_value_heads=args.heads, intermediate_size=args.ffn,
        num_local_experts=args.experts, num_experts_per_tok=args.top_k, bos_token_id=None, eos_token_id=None,
        max_position_embeddings=args.prompt + args.new_tokens, attn_implementation=args.attention,
        experts_implementation=args.moe)).float().eval()


def loop(model, prompt, count):
    """The tokens, the seconds of the prompt pass, and those of the count - 1 steps after it."""
    times, tokens, cache = [perf_counter()], [prompt], {CACHE: DynamicCache(config=model.config)}
    while len(tokens) <= count:
        logits = model(tokens[-1], use_cache=True, logits_to_keep=1, **cache).logits
        tokens.append(logits[:, -1].argmax(-1, keepdim=True))
        times.append(perf_counter())
    return torch.cat(tokens, 1), times[1] - times[0], times[-1] - times[1]


def generate(model, prompt, count):
    """The tokens and the seconds, the prompt pass with them."""
    start = perf_counter()
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True,
                            min_new_tokens=count, max_new_tokens=count, eos_token_id=None)
    return tokens, perf_counter() - start


def rollouts(model, prompt, answers, count):
    """The seconds of answers that are drawn by the model's probabilities, the prompt pass with them."""
    start = perf_counter()
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, top_k=0,
                            top_p=1.0, num_return_sequences=answers, use_cache=True, min_new_tokens=count,
                            max_new_tokens=count, eos_token_id=None)
    assert tokens.shape == (prompt.shape[0] * answers, prompt.shape[1] + count)
    return perf_counter() - start


def compiled_loop(model, prompt, count):
    """As `loop`, with the steps compiled over a cache of fixed length, for which batched experts are fastest."""
    step, length, times = torch.compile(model, dynamic=False), prompt.shape[1], []
    for _ in range(2):  # the first pass compiles
        model.set_experts_implementation("grouped_mm")
        cache = {CACHE: StaticCache(config=model.config, max_cache_len=length + count)}
        times, start = [perf_counter()], model(prompt, use_cache=True, logits_to_keep=1, **cache).logits
        tokens = [prompt, start[:, -1].argmax(-1, keepdim=True)]
        model.set_experts_implementation("batched_mm")
        times.append(perf_counter())
        for place in range(length, length + count - 1):
            position = torch.full((prompt.shape[0], 1), place)
            logits = step(tokens[-1], use_cache=True, position_ids=position, **cache).logits
            tokens.append(logits[:, -1].argmax(-1, keepdim=True))
        times.append(perf_counter())
    return torch.cat(tokens, 1), times[1] - times[0], times[2] - times[1]


@torch.no_grad()
def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    model = build(args)
    prompt = torch.randint(args.vocab, (args.batch, args.prompt), generator=torch.Generator().manual_seed(0))
    _ = loop(model, prompt, 8), generate(model, prompt, 8)  # warm-up
    if args.answers:
        times = [rollouts(model, prompt, args.answers, args.new_tokens) for _ in range(args.repeats)]
        print(json.dumps({
            "peer": f"transformers {__version__} on torch {torch.__version__}", "experts": args.moe,
            "rollout_tokens_per_s": args.batch * args.answers * args.new_tokens / median(times)}))
        return
    speeds, steps = [], args.batch * (args.new_tokens - 1)
    for _ in range(args.repeats):
        tokens, prompt_s, loop_s = loop(model, prompt, args.new_tokens)
        same, all_s = generate(model, prompt, args.new_tokens)
        if args.compile:
            tokens, prompt_s, loop_s = compiled_loop(model, prompt, args.new_tokens)
        if not torch.equal(tokens, same):
            sys.exit("mixtral_decode.py: the loop and generate chose different tokens")
        speeds.append((prompt.numel() / prompt_s, steps / loop_s, steps / (all_s - generate(model, prompt, 1)[1])))
    by_prompt, by_loop, by_generate = (round(median(each), 1) for each in zip(*speeds))
    print(json.dumps({
        "peer": f"transformers {__version__} on torch {torch.__version__}", "threads": args.threads,
        "prompt_tokens_per_s": by_prompt, "decode_tokens_per_s": max(by_loop, by_generate),
        "decode_tokens_per_s_generate": by_generate, "decode_tokens_per_s_loop": by_loop,
        "parameters": sum(weight.numel() for weight in model.parameters())}))


if __name__ == "__main__":
    main()
