"""Noise as data, and networks with random weights: to measure published sizes without files."""

import torch

from mclr.configs.schema import RunConfig
from mclr.likelihood import Draws
from mclr.models.vqvae import VQVAE, VQVAEConfig
from mclr.train.data.dataset import Batch
from mclr.train.data.encoders import RGB, BareLatents, Encoder, Tokens
from mclr.train.data.source import Source
from mclr.train.training.build import Networks
from mclr.train.training.networks import build_classifier, build_net, build_objective


class Noise(Source):
    """The same samples at every position. They cost a step no time, as samples that a run has read ahead."""

    def __init__(self, samples: Batch):
        self.samples = samples

    def batch(self, first: int, count: int) -> Batch:
        """The first `count` samples, at any position."""
        tokens_BL = self.samples.tokens_BL
        return Batch(self.samples.image_BCHW[:count], self.samples.c_B[:count], None if tokens_BL is None else tokens_BL[:count])


def build_noise(config: RunConfig, device: torch.device) -> tuple[Source, Networks]:
    """(train.batch samples of what the network models: images, latents or tokens; networks without a reference).

    The tokenizer has the published number of codes, but is small: nothing is encoded or decoded.
    """
    torch.manual_seed(config.train.seed)
    # draw the weights on the device: on a CPU billions of them take minutes
    with torch.device(device):
        encoder: Encoder
        if config.model.paradigm == "next_scale":
            encoder = Tokens(VQVAE(VQVAEConfig(ch=32, ch_mult=(1,) * 5, num_res_blocks=1)))
        else:
            encoder = BareLatents() if config.model.vae else RGB()
        net = build_net(config, encoder)
        noisy = config.model.paradigm == "diffusion" and build_objective(config).needs_posterior
        classifier = build_classifier(config) if noisy else None
    with torch.no_grad():
        for p in net.parameters():
            # gains start at 0 and would hide input and condition from an untrained EDM2
            if p.ndim == 0:
                p.fill_(1.0)
    draws = Draws(config.train.seed, list(range(config.train.batch)))
    c_B = (config.data.num_classes * draws.uniform()).long()
    if isinstance(encoder, Tokens):
        tokens = encoder.tokenizer.config
        length = sum(side**2 for side in tokens.scales)
        samples = Batch(torch.empty(0), c_B, (tokens.vocab_size * draws.uniform(length)).long())
    else:
        shape = encoder.shape(config.data)
        assert shape is not None
        samples = Batch((256 * draws.uniform(*shape)).to(torch.uint8), c_B)
    return Noise(samples), Networks(encoder, net, classifier, reference=None, generated=None)
