"""Megatron-centric training stack: Hugging Face folder in, Megatron-Core at any layout, Hugging Face folder out."""

__version__ = "0.1.0"
