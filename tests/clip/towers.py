"""Tiny random towers of all kinds that open_clip has."""

import torch

EMBED_DIM = 24
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}


def tokens_first(model):
    """The same weights in a transformer whose blocks get ``[tokens, batch, d]``, as open_clip 2.x had them."""
    from open_clip.transformer import Transformer

    old = model.visual.transformer
    new = Transformer(old.width, old.layers, heads=2, batch_first=False).eval()
    new.load_state_dict(old.state_dict())
    model.visual.transformer = new
    return model


def coca(make_clip):
    from open_clip.coca_model import CoCa

    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2, "output_tokens": True}
    vision |= {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    decoder = {**TEXT, "attn_pooler_heads": 2, "n_queries": 4}
    return CoCa(EMBED_DIM, multimodal_cfg=decoder, text_cfg=text, vision_cfg=vision).eval()


CLS_TOWERS = {
    "batch first": lambda make: make(),
    "tokens first": lambda make: tokens_first(make()),
    "LayerNorm after pooling": lambda make: make(final_ln_after_pool=True),
    "layer scale, no first LayerNorm": lambda make: make(ls_init_value=0.5, no_ln_pre=True),
    "QuickGELU": lambda make: make(quick_gelu=True),
    "own attention": lambda make: make(qk_norm=True, scale_heads=True),
}
OTHER_TOWERS = {
    "average pooling": lambda make: make(pool_type="avg"),
    "attention pooling": lambda make: make(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2),
    "CoCa": coca,
    "ResNet": lambda make: make(layers=[1, 1, 1, 1], width=8, head_width=8),
    "timm ViT": lambda make: make(timm_model_name="test_vit", timm_pool="token", image_size=160),
    "timm ConvNeXt": lambda make: make(timm_model_name="test_convnext", image_size=32),
}
TOWERS = {**CLS_TOWERS, **OTHER_TOWERS}


def build(name, make_clip):
    torch.manual_seed(0)
    return TOWERS[name](make_clip).eval()


def images_for(model):
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    return torch.rand(4, 3, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def encode(model, images, amp=False):
    with torch.autocast("cpu", enabled=amp):
        return model.encode_image(images, normalize=False)  # CoCa would normalize
