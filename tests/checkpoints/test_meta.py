"""Meta's checkpoints, against Meta's own model: llama-models on torch, one process."""

import base64
import importlib
import json
import pickle
import resource
import shutil
import sys
from types import ModuleType, SimpleNamespace
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import llama4_eqx as l4
from llama4_eqx.checkpoints import convert_meta_checkpoint
from llama4_eqx.checkpoints import meta as checkpoints_meta
from llama4_eqx.processing import ImageProcessor, load_tokenizer
from llama4_eqx.processing.tokenizer_json import JsonTokenizer
from tests.toys import random_tokens, relative_error

pytestmark = pytest.mark.slow

PARAMS = {
    "dim": 64,
    "n_layers": 8,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "multiple_of": 8,
    "ffn_dim_multiplier": 1.0,
    "ffn_exp": 4.0,
    "norm_eps": 1e-5,
    "attention_chunk_size": 8,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "nope_layer_interval": 4,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "floor_scale": 4.0,
    "attn_scale": 0.1,
    "moe_args": {"num_experts": 4, "top_k": 1, "interleave_moe_layer_step": 2},
}
VISION_ARGS = {
    "image_size": {"height": 28, "width": 28},
    "patch_size": {"height": 7, "width": 7},
    "dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "mlp_ratio": 4.0,
    "output_dim": 24,
    "pixel_shuffle_ratio": 0.5,
}


class Linear(torch.nn.Linear):
    """What fairscale's parallel layers are in one process."""

    def __init__(self, inputs, outputs, bias=True, **_):
        super().__init__(inputs, outputs, bias)


class Embedding(torch.nn.Embedding):
    def __init__(self, count, size, **_):
        super().__init__(count, size)


@pytest.fixture(scope="module")
def meta():
    """Meta's model and its code for cutting checkpoints. Fairscale, which it would share the work
    out with, is replaced by its meaning in one process."""
    parallel = "fairscale.nn.model_parallel"
    parts = {
        "initialize": {
            "get_model_parallel_world_size": lambda: 1,
            "get_model_parallel_rank": lambda: 0,
        },
        "layers": {
            "ColumnParallelLinear": Linear,
            "RowParallelLinear": Linear,
            "VocabParallelEmbedding": Embedding,
        },
        "mappings": {"reduce_from_model_parallel_region": lambda x: x},
    }
    stands_in = {name: ModuleType(name) for name in ("fairscale", "fairscale.nn", parallel)}
    for part, content in parts.items():
        module = ModuleType(f"{parallel}.{part}")
        vars(module).update(content)
        setattr(stands_in[parallel], part, module)
        stands_in[f"{parallel}.{part}"] = module
    with (
        mock.patch.dict(sys.modules, stands_in),
        mock.patch.object(torch.Tensor, "cuda", lambda self: self),
    ):
        model_code = importlib.import_module("llama_models.llama4.model")
        args = importlib.import_module("llama_models.llama4.args")
        datatypes = importlib.import_module("llama_models.llama4.datatypes")
        resharding = importlib.import_module("llama_models.checkpoint")
        torch.manual_seed(0)
        model = model_code.Transformer(
            args.ModelArgs(**PARAMS, vision_args=VISION_ARGS, max_batch_size=2, max_seq_len=64)
        )
        model = model.float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                wide = parameter.dim() > 1
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5 if wide else 0.3)
                if "norm" in name or "ln_" in name:
                    parameter.add_(1)
        yield SimpleNamespace(
            model=model, inputs=datatypes.TransformerInput, reshard=resharding.reshard_mp
        )


