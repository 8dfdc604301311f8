"""A CT-CLIP so small that a training step takes milliseconds, with data and a tokenizer to match."""

import torch

from medctkit.ctclip import CTCLIPConfig, CTCLIPModel
from medctkit.findings import FINDINGS
from medctkit.lora import add_lora

PROMPTS = {f: ((f"{f} seen", f"there is {f}"), (f"no {f}", f"without {f}")) for f in FINDINGS}


def tiny_model(preset="paper", dropout=0.1):
    torch.manual_seed(0)
    vision = {
        "dim": 32,
        "codebook_size": 24,
        "image_size": 32,
        "num_frames": 8,
        "patch_size": 16,
        "temporal_patch_size": 4,
        "spatial_depth": 1,
        "temporal_depth": 1,
        "dim_head": 8,
        "heads": 4,
    }
    text = {
        "vocab_size": 100,
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    config = CTCLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    return add_lora(CTCLIPModel(config), preset, r=4)


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({w for f in FINDINGS for w in f.lower().split()} | set("seen there is no without scan".split()))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words, *map(str, range(12))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def tiny_data(n=8, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "study": f"study_{i}",
            "patient": f"patient_{i}",
            "pixel_values": torch.rand(1, 8, 32, 32, generator=generator) * 2 - 1,
            "report": f"scan {i}",
            "labels": torch.randint(0, 2, (18,), generator=generator).float(),
        }
        for i in range(n)
    ]
