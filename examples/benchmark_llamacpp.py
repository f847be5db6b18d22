"""Times decoding and reading a prompt on this CPU against llama.cpp, in one run.

    pip install llama-cpp-python gguf
    python examples/benchmark_llamacpp.py      # or: python examples/benchmark.py llamacpp

The same random weights go into a GGUF file for each of llama.cpp's formats; its logits are compared
with ours first. Alternatives take turns and the median of each is printed, with ratios.
"""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import gguf  # pyright: ignore[reportMissingImports]
import jax
import jax.numpy as jnp
import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np
from benchmark import CONFIG

import llama4_eqx as l4

# Chunks as long as those that llama.cpp has fixed, and no scaling of RoPE.
SMALL = dataclasses.replace(CONFIG, attention_chunk_size=8192, rope_scaling=None)
LARGE = dataclasses.replace(
    SMALL,
    hidden_size=2048,
    intermediate_size=2048,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_hidden_layers=4,
)
PROMPT, NEW, ROUNDS = 512, 64, 5
FORMATS = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
}


def main() -> None:
    for config in (SMALL, LARGE):
        compare(config)


def compare(config: l4.TextConfig) -> None:
    """One line for each form of the weights, here and there."""
    model = l4.Llama4(l4.Llama4Config(config), key=jax.random.key(0))
    prompt = jax.random.randint(jax.random.key(1), (1, PROMPT), 0, config.vocab_size)
    ours = {
        "float32": model.unstacked(experts=True),
        "int8": l4.quantize(model).unstacked(experts=True),
    }
    print(f"hidden {config.hidden_size}, {config.num_hidden_layers} layers, 16 experts:")
    with tempfile.TemporaryDirectory() as folder:
        theirs = {name: opened(model, Path(folder) / f"{name}.gguf", name) for name in FORMATS}
        last = np.asarray(model(prompt).logits[0, -1])
        told = read(theirs["F32"], prompt)
        print(f"  the last logits differ by {np.abs(told - last).max() / np.abs(last).max():.0e}")
        runs = {name: ours_run(form, prompt) for name, form in ours.items()}
        runs |= {f"llama.cpp {name}": theirs_run(form, prompt) for name, form in theirs.items()}
        rates = interleaved(runs)
    prompt_rate, decode_rate = rates["llama.cpp F32"]
    for name, (reading, decoding) in rates.items():
        print(
            f"  {name:15} decode {decoding:6.1f} tokens/s, {decoding / decode_rate:5.2f} of "
            f"llama.cpp's F32; prompt {reading:7.1f}, {reading / prompt_rate:5.2f}"
        )


Run = Callable[[int], object]


def interleaved(runs: dict[str, Run]) -> dict[str, tuple[float, float]]:
    """Median tokens per second of reading and of decoding."""
    times: dict[tuple[str, int], list[float]] = {}
    for i in range(ROUNDS + 1):
        for name, run in runs.items():
            for new in (1, 1 + NEW):
                start = time.perf_counter()
                jax.block_until_ready(run(new))
                if i > 0:
                    times.setdefault((name, new), []).append(time.perf_counter() - start)
    seconds = {key: median(each) for key, each in times.items()}
    return {
        name: (PROMPT / seconds[name, 1], NEW / (seconds[name, 1 + NEW] - seconds[name, 1]))
        for name in runs
    }


def ours_run(model: l4.Llama4, prompt: jax.Array) -> Run:
    return lambda new: l4.generate(model, prompt, max_new_tokens=new)


def theirs_run(model: llama_cpp.Llama, prompt: jax.Array) -> Run:
    def run(new: int) -> None:
        logits = read(model, prompt)
        for _ in range(new - 1):
            model.eval([int(logits.argmax())])
            logits = last_logits(model)

    return run


def read(model: llama_cpp.Llama, prompt: jax.Array) -> np.ndarray:
    """The logits after the prompt."""
    model.reset()
    model._ctx.kv_cache_clear()
    model.eval(prompt[0].tolist())
    return last_logits(model)


def last_logits(model: llama_cpp.Llama) -> np.ndarray:
    pointer = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return np.ctypeslib.as_array(pointer, (model.n_vocab(),))


def opened(model: l4.Llama4, file: Path, name: str) -> llama_cpp.Llama:
    """The model in llama.cpp, its matrices in that format."""
    write_gguf(model, file, FORMATS[name])
    threads = len(os.sched_getaffinity(0))
    return llama_cpp.Llama(
        str(file),
        n_ctx=PROMPT + NEW + 8,
        n_batch=PROMPT,
        n_ubatch=PROMPT,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )


def write_gguf(model: l4.Llama4, file: Path, form: gguf.GGMLQuantizationType) -> None:
    config, writer = model.config.text_config, gguf.GGUFWriter(file, "llama4")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size_mlp)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_interleave_moe_layer_step(1)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")

    def add(name: str, weight: jax.Array, rows: int | None = None) -> None:
        """A weight; with `rows`, as matrices of so many rows."""
        data = np.asarray(weight, np.float32)
        if rows is not None:
            data = data.reshape(*data.shape[: data.ndim - 2], rows, -1)
        plain = rows is None or name.endswith("ffn_gate_inp.weight")
        used = gguf.GGMLQuantizationType.F32 if plain else form
        writer.add_tensor(name, gguf.quants.quantize(data, used), raw_dtype=used)

    head, hidden = model.lm_head, config.hidden_size
    assert head is not None
    add("token_embd.weight", model.embed_tokens, config.vocab_size)
    add("output_norm.weight", model.decoder.norm.weight)
    add("output.weight", head, config.vocab_size)
    for i, layer in enumerate(model.decoder.layers()):
        attention: Any = layer.self_attn
        moe: Any = layer.feed_forward
        add(f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight)
        add(f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight)
        for letter in "qkv":
            weight = getattr(attention, f"{letter}_proj")
            add(
                f"blk.{i}.attn_{letter}.weight",
                weight.reshape(-1, hidden),
                weight.shape[0] * weight.shape[1],
            )
        add(f"blk.{i}.attn_output.weight", attention.o_proj.reshape(hidden, -1), hidden)
        add(f"blk.{i}.ffn_gate_inp.weight", moe.router, config.num_local_experts)
        for kind in ("gate", "up", "down"):
            name = f"{kind}_proj"
            experts = jnp.swapaxes(getattr(moe.experts, name), 1, 2)
            add(f"blk.{i}.ffn_{kind}_exps.weight", experts, experts.shape[1])
            shared = getattr(moe.shared_expert, name)
            add(f"blk.{i}.ffn_{kind}_shexp.weight", shared, shared.shape[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