def released_names(state):
    """The same tensors under the fused names of the released files."""
    state = dict(state)
    for i in range(PARAMS["n_layers"]):
        layer = f"layers.{i}."
        qkv = [state.pop(f"{layer}attention.w{letter}.weight") for letter in "qkv"]
        state[f"{layer}attention.wqkv.weight"] = torch.cat(qkv)
        norm = state.pop(f"{layer}attention_norm.weight")
        state[f"{layer}attention.wqkv.layer_norm_weight"] = norm
        norm = state.pop(f"{layer}ffn_norm.weight")
        feed_forward = f"{layer}feed_forward."
        if f"{feed_forward}router_DE" in state:
            state[f"{feed_forward}norm.weight"] = norm
            for old, new in (("w1", "in_eD_F"), ("w2", "out_eF_D"), ("w3", "swiglu_eD_F")):
                expert = state.pop(f"{feed_forward}experts.{old}")
                state[f"{feed_forward}experts.moe_w_{new}"] = expert.flatten(0, 1)
            shared = f"{feed_forward}shared_expert."
            for old, new in (("w1", "in_shared_FD"), ("w2", "out_shared_DF"), ("w3", "swiglu_FD")):
                state[f"{feed_forward}w_{new}.weight"] = state.pop(f"{shared}{old}.weight")
        else:
            state[f"{feed_forward}mlp.layer_norm_weight"] = norm
            gate, up = (state.pop(f"{feed_forward}{w}.weight") for w in ("w1", "w3"))
            state[f"{feed_forward}mlp.fc1_weight"] = torch.cat([gate, up])
            state[f"{feed_forward}mlp.fc2_weight"] = state.pop(f"{feed_forward}w2.weight")
    return state


def cut(meta, state, files):
    """Meta's own cutting. Of experts it cuts the form with an axis of its own."""
    if files == 1:
        return [state]
    experts = PARAMS["moe_args"]["num_experts"]
    unfolded = {
        name: t.unflatten(0, (experts, -1)) if "moe_w_" in name else t for name, t in state.items()
    }
    pieces = [meta.reshard([unfolded], files, rank) for rank in range(files)]
    return [
        {name: t.flatten(0, 1) if "moe_w_" in name else t for name, t in piece.items()}
        for piece in pieces
    ]


def save(folder, pieces, params):
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    # What released files hold besides weights.
    others = {"rope.freqs": torch.zeros(4), "layers.0.attention.wo._extra_state": torch.zeros(1)}
    for number, piece in enumerate(pieces):
        torch.save(piece | others, folder / f"consolidated.{number:02}.pth")
    return folder


@pytest.mark.parametrize(("released", "files"), [(False, 1), (True, 1), (True, 2)])
def test_converted_model_is_metas(meta, tmp_path, released, files):
    """Text logits over chunk edges and vision features, up to float32 rounding."""
    state = meta.model.state_dict()
    state = released_names(state) if released else state
    source = save(tmp_path / "meta", cut(meta, state, files), PARAMS | {"vision_args": VISION_ARGS})
    convert_meta_checkpoint(source, tmp_path / "hf")
    model = l4.load_checkpoint(tmp_path / "hf")

    tokens = random_tokens(2, 40, vocab=128)
    request = meta.inputs(tokens=torch.tensor(np.asarray(tokens)).long(), tokens_position=0)
    assert relative_error(model(tokens).logits, meta.model(request).logits) < 2e-5

    pixels = np.random.default_rng(0).normal(size=(3, 3, 28, 28)).astype(np.float32)
    with torch.no_grad():
        vision = meta.model.vision_embeddings
        features = vision.vision_adapter(vision.vision_encoder(torch.tensor(pixels)[:, None]))
        projected = meta.model.vision_projection(features)
    assert relative_error(l4.encode_images(model, jnp.asarray(pixels)), projected) < 2e-5


def test_text_only(meta, tmp_path):
    state = {n: t for n, t in meta.model.state_dict().items() if not n.startswith("vision")}
    convert_meta_checkpoint(save(tmp_path / "meta", [state], PARAMS), tmp_path / "hf")
    assert l4.load_checkpoint(tmp_path / "hf").vision_model is None


def test_nothing_is_unpickled(tmp_path):
    """A file that would run code when unpickled is refused, and doesn't run it."""
    folder = save(tmp_path / "meta", [], PARAMS)
    witness = tmp_path / "witness"

    class Malice:
        def __reduce__(self):
            return open, (str(witness), "w")

    torch.save({"tok_embeddings.weight": Malice()}, folder / "consolidated.00.pth")
    with pytest.raises(l4.CheckpointError, match="never loaded"):
        convert_meta_checkpoint(folder, tmp_path / "hf")
    (folder / "consolidated.00.pth").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(l4.CheckpointError, match="never loaded"):
        convert_meta_checkpoint(folder, tmp_path / "hf")
    assert not witness.exists()
    assert not (tmp_path / "hf").exists()


