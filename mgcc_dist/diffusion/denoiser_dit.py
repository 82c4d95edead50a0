"""diffusers' `DiTTransformer2DModel` as a denoiser. A mask is one more input channel.

The model always wants a class: `denoiser.predict` gives class 0 to one that was built without classes. With classes,
the null class is the row that diffusers reserves for dropped labels, the last one.
"""

from diffusers import DiTTransformer2DModel
from torch import nn

from mgcc_dist.diffusion.config import DiTDenoiserConfig


def build(config: DiTDenoiserConfig, shape: tuple[int, int, int], labels: int) -> DiTTransformer2DModel:
    """Return a DiT with random weights, for latents of `shape` [C,h,w] and `labels` class labels (0: no classes)."""
    channels, size, _ = shape
    model = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.head_channels,
        in_channels=channels + config.mask_channels,
        out_channels=channels,
        num_layers=config.layers,
        sample_size=size,
        patch_size=config.patch,
        num_embeds_ada_norm=max(labels - 1, 1),  # without the null class
    )
    _initialize(model)
    for block in model.transformer_blocks:
        # Each block would drop labels of its own, from the global random state. `DenoiserLoss` does it once per image.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model


def _initialize(model: DiTTransformer2DModel) -> None:
    """Initialize the weights like Peebles & Xie 2023, which diffusers leaves out: each block is the identity."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.flatten(1))  # a view
    nn.init.zeros_(model.pos_embed.proj.bias)
    for block in model.transformer_blocks:
        embedding = block.norm1.emb
        nn.init.normal_(embedding.class_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(embedding.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedding.timestep_embedder.linear_2.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for output in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(output.weight)
