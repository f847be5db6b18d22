"""Names and ids of Llama 4's special tokens."""

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
HEADER_START = "<|header_start|>"
HEADER_END = "<|header_end|>"
EOM = "<|eom|>"
EOT = "<|eot|>"
PYTHON_START = "<|python_start|>"
PYTHON_END = "<|python_end|>"
PAD = "<|finetune_right_pad|>"
IMAGE_START = "<|image_start|>"
IMAGE_END = "<|image_end|>"
TILE_X_SEPARATOR = "<|tile_x_separator|>"
TILE_Y_SEPARATOR = "<|tile_y_separator|>"
IMAGE = "<|image|>"
PATCH = "<|patch|>"

NUM_SPECIAL_TOKENS = 2048

# `tokenizer.model` doesn't list the special tokens: they follow the last rank. First the offsets of
# the named ones (llama-models 0.3.0, `llama4/tokenizer.py`) …
_NAMED = (
    (0, "begin_of_text end_of_text fim_prefix fim_middle fim_suffix"),
    (5, "header_start header_end eom eot step"),
    (16, "python_start python_end finetune_right_pad"),
    (80, "image_start image_end"),
    (84, "tile_x_separator tile_y_separator"),
    (90, "image"),
    (92, "patch"),
    (1142, "reasoning_thinking_start reasoning_thinking_end"),
)
# … then the runs of reserved ones: first offset, length, prefix, first number. Meta's numbering
# skips 6 and 7 in `text_post_train`; that of Hugging Face's converter doesn't.
_RESERVED = (
    (10, 6, "text_post_train_", 0),
    (19, 61, "text_post_train_", 8),
    (82, 2, "vision_", 0),
    (86, 4, "vision_", 2),
    (91, 1, "vision_", 6),
    (93, 1041, "vision_", 7),
    (1134, 8, "reasoning_", 0),
    (1144, 904, "", 0),
)


def llama4_specials(first: int) -> dict[str, int]:
    """The special tokens by name, with ids from `first` on: 200 000 in the releases."""
    names = {offset + i: name for offset, run in _NAMED for i, name in enumerate(run.split())}
    for offset, length, prefix, number in _RESERVED:
        for i in range(length):
            names[offset + i] = f"{prefix}reserved_special_token_{number + i}"
    return {f"<|{names[offset]}|>": first + offset for offset in sorted(names)}