def test_errors(meta, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"params\.json"):
        convert_meta_checkpoint(tmp_path, tmp_path / "hf")
    state = {n: t for n, t in meta.model.state_dict().items() if not n.startswith("vision")}
    strange = save(tmp_path / "strange", [state | {"layers.0.extra": torch.zeros(2)}], PARAMS)
    with pytest.raises(l4.CheckpointError, match=r"layers\.0\.extra is none of Llama 4's"):
        convert_meta_checkpoint(strange, tmp_path / "hf")
    uneven = save(tmp_path / "uneven", [state, {}], PARAMS)
    with pytest.raises(l4.CheckpointError, match="hold different tensors"):
        convert_meta_checkpoint(uneven, tmp_path / "hf")
    poor = save(tmp_path / "poor", [state], {"dim": 64})
    with pytest.raises(l4.CheckpointError, match="lack 'n_heads'"):
        convert_meta_checkpoint(poor, tmp_path / "hf")
    full = save(tmp_path / "full", [state], PARAMS)
    no_room = OSError(28, "No space left on device")
    with (
        mock.patch("llama4_eqx.checkpoints.meta._write", side_effect=no_room),
        pytest.raises(OSError, match="Nothing was left there; make room"),
    ):
        convert_meta_checkpoint(full, tmp_path / "hf")
    with pytest.raises(FileExistsError, match="choose another folder"):
        convert_meta_checkpoint(uneven, tmp_path / "strange")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "poor", "strange", "uneven"]


def text_state(meta):
    return {n: t for n, t in meta.model.state_dict().items() if not n.startswith("vision")}


