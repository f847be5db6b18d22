"""Trains a small multimodal Llama 4 from nothing to read rows of handwritten digits.

    python examples/train_digits.py
    python examples/launch.py --processes 2 --devices 4 examples/train_digits.py

The digits are scikit-learn's: 1,797 pictures of 8 x 8 pixels. The file follows its writers, so its
last fifth, held out for the test, is of hands that the model has never seen. One to four digits in
a row make a picture, which `process` cuts into a tile for each digit and one for the whole; a
question shows one picture or two, and the answer is what stands in them. It takes about five
minutes on two cores. No weights, no network. It leaves in runs/digits: samples.png, loss.png,
experts.png (which expert reads what), and the model as a Hugging Face folder.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from digits import (
    HELD_OUT,
    TILES,
    Digits,
    Example,
    ask,
    collate,
    load_split,
    loss_function,
    picture,
    read,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from optax.contrib import muon
from tqdm import tqdm

import llama4_eqx as l4
from llama4_eqx.checkpoints import require_writable
from llama4_eqx.distributed import DATA, connect, device_put_global, shard, unshard
from llama4_eqx.processing import byte_tokenizer, load_tokenizer
from llama4_eqx.processing.tokenizer import IMAGE_END, IMAGE_START, PATCH, Tokenizer
from llama4_eqx.training import (
    init_train_state,
    make_train_step,
    muon_dimensions,
    next_token_loss,
    router_report,
)

FOLDER = Path("runs/digits")
STEPS, LEARNING_RATE = 1000, 4e-3
# How many digits stand in each picture of a row. All batches have these rows, and so one shape.
TWO = [(2, 2), (1, 3), (2, 2), (3, 1)]
ROWS = [(4,)] * 16 + [(3,)] * 4 + [(2,), (1,)] * 2 + TWO * 2
TEST_ROWS = [row for two in TWO * 16 for row in [(1,), (2,), (3,), (4,), two]]
TEST_BATCHES = 8


def main(steps: int = STEPS, folder: Path = FOLDER) -> None:
    connect()
    require_writable(folder / "model")
    tokenizer = byte_tokenizer()
    seen, held_out = load_split()
    print(f"{len(seen.values):,} digits to learn from, {HELD_OUT} held out.")
    model = l4.Llama4(config(tokenizer), key=jax.random.key(0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    print(f"A model of {parameters:,} parameters on {jax.device_count()} devices.")
    model, losses = train(model, tokenizer, seen, steps)
    l4.save_checkpoint(model, folder / "model", overwrite=True)
    model = unshard(model)
    if jax.process_index() > 0:
        return  # the rest is for one

    random = np.random.default_rng(1)
    tests, answers = [], []
    for _ in tqdm(range(TEST_BATCHES), desc="Reading", unit="batch"):
        batch = [example(tokenizer, held_out, counts, random) for counts in TEST_ROWS]
        tests += batch
        answers += read(model.unstacked(), tokenizer, batch)
    report(tests, answers)

    draw_samples(tests[:40], answers[:40]).savefig(folder / "samples.png")
    figure = Figure((7, 4), layout="constrained")
    figure.subplots(subplot_kw={"xlabel": "step", "ylabel": "loss"}).semilogy(losses)
    figure.savefig(folder / "loss.png")
    draw_experts(model, collate(tokenizer, tests[-64:])).savefig(folder / "experts.png")
    tokenizer.save(folder / "model")
    print(f"Pictures and the model are in {folder}. Loaded back, it reads:")
    model, tokenizer = l4.load_checkpoint(folder / "model"), load_tokenizer(folder / "model")
    for one, answer in zip(tests[-6:], read(model, tokenizer, tests[-6:]), strict=True):
        print(f"    {answer!r} where {one.answer!r} stands")


def config(tokenizer: Tokenizer) -> l4.Llama4Config:
    """Scout's pattern, small: three chunk-local layers, then a global one without positions; a
    mixture of experts in each."""
    text = l4.TextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        num_local_experts=4,
        attention_chunk_size=64,
        floor_scale=256,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.stop_ids,
        pad_token_id=tokenizer.pad_id,
    )
    vision = l4.VisionConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        vision_output_dim=96,
        projector_input_dim=96,
        projector_output_dim=96,
        image_size=TILES.tile_size,
        patch_size=TILES.patch_size,
        pixel_shuffle_ratio=TILES.pixel_shuffle_ratio,
        rope_theta=100.0,
        initializer_range=0.05,
    )
    boi, eoi, image = (tokenizer.token_id(name) for name in (IMAGE_START, IMAGE_END, PATCH))
    return l4.Llama4Config(text, vision, boi, eoi, image)


def example(
    tokenizer: Tokenizer,
    source: Digits,
    counts: tuple[int, ...],
    random: np.random.Generator,
    *,
    vary: bool = False,
) -> Example:
    """Pictures of so many digits each, drawn by lot, with a question and its answer."""
    chosen = [random.integers(0, len(source.values), count) for count in counts]
    pictures = [picture(source.images[some], random if vary else None) for some in chosen]
    answer = " ".join("".join(map(str, source.values[some])) for some in chosen)
    return ask(tokenizer, pictures, "Read it.", answer)


def train(
    model: l4.Llama4, tokenizer: Tokenizer, seen: Digits, steps: int
) -> tuple[l4.Llama4, np.ndarray]:
    """The model after so many steps, and the answers' cross-entropy at each. All devices of all
    processes share the rows of a batch."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, steps // 20, steps, LEARNING_RATE / 100
    )
    optimizer = muon(
        schedule,
        weight_decay=0.05,
        adam_b2=0.98,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=muon_dimensions,
    )
    step = make_train_step(optimizer, loss_function, clip_norm=1.0)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    state = shard(init_train_state(model, optimizer, key=jax.random.key(1)), mesh, DATA)
    random, losses = np.random.default_rng(0), []
    bar = tqdm(range(steps), desc="Training", unit="step", disable=jax.process_index() > 0)
    for i in bar:
        examples = [example(tokenizer, seen, counts, random, vary=True) for counts in ROWS]
        # All get the whole batch, which is small, and take what is theirs.
        batch = device_put_global(
            collate(tokenizer, examples), NamedSharding(mesh, PartitionSpec())
        )
        state, metrics = step(state, batch)
        losses.append(metrics.aux)
        if i % 10 == 0:
            bar.set_postfix_str(f"{float(metrics.aux):.3f} nats per token of the answers")
    return state.model, np.array(losses)


