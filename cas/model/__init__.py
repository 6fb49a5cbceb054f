"""The frozen Hugging Face model: loading, chat template, positions, attention, decoding."""
