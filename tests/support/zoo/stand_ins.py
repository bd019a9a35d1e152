"""Tiny tokenizers and text models in the place of those that diffusers' tests fetch from the Hub."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from text_encoders import CHARACTERS, clip_tokenizer, gemma, t5_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers.convert_slow_tokenizer import bytes_to_unicode

MARKS = [
    *("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>"),
    *("<|video_pad|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>"),
]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_CHAT = (
    "{% for m in messages %}{{ m['role'] }}:{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
SMALL: dict[str, int] = dict(num_hidden_layers=2, num_attention_heads=4)


def numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def qwen(folder: Path) -> None:
    """A byte tokenizer with the marks of a conversation, and a model that could see."""
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=numbered(list(bytes_to_unicode().values())),
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=MARKS,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    )
    vision = dict(depth=1, embed_dim=16, hidden_size=16, num_heads=2)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if transformers.utils.is_torchvision_available():  # which reading pictures takes
        area = dict(min_pixels=56 * 56, max_pixels=56 * 56)
        processor = transformers.Qwen2VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(**area),
            tokenizer=tokenizer,
            video_processor=transformers.Qwen2VLVideoProcessor(**area),
            chat_template=CHAT,
        )
        processor.save_pretrained(folder)


def t5(folder: Path) -> None:
    config = transformers.T5Config(
        vocab_size=1103, d_model=32, d_kv=16, d_ff=37, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    t5_tokenizer().save_pretrained(folder)


def umt5(folder: Path) -> None:
    config = transformers.UMT5Config(vocab_size=1103, d_model=32, d_kv=16, d_ff=37, num_layers=2, num_heads=2)
    transformers.UMT5EncoderModel(config).save_pretrained(folder)
    t5_tokenizer().save_pretrained(folder)


def clip(folder: Path) -> None:
    clip_tokenizer().save_pretrained(folder)


def gemma_tokens(folder: Path) -> None:
    """Gemma's tokenizer begins every text, an empty one too, with a mark."""
    _, tokenizer = gemma(16)
    tokenizer.chat_template = PLAIN_CHAT
    start = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)


def gemma_3(folder: Path) -> None:
    """The same tokens, and a model that could see."""
    gemma_tokens(folder)
    text = dict(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=16,
        head_dim=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        image_size=28,
        patch_size=14,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)


def consistency(folder: Path) -> None:
    """A network of consistency models, in the folder that their test names."""
    network = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=8,
        norm_num_groups=32,
    )
    network.save_pretrained(folder)


def llama(folder: Path) -> None:
    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokens = ["<unk>", "<s>", "</s>", "▁", "<pad>", "\n", *marks, *CHARACTERS]
    tokenizer = transformers.LlamaTokenizer(
        vocab=numbered(tokens), merges=[], pad_token="<pad>", additional_special_tokens=marks
    )
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=16, intermediate_size=64, num_key_value_heads=4, **SMALL
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def glm(folder: Path) -> None:
    """GLM's tokenizer begins every text, an empty one too, with two marks."""
    llama(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    start = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> <s> $A", special_tokens=[("<s>", start)]
    )
    tokenizer.save_pretrained(folder)


def bert(folder: Path) -> None:
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*marks, *CHARACTERS, *("##" + character for character in CHARACTERS)]
    config = transformers.BertConfig(vocab_size=1124, hidden_size=32, intermediate_size=37, **SMALL)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(vocab=numbered(tokens)).save_pretrained(folder)


def roberta(folder: Path) -> None:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *bytes_to_unicode().values()]
    transformers.RobertaTokenizer(vocab=numbered(tokens), merges=[]).save_pretrained(folder)


def xlm_roberta(folder: Path) -> None:
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0)]
    pieces += [*((character, -4.0) for character in CHARACTERS), ("<mask>", 0.0)]
    transformers.XLMRobertaTokenizer(vocab=pieces).save_pretrained(folder)


MAKERS: dict[str, Callable[[Path], None]] = {
    "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration": qwen,
    "Qwen/Qwen3-Embedding-0.6B": qwen,
    "hf-internal-testing/tiny-random-t5": t5,
    "hf-internal-testing/tiny-random-T5Model": t5,
    "hf-internal-testing/tiny-random-T5ForConditionalGeneration": t5,
    "hf-internal-testing/tiny-random-umt5": umt5,
    "hf-internal-testing/tiny-random-clip": clip,
    "hf-internal-testing/dummy-gemma": gemma_tokens,
    "hf-internal-testing/tiny-gemma3": gemma_3,
    "finetrainers/dummy-hunyaunvideo": llama,
    "hf-internal-testing/tiny-random-LlamaForCausalLM": llama,
    "hf-internal-testing/llama-tokenizer": llama,
    "THUDM/glm-4-9b-chat": glm,
    "hf-internal-testing/tiny-random-BertModel": bert,
    "hf-internal-testing/tiny-random-roberta": roberta,
    "YiYiXu/tiny-random-mclip-base": xlm_roberta,
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": gemma_tokens,
    "diffusers/consistency-models-test": consistency,
}


def provide(folder: Path) -> None:
    """Make what is not there yet, and let transformers find it by the names of the Hub."""
    places = {name: folder / name.replace("/", "--") for name in MAKERS}
    for name, place in places.items():
        if not place.is_dir():
            torch.manual_seed(0)
            MAKERS[name](place)
    classes = (
        *(transformers.AutoTokenizer, transformers.AutoConfig, transformers.AutoProcessor),
        *(transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, transformers.ProcessorMixin),
        *(transformers.ImageProcessingMixin, transformers.FeatureExtractionMixin),
        *(transformers.PreTrainedConfig, diffusers.ModelMixin),
    )
    for cls in classes:
        redirect(cls, places)


def redirect(cls: Any, places: dict[str, Path]) -> None:
    """Let one class read local folders for some names."""
    original = cls.__dict__["from_pretrained"].__func__

    def from_pretrained(self: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        asked = str(name)
        if asked in places:
            name = str(places[asked])
            kwargs.pop("subfolder", None)
            if self is transformers.AutoProcessor and not transformers.utils.is_torchvision_available():
                return transformers.AutoTokenizer.from_pretrained(name, *args, **kwargs)  # of texts alone
        try:
            return original(self, name, *args, **kwargs)
        except OSError as error:
            if asked not in places and Path(asked).exists():
                raise
            lacking = "without torchvision" if asked in places else "here"
            raise OSError(f"{self.__name__} of {asked} has no stand-in {lacking}") from error

    cls.from_pretrained = classmethod(from_pretrained)


def provide_packages() -> None:
    """What the tests import, or their pipelines, and what only decorates: `parameterized`, `ftfy`."""
    import builtins

    parameterized: Any = ModuleType("parameterized")

    class Decorator:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def __call__(self, function: Any) -> Any:
            return function

        @staticmethod
        def expand(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
            return lambda function: function

    parameterized.parameterized = Decorator
    parameterized.parameterized_class = lambda *args, **kwargs: lambda cls: cls
    mock: Any = ModuleType("requests_mock")
    ftfy: Any = ModuleType("ftfy")
    ftfy.fix_text = lambda text: text
    sys.modules |= {"parameterized": parameterized, "requests_mock": mock}
    transforms: Any = ModuleType("transforms")  # of torchvision, of which one network resizes a mask
    transforms.InterpolationMode = SimpleNamespace(NEAREST="nearest")
    transforms.functional = SimpleNamespace(
        resize=lambda image, size, interpolation: torch.nn.functional.interpolate(image, size)
    )
    vars(builtins).update(ftfy=ftfy, transforms=transforms)
