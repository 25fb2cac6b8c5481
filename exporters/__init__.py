"""The ways out of a surgery: dense safetensors, a LoRA adapter."""
