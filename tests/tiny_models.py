"""One tiny random model of every architecture that is tested, and a tiny tokenizer.

Nothing is downloaded, and each model is built in milliseconds. Sizes differ wherever an
architecture lets them differ (heads times their width from the hidden size, the feed-forward
width from both), so that a mix-up can't go unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

N_WORDS = 60
PAD, START, END = 0, 1, 2


@dataclass(frozen=True)
class Tiny:
    """An architecture: how to build it, and where its sites are by its authors' names."""

    name: str  # start of its classes' names: "Bert" for BertConfig and BertModel
    settings: dict[str, Any]  # what its configuration is made with
    # Paths of the linear modules that take the feed-forward neurons and the heads' outputs, with
    # "{}" for the block's number; None where there are none. The last two are in a decoder.
    mlp: str | None = None
    attention: str | None = None
    decoder_mlp: str | None = None
    decoder_attention: str | None = None

    def path(self, stack: str | None, site: str, layer: int) -> str:
        path = getattr(self, f"decoder_{site}" if stack == "decoder" else site)
        return path.format(layer - 1)

    def config(self, **changes: Any) -> Any:
        if not hasattr(transformers, f"{self.name}Model"):
            pytest.skip(f"transformers {transformers.__version__} has no {self.name}")
        tokens = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
        settings = {"vocab_size": N_WORDS, **tokens, **self.settings, **changes}
        return getattr(transformers, f"{self.name}Config")(**settings)

    def build(self, kind: str = "Model", **changes: Any) -> Any:
        config = self.config(**changes)
        torch.manual_seed(0)
        model = getattr(transformers, f"{self.name}{kind}")(config)
        # Fresh models have biases of zero, norms of one and no embedding of the padding, which hide
        # mistakes.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model.eval()


_BERT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 48,
}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "head_dim": 8}
_T5 = {
    "d_model": 24,
    "d_ff": 40,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "decoder_start_token_id": PAD,
}
_BART = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 36,
    "max_position_embeddings": 48,
    "decoder_start_token_id": END,
}
_GPT2 = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 48}
_GPTJ = {**_GPT2, "n_inner": 40, "rotary_dim": 4}
_NEOX = {**_BERT, "rotary_pct": 0.5}
_OPT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 40,
    "max_position_embeddings": 48,
    "word_embed_proj_dim": 24,
}

_BERT_SITES = ("encoder.layer.{}.output.dense", "encoder.layer.{}.attention.output.dense")
_LLAMA_SITES = ("layers.{}.mlp.down_proj", "layers.{}.self_attn.o_proj")
_GPT2_SITES = ("h.{}.mlp.c_proj", "h.{}.attn.c_proj")
_OPT_SITES = ("decoder.layers.{}.fc2", "decoder.layers.{}.self_attn.out_proj")
_NEOX_SITES = ("layers.{}.mlp.dense_4h_to_h", "layers.{}.attention.dense")
_T5_SITES = (
    "encoder.block.{}.layer.1.DenseReluDense.wo",
    "encoder.block.{}.layer.0.SelfAttention.o",
    "decoder.block.{}.layer.2.DenseReluDense.wo",
    "decoder.block.{}.layer.0.SelfAttention.o",
)
_BART_SITES = (
    "encoder.layers.{}.fc2",
    "encoder.layers.{}.self_attn.out_proj",
    "decoder.layers.{}.fc2",
    "decoder.layers.{}.self_attn.out_proj",
)
_MAMBA = {"hidden_size": 24, "num_hidden_layers": 3, "state_size": 4, "time_step_rank": 4}
_EXPERTS = {**_LLAMA, "num_experts_per_tok": 2}

