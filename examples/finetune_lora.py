"""Adapts the model of `train_digits.py` to a new task by training low-rank updates of its weights.

    python examples/train_digits.py
    python examples/finetune_lora.py

The model reads rows of digits; now it learns to read them backwards when it is asked to. Its
weights stay frozen: LoRA updates of the decoder's attention, experts and shared experts learn the
task, in about a minute on two cores. Then they are merged into the weights and saved as a Hugging
Face folder, runs/finetune_lora/model.
"""

from pathlib import Path

import jax
import numpy as np
import optax
from digits import Digits, Example, ask, collate, load_split, loss_function, picture, read
from tqdm import tqdm

import llama4_eqx as l4
from llama4_eqx.checkpoints import require_writable
from llama4_eqx.processing import byte_tokenizer
from llama4_eqx.processing.tokenizer import Tokenizer
from llama4_eqx.training import LoRA, init_train_state, make_train_step, select

DIGITS, FOLDER = Path("runs/digits"), Path("runs/finetune_lora")
STEPS, ROWS, LEARNING_RATE = 300, 16, 3e-3
IN_A_ROW = 3
TESTS = 256


def main(steps: int = STEPS, folder: Path = FOLDER, digits_folder: Path = DIGITS) -> None:
    if not (digits_folder / "model").is_dir():
        print(f"There is no {digits_folder / 'model'} yet: run examples/train_digits.py first.")
        return
    require_writable(folder / "model")
    model = l4.load_checkpoint(digits_folder / "model")
    tokenizer = byte_tokenizer()
    seen, held_out = load_split()
    random = np.random.default_rng(1)
    tests = [backwards(tokenizer, held_out, random) for _ in range(TESTS)]
    print(f"Before: {right(model, tokenizer, tests):.1%} of {TESTS} rows are read backwards.")

    lora = LoRA(model, "decoder.*_proj", rank=8, key=jax.random.key(0))
    updates, weights = (sum(map(np.size, jax.tree.leaves(x))) for x in (lora.updates, model))
    print(f"Training {updates:,} numbers beside {weights:,} frozen ones.")
    model = train(lora, tokenizer, seen, steps).merged()

    print(f"After: {right(model, tokenizer, tests):.1%}.")
    l4.save_checkpoint(model, folder / "model", overwrite=True)
    tokenizer.save(folder / "model")
    print(f"Merged and saved to {folder / 'model'}. Loaded back, it reads:")
    model = l4.load_checkpoint(folder / "model")
    for one, answer in zip(tests[:5], read(model, tokenizer, tests[:5]), strict=True):
        print(f"    {answer!r} where {one.answer[::-1]!r} stands")


def backwards(
    tokenizer: Tokenizer, source: Digits, random: np.random.Generator, *, vary: bool = False
) -> Example:
    """A row of digits, and what it says from right to left."""
    some = random.integers(0, len(source.values), IN_A_ROW)
    answer = "".join(map(str, source.values[some][::-1]))
    shown = picture(source.images[some], random if vary else None)
    return ask(tokenizer, [shown], "Read it backwards.", answer)


def right(model: l4.Llama4, tokenizer: Tokenizer, tests: list[Example]) -> float:
    """The share of the answers that are right as a whole."""
    answers = read(model.unstacked(), tokenizer, tests)
    return float(np.mean([one.answer == said for one, said in zip(tests, answers, strict=True)]))


def train(lora: LoRA, tokenizer: Tokenizer, seen: Digits, steps: int) -> LoRA:
    """The model with updates that know the task."""
    optimizer = optax.adam(
        optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 30, steps)
    )
    trainable = select(lora, "updates.*")
    step = make_train_step(
        optimizer,
        lambda lora, batch, key: loss_function(lora.attached(), batch, key),
        trainable=trainable,
        clip_norm=1.0,
    )
    state = init_train_state(lora, optimizer, key=jax.random.key(1), trainable=trainable)
    random = np.random.default_rng(0)
    bar = tqdm(range(steps), desc="Training", unit="step")
    for i in bar:
        examples = [backwards(tokenizer, seen, random, vary=True) for _ in range(ROWS)]
        state, metrics = step(state, collate(tokenizer, examples))
        if i % 10 == 0:
            bar.set_postfix_str(f"{float(metrics.aux):.3f} nats per token of the answers")
    return state.model


if __name__ == "__main__":
    main()
