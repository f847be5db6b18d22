"""Tokenizers against Meta's and Hugging Face's on the same files, round trips, streams, errors."""

import base64
import importlib.util
import json
import socket
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy
import pytest
import tokenizers
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama4_eqx.processing import byte_tokenizer, load_tokenizer
from llama4_eqx.processing.special_tokens import llama4_specials
from llama4_eqx.processing.tokenizer_conversion import as_json
from llama4_eqx.processing.tokenizer_json import JsonTokenizer
from llama4_eqx.processing.tokenizer_model import SPLIT_PATTERN

TEXTS = [
    "",
    " ",
    "Hello, world! It's what they'd've WANTED; I'M sure we'll see.",
    "def f(xs):\n\treturn [x ** 2 for x in xs if x != 0]  # ok\r\n\r\n\n\nclass CamelCase_snake:\n",
    "SELECT count(*) FROM t WHERE a<=10 AND b='x'; -- /usr/lib//x\n/\n",
    "1234567890 3.14159 1,000,000 0x1F ٣٤٥ ⅫⅣ",
    "Straße, naïve cafe\u0301, Ελληνικά, русский язык, Հայերեն, עברית, العربية",
    "हिन्दी, தமிழ், ไทย, 中文字符，日本語テキスト、한국어",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 👍🏽 \U0001f9d1\u200d\U0001f4bb",
    "   leading, trailing   \t\t \n   \n x  y   z \u00a0\u2003\u3000",
    "\x00\x01\x7f\ufeff\u200b\ufffd\U0010ffff",
    "<|begin_of_text|>a<|header_start|>system<|header_end|>\n\nhi<|eot|><|eot|><|patch|><|no|><|eo",
    "ǅ ǈ ʰʲ aBcDeF ABCdef abcDEF éÉ ﬁ İıſ",
]
SPECIAL_NAMES = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot|>", "<|eom|>", "<|header_start|>"]
# Plain draws seldom hit what matters here: special names, white space, several bytes a character.
SCRAPS = ["<|", "|>", " ", "  ", "\n", "\r\n", "'s", "é", "中", "😀", "\u0301", "12"]
texts = (
    st.lists(st.sampled_from([*SPECIAL_NAMES, *SCRAPS]) | st.text(max_size=8)).map("".join)
    | st.text()
)
thorough = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folders of a small BPE, written both as a tokenizer.json and as a tokenizer.model."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, show_progress=False
    )
    source = Path(__file__).read_text(encoding="utf-8")
    backend.train_from_iterator([*TEXTS * 3, source], trainer)
    ranks = {i: spelling for spelling, i in backend.get_vocab().items()}
    backend.add_special_tokens(list(llama4_specials(len(ranks))))

    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("json", "model")}
    backend.save(str(folders["json"] / "tokenizer.json"))
    byte_of = {character: byte for byte, character in enumerate(_gpt2_alphabet())}
    lines = (
        base64.b64encode(bytes(byte_of[c] for c in ranks[i])) + f" {i}\n".encode()
        for i in range(len(ranks))
    )
    (folders["model"] / "tokenizer.model").write_bytes(b"".join(lines))
    (folders["model"] / "config.json").write_text(f'{{"vocab_size": {len(ranks) + 2048}}}')
    return folders


@pytest.fixture(scope="session")
def both(trained):
    """The tokenizers of the two files."""
    return {kind: load_tokenizer(folder) for kind, folder in trained.items()}


def _gpt2_alphabet() -> list[str]:
    """The characters that stand for the bytes 0 to 255, by GPT-2's rule."""
    alphabet, hidden = [], 256
    for byte in range(256):
        visible = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        alphabet.append(chr(byte if visible else hidden))
        hidden += not visible
    return alphabet


@pytest.fixture(scope="session")
def released_file():
    """Meta's tokenizer.model, of the package llama-models; finding it imports nothing."""
    spec = importlib.util.find_spec("llama_models")
    assert spec is not None, "install the extra `dev`, which has llama-models"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "llama4" / "tokenizer.model"


@pytest.fixture(scope="session")
def released(released_file):
    return load_tokenizer(released_file)


@pytest.fixture(scope="session")
def reference(released_file):
    """Meta's own reading of that file."""
    return importlib.import_module("llama_models.llama4.tokenizer").Tokenizer(released_file)


@pytest.fixture(scope="session", params=["byte", "json", "model", "released"])
def tokenizer(request):
    if request.param == "byte":
        return byte_tokenizer()
    if request.param == "released":
        return request.getfixturevalue("released")
    return request.getfixturevalue("both")[request.param]


