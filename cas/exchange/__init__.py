"""Cartridges in the formats of other libraries, and stores on the Hugging Face Hub."""
