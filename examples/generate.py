"""Continues a prompt, or answers it, with a Llama 4 checkpoint of your own.

    python examples/generate.py FOLDER "Once upon a time"
    python examples/generate.py FOLDER "Why is the sky blue?" --chat

FOLDER is a Hugging Face checkpoint folder: config.json, safetensors, and a tokenizer.json or Meta's
tokenizer.model.
"""

import argparse

import jax
import jax.numpy as jnp

import llama4_eqx as l4
from llama4_eqx.checkpoints import load_generation_config
from llama4_eqx.processing import encode_chat, load_tokenizer

WITHOUT_FOLDER = """\
This example needs a checkpoint folder. You can make a small one in about two minutes:

    python examples/pretrain_text.py
    python examples/generate.py runs/pretrain_text/model "The for statement"

Or use a released one: accept the licence on its Hugging Face page, then

    hf download meta-llama/Llama-4-Scout-17B-16E-Instruct --local-dir scout
    python examples/generate.py scout "Why is the sky blue?" --chat
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Continues a prompt with a Llama 4 checkpoint.")
    parser.add_argument("folder", nargs="?", help="a Hugging Face checkpoint folder")
    parser.add_argument("prompt", nargs="?", default="The ")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, help="0 is greedy; else as the folder says")
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.folder is None:
        print(WITHOUT_FOLDER)
        return

    tokenizer = load_tokenizer(options.folder)
    # Without an accelerator float32 is several times faster than bfloat16.
    on_cpu = jax.default_backend() == "cpu"
    model = l4.load_checkpoint(options.folder, dtype=jnp.float32 if on_cpu else None)
    if options.chat:
        prompt = encode_chat(tokenizer, [{"role": "user", "content": options.prompt}])
    else:
        prompt = tokenizer.encode(options.prompt, bos=True)
        print(options.prompt, end="", flush=True)
    settings = load_generation_config(options.folder)
    if options.temperature == 0:
        sampler = l4.Greedy()
    elif options.temperature is None and settings is not None:
        sampler = settings.sampler()
    else:
        sampler = l4.Sample(options.temperature or 0.6, top_p=options.top_p)
    stream = tokenizer.stream()
    for token in l4.stream(
        model.unstacked(experts=on_cpu),
        jnp.asarray(prompt, jnp.int32),
        max_new_tokens=options.max_new_tokens,
        sampler=sampler,
        key=jax.random.key(options.seed),
        stop_ids=model.config.text_config.stop_ids,
    ):
        print(stream.push(token), end="", flush=True)
    print(stream.flush())


if __name__ == "__main__":
    main()
