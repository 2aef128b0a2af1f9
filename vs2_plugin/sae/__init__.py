"""Top-k sparse autoencoders: the module, its training, its files. Knows torch and nothing of CLIP or data sets."""

from vs2_plugin.sae.config import TrainConfig
from vs2_plugin.sae.files import load_sae, save_sae
from vs2_plugin.sae.topk import Latents, SaeConfig, TopKSAE, fvu, sample_fvu
from vs2_plugin.sae.train import Figures, train_sae

__all__ = [
    "Figures",
    "Latents",
    "SaeConfig",
    "TopKSAE",
    "TrainConfig",
    "fvu",
    "load_sae",
    "sample_fvu",
    "save_sae",
    "train_sae",
]