@pytest.mark.parametrize("vocab_size", [128, -1, None])
@pytest.mark.parametrize("released", [False, True])
def test_half_of_the_files(vocab_size, released, meta, tmp_path):
    """Whether or not params.json has the size of the vocabulary."""
    state = text_state(meta)
    state = released_names(state) if released else state
    params = {k: v for k, v in PARAMS.items() if k != "vocab_size"}
    params |= {} if vocab_size is None else {"vocab_size": vocab_size}
    source = save(tmp_path / "meta", cut(meta, state, 2), params)
    (source / "consolidated.01.pth").unlink()
    with pytest.raises(l4.CheckpointError, match=r"has \d+ rows in the 1 .* but params.json asks"):
        convert_meta_checkpoint(source, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


def test_a_tokenizer_larger_than_the_vocabulary(meta, tmp_path):
    """Of a model whose attention isn't sharded, the tokenizer tells that files are missing."""
    state = text_state(meta)
    half = {
        n: t[:64] if n in ("tok_embeddings.weight", "output.weight") else t
        for n, t in state.items()
    }
    source = save(tmp_path / "meta", [half], PARAMS | {"vocab_size": -1})
    ranks = (f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(100))
    (source / "tokenizer.model").write_text("".join(ranks))
    with pytest.raises(
        l4.CheckpointError, match=r"has 64 rows .* but tokenizer\.model has 100 tok"
    ):
        convert_meta_checkpoint(source, tmp_path / "hf")
    (source / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")  # another kind of file
    assert convert_meta_checkpoint(source, tmp_path / "hf").text_config.vocab_size == 64


def test_the_files_beside_the_weights(meta, tmp_path):
    """The tokenizer in both forms and the images' settings, for us and for `transformers`."""
    rows = 256 + 2 + 2048
    wide = ("tok_embeddings.weight", "output.weight")
    state = {
        n: torch.randn(rows, 64) if n in wide else t for n, t in meta.model.state_dict().items()
    }
    source = save(
        tmp_path / "meta", [state], PARAMS | {"vocab_size": rows, "vision_args": VISION_ARGS}
    )
    tokens = [*(bytes([i]) for i in range(256)), b"th", b"the"]
    ranks = (f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
    (source / "tokenizer.model").write_text("".join(ranks))
    config = convert_meta_checkpoint(source, tmp_path / "hf")
    tokenizer = load_tokenizer(tmp_path / "hf")
    assert isinstance(tokenizer, JsonTokenizer)
    assert tokenizer.encode("the thé") == [257, *b" ", 256, *"é".encode()]
    assert tokenizer.vocab_size == config.text_config.vocab_size
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.encode("the") == [tokenizer.bos_id, 257]
    assert theirs.eos_token_id == tokenizer.token_id("<|eot|>")
    assert ImageProcessor.from_folder(tmp_path / "hf") == ImageProcessor(
        28, 7, mean=(0.5,) * 3, std=(0.5,) * 3
    )

    text = (source / "tokenizer.model").read_text()
    (source / "tokenizer.model").write_text(text.replace("dGhl 257", "dGhl 258"))
    with pytest.raises(l4.CheckpointError, match="line 258: must be base64"):
        convert_meta_checkpoint(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("gone", "named"), [(0, "00"), (1, "01"), (2, "02")])
def test_a_gap_in_the_numbers(gone, named, meta, tmp_path):
    source = save(tmp_path / "meta", [text_state(meta)] * 4, PARAMS)
    (source / f"consolidated.0{gone}.pth").unlink()
    with pytest.raises(l4.CheckpointError, match=rf"lacks consolidated\.{named}\.pth: fetch all"):
        convert_meta_checkpoint(source, tmp_path / "hf")


def test_a_full_disk_leaves_nothing(meta, tmp_path):
    """Full is here the largest size that a file may have."""
    source = save(tmp_path / "meta", [text_state(meta)], PARAMS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (100, 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match=r"File too large\. Nothing was left there") as error:
                convert_meta_checkpoint(source, tmp_path / "hf")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert error.value.errno == 27
        assert [path.name for path in tmp_path.iterdir()] == ["meta"]


def test_targets_that_exist(meta, tmp_path):
    source = save(tmp_path / "meta", [text_state(meta)], PARAMS)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    for name in ("file", "folder", "link"):
        with pytest.raises(FileExistsError, match="exists: choose another folder"):
            convert_meta_checkpoint(source, tmp_path / name)
    # One that appears meanwhile, and what a killed conversion left.
    (tmp_path / ".hf-partial-0123abcd").mkdir()
    write = checkpoints_meta._write

    def write_late(*arguments):
        write(*arguments)
        (tmp_path / "hf").mkdir()

    with (
        mock.patch("llama4_eqx.checkpoints.meta._write", write_late),
        pytest.raises(FileExistsError, match="exists: choose another folder"),
    ):
        convert_meta_checkpoint(source, tmp_path / "hf")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["file", "folder", "hf", "link", "meta"]


@pytest.mark.parametrize(
    "params",
    [
        "[]",
        "{",
        '{"n_heads": "4"}',
        '{"n_heads": 4}',
        json.dumps(PARAMS | {"n_layers": "8"}),
        "\xff",
    ],
)
def test_params_of_wrong_types(params, meta, tmp_path):
    source = save(tmp_path / "meta", [text_state(meta)], PARAMS)
    (source / "params.json").write_bytes(params.encode("latin1"))
    with pytest.raises(l4.CheckpointError, match=r"params\.json doesn't fit: "):
        convert_meta_checkpoint(source, tmp_path / "hf")


def test_files_that_hold_no_tensors_by_name(tmp_path):
    for content in ([torch.zeros(1)], {"tok_embeddings.weight": 3}):
        source = save(tmp_path / "meta", [], PARAMS)
        torch.save(content, source / "consolidated.00.pth")
        with pytest.raises(l4.CheckpointError, match=r"00\.pth doesn't hold tensors by name"):
            convert_meta_checkpoint(source, tmp_path / "hf")
        shutil.rmtree(source)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        convert_meta_checkpoint(tmp_path / "nowhere", tmp_path / "hf")
