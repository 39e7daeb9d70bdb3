"""The policy network: decoder, KV cache, and Hugging Face checkpoints in and out."""
