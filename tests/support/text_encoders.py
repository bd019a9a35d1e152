"""Tiny text encoders and their tokenizers, one token per character, made on the spot."""

import string
from typing import Any

from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

CHARACTERS = string.ascii_letters + string.digits + string.punctuation


def clip_tokenizer() -> Any:
    """Letters with and without the end-of-word mark; no merges."""
    letters = [*CHARACTERS, *(character + "</w>" for character in CHARACTERS)]
    tokens = [*letters, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def clip(width: int, projection: int | None = None) -> tuple[Any, Any]:
    """A CLIP text encoder and its tokenizer; with `projection`, one that pools."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection or width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return kind(config), tokenizer


def t5_tokenizer() -> Any:
    """A unigram model over characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0)]
    pieces += [(character, -4.0) for character in CHARACTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def t5(width: int, kind: type = T5EncoderModel) -> tuple[Any, Any]:
    """A T5 (or UMT5) encoder of `width` channels and its tokenizer."""
    tokenizer = t5_tokenizer()
    config = (UMT5Config if kind is UMT5EncoderModel else T5Config)(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return kind(config), tokenizer


def gemma(width: int) -> tuple[Any, Any]:
    """A Gemma 2 decoder without its head, and its tokenizer."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *CHARACTERS]
    tokenizer = GemmaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        head_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        sliding_window=2048,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Gemma2Model(config), tokenizer


def qwen2_tokenizer() -> Any:
    """One token per printable character, and the marks of a conversation."""
    marks = ["<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*CHARACTERS, "Ġ", "Ċ"])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], pad_token="<|endoftext|>", additional_special_tokens=marks
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def qwen3(width: int, tokens: int) -> Any:
    """A Qwen3 decoder without its head."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=tokens,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )
    )


def qwen25_vl(width: int, tokens: int) -> Any:
    """A Qwen2.5-VL model that sees nothing: it is given text."""
    text = dict(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    )
    vision = dict(depth=1, hidden_size=width, intermediate_size=width, num_heads=2, out_hidden_size=width)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
