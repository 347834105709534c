"""Audio width to text width: the bridge between the two towers."""

from torch import Tensor, nn

from qwen2audio_core.config import Qwen2AudioConfig
from qwen2audio_core.linear import Linear


class MultiModalProjector(nn.Module):
    """One linear map with a bias, (n, A, Da) -> (n, A, D)."""

    def __init__(self, config: Qwen2AudioConfig):
        super().__init__()
        self.linear = Linear(config.audio.d_model, config.text.hidden_size)

    def forward(self, audio_states: Tensor) -> Tensor:
        return self.linear(audio_states)
