"""A CT-CLIP so small that a training step takes milliseconds, with data and a tokenizer to match."""

from contextlib import nullcontext

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from medctkit.findings import FINDINGS
from medctkit.lora.adapter import add_lora
from medctkit.model.colipri import Sizes
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel
from medctkit.model.protocol import Parts
from medctkit.scans.preprocessing import PreprocessConfig
from medctkit.training.memory import PeakMemory

PROMPTS = {f: ((f"{f} seen", f"there is {f}"), (f"no {f}", f"without {f}")) for f in FINDINGS}


VISION = dict(dim=32, codebook_size=24, image_size=32, num_frames=8, patch_size=16, temporal_patch_size=4)
VISION |= dict(spatial_depth=1, temporal_depth=1, dim_head=8, heads=4)
TEXT = dict(vocab_size=100, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40)
TEXT |= dict(max_position_embeddings=32)


def tiny_ct_clip(vision=None, text=None, dropout=0.0):
    """A CT-CLIP without an adapter."""
    torch.manual_seed(0)
    text = TEXT | dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout) | (text or {})
    return CTCLIPModel(CTCLIPConfig(VISION | (vision or {}), text, projection_dim=16))


def tiny_model(preset="paper", dropout=0.1):
    return add_lora(tiny_ct_clip(dropout=dropout), preset, r=4)


def randomise_adapter(model, std=0.3, seed=0):
    """The model, its B matrices, which are zero at the start, filled at random: so the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name and parameter.requires_grad:
            nn.init.normal_(parameter, std=std, generator=generator)
    return model


class PatchesOnly(nn.Module):
    """A base model with nothing of CT-CLIP's inside: no attention, and like COLIPRI a vector for each patch.

    Input, patches and texts are those of `tiny_ct_clip`; `words` is the length of the tokenizer.
    """

    preprocess_config, longest_text = PreprocessConfig((45.0, 11.25, 11.25), (8, 32, 32), antialias=True), 64
    config = Sizes(grid=(2, 2, 2), projection_dim=12)
    parts = Parts(
        {"look": "vision_encoder.look"},
        {"word": "text_encoder.word"},
        {"paper": (("look",), ("word",))},
        stages={"projection": ("vision_encoder.look",), "patches": ("vision_encoder.patches",)},
    )

    def __init__(self, words):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))
        patches = nn.Conv3d(1, 12, (4, 16, 16), (4, 16, 16))
        self.vision_encoder = nn.ModuleDict({"patches": patches, "look": nn.Linear(12, 12)})
        self.text_encoder = nn.ModuleDict({"table": nn.Embedding(words, 12), "word": nn.Linear(12, 12)})

    @property
    def patches(self):
        return self.vision_encoder["patches"]

    def encode_image(self, volumes):
        pooled = self.patches(volumes).tanh().mean((2, 3, 4))
        return nn.functional.normalize(self.vision_encoder["look"](pooled), dim=-1)

    def encode_text(self, input_ids, attention_mask=None):
        return nn.functional.normalize(self.text_encoder["word"](self.text_encoder["table"](input_ids).mean(1)), dim=-1)


def tiny_batch(model, n=3, words=7):
    generator, text = torch.Generator().manual_seed(1), model.config.text_config
    return {
        "pixel_values": torch.rand(n, 1, *model.config.volume_shape, generator=generator) * 2 - 1,
        "input_ids": torch.randint(1, text["vocab_size"], (n, words), generator=generator),
        "attention_mask": torch.ones(n, words, dtype=torch.long),
    }


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


def small_step(fake, checkpointing, dtype=None):
    """Bytes before, after forward, after backward, after the optimiser, and at the highest."""
    with torch.device("meta" if fake else "cpu"):
        model = tiny_model(dropout=0.0).train()
    base = model.get_base_model()
    base.visual_transformer.spatial_rel_pos_bias.requires_grad_(True)  # real ones are kept while frozen
    if checkpointing:
        base.gradient_checkpointing_enable()
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        if fake:
            model.to_empty(device="cpu")
        volumes, words = torch.zeros(3, 1, 8, 32, 32), torch.ones(3, 12, dtype=torch.long)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable)
        with PeakMemory([*model.parameters(), *model.buffers(), volumes, words]) as memory:
            found = [memory.now_bytes]
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = model(pixel_values=volumes, input_ids=words, return_loss=True).loss
            found.append(memory.now_bytes)
            loss.backward()
            found.append(memory.now_bytes)
            optimizer.step()
            optimizer.zero_grad()
            found.append(memory.now_bytes)
        moments = 8 * sum(p.numel() for p in trainable) + 4 * len(trainable)  # two, and a step count each
        assert found[-1] == found[0] + moments + 4  # the loss
        return [*found, memory.peak_bytes]