# --- what Meta's and Hugging Face's code make of the same files


def test_specials_have_the_ids_of_the_releases():
    specials = llama4_specials(200_000)
    assert list(specials.values()) == list(range(200_000, 202_048))
    expected = {
        "begin_of_text": 200000,
        "end_of_text": 200001,
        "header_start": 200005,
        "header_end": 200006,
        "eom": 200007,
        "eot": 200008,
        "python_start": 200016,
        "python_end": 200017,
        "finetune_right_pad": 200018,
        "image_start": 200080,
        "image_end": 200081,
        "tile_x_separator": 200084,
        "tile_y_separator": 200085,
        "image": 200090,
        "patch": 200092,
    }
    assert {name: specials[f"<|{name}|>"] for name in expected} == expected


def test_released_is_the_reference(released, reference):
    assert released.vocab_size == reference.n_words == 202_048
    assert llama4_specials(200_000) == reference.special_tokens
    assert released.bos_id == reference.bos_id == 200000
    assert released.pad_id == reference.pad_id == 200018
    assert sorted(released.stop_ids) == sorted(reference.stop_tokens) == [200001, 200007, 200008]


@thorough
@given(texts)
def test_released_encodes_as_the_reference(released, reference, text):
    _assert_like_the_reference(released, reference, text)


@pytest.mark.parametrize("text", [*TEXTS, Path(__file__).read_text(encoding="utf-8")])
def test_released_encodes_texts_as_the_reference(released, reference, text):
    _assert_like_the_reference(released, reference, text)


def _assert_like_the_reference(released, reference, text):
    for bos, eos in ((False, False), (True, True)):
        plain = reference.encode(text, bos=bos, eos=eos)
        assert released.encode(text, bos=bos, eos=eos) == plain
    special = reference.encode(text, bos=False, eos=False, allowed_special="all")
    assert released.encode(text, special=True) == special
    assert released.decode(special, skip_special=False) == reference.decode(special)


@pytest.mark.parametrize("length", [25_000, 25_001, 50_000, 60_001])
def test_long_runs_encode_as_in_the_reference(released, reference, length):
    for run in (" ", "\n", "a", "é", "a-1"):
        text = f"x y{run * length}{' ' * length} z" + "\t " * length
        assert released.encode(text) == reference.encode(text, bos=False, eos=False)


@pytest.fixture(scope="session", params=["byte", "json"])
def pair(request, trained, tmp_path_factory):
    """Ours and the one of `transformers`, of the same tokenizer.json."""
    folder = trained["json"]
    if request.param == "byte":
        folder = tmp_path_factory.mktemp("byte")
        byte_tokenizer().save(folder)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return load_tokenizer(folder), theirs


@thorough
@given(texts)
def test_json_reads_as_transformers_does(pair, text):
    ours, theirs = pair
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text, special=True) == ids
    assert ours.encode(text) == theirs.encode(
        text, add_special_tokens=False, split_special_tokens=True
    )
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids)


@pytest.fixture(scope="session")
def converted(released, tmp_path_factory):
    """The released vocabulary, written as a tokenizer.json."""
    folder = tmp_path_factory.mktemp("converted")
    as_json(released).save(folder)
    return folder


@pytest.fixture(scope="session")
def converted_pair(converted, released):
    return load_tokenizer(converted), released


@pytest.mark.parametrize("text", TEXTS)
def test_converted_encodes_as_before(converted_pair, text):
    ours, released = converted_pair
    assert (ours.vocab_size, ours.stop_ids) == (released.vocab_size, released.stop_ids)
    for special in (False, True):
        assert ours.encode(text, special=special) == released.encode(text, special=special)


@thorough
@given(parts=st.lists(st.text("aab bcex é\n") | st.lists(st.integers(0, 199_999)), max_size=4))
def test_converted_merges_in_the_same_order(converted_pair, parts):
    """Texts of few letters, and of parts of tokens, which can be merged in many ways."""
    ours, released = converted_pair
    text = "".join(part if isinstance(part, str) else released.decode(part) for part in parts)
    assert ours.encode(text) == released.encode(text)


def test_transformers_opens_what_was_converted(converted, released):
    theirs = transformers.AutoTokenizer.from_pretrained(converted)
    text = "Ünïcode 中文 <|eot|> 12345\n\tx"
    assert theirs.encode(text) == [released.bos_id, *released.encode(text, special=True)]


