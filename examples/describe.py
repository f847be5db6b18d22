"""Answers a question about pictures, with a Llama 4 checkpoint of your own.

    python examples/describe.py FOLDER photo.jpg more.png --question "What is the difference?"

Also writes runs/describe/tiles-1.png, … : each picture cut into tiles and patches, as the model
sees it. FOLDER is a Hugging Face checkpoint folder of a whole model: config.json, safetensors, and
a tokenizer.json or Meta's tokenizer.model.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

import llama4_eqx as l4
from llama4_eqx.processing import ImageProcessor, draw_tiles, load_tokenizer, process

TILES = Path("runs/describe")
WITHOUT_FOLDER = """\
This example needs a checkpoint folder with a vision model, and pictures. Accept the licence on the
release's Hugging Face page, then

    hf download meta-llama/Llama-4-Scout-17B-16E-Instruct --local-dir scout
    python examples/describe.py scout photo.jpg --question "What is this?"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers a question about pictures.")
    parser.add_argument("folder", nargs="?", help="a Hugging Face checkpoint folder")
    parser.add_argument("pictures", nargs="*", help="picture files, in reading order")
    parser.add_argument("--question", default="Describe what you see.")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.folder is None or not options.pictures:
        print(WITHOUT_FOLDER)
        return

    vision = l4.Llama4Config.from_hf(options.folder).vision_config
    if vision is None:
        parser.error(f"{options.folder} holds a text-only model, which sees no pictures")
    try:
        image_processor = ImageProcessor.from_folder(options.folder)
    except FileNotFoundError:  # the settings of the releases, for tiles of this model's size
        image_processor = ImageProcessor(
            vision.image_size, vision.patch_size, vision.pixel_shuffle_ratio
        )
    TILES.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(options.pictures, start=1):
        file = TILES / f"tiles-{i}.png"
        draw_tiles(picture, image_processor).save(file)
        print(f"{picture}, as the model sees it: {file}")

    tokenizer = load_tokenizer(options.folder)
    images = [{"type": "image", "path": picture} for picture in options.pictures]
    content = [*images, {"type": "text", "text": options.question}]
    inputs = process(
        tokenizer, [{"role": "user", "content": content}], image_processor=image_processor
    )
    # Without an accelerator float32 is several times faster than bfloat16.
    on_cpu = jax.default_backend() == "cpu"
    model = l4.load_checkpoint(options.folder, dtype=jnp.float32 if on_cpu else None)
    greedy = options.temperature == 0
    stream = tokenizer.stream()
    for token in l4.stream(
        model.unstacked(experts=on_cpu),
        jnp.asarray(inputs.tokens),
        pixel_values=jnp.asarray(inputs.pixel_values),
        max_new_tokens=options.max_new_tokens,
        sampler=l4.Greedy() if greedy else l4.Sample(options.temperature, top_p=options.top_p),
        key=jax.random.key(options.seed),
        stop_ids=model.config.text_config.stop_ids,
    ):
        print(stream.push(token), end="", flush=True)
    print(stream.flush())


if __name__ == "__main__":
    main()
