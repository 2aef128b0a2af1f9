"""Tiny models of transformers, as ``save_pretrained`` writes them into folders."""

import json
import string

import torch

from vs2_plugin.demo.digits import TINY_CLIP

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
LETTERS = string.ascii_lowercase + string.digits
#: Sizes of both towers.
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}


def _save(folder, model, image_processor, tokenizer):
    from transformers.utils import logging

    logging.disable_progress_bar()
    for part in (model.eval(), image_processor, tokenizer):
        part.save_pretrained(folder)
    logging.enable_progress_bar()
    return f"hf:{folder}"


def write_clip(folder, **vision):
    """A random ``CLIPModel`` whose tokens are letters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), BOS, EOS]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    text = {**SMALL, "vocab_size": len(words), "max_position_embeddings": 24, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**VISION, **vision}, projection_dim=24)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return _save(folder, CLIPModel(config), images, tokenizer)


def _siglip(folder, tokenizer, **text):
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 24, **text}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    return _save(folder, model, SiglipImageProcessor(size={"height": 32, "width": 32}), tokenizer)


def write_siglip(folder):
    """A random ``SiglipModel`` with a tokenizer of sentencepiece."""
    import sentencepiece
    from transformers import SiglipTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    sentences = (f"a photo of the number {number}, word {letter}" for number in range(99) for letter in LETTERS)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_prefix=str(folder / "spiece"), vocab_size=50, pad_id=-1, bos_id=-1, eos_id=1,
        unk_id=0, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    return _siglip(folder, SiglipTokenizer(str(folder / "spiece.model"), model_input_names=["input_ids"]))


def write_siglip2(folder):
    """A random SigLIP 2 of fixed size: the same model with a tokenizer of the package tokenizers, as Gemma's."""
    from transformers import GemmaTokenizer

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    vocabulary = {word: number for number, word in enumerate(words)}
    return _siglip(folder, GemmaTokenizer(vocab=vocabulary, merges=[], padding_side="right"))


def write_tiny(folder):
    """The tiny CLIP that comes with the package, of open_clip, as a ``CLIPModel``."""
    import open_clip
    from safetensors.torch import load_file
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    facts = json.loads((TINY_CLIP / "open_clip_config.json").read_text())
    shape, images = facts["model_cfg"], facts["preprocess_cfg"]
    vision, text = shape["vision_cfg"], shape["text_cfg"]
    words = open_clip.SimpleTokenizer()
    merges = [pair for pair, _ in sorted(words.bpe_ranks.items(), key=lambda item: item[1])]
    names = {EOS: "<end_of_text>", BOS: "<start_of_text>"}
    vocabulary = {key: words.encoder[names.get(key, key)] for key in [*words.encoder, BOS, EOS] if key[0:2] != "<e"}
    vocabulary.pop("<start_of_text>", None)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    config = CLIPConfig(
        projection_dim=shape["embed_dim"],
        vision_config=_sizes(vision["width"], vision["layers"], vision["width"] // vision["head_width"])
        | {"image_size": vision["image_size"], "patch_size": vision["patch_size"]},
        text_config=_sizes(text["width"], text["layers"], text["heads"])
        | {"vocab_size": text["vocab_size"], "max_position_embeddings": text["context_length"]}
        | {"eos_token_id": tokenizer.eos_token_id},
    )
    model = CLIPModel(config)
    weights = {name: tensor.float() for name, tensor in load_file(TINY_CLIP / "open_clip_model.safetensors").items()}
    model.load_state_dict(dict(_renamed(weights)), strict=True)
    size = images["size"] if isinstance(images["size"], int) else images["size"][0]
    processor = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=images["mean"],
        image_std=images["std"], resample=3 if images["interpolation"] == "bicubic" else 2,
    )  # fmt: skip
    return _save(folder, model, processor, tokenizer)


def _sizes(width, layers, heads):
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "hidden_act": "gelu"}


def _renamed(weights):
    """The weights of open_clip by the names that transformers has for them."""
    towers = {"visual.": "vision_model.", "": "text_model."}
    names = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "logit_scale": "logit_scale",
    }
    for name, tensor in weights.items():
        prefix = "visual." if name.startswith("visual.") else ""
        tower, rest = towers[prefix], name.removeprefix(prefix)
        if name in names:
            yield names[name], tensor
        elif name in ("visual.proj", "text_projection"):
            yield ("visual_projection.weight" if prefix else "text_projection.weight"), tensor.T.contiguous()
        elif rest.startswith("transformer.resblocks."):
            number, rest = rest.removeprefix("transformer.resblocks.").split(".", 1)
            layer = f"{tower}encoder.layers.{number}."
            if rest.startswith("attn.in_proj_"):
                for part, one in zip("qkv", tensor.chunk(3)):
                    yield f"{layer}self_attn.{part}_proj.{rest.removeprefix('attn.in_proj_')}", one
            else:
                for ours, theirs in (("attn.", "self_attn."), ("ln_", "layer_norm"), ("mlp.c_fc", "mlp.fc1")):
                    rest = rest.replace(ours, theirs)
                yield layer + rest.replace("mlp.c_proj", "mlp.fc2"), tensor
        else:
            ends = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm", "ln_final": "final_layer_norm"}
            module, kind = rest.split(".")
            yield f"{tower}{ends[module]}.{kind}", tensor