def test_saved_bytes_are_read_by_auto_tokenizer(tmp_path):
    byte_tokenizer().save(tmp_path / "new")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert theirs.encode("é<|eot|>") == [0xC3, 0xA9, byte_tokenizer().token_id("<|eot|>")]


@thorough
@given(texts)
def test_both_kinds_of_file_give_the_same_ids(both, text):
    from_json, from_model = both["json"], both["model"]
    assert from_json.encode(text) == from_model.encode(text)
    ids = from_model.encode(text, bos=True, eos=True, special=True)
    assert from_json.encode(text, bos=True, eos=True, special=True) == ids
    assert from_json.decode(ids, skip_special=False) == from_model.decode(ids, skip_special=False)


# --- round trips and streams


@thorough
@given(texts)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text
    assert tokenizer.decode(tokenizer.encode(text, special=True), skip_special=False) == text


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_of_texts(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("character", [" ", "a", "中"])
def test_a_million_of_one_character(tokenizer, character):
    text = "x" + character * 1_000_000 + "y"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@thorough
@given(texts)
def test_stream_is_decode_at_every_step(tokenizer, text):
    ids = tokenizer.encode(text, bos=True, special=True)
    stream, streamed = tokenizer.stream(), ""
    for length, token in enumerate(ids, start=1):
        piece = stream.push(token)
        streamed += piece
        # What is held back is at most one unfinished character, which decode shows as U+FFFD.
        whole = tokenizer.decode(ids[:length])
        assert whole in (streamed, streamed + "\ufffd")
        assert "\ufffd" not in piece or "\ufffd" in text
    assert stream.flush() == ""
    assert streamed == tokenizer.decode(ids)


@thorough
@given(st.lists(st.integers(0, 270)), st.booleans())
def test_stream_is_decode_of_any_ids(ids, skip_special):
    # Bytes at random are mostly no UTF-8: what can't be a character must come out as decode has it.
    tokenizer = byte_tokenizer()
    stream = tokenizer.stream(skip_special=skip_special)
    for _ in range(2):  # a flushed stream is as good as a new one
        streamed = "".join(map(stream.push, ids)) + stream.flush()
        assert streamed == tokenizer.decode(ids, skip_special=skip_special)


@pytest.mark.parametrize("unknown", [-1, -100, 202_048, 2**31, 2**63])
def test_ids_outside_the_vocabulary_give_nothing(tokenizer, unknown):
    """A model may have more embeddings than there are tokens: a stream must not stop there."""
    before, after = tokenizer.encode("é中")[:1], tokenizer.encode("é中")[1:]
    for skip_special in (True, False):
        assert tokenizer.decode([unknown], skip_special=skip_special) == ""
        # between the bytes of one character, too
        ids = [*before, unknown, *after]
        assert tokenizer.decode(ids, skip_special=skip_special) == "é中"
        stream = tokenizer.stream(skip_special=skip_special)
        assert "".join(map(stream.push, ids)) + stream.flush() == "é中"


@thorough
@given(st.lists(st.integers(0, 700)))
def test_any_ids_decode_as_in_transformers(pair, ids):
    ours, theirs = pair
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids)


@pytest.fixture(scope="module")
def spaced():
    """Ours and the library's, with added tokens that absorb spaces, or count as words only."""
    backend = tokenizers.Tokenizer.from_str(byte_tokenizer()._backend.to_str())
    backend.normalizer = tokenizers.normalizers.Lowercase()
    added = tokenizers.AddedToken
    backend.add_special_tokens(
        [
            added("<l>", lstrip=True),
            added("<r>", rstrip=True),
            added("<lr>", lstrip=True, rstrip=True),
            added("<w>", single_word=True),
            added("<N>", normalized=True),
        ]
    )
    backend.add_tokens([added("plain", rstrip=True), added("Big", normalized=True)])
    backend.encode_special_tokens = False
    return JsonTokenizer(tokenizers.Tokenizer.from_str(backend.to_str())), backend


SPACED = ["<l>", "<r>", "<lr>", "<w>", "<N>", "<n>", "plain", "Big", "big", " ", "\n", "x", "É"]


@thorough
@given(st.lists(st.sampled_from([*SPACED, *SPECIAL_NAMES])).map("".join))
def test_added_tokens_are_those_of_the_library(spaced, text):
    ours, backend = spaced
    assert ours.encode(text, special=True) == backend.encode(text, add_special_tokens=False).ids
    as_text = ours.encode(text)
    assert not set(as_text) & ours._special_ids


