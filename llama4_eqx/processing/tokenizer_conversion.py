"""Meta's `tokenizer.model` as a `tokenizer.json`, which `transformers` reads, too."""

from llama4_eqx.processing import special_tokens as names
from llama4_eqx.processing.tokenizer_json import CHARACTER_OF, JsonTokenizer, tokenizers_library
from llama4_eqx.processing.tokenizer_model import SPLIT_PATTERN, TiktokenTokenizer


def as_json(tokenizer: TiktokenTokenizer) -> JsonTokenizer:
    """The same tokenizer in Hugging Face's form; its `save` writes the file.

    A merge joins two tokens to a third. A `tokenizer.model` has ranks of the results alone, so each
    way to halve a token into two others is a merge, of the rank of the token.
    """
    ranks = tokenizer.ranks
    spelling = {token: token.decode("latin-1").translate(CHARACTER_OF) for token in ranks}
    merges = [
        (spelling[token[:i]], spelling[token[i:]])
        for token in ranks
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    library = tokenizers_library()
    vocabulary = {spelling[token]: rank for token, rank in ranks.items()}
    # As tiktoken does it, text between two splits that is a token of its own is taken whole.
    bpe = library.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True)
    backend = library.Tokenizer(bpe)
    split = library.pre_tokenizers.Split(library.Regex(SPLIT_PATTERN), behavior="isolated")
    as_characters = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = library.pre_tokenizers.Sequence([split, as_characters])
    backend.decoder = library.decoders.ByteLevel()
    special = names.llama4_specials(len(ranks))
    backend.add_special_tokens(list(special))
    begin = names.BEGIN_OF_TEXT
    backend.post_processor = library.processors.TemplateProcessing(
        single=[begin, "$A"],
        pair=[begin, "$A", begin, "$B"],
        special_tokens=[(begin, special[begin])],
    )
    return JsonTokenizer(backend)
