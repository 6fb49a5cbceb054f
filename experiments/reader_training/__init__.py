"""How the embedded reader was trained and measured."""
