"""The language model: the Llama family in Flax NNX, its checkpoints, compression and evaluation."""

from examples.llama.config import CONFIGS, Config, RopeScaling
from examples.llama.generation import generate
from examples.llama.model import Llama
from examples.llama.sampling import Sampling
from examples.llama.speculation import speculate

__all__ = ["CONFIGS", "Config", "Llama", "RopeScaling", "Sampling", "generate", "speculate"]
