"""The layer of exercise 2.4 as a student writes it into a file: noise → data, and a plain module."""

LAYER = """
import torch
from torch import nn


class MyLayer(nn.Module):
    def __init__(self, scale_net, translation_net, mask):
        super().__init__()
        self.scale_net, self.translation_net = scale_net, translation_net
        self.mask = nn.Parameter(mask, requires_grad=False)

    def forward(self, z):
        b = self.mask
        s, t = self.scale_net(b * z), self.translation_net(b * z)
        return b * z + (1 - b) * (z * torch.exp(s) + t), ((1 - b) * s).flatten(1).sum(1)

    def inverse(self, z):
        b = self.mask
        s, t = self.scale_net(b * z), self.translation_net(b * z)
        return b * z + (1 - b) * (z - t) * torch.exp(-s), -((1 - b) * s).flatten(1).sum(1)
"""
