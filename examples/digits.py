"""Pictures of handwritten digits as chats: what `train_digits.py` and `finetune_lora.py` share.

The pictures are scikit-learn's 8 x 8 digits, sorted by writer, so that the last ones are by writers
that no model trained on the others has seen.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import llama4_eqx as l4
from llama4_eqx.processing import ImageProcessor, process
from llama4_eqx.processing.tokenizer import Tokenizer
from llama4_eqx.training import next_token_loss, router_report

HELD_OUT = 360
WARP = 1.5  # how far the corners of a digit may move in training, in its pixels
TILES = ImageProcessor(tile_size=16, patch_size=4)


class Digits(NamedTuple):
    """Pictures of 8 x 8 pixels, from black to white, and what they are of."""

    images: np.ndarray
    values: np.ndarray


class Example(NamedTuple):
    """A conversation as tokens and tiles; the tokens end with the answer's bytes and `<|eot|>`."""

    tokens: np.ndarray
    tiles: np.ndarray
    pictures: list[np.ndarray]
    answer: str


def load_split() -> tuple[Digits, Digits]:
    """Those to learn from, and those that are held out."""
    pixels, values = load_digits(return_X_y=True)
    values = np.asarray(values)
    images = np.rint(np.reshape(pixels, (-1, 8, 8)) * 255 / 16).astype(np.uint8)
    return (
        Digits(images[:-HELD_OUT], values[:-HELD_OUT]),
        Digits(images[-HELD_OUT:], values[-HELD_OUT:]),
    )


def ask(tokenizer: Tokenizer, pictures: list[np.ndarray], question: str, answer: str) -> Example:
    """A user's turn of pictures and a question, and the assistant's answer."""
    content = [*[{"type": "image"}] * len(pictures), {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    inputs = process(tokenizer, chat, pictures, image_processor=TILES, add_generation_prompt=False)
    return Example(inputs.tokens, np.asarray(inputs.pixel_values), pictures, answer)


def picture(images: np.ndarray, random: np.random.Generator | None) -> np.ndarray:
    """Images of digits in a row, twice as large; with a `random`, each is turned, moved, warped and
    inked a little differently."""
    side = TILES.tile_size
    row = np.zeros((side, side * (len(images) + 1)), np.uint8)
    for i, image in enumerate(np.pad(images, ((0, 0), (4, 4), (4, 4)))):
        # Where in the image, of which the digit is the middle half, the corners of a place in the
        # row come from: upper left, lower left, lower right, upper right.
        corners, ink, fade = np.array([[-8, -4], [-8, 4], [8, 4], [8, -4]]), 1.0, 1.0
        if random is not None:
            turn, (ink, fade) = random.uniform(-0.3, 0.3), np.exp(random.uniform(-0.3, 0.3, 2))
            cos, sin = np.cos(turn), np.sin(turn)
            corners = corners @ [[cos, sin], [-sin, cos]] * np.exp(random.uniform(-0.2, 0.2))
            corners = corners + random.uniform(-WARP, WARP, (4, 2)) + random.uniform(-0.7, 0.7, 2)
        drawn = Image.fromarray(image).transform(
            (2 * side, side),
            Image.Transform.QUAD,
            tuple((corners + 8).flat),
            Image.Resampling.BICUBIC,
        )
        inked = np.clip(ink * 255 * (np.asarray(drawn) / 255) ** fade, 0, 255).astype(np.uint8)
        place = row[:, i * side : (i + 2) * side]
        np.maximum(place, inked, out=place)
    return row[:, side // 2 : -side // 2]


def collate(tokenizer: Tokenizer, examples: list[Example]) -> dict[str, Any]:
    """The arguments of `next_token_loss`, padded on the right; only answers are to be learnt."""
    ends = np.array([[len(one.tokens)] for one in examples])
    starts = ends - [[len(one.answer) + 1] for one in examples]
    place = np.arange(ends.max())
    tokens = np.full((len(examples), len(place)), tokenizer.pad_id, np.int32)
    tokens[place < ends] = np.concatenate([one.tokens for one in examples])
    return {
        "tokens": jnp.asarray(tokens),
        "mask": jnp.asarray(place < ends),
        "target_mask": jnp.asarray((starts <= place) & (place < ends)),
        "pixel_values": jnp.asarray(np.concatenate([one.tiles for one in examples])),
    }


def loss_function(model: l4.Llama4, batch: dict[str, Any], key: jax.Array) -> tuple[Any, Any, Any]:
    """The loss, with a little of the experts' imbalance; the tokens that it is a mean over; and the
    cross-entropy alone."""
    loss = next_token_loss(model, **batch, key=key)
    balance = router_report(loss.router_logits, top_k=1, mask=loss.mask).balance_loss.mean()
    return loss.token.total + 0.01 * balance, loss.token.num_tokens, loss.token.cross_entropy


def read(model: l4.Llama4, tokenizer: Tokenizer, examples: list[Example]) -> list[str]:
    """What the model, asked about the examples' pictures, answers. It gets no answers to see."""
    batch = collate(tokenizer, examples)
    new = l4.generate(
        model,
        jnp.where(batch["target_mask"], tokenizer.pad_id, batch["tokens"]),
        mask=batch["mask"] & ~batch["target_mask"],
        pixel_values=batch["pixel_values"],
        max_new_tokens=max(len(one.answer) for one in examples) + 1,
        stop_ids=tokenizer.stop_ids,
    )
    return [tokenizer.decode(row) for row in np.asarray(new)]
