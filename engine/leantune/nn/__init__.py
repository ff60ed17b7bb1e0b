"""Layers of a decoder: linear layers with low-rank updates, attention and MLP blocks, the decoder itself."""

from leantune.nn.arena import Arena
from leantune.nn.batch import Packed
from leantune.nn.config import DecoderConfig, RopeConfig
from leantune.nn.decoder import Decoder
from leantune.nn.linear import Linear, LowRank

__all__ = ["Arena", "Decoder", "DecoderConfig", "Linear", "LowRank", "Packed", "RopeConfig"]
