"""What makes a step cheaper and changes no number: ``speed_up`` applies all of it; each file holds one technique."""

from nlu.fast.deberta_attention import disable_fast_attention, enable_fast_attention
from nlu.fast.speed import speed_up

__all__ = ["disable_fast_attention", "enable_fast_attention", "speed_up"]