def test_special_names_in_text_are_text(tokenizer):
    for name in SPECIAL_NAMES:
        ids = tokenizer.encode(f"a{name}b")
        assert tokenizer.token_id(name) not in ids
        assert len(ids) > 3
        assert tokenizer.encode(f"a{name}b", special=True) == [
            *tokenizer.encode("a"),
            tokenizer.token_id(name),
            *tokenizer.encode("b"),
        ]


def test_bytes_have_their_own_ids():
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 0x0A]
    assert tokenizer.vocab_size == 256 + 15
    assert [tokenizer.bos_id, *tokenizer.stop_ids, tokenizer.pad_id] == [256, 257, 260, 261, 262]


def test_decode_takes_the_integers_of_arrays(tokenizer):
    def chars(token):
        return tokenizer.decode([token])

    for integer in (int, numpy.int64, numpy.uint8, jnp.int32, torch.tensor):
        assert tokenizer.decode(integer(97)) == tokenizer.decode([integer(97)]) == chars(97)
        assert tokenizer.stream().push(integer(97)) == chars(97)
    for array in (jnp.asarray, torch.tensor, numpy.asarray, tuple):
        assert tokenizer.decode(array(tokenizer.encode("né"))) == "né"
    assert tokenizer.decode([]) == tokenizer.decode(numpy.zeros(0, int)) == ""


@pytest.mark.parametrize(
    "ids", [numpy.array([97.0]), [[97]], numpy.array([[97]]), [1.5], [None], "97", None]
)
def test_decode_names_what_is_no_row_of_integers(tokenizer, ids, unchecked):
    with pytest.raises(ValueError, match="token ids must be one row of integers"):
        tokenizer.decode(ids)


@pytest.mark.parametrize("text", [b"bytes", ["a", "b"], None, 5])
def test_encode_names_what_is_no_text(tokenizer, text, unchecked):
    with pytest.raises(ValueError, match=f"encode takes one text.*{type(text).__name__}"):
        tokenizer.encode(text)


def test_the_longest_special_name_counts():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    backend.add_special_tokens(["<x", "<x>"])
    tokenizer = JsonTokenizer(backend)
    assert tokenizer.encode("<x>a<x", special=True) == [2, 0, 1]


# --- files


def test_folder_prefers_json(trained, tmp_path):
    model = (trained["model"] / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    size = len(model.splitlines()) + 2048
    assert type(load_tokenizer(tmp_path, vocab_size=size)).__name__ == "TiktokenTokenizer"
    byte_tokenizer().save(tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == 271
    file = tmp_path / "tokenizer.model"
    assert load_tokenizer(file, vocab_size=size).vocab_size == size


def test_nothing_is_fetched(trained, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    for folder in trained.values():
        load_tokenizer(folder).encode("hello")


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_text()

    def fail(self, target):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        tokenizer.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_text() == before


def test_limits_in_the_file_are_ignored(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    file.write_text(json.dumps(content))
    assert load_tokenizer(file).encode("abc") == [97, 98, 99]


# --- errors


def test_missing_file_names_both_candidates(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json or tokenizer\.model") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_unknown_kind_of_file(tmp_path):
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(ValueError, match=r"\.json.*\.model"):
        load_tokenizer(tmp_path / "vocab.txt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:2], b"!!!! 2", *lines[3:]], "line 3.*rank 2"),
        (lambda lines: [*lines[:2], b"AAA=", *lines[3:]], "line 3"),
        (lambda lines: [*lines[:2], *lines[3:]], "line 3.*rank 2"),
        (lambda lines: [*lines, lines[0].split()[0] + b" %d" % len(lines)], "line 601"),
        (lambda lines: [b"version https://git-lfs.github.com/spec/v1"], "line 1.*LFS"),
        (lambda lines: [b"\x0e\x80\xff\x00"], "line 1"),
        (lambda lines: lines[:100], "100 tokens.*cut short"),
        (lambda lines: [], "0 tokens"),
        (lambda lines: [*lines[:2], lines[2].replace(b" 2", b" 02"), *lines[3:]], "line 3"),
        (lambda lines: [*lines[:300], lines[300][:-1]], "line 301.*rank 300"),
        (
            lambda lines: lines[:599],
            "599 ranks.*2,647.*but vocab_size in .*config.json is 2648.*cut short",
        ),
        (lambda lines: [*lines, b"//////////// 600"], "601 ranks.*config.json is 2648"),
    ],
)
def test_corrupt_ranks(trained, tmp_path, change, message):
    lines = (trained["model"] / "tokenizer.model").read_bytes().splitlines()
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"\n".join(change(lines)))
    (tmp_path / "config.json").write_bytes((trained["model"] / "config.json").read_bytes())
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(file) in str(error.value)


def test_cut_files_are_refused_at_every_line(trained, tmp_path):
    """The special ids would be shifted: they follow the last rank."""
    lines = (trained["model"] / "tokenizer.model").read_bytes().splitlines(keepends=True)
    file = tmp_path / "tokenizer.model"
    for beside, config in (
        (None, ""),
        ("params.json", '{"model": {"vocab_size": 2648}}'),
        ("config.json", '{"text_config": {"vocab_size": 2648}}'),
    ):
        if beside:
            (tmp_path / beside).write_text(config)
        for count in range(0, 600, 7):
            file.write_bytes(b"".join(lines[:count]))
            with pytest.raises(ValueError, match="cut short"):
                load_tokenizer(tmp_path)
            with pytest.raises(ValueError, match="cut short"):
                load_tokenizer(tmp_path, vocab_size=2648)
        file.write_bytes(b"".join(lines))
        assert load_tokenizer(file, vocab_size=2648).token_id("<|eot|>") == 608
        if beside:
            assert load_tokenizer(file).token_id("<|eot|>") == 608
        else:
            with pytest.raises(ValueError, match=r'has 200,000.*"vocab_size": 2648.*pass'):
                load_tokenizer(file)


@pytest.mark.parametrize("count", [256, 1000, 150_000, 199_999])
def test_the_released_file_cut(released_file, tmp_path, count):
    lines = released_file.read_bytes().splitlines(keepends=True)
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines[:count]))
    with pytest.raises(ValueError, match=f"{count:,} ranks; Llama 4's has 200,000.*cut short"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 202048}}')
    with pytest.raises(ValueError, match=r"config\.json is 202048"):
        load_tokenizer(tmp_path)


