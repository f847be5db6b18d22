"""Chats with images to what the model is called with."""

import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int32

from llama4_eqx.processing.chat import Chat, Tools, encode_chat
from llama4_eqx.processing.images import ImageProcessor, ImageSource, TiledImage
from llama4_eqx.processing.messages import as_messages
from llama4_eqx.processing.special_tokens import HEADER_END, HEADER_START, IMAGE
from llama4_eqx.processing.tokenizer import TokenIds, Tokenizer, integers


class Inputs(NamedTuple):
    """A prompt: its token ids, and the tiles of all its images in reading order, if any."""

    tokens: Int32[np.ndarray, "seq"]
    pixel_values: Float[np.ndarray, "tiles channels height width"] | None


def process(
    tokenizer: Tokenizer,
    messages: Chat,
    images: Iterable[ImageSource] = (),
    *,
    image_processor: ImageProcessor | None = None,
    tools: Tools | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
) -> Inputs:
    """A conversation as the model takes it: each image becomes tiles, and the tokens that represent
    them.

    `images` go, in order, to the image parts of the contents that don't hold an image themselves.
    `image_processor` defaults to that of the releases. The other arguments are those of
    `encode_chat`. Errors: as of `Message.from_dict` and `load_image`; a `ValueError` for more or
    fewer images than places for them.
    """
    turns = as_messages(messages)
    parts = [part for turn in turns for part in turn.image_parts]
    is_one_file = isinstance(images, str | bytes | os.PathLike) or hasattr(images, "read")
    is_one_array = getattr(images, "ndim", 4) < 4  # with four axes its items are images
    if is_one_file or is_one_array or not isinstance(images, Iterable):
        raise ValueError(f"images must be a list of images; got one {type(images).__name__}")
    given = list(images)
    places = sum(part.image is None for part in parts)
    if places != len(given):
        raise ValueError(
            f"there must be one image for each image part without its own; got {len(given)} images "
            f'for {places} such parts: put {{"type": "image"}} into a content where an image stands'
        )
    tokens = encode_chat(
        tokenizer,
        turns,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
    )
    if not parts:
        return Inputs(np.array(tokens, np.int32), None)

    image_processor = image_processor or ImageProcessor()
    supply = iter(given)
    sources = [next(supply) if part.image is None else part.image for part in parts]
    tiled = [_tiles(image_processor, number, source) for number, source in enumerate(sources, 1)]
    layouts = (image_processor.layout(image.rows, image.columns) for image in tiled)
    placeholder = tokenizer.token_id(IMAGE)
    expanded = []
    for token in tokens:
        expanded += map(tokenizer.token_id, next(layouts)) if token == placeholder else [token]
    pixel_values = np.concatenate([image.pixel_values for image in tiled])
    return Inputs(np.array(expanded, np.int32), pixel_values)


def _tiles(image_processor: ImageProcessor, number: int, source: ImageSource) -> TiledImage:
    try:
        return image_processor(source)
    except ValueError as error:
        raise ValueError(f"image {number} of the conversation: {error}") from error


def assistant_mask(tokenizer: Tokenizer, tokens: TokenIds) -> Bool[np.ndarray, "seq"]:
    """Which tokens of a chat the assistant writes: each of its turns with the token that ends it,
    without the header. A chat is trained on these, as `target_mask`.

    A last turn that is cut off, or left open, counts as far as it goes; padding doesn't. What
    precedes the first header doesn't count: after a cut at the left nobody knows whose turn it is.
    """
    header_start, header_end = map(tokenizer.token_id, (HEADER_START, HEADER_END))
    header = [header_start, *tokenizer.encode("assistant"), header_end]
    # A blank line follows, which may be one token with what the content begins with.
    blank = len(tokenizer.encode("\n\n"))
    outside = (header_start, tokenizer.bos_id, tokenizer.pad_id)
    row = integers(tokens)
    mask = np.zeros(len(row), bool)
    start = None
    for i, token in enumerate(row):
        if start is not None and i >= start:
            mask[i] = token not in outside
            if token in tokenizer.stop_ids or not mask[i]:
                start = None
        if token == header_start and row[i : i + len(header)] == header:
            start = i + len(header) + blank
    return mask