TINY = {
    "bert": Tiny("Bert", _BERT, *_BERT_SITES),
    "distilbert": Tiny(
        "DistilBert",
        {"dim": 24, "n_layers": 3, "n_heads": 4, "hidden_dim": 40, "max_position_embeddings": 48},
        "transformer.layer.{}.ffn.lin2",
        "transformer.layer.{}.attention.out_lin",
    ),
    "roberta": Tiny("Roberta", _BERT, *_BERT_SITES),
    "xlm-roberta": Tiny("XLMRoberta", _BERT, *_BERT_SITES),
    "mpnet": Tiny("MPNet", _BERT, _BERT_SITES[0], "encoder.layer.{}.attention.attn.o"),
    "electra": Tiny("Electra", {**_BERT, "embedding_size": 16}, *_BERT_SITES),
    "albert": Tiny(
        "Albert",
        {**_BERT, "embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2},
    ),
    "deberta-v2": Tiny(
        "DebertaV2",
        {
            **_BERT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "conv_kernel_size": 3,
            "conv_act": "gelu",
        },
        *_BERT_SITES,
    ),
    "modernbert": Tiny(
        "ModernBert",
        {**_BERT, "cls_token_id": START, "sep_token_id": END, "local_attention": 4},
        "layers.{}.mlp.Wo",
        "layers.{}.attn.Wo",
    ),
    "gpt2": Tiny("GPT2", {**_GPT2, "n_inner": 40}, *_GPT2_SITES),
    "openai-gpt": Tiny("OpenAIGPT", _GPT2, *_GPT2_SITES),
    "gpt-neox": Tiny("GPTNeoX", _NEOX, *_NEOX_SITES),
    "opt": Tiny("OPT", _OPT, *_OPT_SITES),
    "opt-350m": Tiny(
        "OPT", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, *_OPT_SITES
    ),
    "bloom": Tiny(
        "Bloom",
        {"hidden_size": 24, "n_layer": 3, "n_head": 4},
        "h.{}.mlp.dense_4h_to_h",
        "h.{}.self_attention.dense",
    ),
    "llama": Tiny("Llama", _LLAMA, *_LLAMA_SITES),
    "mistral": Tiny("Mistral", {**_LLAMA, "sliding_window": 4}, *_LLAMA_SITES),
    "qwen2": Tiny("Qwen2", _BERT | {"num_key_value_heads": 2}, *_LLAMA_SITES),
    "qwen3": Tiny("Qwen3", _LLAMA, *_LLAMA_SITES),
    "gemma2": Tiny("Gemma2", {**_LLAMA, "sliding_window": 4}, *_LLAMA_SITES),
    "gemma3": Tiny("Gemma3Text", {**_LLAMA, "sliding_window": 4}, *_LLAMA_SITES),
    "phi3": Tiny("Phi3", _BERT | {"num_key_value_heads": 2}, *_LLAMA_SITES),
    # Positions are scaled in a batch of more than 16 tokens.
    "phi3-128k": Tiny(
        "Phi3",
        {
            **_BERT,
            "num_key_value_heads": 2,
            "original_max_position_embeddings": 16,
            "rope_scaling": {"type": "longrope", "short_factor": [1] * 3, "long_factor": [3] * 3},
        },
        *_LLAMA_SITES,
    ),
    "xlnet": Tiny(
        "XLNet", {"d_model": 24, "n_layer": 3, "n_head": 4, "d_inner": 40}, "layer.{}.ff.layer_2"
    ),
    "t5": Tiny("T5", _T5, *_T5_SITES),
    "flan-t5": Tiny("T5", {**_T5, "feed_forward_proj": "gated-gelu"}, *_T5_SITES),
    "bart": Tiny("Bart", _BART, *_BART_SITES),
    # What is not on the list of supported architectures, but has a twist of its own.
    "cohere": Tiny("Cohere", _BERT | {"num_key_value_heads": 2}, *_LLAMA_SITES),
    # Its last hidden state has another width.
    "embedding-gemma2": Tiny(
        "EmbeddingGemma2Text",
        {
            **_LLAMA,
            "embedding_dim": 32,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 4,
        },
        *_LLAMA_SITES,
    ),
    "falcon": Tiny(
        "Falcon",
        {k: v for k, v in _BERT.items() if k != "intermediate_size"} | {"ffn_hidden_size": 40},
        "h.{}.mlp.dense_4h_to_h",
        "h.{}.self_attention.dense",
    ),
    # Its attention is another one for up to 28 tokens.
    "big-bird": Tiny("BigBird", {**_BERT, "block_size": 4, "num_random_blocks": 1}, *_BERT_SITES),
    "convbert": Tiny("ConvBert", {**_BERT, "embedding_size": 16, "head_ratio": 2}, *_BERT_SITES),
    "fnet": Tiny("FNet", _BERT, _BERT_SITES[0]),
    # Its decoder returns words' scores.
    "fsmt": Tiny(
        "FSMT",
        {**_BART, "langs": ["en", "de"], "src_vocab_size": N_WORDS, "tgt_vocab_size": N_WORDS},
        *_BART_SITES,
    ),
    "gptj": Tiny("GPTJ", _GPTJ, "h.{}.mlp.fc_out", "h.{}.attn.out_proj"),
    "led": Tiny(
        "LED",
        {
            **_BART,
            "attention_window": 4,
            "max_encoder_position_embeddings": 48,
            "max_decoder_position_embeddings": 40,
        },
        "encoder.layers.{}.fc2",
        "encoder.layers.{}.self_attn.output",
        *_BART_SITES[2:],
    ),
    "longformer": Tiny("Longformer", {**_BERT, "attention_window": 4}, *_BERT_SITES),
    "marian": Tiny("Marian", _BART, *_BART_SITES),
    "mobilebert": Tiny(
        "MobileBert",
        {**_BERT, "embedding_size": 12, "intra_bottleneck_size": 16, "true_hidden_size": 16},
        *_BERT_SITES,
    ),
    "mpt": Tiny(
        "Mpt",
        {"d_model": 24, "n_heads": 4, "n_layers": 3, "max_seq_len": 48},
        "blocks.{}.ffn.down_proj",
        "blocks.{}.attn.out_proj",
    ),
    "mt5": Tiny("MT5", _T5, *_T5_SITES),
    "nomic-bert": Tiny("NomicBert", _BERT, *_LLAMA_SITES),
    "stablelm": Tiny("StableLm", _BERT | {"num_key_value_heads": 2}, *_LLAMA_SITES),
    "xlm": Tiny(
        "XLM", {"emb_dim": 24, "n_layers": 3, "n_heads": 4}, "ffns.{}.lin2", "attentions.{}.out_lin"
    ),
    "clip-text": Tiny("CLIPText", _BERT),
    "xmod": Tiny(
        "Xmod", _BERT | {"languages": ["en_XX"], "default_language": "en_XX"}, *_BERT_SITES
    ),
}

# No neurons that every token shares, or none at all.
MIXTURES = {
    "mixtral": Tiny("Mixtral", {**_EXPERTS, "num_local_experts": 4}, None, _LLAMA_SITES[1]),
    "qwen3-moe": Tiny(
        "Qwen3Moe",
        {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16},
        None,
        _LLAMA_SITES[1],
    ),
}
MAMBA = Tiny("Mamba", _MAMBA)
ALL = {**TINY, **MIXTURES, "mamba": MAMBA}


def tiny_tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """Train a tokenizer of a few dozen words, which marks the start and the end of a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    words = " ".join(f"word{i}" for i in range(N_WORDS - 4))
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer.train_from_iterator([words], trainers.WordLevelTrainer(special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", START), ("</s>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side=padding_side,
    )


def tiny_batch(lengths: Sequence[int] = (7, 3, 1, 7, 5)) -> dict[str, torch.Tensor]:
    """Make texts of so many tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, N_WORDS, (len(lengths), max(lengths)), generator=generator)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids.masked_fill(~real, PAD), "attention_mask": real.long()}


def tiny_reader(**changes: Any) -> dict[str, Any]:
    """Make a BERT of one block and its tokenizer, which reads every byte of a text."""
    tokenizer = byte_tokenizer()
    changes = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, **changes}
    return {"model": TINY["bert"].build(**changes), "tokenizer": tokenizer}


def save_parts(parts: dict[str, Any], folder: Any) -> str:
    """Write a model and its tokenizer into a folder."""
    for part in parts.values():
        part.save_pretrained(folder)
    return str(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer that gives every byte of a text a token, so that no two texts look alike."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", START), ("</s>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