def test_the_released_file_changed(released_file, tmp_path):
    lines = released_file.read_bytes().splitlines()
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"\r\n".join([*lines, b""]))  # as git may write it on Windows
    assert load_tokenizer(file).token_id("<|eot|>") == 200_008
    first, second = lines[1000].split()[0], lines[1001].split()[0]
    lines[1000:1002] = [second + b" 1000", first + b" 1001"]
    file.write_bytes(b"\n".join([*lines, b""]))
    with pytest.raises(ValueError, match=r"SHA-256.*damaged"):
        load_tokenizer(file)


@pytest.mark.parametrize("content", [b"[]", b"{", b"version https", b"\xff\xfe{}", b"null"])
def test_a_broken_config_beside_the_ranks_is_named(trained, tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes((trained["model"] / "tokenizer.model").read_bytes())
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json (is not|must hold)"):
        load_tokenizer(tmp_path)


def test_a_given_size_is_checked(tmp_path):
    byte_tokenizer().save(tmp_path)
    assert load_tokenizer(tmp_path, vocab_size=271).vocab_size == 271
    with pytest.raises(ValueError, match=r"tokenizer\.json has a vocabulary of 271.*is 300"):
        load_tokenizer(tmp_path, vocab_size=300)


def test_corrupt_json(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text('{\n"version": "1.0",\n"model": {')
    with pytest.raises(ValueError, match=r"tokenizer\.json.*line 3.*fetch it again"):
        load_tokenizer(tmp_path)


def test_json_of_another_encoding(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes("{}".encode("utf-16"))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not UTF-8"):
        load_tokenizer(tmp_path)


def test_json_that_is_not_byte_level(tmp_path):
    model = tokenizers.models.BPE(vocab={"a": 0, "▁b": 1}, merges=[])
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: .*not byte-level.*▁b"):
        load_tokenizer(tmp_path)


def test_unknown_special(tokenizer):
    with pytest.raises(ValueError, match=r"<.eot_id.>.*spelling"):
        tokenizer.token_id("<|eot_id|>")


def test_half_a_surrogate_pair(tokenizer):
    with pytest.raises(ValueError, match=r"position 1.*errors='replace'"):
        tokenizer.encode("a\ud83d")


@pytest.mark.parametrize(("package", "kind"), [("tokenizers", "json"), ("tiktoken", "model")])
def test_missing_package(trained, monkeypatch, package, kind):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf"`{package}` package: pip install 'llama4_eqx\[text\]'"
    ):
        load_tokenizer(trained[kind])
