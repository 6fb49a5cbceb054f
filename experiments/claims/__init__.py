"""One file per claim of the papers; what they share is in lab.py."""
