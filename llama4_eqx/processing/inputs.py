"""Chats with images to what the model is called with."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int32

from llama4_eqx.processing.chat import Message, encode_chat
from llama4_eqx.processing.images import ImageProcessor, ImageSource, TiledImage
from llama4_eqx.processing.special_tokens import EOM, EOT, HEADER_END, HEADER_START, IMAGE
from llama4_eqx.processing.tokenizer import Tokenizer


class Inputs(NamedTuple):
    """A prompt: its token ids, and the tiles of all its images in reading order, if any."""

    tokens: Int32[np.ndarray, "seq"]
    pixel_values: Float[np.ndarray, "tiles channels height width"] | None


def process(
    tokenizer: Tokenizer,
    messages: Iterable[Message | Mapping[str, Any]],
    images: Iterable[ImageSource] = (),
    *,
    image_processor: ImageProcessor | None = None,
    add_generation_prompt: bool = True,
) -> Inputs:
    """A conversation as the model takes it: each image becomes tiles and the tokens that stand for
    them.

    `images` go, in their order, to the image parts of the contents that don't hold their image
    themselves. `image_processor` is the releases' unless given. Errors: as of `Message.from_dict`
    and `load_image`; a `ValueError` for more or fewer images than places for them.
    """
    turns = [m if isinstance(m, Message) else Message.from_dict(m) for m in messages]
    parts = [part for turn in turns for part in turn.image_parts]
    given = list(images)
    places = sum(part.image is None for part in parts)
    if places != len(given):
        raise ValueError(
            f"there must be one image for each image part without its own; got {len(given)} images "
            f'for {places} such parts: put {{"type": "image"}} into a content where an image stands'
        )
    tokens = encode_chat(tokenizer, turns, add_generation_prompt=add_generation_prompt)
    if not parts:
        return Inputs(np.array(tokens, np.int32), None)

    image_processor = image_processor or ImageProcessor()
    supply = iter(given)
    sources = [next(supply) if part.image is None else part.image for part in parts]
    tiled = [_tiles(image_processor, place, source) for place, source in enumerate(sources)]
    layouts = (image_processor.layout(image.rows, image.columns) for image in tiled)
    placeholder = tokenizer.token_id(IMAGE)
    expanded = []
    for token in tokens:
        expanded += map(tokenizer.token_id, next(layouts)) if token == placeholder else [token]
    pixel_values = np.concatenate([image.pixel_values for image in tiled])
    return Inputs(np.array(expanded, np.int32), pixel_values)


def assistant_mask(tokenizer: Tokenizer, tokens: Iterable[int]) -> Bool[np.ndarray, "seq"]:
    """Which tokens of a chat the assistant says: each of its turns with the token that ends it, but
    not the header. It is what a chat is trained on, as `target_mask`."""
    names = (HEADER_START, HEADER_END, EOT, EOM)
    header_start, header_end, *ends = map(tokenizer.token_id, names)
    header = [header_start, *tokenizer.encode("assistant"), header_end]
    # A blank line follows, which may be one token with what the content begins with.
    blank = len(tokenizer.encode("\n\n"))
    tokens = list(tokens)
    said = np.zeros(len(tokens), bool)
    start = None
    for i, token in enumerate(tokens):
        if start is None and tokens[i : i + len(header)] == header:
            start = i + len(header) + blank
        elif start is not None and token in ends:
            said[start : i + 1] = True
            start = None
    return said


def _tiles(image_processor: ImageProcessor, place: int, source: ImageSource) -> TiledImage:
    try:
        return image_processor(source)
    except ValueError as error:
        raise ValueError(f"image {place + 1} of the conversation: {error}") from error