def report(examples: list[Example], answers: list[str]) -> None:
    """Prints how many digits, and how many whole answers, are right for each kind of question."""
    whole, digits = defaultdict(list), defaultdict(list)
    for one, answer in zip(examples, answers, strict=True):
        kind = "two pictures" if len(one.pictures) > 1 else f"{len(one.answer)} in a picture"
        whole[kind].append(answer == one.answer)
        pairs = zip(one.answer, answer.ljust(len(one.answer)), strict=False)
        digits[kind] += [truth == said for truth, said in pairs if truth != " "]
    for kind, right in whole.items():
        print(
            f"{kind:>14}: {np.mean(digits[kind]):.2%} of {len(digits[kind]):,} digits are right, "
            f"{np.mean(right):.2%} of {len(right)} whole answers."
        )


def draw_samples(examples: list[Example], answers: list[str]) -> Figure:
    """Pictures with what the model read; in red where that is wrong."""
    figure = Figure((10, 7), layout="constrained")
    gap = np.full((TILES.tile_size, 4), 255, np.uint8)
    axes = figure.subplots(len(examples) // 5, 5).flat
    for axis, one, answer in zip(axes, examples, answers, strict=True):
        side_by_side = [part for picture in one.pictures for part in (gap, picture)][1:]
        axis.imshow(np.concatenate(side_by_side, axis=1), cmap="gray")
        right = answer == one.answer
        label = answer if right else f"{answer}, not {one.answer}"
        axis.set_title(label, color="black" if right else "red", fontsize=10)
        axis.axis("off")
    return figure


def draw_experts(model: l4.Llama4, batch: dict[str, Any]) -> Figure:
    """How each layer's experts share the tokens of pictures, and those of text."""
    logits = eqx.filter_jit(next_token_loss)(model, **batch).router_logits
    is_patch = batch["tokens"] == model.config.image_token_index
    kinds = {"tokens of pictures": is_patch, "tokens of text": batch["mask"] & ~is_patch}
    figure = Figure((9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (kind, mask) in zip(axes, kinds.items(), strict=True):
        load = np.asarray(router_report(logits, top_k=1, mask=mask).load)
        layers, below = np.arange(1, len(load) + 1), np.zeros(len(load))
        for expert, share in enumerate(load.T, start=1):
            axis.bar(layers, share, bottom=below, label=f"expert {expert}")
            below += share
        axis.set(title=kind, xlabel="layer", xticks=layers, ylabel="share")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


if __name__ == "__main__":
    main()
